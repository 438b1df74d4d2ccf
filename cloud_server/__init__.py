"""The cloud server: a large diffusers pipeline behind a gRPC stream. Deployed apart from the edge."""

from __future__ import annotations


def version() -> str:
    """The version of the installed distribution; "0+unknown" where it runs without being installed."""
    from importlib import metadata  # not at import: it costs milliseconds that few need

    try:
        return metadata.version("routet2i")
    except metadata.PackageNotFoundError:
        return "0+unknown"
