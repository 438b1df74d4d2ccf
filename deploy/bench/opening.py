"""The edge's models on the providers that are measured, opened as the daemon opens them.

Its own process, which opens them before anything is measured, is started as
`python deploy/bench/opening.py BUNDLE THREADS PROVIDERS`. What has to be compiled is in the daemon's cache afterwards.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from child import Reply, answer
from edge_agent.bundle import Bundle
from edge_agent.diffusion import providers
from edge_agent.diffusion.generator import Generator
from edge_agent.diffusion.sessions import Runtime
from edge_agent.errors import RouteT2IError


def opened(folder: Path, threads: int, names: str) -> Generator:
    """On the providers that `names` has, with commas between; the best of them, where that has to compile first."""
    if names == providers.CPU:
        return Generator(Bundle.open(folder), Runtime(threads=threads))
    from edge_agent import loader  # here: a cold start on the CPU is measured without it
    from edge_agent.settings import resolve

    models = loader.load(resolve({"bundle": str(folder), "threads": str(threads), "providers": names}, {}))
    return models.open_better() if models.open_better else models.generator


def runtime(threads: int, names: str) -> Runtime:
    """For a graph by itself, on providers that run it as it is."""
    if names == providers.CPU:
        return Runtime(threads=threads)
    serving = providers.find(names.split(",")).serving
    return Runtime(threads=threads, providers=tuple(map(providers.full_name, serving)))


def once(folder: Path, threads: int, names: str) -> Reply:
    """Seconds that opening them for the first time takes."""
    began = time.perf_counter()
    try:
        opened(folder, threads, names)
    except RouteT2IError as error:
        sys.exit(error.message)
    return {"opened_s": time.perf_counter() - began}


if __name__ == "__main__":
    bundle_folder, thread_count, provider_names = sys.argv[1:]
    answer(lambda: lambda: once(Path(bundle_folder), int(thread_count), provider_names))
