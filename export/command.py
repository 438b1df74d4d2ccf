"""Build hook: the development install gets the command `edge-export`; a wheel, which carries no export/, does not."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Installers replace "#!python" by the environment's interpreter.
SCRIPT = """#!python
import sys

from export.__main__ import main

sys.exit(main())
"""


class EdgeExportCommand(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the script to editable builds."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a build; `version` is "standard" or "editable"."""
        if version == "editable":
            self.folder = tempfile.TemporaryDirectory()
            script = Path(self.folder.name) / "edge-export"
            script.write_text(SCRIPT, encoding="utf-8")
            build_data["shared_scripts"][str(script)] = "edge-export"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 - hatchling's signature
        """Called by hatchling after the build."""
        if version == "editable":
            self.folder.cleanup()
