#!/usr/bin/env bash
# Make the starter anew: all stages of `edge-export starter` but the sprites, two at once where they can, a process a core.
# Training took less than twenty minutes on an H200 with 16 cores beside it, but for the inspector, which took 46 minutes on
# one CPU thread. On two CPU cores it would take more than a day by estimate, most of it for the cloud model.
# Training and labelling can be interrupted, and the same command goes on. Everything else starts over, also the painting of
# the sketches, minutes on a GPU, unless it came to its end.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 # two threads in one process wait for each other whenever a core is busy

stage() { .venv/bin/edge-export starter "$@"; }

# Two stages at once; either one's failure ends the run.
both() {
    stage $1 & one=$!
    stage $2 & other=$!
    trap 'kill $one $other 2>/dev/null' EXIT
    wait $one # not with && in between: then set -e would let the first one's failure pass
    wait $other
    trap - EXIT
}

both autoencoder edge-text
both decoder cloud-text
stage sketch
both judge inspector
both edge cloud
stage install
stage bundle
both "label --share 1/2" "label --share 2/2" || true # the one that ends first says that pieces are left
stage label # nothing is left to measure: this one writes the matrix
stage inspect
stage predictor
stage evaluate
stage contact-sheet
unset OMP_NUM_THREADS # nothing runs beside it
stage summary
