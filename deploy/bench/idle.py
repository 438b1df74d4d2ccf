"""What a daemon holds that has put its models down: after every image, over many images."""

from __future__ import annotations

import time

from child import held_bytes_of
from errors import BenchError
from estimate import quantile
from overhead import Answer, running_agent
from plan import PROMPTS, Plan
from routet2i.edge.v1 import edge_pb2, edge_pb2_grpc
from row import Row

GROUP = "idle"
MEGABYTES = 120.0  # target
KEEP_ALIVE_S = 0.2  # after an image; the default is minutes
PUT_DOWN_S = 30.0
_POLL_S = 0.05
_SETTLE_S = 0.3  # the status says so once the first graph is gone; the memory of all goes back moments later
_FIRST_AND_LAST = 10  # cycles whose medians say whether memory grows


def rows(plan: Plan) -> list[Row]:
    """Memory after the models were unloaded, and what it grew by from the first cycles to the last."""
    loaded, idle = [], []
    settings = ("--keep-alive-s", str(KEEP_ALIVE_S))
    with running_agent(plan.bundle, plan.threads, plan.providers, *settings) as (stub, process):
        for number in range(plan.unloads):
            answer = Answer(stub)
            answer.image(PROMPTS[number % len(PROMPTS)], number)
            answer.end()
            try:
                loaded.append(held_bytes_of(process) / 1e6)
                _wait_until_unloaded(stub)
                idle.append(held_bytes_of(process) / 1e6)
            except OSError:
                raise BenchError("only Linux tells what memory another process holds") from None
    few = min(_FIRST_AND_LAST, -(-len(idle) // 2))
    grown = quantile(idle[-few:]).value - quantile(idle[:few]).value
    return [
        Row.at_most(
            GROUP,
            "idle memory of the daemon, models unloaded",
            quantile(idle),
            "MB",
            MEGABYTES,
            note=f"{quantile(loaded).value:.0f} MB with them; {len(idle)} images, from the first {few} to the last "
            f"{few} it changed by {grown:+.1f} MB",
            details={"loaded_mb": loaded, "idle_mb": idle},
        )
    ]


def _wait_until_unloaded(stub: edge_pb2_grpc.EdgeAgentServiceStub) -> None:
    until = time.monotonic() + PUT_DOWN_S
    while stub.GetStatus(edge_pb2.GetStatusRequest()).loaded:
        if time.monotonic() > until:
            raise BenchError(f"edge-agent did not put its models down within {PUT_DOWN_S:g} s")
        time.sleep(_POLL_S)
    time.sleep(_SETTLE_S)
