"""Generates the Python code of the .proto files: `python protos/generate.py [FOLDER]`.

Without FOLDER the code is written beside the sources, where it is committed; with it, the same tree is written there,
which is how a test compares the two. The versions of protoc and of the plugins are those of constraints.txt.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parent

# Files that define a service; the others get messages only.
SERVICES = ("routet2i/edge/v1/edge.proto", "routet2i/cloud/v1/cloud.proto")


def generate(output: Path) -> None:
    """Writes *_pb2.py and .pyi for every .proto, *_pb2_grpc.py and .pyi for every service; SystemExit on failure."""
    import grpc_tools
    from grpc_tools import protoc

    stubs = shutil.which("protoc-gen-mypy_grpc", path=str(Path(sys.executable).parent))
    if stubs is None:
        sys.exit("protoc-gen-mypy_grpc is missing: install the dev extra (make env)")
    include = Path(grpc_tools.__file__).parent / "_proto"
    common = ["protoc", f"-I{SOURCES}", f"-I{include}"]
    messages = sorted(path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.proto"))
    for arguments in (
        [f"--python_out={output}", f"--pyi_out={output}", *messages],
        [
            f"--plugin=protoc-gen-mypy_grpc={stubs}",
            f"--grpc_python_out={output}",
            f"--mypy_grpc_out=quiet:{output}",
            *SERVICES,
        ],
    ):
        if code := protoc.main([*common, *arguments]):
            sys.exit(code)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Generate the Python code of the .proto files.")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=SOURCES, help="where to write; default: the sources"
    )
    generate(parser.parse_args().folder)
