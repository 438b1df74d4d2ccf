"""`cloud-server`: the command line."""

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
    import logging
    from contextlib import suppress
    from typing import NoReturn

    from cloud_server import log, settings, version
    from cloud_server.errors import DeviceLost, StartRefused
finally:
    signal.signal(signal.SIGINT, _before)

DESCRIPTION = "Hosts a large text-to-image model for the edge agents that route prompts to it."

# Read by torch's OpenMP when torch is imported. Threads that spin while they wait for each other take the cores from
# those that they wait for: beside one busy core of two, an image then took four times as long, or forty.
THREADS_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

SERVE_EPILOG = """\
Every option is also an environment variable (--max-queue is CLOUD_SERVER_MAX_QUEUE) and a key of the TOML
file given by --config (max_queue = 8). Options beat the environment, the environment beats the file.

examples:
  cloud-server serve
      the starter model on 127.0.0.1:50052, for an edge agent on the same machine
  cloud-server serve --model ./my-pipeline --price-micro-usd 4000
      a folder written by a diffusers pipeline's save_pretrained(), at 0.4 cents an image
  cloud-server serve --listen 0.0.0.0:443 --tls-cert chain.pem --tls-key key.pem --tokens tokens.txt
      for other machines; tokens.txt has a line 'TENANT TOKEN' for each caller

SIGTERM, Ctrl-C and a terminal that closes let requests in flight finish (--grace-s); a second SIGTERM or
Ctrl-C stops them at their next step. On Windows Ctrl-Break does what SIGTERM does elsewhere.
Exit codes: 0 stopped when told to, 1 a fault of the program itself, 2 bad usage or could not start (the message says
why), 3 a model's hub not reached, no memory for the model, the device busy or lost, no room for the journal, or another
server has it: starting again may help, 130 Ctrl-C in its first moments.
"""


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="cloud-server", description=DESCRIPTION)
    top.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="load a model and serve it over gRPC",
        description="Loads a diffusers text-to-image pipeline and serves it over gRPC, one image at a time.",
        epilog=SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    settings.add_flags(serve)
    digest = commands.add_parser(
        "digest",
        help="print a model's digest",
        description="Prints a model's digest, as GetModel answers it: what a router is calibrated for.",
    )
    digest.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        default=os.environ.get(settings.ENVIRONMENT_PREFIX + "MODEL") or str(settings.STARTER),
        help="as for serve",
    )
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code. A server that stopped ends the process with it."""
    try:
        parsed = parser().parse_args(arguments)
        if parsed.command == "digest":
            from cloud_server.model import open_model

            return _print(open_model(parsed.model).digest)
        _serve(settings.resolve(vars(parsed), os.environ))
    except StartRefused as refusal:
        return _complain(refusal.message, refusal.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED


def _print(line: str) -> int:
    try:
        print(line, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in its buffer
        if isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL):
            return 0  # whoever read it has enough; the second is what Windows calls it
        return _complain(f"the output cannot be written: {error.strerror}")
    return 0


def _complain(message: str, code: int = 2) -> int:
    """On standard error, where it takes a line; `print` would take a closed one's None for standard output."""
    if sys.stderr is not None:
        with suppress(OSError):  # the exit code says it, too
            print(f"cloud-server: {message}", file=sys.stderr)
    return code


def _serve(chosen: settings.Settings) -> NoReturn:
    log.configure(as_json=chosen.log_format == "json")
    for advice in settings.unknown(os.environ):
        log.events(__name__).warning("advice", do=advice)
    signal.signal(signal.SIGINT, _interrupted)  # until the server takes it over
    for name, value in THREADS_SLEEP.items():
        os.environ.setdefault(name, value)
    from cloud_server.server import run

    code = 0
    try:
        asyncio.run(run(chosen))
    except DeviceLost as lost:
        logging.shutdown()
        code = _complain(lost.message, lost.exit_code)
    finally:
        logging.shutdown()  # before anything else is said
    # Everything is closed. Taking torch down costs a second and more, and might hang or crash where the device is lost,
    # or the loader's or the model's thread is deep in native code.
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
