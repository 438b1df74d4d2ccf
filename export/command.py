"""Build hook: the development install gets the command `edge-export`; a wheel, which carries no export/, does not."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EdgeExportCommand(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the command to editable builds. Of an entry point installers make a program that Windows, too, can start."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Called by hatchling before a build; `version` is "standard" or "editable"."""
        if version == "editable":
            self.metadata.core.scripts["edge-export"] = "export.__main__:main"
