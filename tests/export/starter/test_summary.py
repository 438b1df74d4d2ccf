"""What the starter's models cost and how good they are, as the document says it."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from export.errors import ExportError
from export.starter import summary
from export.starter.size import CLOUD, EDGE


class Products:
    """A painter whose image costs what can be counted by hand: (2 x 3) @ (3 x 5), and attention of 4 tokens of 8."""

    def __init__(self):
        self.layer = nn.Linear(3, 5)

    def paint(self, prompts, seeds):
        self.layer(torch.ones(2, 3))
        token = torch.ones(1, 1, 4, 8)
        nn.functional.scaled_dot_product_attention(token, token, token)


def test_multiply_adds_are_those_of_products_and_of_attention():
    assert summary.multiply_adds(Products()) == 2 * 3 * 5 + 2 * 4 * 4 * 8


def test_the_document_says_what_the_labels_and_the_models_say(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "TIMED", 1)
    out, labels = tmp_path / "starter.md", tmp_path / "labels.parquet"
    table = pq.read_table(summary.STARTER_LABELS)
    first = (table["split"].to_numpy() == "test") & (table["prompt_id"].to_numpy() % 100_000 < 200)
    table = table.filter(first)  # to draw all prompts of the world anew takes half a minute
    pq.write_table(table, labels)
    assert summary.main(["--labels", str(labels), "--out", str(out)]) == 0
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for line in out.read_text().splitlines()
        if len(cells := line.split("|")) > 4
    }
    ids, model = table["prompt_id"].to_numpy(), table["model"].to_numpy()
    color = table["color"].to_numpy().astype(float)
    for column, name in enumerate(("edge", "cloud")):
        means = [color[(ids == prompt) & (model == name)].mean() for prompt in np.unique(ids)]
        value, low, high = (float(text.strip("[],")) for text in rows["color"][column].split())
        assert value == pytest.approx(np.mean(means), abs=6e-4)
        assert low < value < high
    edge, cloud, ratio = rows["multiply-adds, thousand million"]
    assert float(cloud) > float(edge) > 0
    # The ratio is of what was counted, not of what the table rounds it to.
    assert float(ratio.removesuffix(" x")) == pytest.approx(float(cloud) / float(edge), rel=0.02)
    assert rows["steps"][:2] == [str(size.inference_steps) for size in (EDGE, CLOUD)]


def test_labels_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ExportError, match=r"none\.parquet"):
        summary.main(["--labels", str(tmp_path / "none.parquet"), "--out", str(tmp_path / "a.md")])
