"""`edge-agent`: the command line."""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130  # exit code, after Ctrl-C


def _interrupted(*_: object) -> None:
    """Ends the program, which has nothing open yet. An exception would be lost where a native library is imported, or
    come out of it as another.
    """
    os._exit(INTERRUPTED)


# Read by gRPC when it is imported. It has words of its own, such as for a stranger's handshake that fails, which are no
# lines of our log, and where nobody reads standard error the threads that serve would wait there.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

_before = signal.signal(signal.SIGINT, _interrupted)
try:
    import argparse
    import asyncio
    import errno
    import io
    import logging
    from collections import Counter
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import contextmanager
    from datetime import datetime
    from typing import Any

    from edge_agent import image_file, log, memory, models, settings, version
    from edge_agent.client import BAD_INPUT, BROKEN, DONE, REFUSED, UNREACHABLE, CallFailed, Received
    from edge_agent.errors import (
        BundleError,
        Busy,
        DeviceNotReady,
        InvalidRequest,
        LedgerError,
        PolicyConflict,
        PullFailed,
        QuotaExhausted,
        RouteT2IError,
        SourceUnreachable,
        StartRefused,
        StoreError,
    )
    from edge_agent.image import Progress
    from edge_agent.money import dollars, parse_dollars
    from edge_agent.policy import Decision, decide
    from edge_agent.quota import BudgetState
    from edge_agent.request import (
        MAX_SEED,
        ImageRequest,
        Limits,
        Privacy,
        Routing,
        check_request_id,
        validate,
    )
    from edge_agent.store import STARTER_NAME
    from edge_agent.superiority import METRICS
    from edge_agent.terminal import (
        add_command,
        client,
        on_terminal,
        print_facts,
        print_json,
        print_table,
        remark,
    )
finally:
    signal.signal(signal.SIGINT, _before)

SWITCH_S = 1e-4
"""How long a thread may keep Python to itself while the daemon's others wait for it. The device's thread wants it for
microseconds between two runs; by Python's default of 5 ms an image waited until its decision had been told."""

DESCRIPTION = """\
Makes images from prompts on this device, and asks a cloud server for those that a larger model is predicted to do
better, as far as the quota allows.
"""

EPILOG = """\
a first image, in two terminals:
  edge-agent serve
  edge-agent generate "a red apple on a beach" -o apple.png

Commands other than serve talk to a running daemon. They find it by --agent, else by the environment variable
EDGE_AGENT_ADDRESS, else at the default socket. `edge-agent COMMAND --help` has examples of each.

exit codes: 0 done, 1 a fault of the program itself, 2 bad usage or input, or a damaged model, 3 daemon, cloud or
source of a model not reachable or busy, a provider that is named busy or lost, or no room for the ledger or in memory,
4 refused by quota or policy, 130 Ctrl-C (0 from serve, except in its first moments)
"""

SERVE_EPILOG = """\
Every option is also an environment variable (--max-price is EDGE_AGENT_MAX_PRICE) and a key of the TOML file given by
--config (max_price = 0.01). Options beat the environment, the environment beats the file.

examples:
  edge-agent serve
      the starter model, everything on this device
  edge-agent serve --cloud 127.0.0.1:50052 --routing-rate 0.3 --budget 0.50
      up to 30 % of the prompts may go to the cloud, and at most 50 cents a day
  edge-agent serve --cloud images.example.com:443 --cloud-token token.txt --budget 1/day,20/month --rate 10/60
      another machine's cloud server over TLS, two budgets, and no more than ten calls a minute

SIGTERM, Ctrl-C and a terminal that closes let images in the making finish (--grace-s); a second SIGTERM or
Ctrl-C stops them at their next step. The exit code is 0 either way, and 3 where a device was lost and nothing else
may or can take its place. On Windows Ctrl-Break does what SIGTERM does
elsewhere.
"""

GENERATE_EPILOG = """\
examples:
  edge-agent generate "three owls left of a tiny guitar at night" -o owls.png --seed 7
  edge-agent generate "my diary, page one" --local-only
  edge-agent generate "a red apple" -o - | feh -

--json prints one object: request_id, route, served_by, reason, fallback, prs, alpha, seed, width, height, file, sha256,
cost_micro_usd, timings_ms. `route` is what was decided, `served_by` who made the image; where they differ, `fallback`
says what went wrong in the cloud, otherwise it is null. Not together with -o -, which is standard output's, too.
"""

ROUTE_EPILOG = """\
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

_EXIT_CODES: dict[type[RouteT2IError], int] = {
    StartRefused: BAD_INPUT,
    DeviceNotReady: UNREACHABLE,
    BundleError: BAD_INPUT,
    LedgerError: BAD_INPUT,
    StoreError: BAD_INPUT,
    PullFailed: BAD_INPUT,
    SourceUnreachable: UNREACHABLE,
    Busy: UNREACHABLE,
    InvalidRequest: BAD_INPUT,
    PolicyConflict: REFUSED,
    QuotaExhausted: REFUSED,
}

_PASSING = ("disk is full", "No space left", "disk I/O", "locked")
"""SQLite's words, and the system's, for what may keep the ledger shut now and not in a while: a full disk, or a daemon
that is just ending. A service manager should try again."""


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="edge-agent",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    serve = add_command(commands, "serve", _serve, "start the daemon", SERVE_EPILOG, client=False)
    settings.add_flags(serve)

    generate = add_command(commands, "generate", _generate, "make an image", GENERATE_EPILOG)
    generate.add_argument("prompt", metavar="PROMPT", help="what the picture shows")
    generate.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="file to write; - is standard output (default: ID.png, ID being new)",
    )
    generate.add_argument(
        "--seed", type=_number(MAX_SEED), metavar="N", help="same seed, same image (default: drawn)"
    )
    wish = generate.add_mutually_exclusive_group()
    wish.add_argument("--local-only", action="store_true", help="the prompt does not leave this device")
    wish.add_argument("--cloud-only", action="store_true", help="from the cloud or not at all")
    generate.add_argument("--negative-prompt", metavar="TEXT", help="what the picture should not show")
    generate.add_argument(
        "--steps", type=_number(2**32 - 1), metavar="N", help="denoising steps; default: the model's"
    )
    generate.add_argument("--guidance-scale", type=float, metavar="X", help="default: the model's")
    for side in ("width", "height"):
        generate.add_argument(
            f"--{side}",
            type=_number(2**32 - 1),
            metavar="PIXELS",
            help="one that the model makes (`edge-agent models show edge`); default: its first",
        )
    generate.add_argument("--max-price", type=_money, metavar="USD", help="most that this image may cost")
    generate.add_argument("--request-id", metavar="ID", help="name of this request (default: drawn)")
    _app(generate)
    _timeout(generate)

    route = add_command(commands, "route", _route, "say where prompts would go, and why", ROUTE_EPILOG)
    route.add_argument(
        "prompts", metavar="PROMPT", nargs="+", help="a prompt; - reads one a line from standard input"
    )
    route.add_argument(
        "--explain",
        action="store_true",
        help="say what PRS would be without each token; reads the prompt for each",
    )
    settings.add_flags(route, ("bundle", "routing_rate"))
    _app(route)
    _timeout(route)

    quota = add_command(
        commands,
        "quota",
        _quota,
        "show the budgets and what is left of them",
        "--json prints one object a line: name, window, cap_micro_usd, spent_micro_usd, reserved_micro_usd, "
        "remaining_micro_usd. Rates are in the table only.\n",
    )
    quota.add_argument("--app", default="", metavar="NAME", help="only the budgets that count for this app")

    add_command(
        commands,
        "status",
        _status,
        "show what the daemon is doing, and what to do when it does not route",
        "--json prints one object; `advice` lists what is not as it should be.\n",
    )

    models.add_commands(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of characters that its encoding lacks
    command = ""
    try:
        options = parser().parse_args(arguments)
        command = options.command
        code: int = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written shall be found here and not by the interpreter
        return code
    except CallFailed as error:
        return _complain(error.message, error.exit_code)
    except RouteT2IError as error:
        return _complain(error.message, _exit_code(error))
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        return _complain(
            "there is no onnxruntime; install one: pip install 'routet2i[cpu]' or [gpu], on a Jetson NVIDIA's wheel",
            BAD_INPUT,
        )
    except BrokenPipeError:  # whoever read our output has enough
        _drop_output()
        return DONE
    except OSError as error:
        if error.filename is not None or command == "serve":
            raise
        _drop_output()
        if os.name == "nt" and error.errno == errno.EINVAL:  # as Windows calls a pipe whose reader is gone
            return DONE
        return _complain(f"the output cannot be written: {error.strerror}; send it elsewhere", BAD_INPUT)
    except KeyboardInterrupt:
        return INTERRUPTED


@contextmanager
def _interruptible() -> Iterator[None]:
    """Where libraries are imported while nothing is open: see `_interrupted`."""
    before = signal.signal(signal.SIGINT, _interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _drop_output() -> None:
    """Nothing more is written, also not what is still in a buffer when the program ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_code(error: RouteT2IError) -> int:
    """That of the error's class, else of its nearest base."""
    if isinstance(error, LedgerError) and any(words in str(error.__cause__) for words in _PASSING):
        return UNREACHABLE
    return next((_EXIT_CODES[cls] for cls in type(error).__mro__ if cls in _EXIT_CODES), BROKEN)


def _serve(options: argparse.Namespace) -> int:
    chosen = settings.resolve(vars(options), os.environ)
    log.configure(as_json=chosen.log_format == "json")
    for advice in settings.unknown(os.environ):
        logging.getLogger("edge_agent").warning("advice", extra={"fields": {"do": advice}})
    memory.share_one_heap()
    sys.setswitchinterval(SWITCH_S)
    signal.signal(signal.SIGINT, _interrupted)  # until the daemon takes it over
    from edge_agent.daemon import run  # the commands need none of it

    try:
        daemon = asyncio.run(run(chosen))
    except BundleError as error:
        if not chosen.bundle and chosen.store.current != STARTER_NAME:
            where = f" --models {chosen.store.folder}" if chosen.models else ""
            error.message += f"; `edge-agent models use {STARTER_NAME}{where}` goes back"
        raise
    finally:
        logging.shutdown()  # before anything else is said
    code = DONE if daemon.lost is None else _complain(daemon.lost.message, _exit_code(daemon.lost))
    if daemon.still_working or daemon.lost is not None:
        # Everything is closed. A thread that is left is deep in native code that cannot be interrupted and must not run
        # while the interpreter is being taken down, and what lets go of a lost device may hang.
        os._exit(code)
    return code


def _generate(options: argparse.Namespace) -> int:
    if options.json and options.output == "-":
        raise InvalidRequest(
            "--json and -o - would both write to standard output; name a file with -o, or leave out --json"
        )
    target = image_file.checked(_file(options))
    fields = {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "app": options.app,
        "request_id": options.request_id,
        "seed": options.seed,
        "width": options.width,
        "height": options.height,
        "steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "max_price_micro_usd": options.max_price,
    }
    routing = Routing.AUTO
    if options.local_only:
        routing = Routing.LOCAL_ONLY
    elif options.cloud_only:
        routing = Routing.CLOUD_ONLY
    given = {name: value for name, value in fields.items() if value is not None}
    decision, received = None, None
    for event in _shown(client(options).generate(routing=routing, **given)):
        if isinstance(event, Decision):
            decision = event
        elif isinstance(event, Received):
            received = event
    if decision is None or received is None:
        raise CallFailed("the daemon sent an image without its decision", BROKEN)
    file = image_file.write(received, target)
    if received.fallback_error:
        remark(f"made on this device, because {received.fallback_error}")
    if options.json:
        print_json(_image_facts(decision, received, file))
    elif target is not image_file.STANDARD_OUTPUT:
        cost = f" for {dollars(received.cost_micro_usd)}" if received.cost_micro_usd else ""
        seconds = received.timings_ms.get("total", 0.0) / 1e3
        print(
            f"{file}: {received.width}x{received.height}, seed {received.seed}, by the {received.served_by} "
            f"({decision.reason.value}){cost}, {seconds:.2f} s"
        )
    return DONE


def _route(options: argparse.Namespace) -> int:
    prompts = _Prompts(options.prompts)
    try:
        return _routed(options, prompts)
    except RouteT2IError as error:
        if prompts.line:  # of a long file, where to look and from where to go on
            error.message = f"line {prompts.line} of standard input: {error.message}"
        raise


def _routed(options: argparse.Namespace, prompts: Iterable[str]) -> int:
    agent = client(options)
    own_terms = any(name in options for name in ("bundle", "routing_rate", "config"))
    named = bool(options.agent or os.environ.get(settings.ADDRESS_VARIABLE))
    if own_terms or (not named and not agent.reachable()):
        decisions = _routed_here(options, prompts)
    else:
        decisions = (
            (prompt, agent.route(prompt, app=options.app, explain=options.explain)) for prompt in prompts
        )
    if options.json:
        for prompt, decision in decisions:
            print_json(_decision_facts(prompt, decision))
    elif options.explain:
        for prompt, decision in decisions:
            _print_explained(prompt, decision)
    else:
        print_table(
            ("prompt", "PRS", "alpha", "route", "reason", "ms"),
            (
                (
                    prompt,
                    _rounded(decision.prs),
                    _rounded(decision.alpha),
                    decision.route,
                    decision.reason.value,
                    f"{decision.timings_ms.get('total', 0):.1f}",
                )
                for prompt, decision in decisions
            ),
        )
    return DONE


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


def _routed_here(options: argparse.Namespace, prompts: Iterable[str]) -> Iterator[tuple[str, Decision]]:
    """Decisions of a bundle loaded in this process."""
    with _interruptible():
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


def _quota(options: argparse.Namespace) -> int:
    budgets, rates = client(options).quota(options.app)
    if options.json:
        for budget in budgets:
            print_json(_budget_facts(budget))
    else:
        print_table(
            ("budget", "window", "cap", "spent", "reserved", "remaining"),
            (
                (
                    budget.name,
                    budget.window,
                    dollars(budget.cap_micro_usd),
                    dollars(budget.spent_micro_usd),
                    dollars(budget.reserved_micro_usd),
                    dollars(budget.remaining_micro_usd),
                )
                for budget in budgets
            ),
        )
        if rates:
            print_table(
                ("rate", "calls", "at most", "in seconds"),
                (
                    (rate.name, str(rate.calls), str(rate.max_calls), f"{rate.per_seconds:g}")
                    for rate in rates
                ),
            )
    return DONE


def _status(options: argparse.Namespace) -> int:
    facts = client(options).status()
    if not options.json:
        facts["providers"] = [
            f"{each['name']}: {each['state'].replace('_', ' ')}{each['reason'] and ', ' + each['reason']}"
            for each in facts["providers"]
        ]
        since = datetime.fromtimestamp(facts["loaded_since"]).astimezone()
        facts["loaded_since"] = since.isoformat(" ", "seconds")
    return print_facts(facts, options)


def _app(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--app", default="default", metavar="NAME", help="in whose name to ask (default: default)"
    )


def _timeout(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up after so long (default: never)"
    )


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


def _file(options: argparse.Namespace) -> str | None:
    """The file that is asked for; None where only the daemon can name it."""
    output: str | None = options.output
    if output is None and options.request_id:
        check_request_id(options.request_id)
        output = f"{options.request_id}.png"
    return output


def _shown(events: Iterable[Decision | Progress | Received]) -> Iterator[Decision | Progress | Received]:
    """The events, with a bar on the terminal; nothing is shown in a pipe."""
    if not on_terminal(sys.stderr):
        yield from events
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("routing", total=None)
        for event in events:
            if isinstance(event, Decision):
                bars.update(bar, description=f"{event.route} ({event.reason.value})")
            elif isinstance(event, Progress):
                bars.update(bar, completed=event.step, total=event.steps)
            yield event


def _image_facts(decision: Decision, received: Received, file: str) -> dict[str, Any]:
    return {
        "request_id": received.request_id,
        "route": decision.route,
        "served_by": received.served_by,
        "reason": decision.reason.value,
        "fallback": received.fallback_error or None,
        "prs": decision.prs,
        "alpha": decision.alpha,
        "seed": received.seed,
        "width": received.width,
        "height": received.height,
        "file": file,
        "sha256": received.sha256,
        "cost_micro_usd": received.cost_micro_usd,
        "timings_ms": received.timings_ms,
    }


def _decision_facts(prompt: str, decision: Decision) -> dict[str, Any]:
    def metrics(values: tuple[float, ...]) -> dict[str, float]:
        return dict(zip(METRICS, values, strict=False))  # empty where no predictor ran

    return {
        "prompt": prompt,
        "route": decision.route,
        "reason": decision.reason.value,
        "prs": decision.prs,
        "alpha": decision.alpha,
        "edge_quality": metrics(decision.edge_quality),
        "cloud_quality": metrics(decision.cloud_quality),
        "tokens": [
            {"text": token.text, "pull": metrics(token.pull), "prs_without": token.prs_without}
            for token in decision.tokens
        ],
        "quota": {budget.name: _budget_facts(budget) for budget in decision.quota},
        "timings_ms": dict(decision.timings_ms),
        "unfamiliar": list(decision.unfamiliar),
    }


def _budget_facts(budget: BudgetState) -> dict[str, Any]:
    return {
        "name": budget.name,
        "window": budget.window,
        "cap_micro_usd": budget.cap_micro_usd,
        "spent_micro_usd": budget.spent_micro_usd,
        "reserved_micro_usd": budget.reserved_micro_usd,
        "remaining_micro_usd": budget.remaining_micro_usd,
    }


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


MAX_DIGITS = 1000  # of a number; Python reads none of thousands


def _number(maximum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > MAX_DIGITS or int(text) > maximum:
            raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {maximum}, not {text[:40]!r}")
        return int(text)

    return number


def _money(text: str) -> int:
    try:
        return parse_dollars(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _complain(message: str, code: int) -> int:
    remark(message)
    return code


if __name__ == "__main__":
    sys.exit(main())
