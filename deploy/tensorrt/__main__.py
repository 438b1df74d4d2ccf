"""`make tensorrt`: whether NVIDIA's compiler takes a bundle's denoiser and decoder whole. It needs no GPU.

The compiler is that of TensorRT for RTX, the one that compiles without a GPU, for a GPU of the Ampere generation as a
Jetson Orin's is. It reads ONNX with TensorRT's own parser, so what it refuses onnxruntime would not hand over to
TensorRT in one piece. What it makes is thrown away: it runs nowhere here, and says nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from edge_agent.bundle import Bundle
from edge_agent.diffusion.generator import Generator
from edge_agent.diffusion.sessions import Session
from edge_agent.errors import BundleError
from edge_agent.manifest import DECODER
from edge_agent.settings import STARTER

ROOT = Path(__file__).resolve().parents[2]

PACKAGE = "tensorrt-rtx-cu13==1.7.1.116"  # 0.3 GB


def main() -> int:
    """Exit code 1 where a graph is refused, 2 where none could be tried, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="make tensorrt", description=__doc__)
    parser.add_argument("bundles", metavar="BUNDLE", nargs="*", type=Path, help="instead of the starter")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build/tensorrt", help="where the compiler is installed"
    )
    options = parser.parse_args()
    try:
        bundles = [Bundle.open(folder) for folder in options.bundles or [STARTER]]
        python = _compiler(options.folder.absolute())
        return max([_compile(python, bundle) for bundle in bundles])
    except (BundleError, subprocess.CalledProcessError) as error:
        print(f"make tensorrt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _compiler(folder: Path) -> Path:
    """The Python of an environment that has the compiler; made where it is not there."""
    environment = folder / "compiler-env"
    python, done = environment / "bin/python", environment / "installed"
    if not done.exists() or done.read_text() != PACKAGE:
        print(f"installing {PACKAGE} into {environment}", flush=True)
        venv.create(environment, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGE], check=True)
        done.write_text(PACKAGE)
    return python


def _compile(python: Path, bundle: Bundle) -> int:
    generator = Generator(bundle)
    refused = 0
    denoiser, decoder = generator.denoiser.session, generator.decoder.session
    for graph, session in ((bundle.manifest.denoiser, denoiser), (DECODER, decoder)):
        name = f"{bundle.folder.name}/{Path(graph).parent}"
        compiler = Path(__file__).with_name("compile.py")
        command = [python, compiler, bundle.path(graph), json.dumps(_shapes(session))]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        told = json.loads(found.stdout.splitlines()[-1])
        if told["refused"]:
            print(f"{name}: REFUSED: {told['refused']}", flush=True)
            refused = 1
        else:
            print(
                f"{name}: compiled whole, {told['layers']} layers, {told['bytes'] / 1e6:.1f} MB", flush=True
            )
    return refused


def _shapes(session: Session) -> dict[str, list[Any]]:
    """For one image, as the daemon fixes what is open in the inputs before it hands the graph over."""
    return {name: [session.sizes.get(size, size) for size in shape] for name, shape in session.shapes.items()}


if __name__ == "__main__":
    sys.exit(main())
