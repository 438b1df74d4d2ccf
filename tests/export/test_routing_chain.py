"""train -> predictor -> calibrate -> evaluate, by the command, on real token states."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from edge_agent.bundle import Bundle
from edge_agent.calibration import Calibration
from edge_agent.diffusion.text_encoder import TextEncoder, TextStates
from edge_agent.errors import BundleError
from edge_agent.manifest import CALIBRATION, PREDICTOR
from edge_agent.predictor import Predictor
from edge_agent.superiority import METRICS, SD_FLOOR, paper_scale, relative_superiority
from edge_agent.tokens import Tokenizer, Tokens
from export import calibrate as calibration_stage
from export import evaluate as evaluation
from export import train as training
from export.__main__ import INTERRUPTED, main
from export.calibrate import _remark_chance, calibrate, familiar, scale_of
from export.errors import ExportError
from export.evaluate import BEGINS
from export.mixture import Ensemble
from export.outcomes import Outcomes
from export.states import TokenStates, encode, of_prompts, of_shorter_prompts
from tests.export.routing_world import WIDTH, write_bundle, write_labels


class Chain:
    """Where everything lies, after the four stages have run."""

    def __init__(self, folder: Path) -> None:
        self.bundle, self.weights, self.report = folder / "bundle", folder / "run", folder / "evaluation.json"
        digest = write_bundle(self.bundle).model_digest
        texts = json.dumps([[name, f"good {name}", f"bad {name}"] for name in METRICS])
        facts = {"edge_digest": digest, "cloud_digest": "c0ffee", "judge_digest": "1ead", "metrics": texts}
        self.labels = write_labels(folder / "labels.parquet", 720, facts=facts)
        train = ["--seeds", "1", "--steps", "400", "--rank", "4", "--hidden", "16"]
        self.codes = [
            main(["train", str(self.labels), str(self.bundle), str(self.weights), *train]),
            main(["predictor", str(self.weights / "predictor.safetensors"), str(self.bundle)]),
            main(["calibrate", str(self.labels), str(self.bundle)]),
            main(["evaluate", str(self.labels), str(self.bundle), "--out", str(self.report)]),
        ]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))


def test_every_stage_succeeds_and_the_bundle_passes_its_checks(chain: Chain) -> None:
    assert chain.codes == [0, 0, 0, 0]
    assert chain.report.read_text().startswith(BEGINS)  # or it would not be taken for the stage's own
    bundle = Bundle.open(chain.bundle)
    assert {PREDICTOR, CALIBRATION} <= set(bundle.manifest.files)


def test_predicted_prs_follows_the_measured_one_better_than_the_number_of_objects(chain: Chain) -> None:
    report = json.loads(chain.report.read_text())
    rows = {row["router"]: row for row in report["routers"]}
    assert (
        rows["predictor"]["rank_correlation"]["low"] > rows["number of objects"]["rank_correlation"]["value"]
    )
    assert rows["predictor"]["headroom"]["value"] > rows["number of objects"]["headroom"]["value"] > 0
    assert report["prompts"] == 120


def test_the_calibration_is_what_the_daemon_would_compute(chain: Chain) -> None:
    bundle, outcomes = Bundle.open(chain.bundle), Outcomes.read(chain.labels)
    calibration = bundle.calibration
    assert calibration is not None
    assert (calibration.edge_digest, calibration.cloud_digest) == (bundle.model_digest, "c0ffee")
    assert calibration.metrics[0] == ("definition", "good definition", "bad definition")
    train = outcomes.split("train")
    gap = train.edge - train.cloud
    np.testing.assert_allclose(calibration.scale, paper_scale(gap.mean(0), gap.std(0, ddof=1)), rtol=1e-4)

    predictor = Predictor.load(bundle.path(PREDICTOR), WIDTH)
    made = [predictor.predict(*one) for one in encode(bundle, outcomes.split("calibration").prompts)]
    prs = [relative_superiority(p.edge, p.cloud, calibration.scale, calibration.weights) for p in made]
    np.testing.assert_allclose(calibration.scores, np.sort(prs), rtol=1e-9)
    tokenizer = Tokenizer.open(bundle)
    having = Counter(
        token
        for tokens in map(tokenizer.encode, train.prompts)
        for token in {int(tokens.ids[0, position]) for position in tokens.own}
    )
    assert calibration.familiar == tuple(sorted(token for token, count in having.items() if count >= 3))


def test_metrics_weigh_by_their_spread_unless_they_are_asked_to_weigh_the_same(chain: Chain) -> None:
    bundle, outcomes = Bundle.open(chain.bundle), Outcomes.read(chain.labels)
    spread, equal = (calibrate(outcomes, bundle, "c0ffee", 1.0, weighing) for weighing in ("spread", "equal"))
    assert bundle.calibration is not None
    assert spread.weights == bundle.calibration.weights
    np.testing.assert_allclose(np.array(spread.weights) / spread.scale, 1 / sum(spread.scale))
    assert equal.weights == (1 / len(METRICS),) * len(METRICS)
    assert (spread.recipe["weights"], equal.recipe["weights"]) == ("spread", "equal")
    # Near one half, PRS is a straight line in the gain of mean quality.
    edge, gain = np.full(len(METRICS), 0.5), np.linspace(-0.01, 0.01, len(METRICS))
    prs = relative_superiority(edge, edge + gain, spread.scale, spread.weights)
    assert prs == pytest.approx(0.5 - gain.sum() / (4 * sum(spread.scale)), abs=1e-4)


def test_gamma_weighs_what_lies_between_the_models_against_what_varies(chain: Chain) -> None:
    train = Outcomes.read(chain.labels).split("train")
    gap = (train.edge - train.cloud).astype(np.float64)
    for gamma in (0.0, 3.0):
        expected = np.maximum(gamma * np.abs(gap.mean(0)), SD_FLOOR * gap.std(0, ddof=1))
        np.testing.assert_allclose(scale_of(train, gamma), expected, rtol=1e-6)
    with pytest.raises(
        ExportError, match=r"^on definition edge and cloud are equal on every training prompt"
    ):
        scale_of(_equal_on_definition(train), 1.0)


def _equal_on_definition(outcomes: Outcomes) -> Outcomes:
    cloud = outcomes.cloud_seeds.copy()
    cloud[..., 0] = outcomes.edge_seeds[..., 0]
    return replace(outcomes, cloud_seeds=cloud)


def test_a_token_is_familiar_by_the_prompts_that_have_it_and_not_by_how_often_they_do(chain: Chain) -> None:
    tokenizer = Tokenizer.open(Bundle.open(chain.bundle))
    prompts = ["dog dog dog dog", "cat", "cat dog", "cat"]
    (cat,) = {int(one.ids[0, one.own[0]]) for one in map(tokenizer.encode, prompts[1:2])}
    assert familiar([tokenizer.encode(prompt) for prompt in prompts]) == (cat,)


def test_a_predictor_that_ranks_the_wrong_way_round_is_no_better_than_chance(
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = np.linspace(0, 1, 40)
    for predictions, told in ((measured**2, False), (1 - measured, True), (np.ones(40), True)):
        _remark_chance(predictions, measured)
        assert ("do not tell the predictor from chance" in capsys.readouterr().err) is told


def test_a_calibration_by_which_nothing_goes_to_the_cloud_says_so(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(chain.bundle, tmp_path / "bundle")
    nobody = "finds the edge's image as good for every calibration prompt: none will be routed"
    assert nobody not in said(capsys, "calibrate", chain.labels, bundle)
    alike = np.full((len(Outcomes.read(chain.labels).split("calibration")), len(METRICS)), 0.5, np.float32)
    monkeypatch.setattr(calibration_stage, "predicted", lambda *_: (alike, alike))
    assert nobody in said(capsys, "calibrate", chain.labels, bundle)


def test_a_calibration_that_is_broken_off_leaves_the_bundle_as_it_was(
    tmp_path: Path, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(chain.bundle, tmp_path / "bundle"))
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(calibration_stage, "put_file", full)
    assert main(["calibrate", str(chain.labels), str(bundle)]) == 2
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


def test_labels_of_other_metrics_are_not_calibrated(chain: Chain) -> None:
    outcomes = Outcomes.read(chain.labels)
    texts = json.loads(outcomes.facts["metrics"])
    turned = replace(outcomes, facts=outcomes.facts | {"metrics": json.dumps(texts[::-1])})
    with pytest.raises(ExportError, match=r"^the labels' metrics are not definition, "):
        calibrate(turned, Bundle.open(chain.bundle), "c0ffee", 1.0)


@pytest.mark.parametrize(
    ("stage", "option", "why"),
    [
        ("train out", "--gain-weight=nan", "--gain-weight must not be negative"),
        ("train out", "--rank-weight=-1", "--rank-weight must not be negative"),
        ("train out", "--deletion-weight=inf", "--deletion-weight must not be negative"),
        ("train out", "--sentence=7", "--sentence must be a multiple of "),
        ("calibrate", "--gamma=nan", "--gamma must be a number of at least 0"),
        ("calibrate", "--gamma=-1", "--gamma must be a number of at least 0"),
        ("evaluate", "--rate=0", "--rate must lie between 0 and 1"),
        ("evaluate", "--rate=1", "--rate must lie between 0 and 1"),
        ("evaluate", "--rate=nan", "--rate must lie between 0 and 1"),
    ],
)
def test_numbers_of_which_nothing_can_be_made_are_refused_before_anything_is_read(
    stage: str, option: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *more = stage.split()
    with pytest.raises(SystemExit) as stopped:
        main([name, "labels", "bundle", *more, option])
    assert stopped.value.code == 2
    assert why in capsys.readouterr().err


def test_cached_states_are_those_the_encoder_makes(chain: Chain) -> None:
    bundle, prompts = Bundle.open(chain.bundle), Outcomes.read(chain.labels).split("train").prompts
    files = sorted(chain.weights.glob("states-*.npz"))
    assert len(files) == 2
    before = [file.stat().st_mtime_ns for file in files]
    states, mask, ids = of_prompts(chain.weights, bundle, prompts).padded()
    assert [file.stat().st_mtime_ns for file in files] == before
    expected, own, words = next(encode(bundle, prompts[3:4]))
    np.testing.assert_allclose(states[3][mask[3]], expected[0][own], atol=1e-6)
    np.testing.assert_array_equal(ids[3][mask[3]], words[0][own])


@pytest.mark.parametrize("left", [0, 50])
def test_a_spoilt_cache_is_made_again(chain: Chain, tmp_path: Path, left: int) -> None:
    bundle = Bundle.open(chain.bundle)
    right = of_prompts(tmp_path, bundle, ["two cat", "dog"])
    (file,) = tmp_path.glob("states-*.npz")
    file.write_bytes(file.read_bytes()[:left])
    np.testing.assert_array_equal(of_prompts(tmp_path, bundle, ["two cat", "dog"]).tokens, right.tokens)


@pytest.mark.parametrize("read", [of_prompts, of_shorter_prompts])
def test_token_states_are_made_once_whatever_interrupts_them(
    chain: Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Path, Bundle, Sequence[str]], TokenStates | tuple[TokenStates, np.ndarray]],
) -> None:
    """And of another prompt list none: its pieces lie beside these."""
    bundle = Bundle.open(chain.bundle)
    prompts = Outcomes.read(chain.labels).split("train").prompts[:11]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    read(whole, bundle, prompts)
    (expected,) = whole.iterdir()
    monkeypatch.setattr("export.states.PIECE", 3)
    made: list[Tokens] = []

    def interrupted(wanted: Sequence[str], after: int) -> None:
        """As if it were killed then: half a piece under the name of a process that is no more."""

        def encode(self: TextEncoder, tokens: Tokens) -> TextStates:
            if len(made) == after:
                (cut / f".1-{expected.stem}-6-9.npz").write_bytes(expected.read_bytes()[:200])
                raise KeyboardInterrupt
            made.append(tokens)
            return encoder(self, tokens)

        encoder, made[:] = TextEncoder.encode, []
        with monkeypatch.context() as patch:
            patch.setattr(TextEncoder, "encode", encode)
            read(cut, bundle, wanted)

    with pytest.raises(KeyboardInterrupt):
        interrupted(prompts[::-1], after=4)
    with pytest.raises(KeyboardInterrupt):
        interrupted(prompts, after=8)
    assert len(made) == 8  # and not less: those of the other list are others
    (spoilt,) = cut.glob(f"{expected.stem}-0-3.npz")  # as a power loss leaves it
    spoilt.write_bytes(b"")
    interrupted(prompts, after=99)
    assert len(made) == 11 - 6 + 3
    (joined,) = cut.glob(f"{expected.stem}*")
    with np.load(joined) as found, np.load(expected) as wanted:
        assert [*found] == [*wanted]
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name])
            assert found[name].dtype == wanted[name].dtype


def test_training_says_first_how_many_prompts_are_to_be_read(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(chain.weights, tmp_path / "run")
    for more, told in (
        ([], "840 prompts: 360 to learn from, these again less a token each, and 120 to validate"),
        (["--deletion-weight", "0"], "480 prompts: 360 to learn from, and 120 to validate on"),
    ):
        line = said(capsys, "train", chain.labels, chain.bundle, run, "--steps", "1", *more)
        assert line.startswith(f"the text encoder reads {told}")


def test_a_predictor_of_one_s_own_is_a_mean_of_three_unless_told_otherwise(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(chain.weights, tmp_path / "run")
    for more, members in (([], 3), (["--seeds", "2"], 2)):
        line = said(capsys, "train", chain.labels, chain.bundle, run, "--steps", "1", *more)
        assert f"weights in {members} mixtures, whose validation losses are" in line
        ensemble, _ = Ensemble.load(run / "predictor.safetensors")
        heads = [member.head for member in ensemble.members]
        assert len(heads) == members and not torch.equal(heads[0], heads[1])


def test_a_mixture_that_is_trained_is_kept_for_the_next_call_by_the_same_recipe(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(chain.weights, tmp_path / "run", ignore=shutil.ignore_patterns("mixture-*"))
    begun: list[int] = []
    fit = training.fit

    def interrupted(*arguments: Any) -> Iterator[training.Epoch]:
        begun.append(arguments[-1])
        if begun == [0, 1]:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(training, "fit", interrupted)

    def trained(*more: str, labels: Path = chain.labels) -> tuple[str, list[int]]:
        """What the command says, and the seeds that it trained."""
        begun.clear()
        line = said(capsys, "train", labels, chain.bundle, run, "--steps", "1", *more)
        return line, list(begun)

    arguments = ("train", chain.labels, chain.bundle, run, "--steps", "1", "--seeds", "2")
    assert main([str(argument) for argument in arguments]) == INTERRUPTED
    assert begun == [0, 1]
    line, seeds = trained("--seeds", "2")
    assert "1 of 2 mixtures are in" in line and seeds == [1]
    whole, _ = Ensemble.load(run / "predictor.safetensors")
    line, seeds = trained("--seeds", "3")
    assert "2 of 3 mixtures are in" in line and seeds == [2]
    more, record = Ensemble.load(run / "predictor.safetensors")
    assert [[member["seed"], len(member["epochs"])] for member in record["members"]] == [
        [0, 1],
        [1, 1],
        [2, 1],
    ]
    for one, other in zip(whole.members, more.members, strict=False):
        assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
    assert trained("--seeds", "2")[1] == []
    assert trained("--seeds", "1", "--gain-weight", "2")[1] == [0]
    same = ("--seeds", "1", "--gain-weight", "2", "--rank", "4")
    assert trained(*same)[1] == [0]
    (run / "mixture-0.safetensors").write_bytes(b"damaged")
    assert trained(*same)[1] == [0]
    others = of_other_prompts(chain.labels, tmp_path / "others.parquet")
    assert trained(*same, labels=others)[1] == [0]


def test_a_new_predictor_takes_the_old_calibration_away(tmp_path: Path, chain: Chain) -> None:
    copy = tmp_path / "bundle"
    for name in [*Bundle.open(chain.bundle).manifest.files, "manifest.json"]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((chain.bundle / name).read_bytes())
    assert main(["predictor", str(chain.weights / "predictor.safetensors"), str(copy)]) == 0
    assert Bundle.open(copy).calibration is None
    assert Bundle.open(copy).model_digest == Bundle.open(chain.bundle).model_digest


@pytest.mark.linux
def test_a_bundle_behind_a_link_where_nothing_can_be_written_gets_its_predictor(
    tmp_path: Path, chain: Chain
) -> None:
    there = Path(shutil.copytree(chain.bundle, tmp_path / "bundle"))
    number = os.open(there, os.O_RDONLY)
    link = f"/proc/self/fd/{number}"  # a folder of links on another disk, which not even root can write
    assert main(["predictor", str(chain.weights / "predictor.safetensors"), link]) == 0
    os.close(number)
    left = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert left == {*Bundle.open(there).manifest.files, "manifest.json"}


def of_other_prompts(labels: Path, to: Path) -> Path:
    """The same labels, the qualities of each prompt now being another's: nothing in a prompt tells them."""
    table = pq.read_table(labels)
    order = np.random.default_rng(0).permutation(len(table) // 4)  # of each prompt two images a model
    for name in METRICS:
        mixed = table[name].to_numpy().reshape(-1, 4)[order].ravel()
        table = table.set_column(table.column_names.index(name), name, pa.array(mixed))
    pq.write_table(table, to)
    return to


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must succeed; what it says, as one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return " ".join(capsys.readouterr().err.split())


def test_a_predictor_that_learnt_nothing_is_told_from_one_that_did(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the loss of the means on the validation prompts themselves, and on prompts that none of it has seen."""
    mixed, bundle = of_other_prompts(chain.labels, tmp_path / "mixed.parquet"), tmp_path / "bundle"
    shutil.copytree(chain.bundle, bundle)
    short = ["--steps", "60", "--rank", "4", "--hidden", "16"]
    stages = {"train": [tmp_path / "run", *short], "calibrate": [], "evaluate": ["--out", tmp_path / "out"]}
    words = {"train": "learnt nothing", "calibrate": "from chance", "evaluate": "from random routing"}
    told = {}
    for stage, more in stages.items():
        assert words[stage] not in said(capsys, stage, chain.labels, bundle, *more)
        told[stage] = words[stage] in said(capsys, stage, mixed, bundle, *more)
    assert told["calibrate"] and told["evaluate"]

    train, validation = (Outcomes.read(mixed).split(name) for name in ("train", "validation"))
    edge, cloud = train.edge.mean(0), train.cloud.mean(0)

    def share(error: np.ndarray, of: np.ndarray) -> float:
        return float((error**2 / of.var(0, ddof=1)).mean())

    gap, missed = train.cloud - train.edge, (cloud - edge) - (validation.cloud - validation.edge)
    level = share(edge - validation.edge, train.edge) + share(cloud - validation.cloud, train.cloud)
    cost = level / 2 + 3 * share(missed, gap) + 10 * share(missed.mean(1), gap.mean(1))
    _, record = Ensemble.load(tmp_path / "run" / "predictor.safetensors")
    assert record["validation_loss_of_means"] == pytest.approx(cost, rel=1e-4)
    # By chance the best epoch may be better than they are.
    assert told["train"] == (record["validation_loss"] >= record["validation_loss_of_means"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must refuse with exit code 2 and one line; returns that line."""
    assert main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def test_labels_of_another_edge_model_are_refused(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = write_labels(
        tmp_path / "labels.parquet", 12, facts={"edge_digest": "00ff", "cloud_digest": "c0ffee"}
    )
    for stage in ("calibrate", "evaluate"):
        assert "labels are of edge model 00ff" in refused(capsys, stage, labels, chain.bundle)
    assert "labels are of edge model 00ff" in refused(capsys, "train", labels, chain.bundle, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_predictor_is_not_calibrated_for_a_cloud_model_of_which_it_learnt_nothing(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = Outcomes.read(chain.labels).facts | {"cloud_digest": "00ff"}
    labels = write_labels(tmp_path / "labels.parquet", 720, facts=facts)
    before = (chain.bundle / CALIBRATION).read_bytes()
    line = refused(capsys, "calibrate", labels, chain.bundle)
    assert (
        "learnt of cloud model c0ffee, and the labels are of cloud model 00ff" in line
        and "edge-export train" in line
    )
    assert (chain.bundle / CALIBRATION).read_bytes() == before


def test_a_rate_above_what_a_daemon_sends_is_told_as_such(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    largest = Calibration.load(chain.bundle / CALIBRATION).recipe["largest_rate"]
    assert 0 < largest < 0.99
    for rate, told in ((largest / 2, False), (0.99, True)):
        options = ("--out", str(tmp_path / "out"), "--rate", str(rate))
        assert main(["evaluate", str(chain.labels), str(chain.bundle), *options]) == 0
        said = capsys.readouterr().err
        assert (f"a daemon sends at most {largest:.0%}" in said) is told


def test_training_that_diverges_is_refused_and_leaves_no_weights(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ("--gain-weight", "1e300", "--seeds", "1", "--steps", "2")
    assert main(["train", str(chain.labels), str(chain.bundle), str(out), *options]) == 2
    assert "diverges: in epoch 1 its validation loss is no number" in capsys.readouterr().err
    assert not list(out.glob("*.safetensors"))


def test_labels_of_another_judge_than_the_predictor_learnt_from_are_neither_calibrated_nor_evaluated(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    """One's scale and the other's scores would make a calibration of nothing."""
    facts = Outcomes.read(chain.labels).facts | {"judge_digest": "50ft"}
    labels = write_labels(tmp_path / "labels.parquet", 720, facts=facts)
    line = refused(capsys, "calibrate", labels, chain.bundle)
    assert (
        "learnt from judge 1ead, and the labels are from judge 50ft" in line and "edge-export train" in line
    )
    line = refused(capsys, "evaluate", labels, chain.bundle, "--out", tmp_path / "evaluation.json")
    assert "labels are from judge 50ft" in line and "calibrated for 1ead" in line


def test_what_is_there_and_no_labels_or_weights_is_told_as_it_is(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"there is no file {chain.bundle}; name the labels" in refused(
        capsys, "train", chain.bundle, chain.bundle, tmp_path / "run"
    )
    assert f"there is no file {chain.weights}; name the predictor.safetensors" in refused(
        capsys, "predictor", chain.weights, chain.bundle
    )
    (tmp_path / "run").touch()
    assert "is no folder; name one" in refused(capsys, "train", chain.labels, chain.bundle, tmp_path / "run")


def test_a_bundle_that_is_calibrated_for_another_cloud_model_is_not_evaluated(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = write_labels(tmp_path / "labels.parquet", 12, facts={"cloud_digest": "00ff"})
    line = refused(capsys, "evaluate", labels, chain.bundle)
    assert "labels are of cloud model 00ff" in line and "calibrated for c0ffee" in line


def test_a_win_over_random_is_told_where_headroom_is_not(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("evaluate", chain.labels, chain.bundle, "--out", tmp_path / "evaluation.json")
    assert "headroom" not in said(capsys, *arguments)
    monkeypatch.setattr(evaluation, "tells_headroom", lambda *_: False)
    line = said(capsys, *arguments)
    assert "the oracle wins no more than random, and nothing is said of headroom" in line
    assert "do not tell the predictor from random" not in line
    rows = json.loads((tmp_path / "evaluation.json").read_text())["routers"]
    assert all(row["headroom"] is None and row["over_random"] for row in rows)


def test_too_few_test_prompts_are_refused_before_anything_is_written(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of them, and where a sample of one alone is drawn, headroom is nothing over nothing."""
    labels, out = write_labels(tmp_path / "labels.parquet", 54), tmp_path / "evaluation.json"
    line = refused(capsys, "evaluate", labels, chain.bundle, "--out", out)
    assert "test prompts say 9 things that no training prompt says, too few to measure on: label more" in line
    assert not out.exists()


def test_labels_that_do_not_say_their_cloud_model_ask_for_it(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = write_labels(tmp_path / "labels.parquet", 12)
    assert "--cloud-digest" in refused(capsys, "calibrate", labels, chain.bundle)


def test_alpha_is_not_made_for_a_cloud_model_that_was_not_measured(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = (chain.bundle / CALIBRATION).read_bytes()
    flags = ["calibrate", chain.labels, chain.bundle, "--cloud-digest"]
    assert "measured on the cloud model c0ffee, not on 000" in refused(capsys, *flags, "0" * 64)
    with pytest.raises(SystemExit):
        main([*map(str, flags), "nonsense"])
    assert "'nonsense' is no digest: 64 hexadecimal digits" in capsys.readouterr().err
    assert (chain.bundle / CALIBRATION).read_bytes() == kept


@pytest.mark.posix  # whose shell takes single quotes
def test_the_command_that_takes_up_a_calibration_can_be_copied(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "my bundle"
    shutil.copytree(chain.bundle, bundle)
    assert f"`edge-agent models pull '{bundle}' --use`" in said(capsys, "calibrate", chain.labels, bundle)


def test_a_bundle_without_predictor_or_calibration_says_what_to_run(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path / "bare")
    assert "edge-export predictor" in refused(capsys, "calibrate", chain.labels, tmp_path / "bare")
    assert "edge-export calibrate" in refused(capsys, "evaluate", chain.labels, tmp_path / "bare")
    weights = tmp_path / "other"
    weights.touch()
    assert "not a trained predictor" in refused(capsys, "predictor", weights, tmp_path / "bare")


def test_an_ablated_predictor_is_trained_and_stays_out_of_the_bundle(
    tmp_path: Path, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--seeds", "1", "--steps", "10", "--ablate", "single-metric", "--ablate", "no-selection"]
    assert main(["train", str(chain.labels), str(chain.bundle), str(tmp_path), *short]) == 0
    capsys.readouterr()
    assert "ablation" in refused(capsys, "predictor", tmp_path / "predictor.safetensors", chain.bundle)
    assert Bundle.open(chain.bundle).calibration is not None


def test_an_altered_predictor_is_refused_by_name(tmp_path: Path, chain: Chain) -> None:
    bundle = Bundle.open(chain.bundle)
    content = bundle.path(PREDICTOR).read_bytes()
    bundle.path(PREDICTOR).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(BundleError, match=r"predictor[\\/]model\.onnx"):
            Bundle.open(chain.bundle)
    finally:
        bundle.path(PREDICTOR).write_bytes(content)


def test_a_months_budget_buys_more_where_it_is_paced(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, picture = tmp_path / "budget.json", tmp_path / "budget.png"
    how = ["--budget", "1.2,0.3", "--prompts-a-day", "40", "--months", "2", "--out", str(report)]
    how += ["--picture", str(picture)]
    assert main(["budget", str(chain.labels), str(chain.bundle), *how]) == 0
    facts = json.loads(report.read_text())
    assert [row["images"] for row in facts["rows"]] == [120, 30]
    for row in facts["rows"]:
        found = [row[way]["value"] for way in ("as_it_comes", "paced", "in_hindsight")]
        assert found[0] < 0.9 * found[1] <= 0.95 * found[2] < 0.5
        assert row["lasts_days"]["value"] < 10
    assert "$0.30" in capsys.readouterr().out
    with PIL.Image.open(picture) as drawn:
        assert len(drawn.convert("RGB").getcolors(2**24) or ()) > 10  # axes, and curves of several colours


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (["--picture", "budget.doc"], "must end in .png, .svg, .pdf, not 'budget.doc'"),
        (["--picture", "budget.png", "--out", "./budget.png"], "--picture must not name the file of --out"),
        (["--price", "0"], "lasts for ever"),
        (["--budget", "1,x"], "'x' is not an amount"),
        (["--budget", "1,0.005"], "must pay for one image"),
        (["--rate", "0"], "--rate must lie above 0"),
        (["--prompts-a-day", "nan"], "--prompts-a-day must lie between"),
        (["--months", "1"], "--months must lie between"),
    ],
)
def test_a_budget_that_cannot_be_simulated_is_refused(
    chain: Chain, capsys: pytest.CaptureFixture[str], how: list[str], why: str
) -> None:
    with pytest.raises(SystemExit):
        main(["budget", str(chain.labels), str(chain.bundle), *how])
    assert why in capsys.readouterr().err


def test_no_budget_is_simulated_where_the_cloud_draws_no_better(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pq.read_table(chain.labels)
    worse = {"edge": "cloud", "cloud": "edge"}
    models = pa.array([worse[model] for model in rows["model"].to_pylist()], rows.schema.field("model").type)
    swapped = tmp_path / "labels.parquet"
    pq.write_table(
        rows.set_column(rows.column_names.index("model"), rows.schema.field("model"), models), swapped
    )
    assert main(["budget", str(swapped), str(chain.bundle), "--out", str(tmp_path / "budget.json")]) == 2
    assert "the cloud's images are not better" in capsys.readouterr().err
