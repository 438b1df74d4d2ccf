"""Every error has its gRPC code, and what a caller needs travels with it."""

from __future__ import annotations

import pytest
from google.rpc import error_details_pb2

from cloud_server import errors


def test_every_error_that_a_call_can_meet_has_a_code() -> None:
    tree = set(errors.CloudServerError.__subclasses__())
    assert tree - set(errors.GRPC_CODES) == {errors.StartRefused}
    for kind in tree:
        assert f"── {kind.__name__} " in (errors.__doc__ or "")


@pytest.mark.parametrize("character", ["x", "\U0001f989"])
def test_details_travel_and_long_messages_are_cut(character: str) -> None:
    error = errors.QueueFull(character * 9_000, field="prompt", retry_after_s=1.5, facts={"a": "b"})
    status = errors.grpc_status(error)
    assert status.code == 8
    assert len(status.SerializeToString()) < 4_096
    request, retry, info = status.details
    violation = error_details_pb2.BadRequest()
    request.Unpack(violation)
    assert violation.field_violations[0].field == "prompt"
    delay = error_details_pb2.RetryInfo()
    retry.Unpack(delay)
    assert delay.retry_delay.ToMilliseconds() == 1_500
    reason = error_details_pb2.ErrorInfo()
    info.Unpack(reason)
    assert (reason.reason, dict(reason.metadata)) == ("QUEUE_FULL", {"a": "b"})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("unet has\n no weights"), "unet has no weights"),
        (KeyError("unet"), "KeyError: 'unet'"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_python_names_an_error_where_it_says_nothing_itself(error: Exception, said: str) -> None:
    assert errors.reason(error) == said
