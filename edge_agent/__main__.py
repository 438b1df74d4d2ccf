"""`edge-agent`: the command line."""

from __future__ import annotations

import os
import signal
import sys

from edge_agent.interrupt import INTERRUPTED, interrupted, interruptible

# Read by gRPC when it is imported. It has words of its own, such as for a stranger's handshake that fails, which are no
# lines of our log, and where nobody reads standard error the threads that serve would wait there.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

with interruptible():
    import argparse
    import asyncio
    import errno
    import io
    import logging
    import secrets
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime
    from typing import Any

    from edge_agent import bench, image_file, log, memory, models, route, settings, version
    from edge_agent.client import BAD_INPUT, BROKEN, DONE, UNREACHABLE, CallFailed, Received
    from edge_agent.errors import (
        BundleError,
        Busy,
        DeviceNotReady,
        InvalidRequest,
        LedgerError,
        PullFailed,
        RouteT2IError,
        SourceUnreachable,
        StartRefused,
        StoreError,
    )
    from edge_agent.facts import budget_facts, image_facts
    from edge_agent.image import Progress
    from edge_agent.money import dollars, parse_dollars
    from edge_agent.policy import Decision
    from edge_agent.request import MAX_SEED, Routing, check_request_id
    from edge_agent.store import STARTER_NAME
    from edge_agent.terminal import (
        add_app,
        add_command,
        add_image_options,
        add_timeout,
        client,
        on_terminal,
        print_facts,
        print_json,
        print_table,
        remark,
        whole_number,
    )

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

generate, quota and status ask a running daemon; so does route where there is one. They find it by --agent, else by the
environment variable EDGE_AGENT_ADDRESS, else at the default socket. `edge-agent COMMAND --help` has examples of each.

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
may or can take its place. On Windows Ctrl-Break does what SIGTERM does elsewhere.
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

    _add_generate(commands)
    route.add_command(commands)

    quota = add_command(
        commands,
        "quota",
        _quota,
        "show the budgets and what is left of them",
        "--json prints one object a line: name, window, cap_micro_usd, spent_micro_usd, reserved_micro_usd,\n"
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
    bench.add_command(commands)
    return top


def _add_generate(commands: Any) -> None:
    generate = add_command(commands, "generate", _generate, "make an image", GENERATE_EPILOG)
    generate.add_argument("prompt", metavar="PROMPT", help="what the picture shows")
    generate.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="file to write; - is standard output (default: ID.png, ID being new)",
    )
    generate.add_argument(
        "--seed", type=whole_number(MAX_SEED), metavar="N", help="same seed, same image (default: drawn)"
    )
    wish = generate.add_mutually_exclusive_group()
    wish.add_argument("--local-only", action="store_true", help="the prompt does not leave this device")
    wish.add_argument("--cloud-only", action="store_true", help="from the cloud or not at all")
    generate.add_argument("--negative-prompt", metavar="TEXT", help="what the picture should not show")
    add_image_options(generate)
    generate.add_argument("--max-price", type=_money, metavar="USD", help="most that this image may cost")
    generate.add_argument(
        "--request-id",
        metavar="ID",
        help="name of this request (default: drawn); the same again brings the image that it has paid for",
    )
    add_app(generate)
    add_timeout(generate)


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
        if _nowhere():
            return _complain("the working directory is not there any more; change to another", BAD_INPUT)
        if error.filename is not None or command == "serve":
            raise
        _drop_output()
        if os.name == "nt" and error.errno == errno.EINVAL:  # as Windows calls a pipe whose reader is gone
            return DONE
        return _complain(f"the output cannot be written: {error.strerror}; send it elsewhere", BAD_INPUT)
    except KeyboardInterrupt:
        return INTERRUPTED


def _nowhere() -> bool:
    """Whether the working directory was removed."""
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return True
    return False


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
        log.events(__name__).warning("advice", do=advice)
    memory.share_one_heap()
    sys.setswitchinterval(SWITCH_S)
    signal.signal(signal.SIGINT, interrupted)  # until the daemon takes it over
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
    request_id = options.request_id or secrets.token_hex(16)
    fields = {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "app": options.app,
        "request_id": request_id,
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
    try:
        for event in _shown(client(options).generate(routing=routing, **given)):
            if isinstance(event, Decision):
                decision = event
            elif isinstance(event, Received):
                received = event
        if decision is None or received is None:
            raise CallFailed("the daemon sent an image without its decision", BROKEN)
        file = image_file.write(received, target)
    except RouteT2IError as error:
        if _is_lost(error, decision, received):
            error.message += (
                f"; with --request-id {request_id} an image that the cloud has made comes again, for nothing"
            )
        raise
    if received.fallback_error:
        remark(f"made on this device, because {received.fallback_error}")
    if options.json:
        print_json(image_facts(decision, received, file))
    elif target is not image_file.STANDARD_OUTPUT:
        cost = f" for {dollars(received.cost_micro_usd)}" if received.cost_micro_usd else ""
        seconds = received.timings_ms.get("total", 0.0) / 1e3
        print(
            f"{file}: {received.width}x{received.height}, seed {received.seed}, by the {received.served_by} "
            f"({decision.reason.value}){cost}, {seconds:.2f} s"
        )
    return DONE


def _is_lost(error: RouteT2IError, decision: Decision | None, received: Received | None) -> bool:
    """Whether an image that may have been paid for did not come, or cannot be written."""
    if received is not None:
        return received.served_by == "cloud"
    broke_off = isinstance(error, CallFailed) and error.exit_code in (BROKEN, UNREACHABLE)
    return broke_off and decision is not None and decision.route == "cloud"


def _quota(options: argparse.Namespace) -> int:
    budgets, rates = client(options).quota(options.app)
    if options.json:
        for budget in budgets:
            print_json(budget_facts(budget))
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
                    (rate.name, str(rate.calls), str(rate.max_calls), f"{rate.per_seconds:.10g}")
                    for rate in rates
                ),
            )
    return DONE


def _status(options: argparse.Namespace) -> int:
    facts = client(options).status()
    if options.json:
        print_json(facts)
    else:
        facts["providers"] = [
            f"{each['name']}: {each['state'].replace('_', ' ')}{each['reason'] and ', ' + each['reason']}"
            for each in facts["providers"]
        ]
        since = datetime.fromtimestamp(facts["loaded_since"]).astimezone()
        facts["loaded_since"] = since.isoformat(" ", "seconds")
        print_facts(facts)
    return DONE


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
