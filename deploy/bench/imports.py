"""Importing every module of the edge, in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from child import HEAVY
from errors import BenchError
from estimate import calm, quantile
from plan import Plan
from row import Row

GROUP = "import"
SECONDS, MEGABYTES = 0.5, 100.0  # targets

# Imports next to nothing itself, so that nothing the edge needs is there already.
IMPORT_EVERYTHING = """
import sys, time
began = time.perf_counter()
import importlib, pkgutil
import edge_agent
for module in pkgutil.walk_packages(edge_agent.__path__, "edge_agent."):
    importlib.import_module(module.name)
seconds = time.perf_counter() - began
import json
sys.path.insert(0, sys.argv[1])
from child import peak_bytes
found = {"seconds": seconds, "bytes": peak_bytes()}
print(json.dumps(found | {"modules": sorted(sys.modules)}))
"""


def rows(plan: Plan) -> list[Row]:
    """Seconds and peak memory; the interpreter's own start is in the memory, not in the seconds."""
    found = [_fresh() for _ in range(plan.starts)]
    heavy = sorted({name for one in found for name in HEAVY if name in one["modules"]})
    if heavy:
        raise BenchError(f"importing edge_agent imports {', '.join(heavy)}, which it must not")
    seconds = quantile([one["seconds"] for one in found])
    fastest = calm([one["seconds"] for one in found])
    megabytes = quantile([one["bytes"] / 1e6 for one in found])
    return [
        Row.at_most(GROUP, "importing edge_agent, all modules", seconds, "s", SECONDS, calm=fastest),
        Row.at_most(GROUP, "memory after importing edge_agent", megabytes, "MB", MEGABYTES),
    ]


def _fresh() -> dict[str, Any]:
    command = [sys.executable, "-c", IMPORT_EVERYTHING, sys.path[0]]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise BenchError(f"importing edge_agent failed:\n{finished.stderr.strip()}")
    found: dict[str, Any] = json.loads(finished.stdout)
    return found
