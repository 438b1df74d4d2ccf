"""`edge-agent route`: where prompts would go, and why, asked of the daemon or of a bundle in this process."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from edge_agent import settings, terminal
from edge_agent.client import DONE
from edge_agent.errors import InvalidRequest, RouteT2IError
from edge_agent.facts import decision_facts
from edge_agent.interrupt import interruptible
from edge_agent.policy import Decision, decide
from edge_agent.request import ImageRequest, Limits, Privacy, Routing, validate
from edge_agent.terminal import add_app, add_timeout, client, print_json, print_table, remark

EPILOG = """\
examples:
  edge-agent route "a red apple" "three owls left of a tiny guitar at night"
  edge-agent route - --json < prompts.txt
  edge-agent route --explain "three strawberries on white"

Nothing is generated, reserved or sent. With --bundle, --routing-rate or --config, or where no daemon runs and neither
--agent nor EDGE_AGENT_ADDRESS names one, the bundle is loaded in this process and the answer is the prediction alone:
a cloud within reach and no quota are taken for granted.

--explain deletes each token in turn and reads the prompt again, so it takes as long as a decision for each of them.
What moves PRS most, without it, decided most. Of a prompt that is longer than the model reads, no word moves up.

--json prints one object a line: prompt, route, reason, prs, alpha, edge_quality, cloud_quality, tokens, quota,
timings_ms, unfamiliar. A token has its text, its pull on each metric's gap and, with --explain, prs_without, otherwise
null. `unfamiliar` lists the tokens that the predictor has not learnt of: with any of them the prediction is a guess.
"""


def add_command(commands: Any) -> None:
    """Adds `route` to the command line."""
    route = terminal.add_command(commands, "route", _route, "say where prompts would go, and why", EPILOG)
    route.add_argument(
        "prompts", metavar="PROMPT", nargs="+", help="a prompt; - reads one a line from standard input"
    )
    route.add_argument(
        "--explain",
        action="store_true",
        help="say what PRS would be without each token; reads the prompt for each",
    )
    settings.add_flags(route, ("bundle", "routing_rate"))
    add_app(route)
    add_timeout(route)


def _route(options: argparse.Namespace) -> int:
    prompts = _Prompts(options.prompts)
    try:
        decisions = _decisions(options, prompts)
        if options.json:
            for prompt, decision in decisions:
                print_json(decision_facts(prompt, decision))
        elif options.explain:
            for prompt, decision in decisions:
                _print_explained(prompt, decision)
        else:
            columns = ("prompt", "PRS", "alpha", "route", "reason", "ms")
            print_table(columns, (_row(prompt, decision) for prompt, decision in decisions))
    except RouteT2IError as error:
        if prompts.line:  # of a long file, where to look and from where to go on
            error.message = f"line {prompts.line} of standard input: {error.message}"
        raise
    return DONE


def _decisions(options: argparse.Namespace, prompts: Iterable[str]) -> Iterator[tuple[str, Decision]]:
    """Each prompt with the daemon's decision, or this process's."""
    agent = client(options)
    own_terms = any(name in options for name in ("bundle", "routing_rate", "config"))
    named = bool(options.agent or os.environ.get(settings.ADDRESS_VARIABLE))
    if own_terms or (not named and not agent.reachable()):
        return _decided_here(options, prompts)
    return ((prompt, agent.route(prompt, app=options.app, explain=options.explain)) for prompt in prompts)


def _row(prompt: str, decision: Decision) -> tuple[str, ...]:
    def rounded(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    took_ms = f"{decision.timings_ms.get('total', 0):.1f}"
    prs, alpha = rounded(decision.prs), rounded(decision.alpha)
    return prompt, prs, alpha, decision.route, decision.reason.value, took_ms


def _print_explained(prompt: str, decision: Decision) -> None:
    print(f"{prompt}\n  {decision.route} ({decision.reason.value})", end="")
    if decision.prs is None or decision.alpha is None:
        print("; nothing to explain: there is no calibration for these models")
        return
    print(f", PRS {decision.prs:.3f}, alpha {decision.alpha:.3f}")
    if decision.unfamiliar:
        print(f"  a guess, as the predictor has not learnt of: {', '.join(decision.unfamiliar)}")
    moved = [
        (name, token.prs_without, token.prs_without - decision.prs)
        for name, token in zip(
            _distinct([token.text for token in decision.tokens]), decision.tokens, strict=True
        )
        if token.prs_without is not None
    ]
    if not decision.tokens:
        print("  nothing to delete: the model on this device reads nothing in it")
        return
    if not moved:
        print("  nothing was measured: the daemon is older than this command; restart it")
        return
    print_table(
        ("  without", "PRS", "moved"),
        (
            (f"  {text}", f"{prs:.3f}", f"{by:+.3f}")
            for text, prs, by in sorted(moved, key=lambda one: -abs(one[2]))
        ),
    )


def _distinct(texts: Sequence[str]) -> Iterator[str]:
    """The texts, each that stands there more than once with which of them it is."""
    often = Counter(texts)
    seen: Counter[str] = Counter()
    for text in texts:
        seen[text] += 1
        yield f"{text} ({seen[text]} of {often[text]})" if often[text] > 1 else text


def _decided_here(options: argparse.Namespace, prompts: Iterable[str]) -> Iterator[tuple[str, Decision]]:
    """Decisions of a bundle loaded in this process."""
    with interruptible():
        from edge_agent.bundle import Bundle
        from edge_agent.diffusion.sessions import Runtime
        from edge_agent.reader import Reader

    chosen = settings.resolve(vars(options), os.environ)
    bundle = Bundle.open(chosen.bundle_folder)
    remark(f"without a daemon, so by prediction alone, with {bundle.folder}")
    reader = Reader.open(bundle, chosen.routing_rate, Runtime(threads=chosen.threads or None))
    if reader.advice:
        remark(reader.advice)
    limits = Limits(
        bundle.manifest.sizes, bundle.manifest.steps, max_prompt_chars=chosen.max_prompt_characters
    )
    for prompt in prompts:
        validate(ImageRequest(request_id="route", prompt=prompt), limits)
        reading = reader.read(prompt)
        route, reason = decide(
            reading.prs,
            reader.alpha,
            routing=Routing.AUTO,
            privacy=Privacy.NORMAL,
            cloud_available=True,
            quota_allows=True,
        )
        decision = reading.decision(route, reason, reader.alpha)
        if options.explain and reader.alpha is not None:
            decision = decision.explained(
                [reader.prs_without(reading.tokens, position) for position in reading.tokens.own]
            )
        yield prompt, decision


class _Prompts:
    """The prompts that a command is given, those of standard input in place of "-": one a line that is not empty."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self.line = 0  # of standard input, that of the prompt in hand; 0 for one that was an argument

    def __iter__(self) -> Iterator[str]:
        for argument in self._arguments:
            if argument == "-":
                yield from self._lines()
                self.line = 0
            else:
                yield argument

    def _lines(self) -> Iterator[str]:
        if sys.stdin is None:
            raise InvalidRequest("standard input is closed, so no prompt can be read from it")
        # A byte order mark is no part of the first prompt.
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # type: ignore[union-attr]
        try:
            for number, line in enumerate(sys.stdin, 1):
                if line.strip():
                    self.line = number
                    yield line.rstrip("\r\n")
        except OSError as error:
            raise InvalidRequest(
                f"standard input cannot be read: {error.strerror}; send the prompts with < FILE, or name them"
            ) from error
