"""The committed code of the wire is what the .proto files generate, and no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROTOS = REPOSITORY / "protos"
KINDS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generated_files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for kind in KINDS
        for path in folder.rglob(kind)
    }


def test_the_committed_code_is_what_the_proto_files_generate(tmp_path: Path) -> None:
    subprocess.run([sys.executable, PROTOS / "generate.py", tmp_path], check=True)
    fresh, committed = generated_files(tmp_path), generated_files(PROTOS)
    assert sorted(committed) == sorted(fresh), (
        "run `make protos`, and remove what no .proto generates any more"
    )
    stale = [name for name, text in fresh.items() if committed[name] != text]
    assert not stale, f"run `make protos`: {stale} are not what the .proto files say"


def test_every_proto_file_has_its_messages_generated() -> None:
    for source in PROTOS.rglob("*.proto"):
        for suffix in ("_pb2.py", "_pb2.pyi"):
            assert (source.parent / f"{source.stem}{suffix}").is_file()
