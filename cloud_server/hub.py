"""Why the hub gave no model, from what its own library and those above it make of that."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import __version__, constants, get_token, model_info
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

_LATER = 429
"""In HTTP, too many requests; those above are the server's own trouble."""

_NOT_LET_IN = (401, 403)

_FORGOTTEN_S = 60.0
"""How long a hub is not asked again that let us wait, as one that is silent does for 10 s. A refusal comes at once."""

_NO_WAY = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN})
"""What the system says of a host to which no way leads; Python has no classes for these."""

_unreached: dict[str, tuple[float, Exception]] = {}
"""By the hub's address: until when (time.monotonic) it is not asked again, and what came of asking it last."""

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

_AUTHORITIES = "REQUESTS_CA_BUNDLE" if __version__.startswith("0.") else "SSL_CERT_FILE"
"""The variable that names the authorities to trust, as the transport below the hub's library has it."""


def why(model: str, error: BaseException) -> str:
    """What the hub answered, or that it did not, and what to do about it; empty where it has the model."""
    hub = f"the hub at {constants.ENDPOINT}"
    for each in _causes(error):
        if isinstance(each, ssl.SSLCertVerificationError):
            return (
                f"the certificate of {hub} is not to be trusted: {each.verify_message}; if an authority of your own "
                f"vouches for it, name that authority's PEM file in {_AUTHORITIES}"
            )
        if isinstance(each, FileMetadataError):
            return f"{hub} answers without the headers of a hub; check HF_ENDPOINT"
        if isinstance(each, DisabledRepoError):
            return f"{hub} has disabled it"
        if isinstance(each, GatedRepoError):
            terms = f"{constants.ENDPOINT}/{model}"
            return (
                f"{hub} gives it to those alone who have agreed to its terms: do so at {terms}, and {_LOG_IN}"
            )
        if isinstance(each, RepositoryNotFoundError):
            return f"{hub} has no such model, or not for everybody: look at the name; for one that is private {_LOG_IN}"
        status = _status(each)
        if status in _NOT_LET_IN and get_token():
            return (
                f"{hub} refuses the token ({status}), which is not valid, has expired or may not read it: "
                "`hf auth login`, or unset HF_TOKEN"
            )
        if status:
            return f"{hub} answers with the error {status}" + (
                ": try again later" if status >= _LATER else ""
            )
    # diffusers says of a hub that does not answer that the model lacks a file.
    if any(isinstance(each, LocalEntryNotFoundError) for each in behind(error)):
        if constants.HF_HUB_OFFLINE:
            return (
                "HF_HUB_OFFLINE is set, so the hub is not asked, and it has left no copy here; name a folder"
            )
        return f"{hub} cannot be reached and has left no copy here; check the connection, or name a folder"
    return ""


def out_of_reach(model: str | os.PathLike[str]) -> bool:
    """Whether `model` is no folder here and the hub cannot be reached, so that only what is kept of it here can be had.
    Its library, asked for a file that it was not told to look for here alone, goes on trying for 23 s.
    """
    if Path(model).is_dir():
        return False
    if constants.ENDPOINT in _unreached and time.monotonic() < _unreached[constants.ENDPOINT][0]:
        return True
    limit_s = constants.HF_HUB_ETAG_TIMEOUT  # without one it waits for ever
    try:
        model_info(os.fspath(model), timeout=limit_s)
    except Exception as error:  # the library raises whatever its transport raises
        if _is_unreached(error):
            at_once = any(isinstance(each, (ConnectionError, ssl.SSLError)) for each in behind(error))
            until = time.monotonic() + (0.0 if at_once else _FORGOTTEN_S)
            _unreached[constants.ENDPOINT] = until, error
            return True
    _unreached.pop(constants.ENDPOINT, None)
    return False


def may_recover(error: BaseException) -> bool:
    """Whether the hub was not reached, or had no answer for now, whatever the libraries have made of it since."""
    causes = list(_causes(error))
    if constants.HF_HUB_OFFLINE or any(
        isinstance(each, (ssl.SSLCertVerificationError, FileMetadataError)) or 0 < _status(each) < _LATER
        for each in causes
    ):
        return False
    return _is_unreached(error) or any(_status(each) >= _LATER for each in causes)


def _is_unreached(error: BaseException) -> bool:
    unreached = (
        ConnectionError,
        TimeoutError,
        socket.gaierror,
        ssl.SSLCertVerificationError,
        LocalEntryNotFoundError,
    )
    return any(
        isinstance(each, unreached) or (isinstance(each, OSError) and each.errno in _NO_WAY)
        for each in behind(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What is behind `error`; where a copy alone was looked for, as the hub was not reached, also what is behind
    that.
    """
    yield from behind(error)
    if any(isinstance(each, LocalEntryNotFoundError) for each in behind(error)):
        yield from behind(_unreached.get(constants.ENDPOINT, (0.0, None))[1])


def _status(error: BaseException) -> int:
    """What the hub answered in HTTP, where that says nothing of one file; otherwise 0."""
    if isinstance(error, EntryNotFoundError):
        return 0
    status = getattr(getattr(error, "response", None), "status_code", 0)
    # What was tried again in vain comes as an error of the library below; that knows no file from a repository.
    trusted = isinstance(error, HfHubHTTPError) or (isinstance(status, int) and status >= _LATER)
    return int(status) if trusted else 0


def behind(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, what it came of, what that came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
