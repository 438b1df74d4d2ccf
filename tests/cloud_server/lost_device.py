"""`cloud-server` on a device that is lost amid the first image, as by a kernel that reads what it may not."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from cloud_server import generator
from cloud_server.__main__ import main


def lost(*_: Any, **__: Any) -> None:
    """From now on, whatever is asked of the device."""
    generator.compute = lost
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def draw(*_: Any, **__: Any) -> None:
    """Until a file says that the device is lost."""
    while not Path("lost").exists():
        time.sleep(0.01)
    lost()


UNet2DConditionModel.forward = draw

if __name__ == "__main__":
    sys.exit(main())
