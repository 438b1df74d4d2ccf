"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes

mpl.use("Agg")  # files, no window

from matplotlib import pyplot as plt


@contextmanager
def figure(file: Path, label: str) -> Iterator[Axes]:
    """Axes to draw into, with `label` for what is upwards; what was drawn goes to the file."""
    made, axes = plt.subplots(figsize=(7, 4.6), dpi=130, layout="constrained")
    yield axes
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    made.savefig(file)
    plt.close(made)
