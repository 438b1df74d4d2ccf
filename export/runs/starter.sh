#!/usr/bin/env bash
# Make the starter anew on two CPU cores: some hours, most of it the two text-to-image models, which share the cores.
# Interrupt it whenever you like; the same command goes on. On a GPU, `edge-export starter` does the same in a row.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 # a process a core: two threads in one process wait for each other whenever a core is busy

stage() { .venv/bin/edge-export starter "$@"; }

stage autoencoder &
stage judge &
wait
stage decoder
stage edge-text &
stage cloud-text &
wait
stage cloud &
while [ ! -f runs/starter/latents.pt ]; do sleep 5; done # the cloud's run encodes the scenes for both
stage edge &
wait
stage install
stage bundle
stage label --share 1/2 &
stage label --share 2/2 &
wait
stage label # nothing is left to measure: this one writes the matrix
stage predictor
stage evaluate
stage contact-sheet
