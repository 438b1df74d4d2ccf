"""The edge daemon: decides where a prompt becomes an image, and makes it here unless the cloud is worth it."""

from __future__ import annotations

import functools


@functools.cache
def version() -> str:
    """The version of the installed distribution; "0+unknown" where it runs without being installed."""
    from importlib import metadata  # not at import: it costs milliseconds that few need

    try:
        return metadata.version("routet2i")
    except metadata.PackageNotFoundError:
        return "0+unknown"
