"""The edge daemon: decides where a prompt becomes an image, and makes it here unless the cloud is worth it."""

from __future__ import annotations

import functools
import os

# From 1.29 on, onnxruntime's wheels for Linux and macOS otherwise leave a device id in the user's cache and report
# models and run times to their maker. It looks at this once, on being imported, so this comes first: nothing of a
# prompt's making leaves the device. Who wants the reports sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@functools.cache
def version() -> str:
    """The version of the installed distribution; "0+unknown" where it runs without being installed."""
    from importlib import metadata  # not at import: it costs milliseconds that few need

    try:
        return metadata.version("routet2i")
    except metadata.PackageNotFoundError:
        return "0+unknown"
