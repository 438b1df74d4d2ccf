"""What half precision and eight bits cost and save: size, time, memory, the ten metrics, decisions, against float32.

    edge-export precision [BUNDLE --prompts FILE --judge CLIP] [--number 200] [--out docs/precision.md]

Every form of the bundle makes the images of the same prompts from the same seeds. They are judged and compared in
pairs. Time and memory are measured in processes that do not import torch, one a form; float32's takes turns with one of
the others after the other, so that two are in memory. All lie in the folder for temporary files meanwhile, which TMPDIR
names. Some minutes on two cores for the starter.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.diffusion.generator import Image
from edge_agent.manifest import PREDICTOR
from edge_agent.reader import Reader
from edge_agent.superiority import METRICS, relative_superiority
from export.arguments import at_least
from export.bootstrap import Estimate, Floats, interval
from export.errors import ExportError
from export.markdown import head, row
from export.output import check_output, default_output, write_output
from export.precision import CALIBRATION_PROMPTS, DTYPES, Loss, drawn, shrink
from export.prompts import numbered_lines, router_prompts
from export.quality import Judge
from export.starter.shipped import STARTER_BUNDLE, STARTER_JUDGE
from export.terminal import console, progress, silent

OUT, BEGINS = "precision.md", "Made by `edge-export precision"
PROMPTS = 200
CALIBRATION = 24  # prompts of the split `train`, where the bundle is the starter's
ROUTING_RATE = 0.5
TURNS = 30  # timed images a form
RESAMPLES = 2000
SEED = 6000
_MB = 1e6

# Loads a bundle and makes one image for each line it reads; says how long that took, and its memory.
_PAINTER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, which ends this
began = time.perf_counter()
from edge_agent.bundle import Bundle
from edge_agent.manifest import PREDICTOR
from edge_agent.diffusion.generator import Generator
bundle = Bundle.open(sys.argv[1])
generator, facts = Generator(bundle), bundle.manifest
loaded = time.perf_counter() - began
def memory():
    if sys.platform != "linux":
        import psutil  # which accelerate needs
        held = psutil.Process().memory_info()
        if sys.platform == "win32":
            return held.rss, held.peak_wset
        import resource
        return held.rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    status = open("/proc/self/status").read()
    return [int(status.split(name)[1].split()[0]) * 1024 for name in ("VmRSS:", "VmHWM:")]
import json
for line in sys.stdin:
    prompt, seed = json.loads(line)
    began = time.perf_counter()
    states, negative = generator.encode(prompt)[1], generator.encode_negative("")
    for _ in generator.generate(states, negative, seed, facts.default_steps, facts.default_guidance):
        pass
    seconds = time.perf_counter() - began
    idle, peak = memory()
    found = {"seconds": seconds, "loaded": loaded, "idle": idle, "peak": peak}
    print(json.dumps(found), flush=True)
"""


@dataclass(frozen=True)
class Form:
    """A bundle in which all parts but `keep` are of `dtype`."""

    name: str  # for people
    dtype: str
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What a form costs on this machine."""

    bytes: int  # of the bundle's files
    seconds: Floats  # an image
    ratios: Floats  # an image, over the first form's beside it
    load_seconds: float  # importing, hashing, opening the graphs
    peak_bytes: int  # of the process, images included
    idle_bytes: int  # after an image


@dataclass(frozen=True)
class Measured:
    """All that is known of a form."""

    form: Form
    cost: Cost
    loss: Loss
    quality: Floats  # [prompts, metrics]
    prs: Floats | None  # [prompts]; None without predictor and calibration


def forms(bundle: Bundle) -> list[Form]:
    """Float32, half precision, eight bits, and eight bits in one part alone."""
    parts = _parts(bundle)
    alone = [Form(f"int8 {one}", "int8", tuple(part for part in parts if part != one)) for one in parts]
    return [*(Form(dtype, dtype) for dtype in DTYPES), *alone]


def _parts(bundle: Bundle) -> list[str]:
    return sorted({Path(name).parent.as_posix() for name in bundle.graphs if name != PREDICTOR})


def measure(
    source: Path,
    wanted: Sequence[Form],
    prompts: Sequence[str],
    calibration: Sequence[str],
    judge: Judge,
    turns: int = TURNS,
) -> list[Measured]:
    """Make forms of the bundle at `source`, measure, and throw away; the others are compared to the first. The name of
    one says which parts stayed float32 because half precision cannot hold their values.
    """
    with tempfile.TemporaryDirectory() as scratch, progress() as bar:
        folders = [Path(scratch) / str(number) for number in range(len(wanted))]
        made: list[Form] = []
        for form, folder in bar.track(list(zip(wanted, folders, strict=True)), description="convert"):
            _copied(source, folder)
            made.append(form)
            if form.dtype != DTYPES[0]:
                # No bound: a form that is grossly off belongs in the table all the more.
                shrink(
                    folder,
                    form.dtype,
                    keep=form.keep,
                    prompts=calibration,
                    bound=float("inf"),
                    report=silent,
                )
                bundle = Bundle.open(folder)
                if stayed := sorted(set(_parts(bundle)) - set(form.keep) - set(bundle.manifest.dtypes or {})):
                    made[-1] = replace(form, name=f"{form.name}, {' and '.join(stayed)} in fp32")
        costs = _costs(folders, prompts, turns)
        found: list[Measured] = []
        references: list[NDArray[np.float32]] = []
        for form, folder, cost in bar.track(
            list(zip(made, folders, costs, strict=True)), description="make and judge"
        ):
            images = list(drawn(Bundle.open(folder), prompts, SEED))
            references = references or images
            pictures = [Image(colours).pixels for colours in images]
            quality = _judged(judge, pictures)
            found.append(
                Measured(form, cost, Loss.between(images, references), quality, _prs(folder, source, prompts))
            )
    return found


def _copied(source: Path, folder: Path) -> None:
    try:
        shutil.copytree(source, folder)
    except shutil.Error as error:  # of every file that could not be copied: where from, where to, and why
        raise ExportError(
            f"{source} cannot be copied to {folder}: {error.args[0][0][2]}; for room, name another folder in TMPDIR"
        ) from error


def _costs(folders: Sequence[Path], prompts: Sequence[str], turns: int) -> list[Cost]:
    """A process a form. The first form's lives on beside each of the others, and the two take turns: what else the
    machine does then weighs on both alike, and no more than two forms are in memory.
    """
    answers: list[list[dict[str, float]]] = [[] for _ in folders]
    with _painting(folders[0]) as first:
        answers[0].append(first(prompts[0], SEED))
        for number, folder in enumerate(folders[1:], 1):
            with _painting(folder) as other:
                answers[number].append(other(prompts[0], SEED))
                for turn in range(1, turns + 1):
                    pair = ((0, first), (number, other))
                    for one, painted in pair if turn % 2 else pair[::-1]:
                        answers[one].append(painted(prompts[turn % len(prompts)], SEED + turn))
    # The first warmed up.
    seconds = [np.array([answer["seconds"] for answer in given[1:]]) for given in answers]
    beside = seconds[0].reshape(-1, turns)  # a row for each of the others
    return [
        Cost(
            sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            seconds[number],
            seconds[number] / beside[number - 1] if number else np.ones(turns),
            given[0]["loaded"],
            int(given[-1]["peak"]),
            int(given[-1]["idle"]),
        )
        for number, (folder, given) in enumerate(zip(folders, answers, strict=True))
    ]


@contextmanager
def _painting(folder: Path) -> Iterator[Callable[[str, int], dict[str, float]]]:
    """What has an image of a prompt and a seed made by the form in `folder`, in a process of its own, and says what
    _PAINTER says. The form is loaded when the first image is made.
    """
    command = [sys.executable, "-c", _PAINTER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        taking, giving = process.stdin, process.stdout

        def painted(prompt: str, seed: int) -> dict[str, float]:
            taking.write(json.dumps([prompt, seed]) + "\n")
            taking.flush()
            if not (line := giving.readline()):
                raise ExportError("a form cannot be measured; what its process said stands above")
            answer: dict[str, float] = json.loads(line)
            return answer

        try:
            yield painted
        except BaseException:
            process.kill()  # in the middle of an image, which may take minutes
            raise


def _judged(judge: Judge, pictures: Sequence[NDArray[np.uint8]]) -> Floats:
    from PIL import Image as Pillow

    batches = [pictures[start : start + 50] for start in range(0, len(pictures), 50)]
    scores = [judge.quality([Pillow.fromarray(picture) for picture in batch]) for batch in batches]
    return np.concatenate(scores).astype(np.float64)


def _prs(folder: Path, source: Path, prompts: Sequence[str]) -> Floats | None:
    """PRS by the predictor and the calibration of the float32 bundle, whatever the digests say."""
    calibration, bundle = Bundle.open(source).calibration, Bundle.open(folder)
    if calibration is None or bundle.predictor is None:
        return None
    reader = Reader.open(bundle, ROUTING_RATE)
    edge, cloud, _ = zip(*(reader.read(prompt).prediction for prompt in prompts), strict=True)
    return relative_superiority(edge, cloud, calibration.scale, calibration.weights)


def spread(values: Floats, statistic: Callable[[Floats], np.float64] = np.mean) -> Estimate:
    """The statistic of ``values`` [N], which are independent of each other."""
    return interval(lambda rows: statistic(values[rows]), np.arange(len(values)), RESAMPLES, SEED)


def report(source: Path, found: Sequence[Measured], command: str) -> str:
    """The tables as Markdown."""
    bundle = Bundle.open(source)
    facts, first = bundle.manifest, found[0]
    count = len(first.quality)
    lines = [
        f"Made by `{command}` on {facts.name} ({bundle.model_digest[:16]}), {facts.width} x {facts.height} pixels, "
        f"{facts.default_steps} steps, with onnxruntime {ort.__version__} on {_processor()}.",
        "",
        "### Size, time and memory",
        "",
        f"Time is the median of {len(first.cost.ratios)} images, of fp32 that of as many beside each other form; its "
        "ratio to fp32 is the median of pairs made in turns, with a 95 % bootstrap interval. Memory is the process's "
        f"own: what it holds after an image, and its peak. The difference is that of {count} images from fp32's, "
        "colours in 0..1.",
        "",
        "| form | files | an image | over fp32 | load | memory | peak | largest difference | PSNR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        cost = one.cost
        ratio = spread(cost.ratios, np.median)
        lines.append(
            f"| {one.form.name} | {cost.bytes / _MB:.1f} MB | {1e3 * float(np.median(cost.seconds)):.1f} ms | "
            f"{ratio:.2f} | {cost.load_seconds:.2f} s | "
            f"{cost.idle_bytes / _MB:.0f} MB | {cost.peak_bytes / _MB:.0f} MB | {one.loss.largest:.3f} | "
            f"{one.loss.psnr:.1f} dB |"
        )
    others = [one for one in found if one.form.dtype != DTYPES[0]]
    lines += [
        "",
        "### Metrics",
        "",
        f"Mean difference from fp32 in hundredths, over {count} prompts in pairs of the same seed, with 95 % bootstrap "
        "intervals; bold where the interval leaves zero out. The first column is fp32's mean and the standard "
        "deviation between its images, in hundredths.",
        "",
        *head("metric", "fp32", *(one.form.name for one in others)),
    ]
    for index, name in enumerate(METRICS):
        own = 100 * first.quality[:, index]
        cells = []
        for one in others:
            change = spread(100 * (one.quality[:, index] - first.quality[:, index]))
            bold = "**" if change.low > 0 or change.high < 0 else ""
            cells.append(f"{bold}{change:+.2f}{bold}")
        lines.append(row(name, f"{own.mean():.1f} ± {own.std():.1f}", *cells))
    calibration = bundle.calibration
    if first.prs is not None and calibration is not None:
        alpha = calibration.alpha(ROUTING_RATE)
        lines += [
            "",
            "### Decisions",
            "",
            f"Only the text encoder takes part in them. The predictor and the calibration are fp32's; alpha is that of "
            f"a routing rate of {ROUTING_RATE:.0%}.",
            "",
            *head("form", "largest change of PRS", "prompts that go elsewhere", "share to the cloud"),
        ]
        for one in found:
            assert one.prs is not None
            moved = np.mean((one.prs < alpha) != (first.prs < alpha))
            lines.append(
                f"| {one.form.name} | {np.abs(one.prs - first.prs).max():.4f} | {moved:.1%} | "
                f"{np.mean(one.prs < alpha):.1%} |"
            )
    return "\n".join(lines) + "\n"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "an unknown processor"
    names: Mapping[str, str] = dict(
        (part.strip() for part in line.split(":", 1)) for line in lines if ":" in line
    )
    vnni = "with" if "vnni" in names.get("flags", "") else "without"
    return f"{names.get('model name', 'an unknown processor')} ({vnni} VNNI)"


def _captions(split: str, number: int) -> list[str]:
    """Of the starter's world."""
    return [prompt.text for prompt in router_prompts({split: number})]


def main(argv: Sequence[str] | None = None) -> int:
    """The stage's command; exit code 0."""
    parser = argparse.ArgumentParser(
        "edge-export precision",
        description=(__doc__ or "").split("\n")[0],
        epilog="Meanwhile all forms, six for a model of three parts, lie in the folder for temporary files; TMPDIR "
        "names another.",
    )
    parser.add_argument("bundle", type=Path, nargs="?", default=STARTER_BUNDLE, help="default: the starter's")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts in UTF-8, one a line; default: captions of the starter's world",
    )
    parser.add_argument(
        "--number", type=at_least(1), default=PROMPTS, help="how many of them at most (default: %(default)s)"
    )
    parser.add_argument("--judge", help="a CLIP: folder or hub id; default: the starter's")
    parser.add_argument("--out", type=Path, help=f"default: {OUT}")
    options = parser.parse_args(argv)
    out = options.out or default_output(OUT, BEGINS)
    check_output(out)
    starter = options.bundle.resolve() == STARTER_BUNDLE.resolve()
    if not starter and not (options.prompts and options.judge):
        raise ExportError(
            "the starter's captions and judge know nothing but the starter's world: name prompts with --prompts FILE, "
            "and a CLIP with --judge"
        )
    prompts = (
        [text for _, text in numbered_lines(options.prompts)][: options.number]
        if options.prompts
        else _captions("test", options.number)
    )
    calibration = _captions("train", CALIBRATION) if starter else CALIBRATION_PROMPTS
    judge = Judge(options.judge or STARTER_JUDGE)
    found = measure(options.bundle, forms(Bundle.open(options.bundle)), prompts, calibration, judge)
    command = " ".join(("edge-export precision", *(sys.argv[1:] if argv is None else argv)))
    write_output(out, report(options.bundle, found, command))
    console.print(f"written to {out}")
    return 0
