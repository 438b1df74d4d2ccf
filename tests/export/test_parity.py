"""For every class of pipelines and every scheduler the edge makes diffusers' picture; docs/parity.md says so."""

from __future__ import annotations

import pytest

from tests.export.parity import COLUMNS, PAGE, TOLERANCE, Parity, expected_shape, shape


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Parity:
    return Parity(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize(
    ("column", "scheduler"),
    [(title, name) for title, column in COLUMNS.items() for name in column.schedulers],
)
def test_pixels_equal_diffusers(parity: Parity, column: str, scheduler: str) -> None:
    difference, deviation = parity.measure(column, scheduler)
    assert deviation > 0.03  # else anything would agree
    assert difference <= TOLERANCE


def test_the_page_has_the_cells_that_are_tested() -> None:
    """A row, a column or a dash that changes here must be measured again: run `make parity`."""
    assert shape(PAGE.read_text()) == expected_shape()
