from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.bundle import Bundle
from edge_agent.superiority import METRICS
from export.__main__ import main
from export.bootstrap import estimate
from export.outcomes import Outcomes
from export.prompts import router_prompts, scenes_by_text, scenes_of
from export.routerbench.decision import Decider, Decisions, Rate, decisions
from tests.export.routing_world import TOKENS, write_bundle, write_labels


class Routed:
    """A world with a trained and calibrated bundle."""

    def __init__(self, folder: Path) -> None:
        bundle, self.cache = folder / "bundle", folder / "run"
        digest = write_bundle(bundle).model_digest
        texts = json.dumps([[name, f"good {name}", f"bad {name}"] for name in METRICS])
        labels = write_labels(
            folder / "labels.parquet",
            360,
            facts={"edge_digest": digest, "cloud_digest": "c0ffee", "judge_digest": "1ead", "metrics": texts},
        )
        train = ["--seeds", "1", "--steps", "300", "--rank", "4", "--hidden", "16"]
        assert main(["train", str(labels), str(bundle), str(self.cache), *train]) == 0
        assert main(["predictor", str(self.cache / "predictor.safetensors"), str(bundle)]) == 0
        assert main(["calibrate", str(labels), str(bundle)]) == 0
        self.labels = labels
        self.bundle, self.outcomes = Bundle.open(bundle), Outcomes.read(labels)
        scenes = self.outcomes.scenes()
        self.scenes = {
            split: scenes[self.outcomes.splits == split] for split in ("train", "calibration", "test")
        }


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Routed:
    return Routed(tmp_path_factory.mktemp("routed"))


@pytest.fixture(scope="module")
def made(routed: Routed) -> Decisions:
    found = decisions(routed.bundle, routed.outcomes, routed.scenes, routed.cache)
    assert found is not None
    return found


def test_where_splits_are_alike_the_wanted_rate_is_realised(made: Decisions) -> None:
    rates = made.rates["test"]
    assert sum(rate.kept for rate in rates) >= len(rates) - 1
    assert np.diff([rate.realised.value for rate in rates]).min() >= 0
    assert max(rate.realised.value for rate in rates) <= made.reachable["test"]


def test_a_rate_above_the_wanted_one_is_never_kept_and_one_below_only_at_the_bound() -> None:
    def rate(wanted: float, alpha: float) -> Rate:
        return Rate(wanted, alpha, estimate(np.array([0.5, 0.45, 0.55])))

    assert rate(0.5, 0.4).kept
    assert not rate(0.4, 0.4).kept
    assert not rate(0.6, 0.4).kept
    assert rate(0.6, 0.5).kept
    assert not rate(0.4, 0.5).kept


def test_predicted_prs_is_realised_where_there_is_something_to_learn(made: Decisions) -> None:
    assert made.slope.low > 0
    assert made.bins[-1].realised.value > made.bins[0].realised.value


def test_deleting_the_named_token_moves_prs_further_than_another(made: Decisions) -> None:
    assert made.explanations.ratio.low > 1


def test_a_prompt_without_a_token_is_the_prompt_that_never_had_it(routed: Routed) -> None:
    calibration = routed.bundle.calibration
    assert calibration is not None
    decider = Decider(routed.bundle, calibration)
    whole, less = decider.tokenizer.encode("a red dog"), decider.tokenizer.encode("a dog")
    cut = whole.without(2)
    assert cut.ids.shape == (1, TOKENS)
    assert decider.decide(cut)[0] == decider.decide(less)[0]


def test_an_unknown_word_is_told(routed: Routed, made: Decisions) -> None:
    assert made.domains["test"].with_unknown == 0
    assert made.domains["calibration"].far == pytest.approx(0.05, abs=0.02)


def test_prompts_without_tokens_leave_the_others_as_far_away_as_they_are(
    routed: Routed, tmp_path: Path
) -> None:
    """As one of an invisible character, which cleaning takes out."""
    texts, splits = list(routed.outcomes.prompts), routed.outcomes.splits
    for split in ("train", "calibration"):
        texts[np.flatnonzero(splits == split)[0]] = "\u200b"
    outcomes = replace(routed.outcomes, prompts=tuple(texts))
    found = decisions(routed.bundle, outcomes, routed.scenes, tmp_path)
    assert found is not None
    assert found.domains["calibration"].far == pytest.approx(0.05, abs=0.02)


def test_a_bundle_without_calibration_has_no_decisions_to_measure(routed: Routed, tmp_path: Path) -> None:
    bare = write_bundle(tmp_path / "bare")
    assert decisions(bare, routed.outcomes, routed.scenes, tmp_path) is None


@pytest.mark.parametrize("name", ["edge_digest", "cloud_digest"])
def test_a_calibration_for_other_models_is_not_judged_by_these_labels(routed: Routed, name: str) -> None:
    others = replace(routed.outcomes, facts=routed.outcomes.facts | {name: "00ff"})
    assert decisions(routed.bundle, others, routed.scenes, routed.cache) is None


def test_labels_without_calibration_prompts_have_no_decisions_to_measure(routed: Routed) -> None:
    scenes = {split: routed.scenes[split] for split in ("train", "test")}
    assert decisions(routed.bundle, routed.outcomes, scenes, routed.cache) is None


def test_sentences_of_one_scene_share_its_number_and_strangers_have_their_own() -> None:
    prompts = router_prompts({"train": 60})
    ids, splits = np.array([one.prompt_id for one in prompts]), np.array([one.split for one in prompts])
    numbers = scenes_of([*(one.text for one in prompts), "a stranger"], scenes_by_text(ids, splits))
    assert len(set(numbers)) == len({one.scene for one in prompts}) + 1
    assert len({one.scene for one in prompts}) < 60
