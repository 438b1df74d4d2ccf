"""`cloud-server` on a device whose driver answers no more: the first denoising step does not end."""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

from diffusers import UNet2DConditionModel

from cloud_server import server
from cloud_server.__main__ import main


def hang(*_: Any, **__: Any) -> None:
    """For good."""
    logging.getLogger("cloud_server").warning("a step hangs")
    threading.Event().wait()


UNet2DConditionModel.forward = hang
server.STEP_S = 0.5

if __name__ == "__main__":
    sys.exit(main())
