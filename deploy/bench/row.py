"""One line of the table: what was measured, and whether it reaches its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from estimate import Estimate

# How many digits a person wants to see of each unit.
_FORMATS = {"x": "{:.3f}", "%": "{:.1f}", "ms": "{:.2f}", "s": "{:.2f}", "MB": "{:.0f}", "": "{:.1e}"}


@dataclass(frozen=True)
class Row:
    """`measured` is None, and `met` with it, where nothing could be measured; `note` then says what to do.

    `met` is also None where no target is set.
    """

    group: str
    what: str
    unit: str
    target: str
    measured: Estimate | None
    met: bool | None
    note: str = ""
    # The same from the fastest tenth of each side, which other work disturbed least.
    calm: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)  # for the JSON file

    @classmethod
    def untargeted(cls, group: str, what: str, measured: Estimate, unit: str, **more: Any) -> Row:
        """For the record alone."""
        return cls(group, what, unit, "", measured, None, **more)

    @classmethod
    def at_most(cls, group: str, what: str, measured: Estimate, unit: str, limit: float, **more: Any) -> Row:
        """Met when the measured value is not above `limit`."""
        target = f"<= {limit:g} {unit}".rstrip()
        return cls(group, what, unit, target, measured, measured.value <= limit, **more)

    @classmethod
    def missing(cls, group: str, what: str, reason: str) -> Row:
        """Nothing was measured, and why."""
        return cls(group, what, "", "", None, None, reason)

    @property
    def shown(self) -> str:
        """The measured value with its interval, for a person."""
        if self.measured is None:
            return "not measured"
        form = _FORMATS[self.unit]
        value, low, high = (
            form.format(number) for number in (self.measured.value, self.measured.low, self.measured.high)
        )
        interval = f" [{low}, {high}]" if (low, high) != (value, value) else ""
        return f"{value} {self.unit}".rstrip() + interval

    @property
    def shown_calm(self) -> str:
        """The same in calm moments, where it was measured."""
        return "" if self.calm is None else f"{_FORMATS[self.unit].format(self.calm)} {self.unit}"

    @property
    def verdict(self) -> str:
        """Met, missed, or nothing to say."""
        return {True: "met", False: "missed", None: "-"}[self.met]
