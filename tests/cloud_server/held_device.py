"""`cloud-server` on a device that takes no step until a file says so: what is in flight stays so meanwhile."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from cloud_server.__main__ import main

forward = UNet2DConditionModel.forward


def held(self: UNet2DConditionModel, *arguments: Any, **options: Any) -> Any:
    """The pass, once it may be made."""
    while not Path("go").exists():
        time.sleep(0.01)
    return forward(self, *arguments, **options)


UNet2DConditionModel.forward = held

if __name__ == "__main__":
    sys.exit(main())
