"""Every error has one code and carries, machine-readable, what the caller needs to react."""

from __future__ import annotations

import math
import shlex
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, QuotaFailure, RetryInfo

from edge_agent import errors
from edge_agent.errors import (
    GRPC_CODES,
    MAX_MESSAGE_BYTES,
    MAX_RETRY_S,
    Busy,
    CloudError,
    InvalidRequest,
    QuotaExhausted,
    RouteT2IError,
    grpc_code,
    printable,
    quoted,
    sent_status,
    status_details,
)

TREE = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, RouteT2IError)]


@pytest.mark.parametrize("cls", [cls for cls in TREE if cls not in (RouteT2IError, CloudError)])
def test_every_error_has_a_code_of_the_table_and_is_in_the_tree_on_top(cls: type[RouteT2IError]) -> None:
    assert any(base in GRPC_CODES for base in cls.__mro__)
    assert f"─ {cls.__name__} " in (errors.__doc__ or "")


def test_a_subclass_has_its_base_class_code_and_a_stranger_is_internal() -> None:
    class PromptTooLong(InvalidRequest):
        pass

    assert grpc_code(PromptTooLong("too long")) is grpc.StatusCode.INVALID_ARGUMENT
    assert grpc_code(ZeroDivisionError()) is grpc.StatusCode.INTERNAL


def test_a_bad_field_travels_as_bad_request() -> None:
    status = status_details(InvalidRequest("the prompt is empty", field="prompt"))
    assert (status.code, status.message) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], "the prompt is empty")
    (detail,) = status.details
    bad = BadRequest()
    assert detail.Unpack(bad)
    assert [(v.field, v.description) for v in bad.field_violations] == [("prompt", "the prompt is empty")]


def test_an_exhausted_quota_travels_with_its_budget_and_the_time_to_wait() -> None:
    status = status_details(QuotaExhausted("nothing left today", budget="daily", retry_after_s=90.5))
    failure, retry = QuotaFailure(), RetryInfo()
    assert status.details[0].Unpack(failure)
    assert status.details[1].Unpack(retry)
    assert failure.violations[0].subject == "daily"
    assert retry.retry_delay.ToMilliseconds() == 90_500


def test_a_full_queue_says_when_to_come_back_and_is_no_quota_failure() -> None:
    status = status_details(Busy("64 requests are waiting", retry_after_s=0.0002))
    assert [detail.TypeName() for detail in status.details] == ["google.rpc.RetryInfo"]
    retry = RetryInfo()
    assert status.details[0].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1, "soon is not at once"


@pytest.mark.parametrize(
    ("retry_after_s", "told_s"),
    [(-1.0, 0), (math.nan, 0), (2.0**63, int(MAX_RETRY_S)), (math.inf, int(MAX_RETRY_S))],
)
def test_a_time_to_wait_that_no_message_holds_is_told_all_the_same(retry_after_s: float, told_s: int) -> None:
    (detail,) = status_details(Busy("later", retry_after_s=retry_after_s)).details
    retry = RetryInfo()
    assert detail.Unpack(retry)
    assert retry.retry_delay.ToSeconds() == told_s


def test_the_text_of_a_fault_of_our_own_stays_off_the_wire() -> None:
    assert "secret" not in status_details(RuntimeError("secret")).message


@pytest.mark.parametrize("letter", ["x", "é", "🐈", "\udcff"])
def test_a_message_is_cut_to_what_headers_take(letter: str) -> None:
    status = status_details(InvalidRequest(letter * 20_000, field="media_type"))
    assert 900 < len(status.message.encode()) <= MAX_MESSAGE_BYTES
    assert status.ByteSize() < 3 * MAX_MESSAGE_BYTES


@pytest.mark.parametrize("metadata", [None, (), (("grpc-status-details-bin", b"\xff\xff"),)])
def test_an_error_without_details_that_can_be_read_is_of_grpc_itself(metadata: Any) -> None:
    error: Any = SimpleNamespace(trailing_metadata=lambda: metadata)
    assert sent_status(error) is None


def test_a_path_in_a_command_is_one_word_to_the_shell_of_its_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shlex.split(quoted("/home/me/it's mine")) == ["/home/me/it's mine"]
    monkeypatch.setattr(errors, "os", SimpleNamespace(name="nt"))
    assert quoted(r"C:\Users\me\model") == r"C:\Users\me\model"
    assert quoted(r"C:\Users\me\my model") == r'"C:\Users\me\my model"'


def test_what_a_library_says_in_lines_is_one_line_and_moves_no_cursor() -> None:
    """As Windows does, within what gRPC says."""
    assert printable("refused (Connection refused.\r\n -- 10061)") == "refused (Connection refused. -- 10061)"
    assert printable("\x1b[2Jgone\u202e") == "?[2Jgone?"
