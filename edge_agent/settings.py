"""The settings of `edge-agent serve`. Each field of `Settings` is a flag, an environment variable, a TOML key.

`routing_rate` is --routing-rate, EDGE_AGENT_ROUTING_RATE and routing_rate = ... in the file given by --config.
Flags beat the environment, the environment beats the file.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, cast, get_args

from edge_agent.address import is_local, must_be_text, split_address
from edge_agent.budget import Budget, Rate, Window
from edge_agent.errors import InvalidRequest, StartRefused
from edge_agent.money import parse_dollars
from edge_agent.request import check_app
from edge_agent.store import Store

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT_PREFIX = "EDGE_AGENT_"
ADDRESS_VARIABLE = "EDGE_AGENT_ADDRESS"
"""Where clients look for the daemon unless --agent says otherwise."""

STARTER = Path(__file__).parent / "starter"
"""The bundle that comes with the project."""

DEFAULT_BUDGET = "1.00"
"""US dollars a day for all apps together, unless a budget for all apps is given."""

SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103
"""Longest path of a Unix socket: macOS and the BSDs have room for four bytes less than Linux."""

NOT_IN_SOCKET_PATHS = "#?%,"
"""gRPC's clients take an address for a URI, or for several with commas, and would look for the socket elsewhere."""

MAX_THREADS = 1_024
"""More than machines have cores. Each takes memory of its own, and past some number the process cannot begin."""


def expanded(path: str) -> Path:
    """The path, a leading ~ or ~USER being that user's home. Raises StartRefused where no such home is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise StartRefused(f"{path}: no home folder is known for its ~; write the path out") from error


def default_state_folder() -> Path:
    """Where the ledger lies unless --state says otherwise: under XDG_STATE_HOME."""
    return _base_folder("XDG_STATE_HOME", "~/.local/state") / "routet2i" / "edge-agent"


def default_models_folder() -> Path:
    """Where installed models lie unless --models says otherwise: under XDG_DATA_HOME."""
    return _base_folder("XDG_DATA_HOME", "~/.local/share") / "routet2i" / "models"


def default_cache_folder() -> Path:
    """Where what can be made again lies unless --cache says otherwise: under XDG_CACHE_HOME."""
    folder = _base_folder("XDG_CACHE_HOME", "~/.cache") / "routet2i" / "edge-agent"
    return folder / "cache" if os.name == "nt" else folder  # there it may be the ledger's folder


def _base_folder(variable: str, otherwise: str) -> Path:
    """The user's folder that XDG's variable names. Windows has one for all kinds, which stays on the machine."""
    local = os.environ.get("LOCALAPPDATA") if os.name == "nt" else None
    return expanded(os.environ.get(variable) or local or otherwise)


def default_address() -> str:
    """The socket that daemon and clients agree on unless told otherwise; loopback where there are no Unix sockets."""
    if os.name == "nt":
        return "127.0.0.1:50051"
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    # One that is not absolute is to be ignored, says its specification: it would be another for each of both.
    folder = runtime / "edge-agent" if runtime.is_absolute() else default_state_folder() / "socket"
    return f"unix:{folder / 'agent.sock'}"


def socket_address(path: str) -> str:
    """The address of a Unix socket: unix: and its absolute path. Raises ValueError when there can be none."""
    if not path:
        raise ValueError("unix:PATH needs a path")
    if os.name == "nt":
        raise ValueError("Python has no Unix sockets on Windows; use a loopback address: 127.0.0.1:50051")
    absolute = expanded(path).absolute()
    if len(os.fsencode(absolute)) > SOCKET_PATH_BYTES:
        raise ValueError(
            f"a socket's path has at most {SOCKET_PATH_BYTES} bytes, and this one has {len(os.fsencode(absolute))}"
        )
    if wrong := [letter for letter in NOT_IN_SOCKET_PATHS if letter in str(absolute)]:
        raise ValueError(f"a socket's path with {wrong[0]} in it cannot be reached; choose one without")
    return must_be_text(f"unix:{absolute}")


# What a setting may be. Each takes the text of a flag or variable and raises ValueError with a phrase that says what
# is expected.


def _path(value: str) -> str:
    try:
        expanded(value)
    except StartRefused as error:
        raise ValueError(error.message) from error
    return value


def _listen(value: str) -> str:
    if not value:
        return value
    if value.startswith("unix:"):
        return socket_address(value.removeprefix("unix:"))
    if not is_local(value):
        raise ValueError(
            "only this machine's apps may call the daemon: use unix:PATH, or a loopback address such as 127.0.0.1:50051"
        )
    return value


def _cloud(value: str) -> str:
    if value.startswith("unix:"):
        path = _path(value.removeprefix("unix:"))
        if not path:
            raise ValueError("unix:PATH needs a path")
        return must_be_text(f"unix:{expanded(path)}")
    if value and not split_address(value)[1]:
        raise ValueError(f"{value!r}: the port 0 cannot be called")
    return value


def _number(value: str) -> float:
    """NaN, which lies within no bounds, where it is none."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def _share(value: str) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise ValueError("a share between 0 and 1 is expected")
    return number


def _count(value: str) -> int:
    if not value.isdecimal() or len(value) > 10 or int(value) > 2**31 - 1:
        raise ValueError("a whole number, 0 or more, is expected")
    return int(value)


def _count_from_1(value: str) -> int:
    if (count := _count(value)) == 0:
        raise ValueError("a whole number, 1 or more, is expected")
    return count


def _threads(value: str) -> int:
    if (count := _count(value)) > MAX_THREADS:
        raise ValueError(f"a whole number from 0 to {MAX_THREADS} is expected")
    return count


def _seconds(value: str) -> float:
    number = _number(value)
    if not 0 < number <= 1e9:
        raise ValueError("a number of seconds above 0 is expected")
    return number


def _seconds_or_none(value: str) -> float:
    with suppress(ValueError):
        return 0.0 if float(value) == 0 else _seconds(value)
    raise ValueError("a number of seconds is expected, or 0 for good")


def _switch(value: str) -> bool:
    if value.lower() in ("true", "on", "yes", "1"):
        return True
    if value.lower() in ("false", "off", "no", "0"):
        return False
    raise ValueError("true or false is expected")


def _log_format(value: str) -> str:
    if value not in ("text", "json"):
        raise ValueError("text or json is expected")
    return value


def _providers(value: str) -> tuple[str, ...]:
    names = tuple(name.lower() for name in _parts(value))
    if len(set(names)) < len(names):
        raise ValueError("the same provider is given twice")
    if wrong := [name for name in names if not name.isidentifier() or name.endswith("executionprovider")]:
        raise ValueError(
            f"{wrong[0]} is no provider's name; names are like cuda and cpu, with commas between"
        )
    return names


def _apps(value: str) -> tuple[str, ...]:
    names = _parts(value)
    for name in names:
        _check_app(name)
    return names


def _parts(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _budgets(value: str) -> tuple[Budget, ...]:
    """Budgets of `1`, `0.20/hour, 20/month` or `0.50/day@kiosk`: dollars, window (a day where none is named), app.

    Where each is one app's alone, the default one stays: a limit for one app must not lift that of all others.
    """
    budgets: list[Budget] = []
    for part in _parts(value):
        rest, at, app = part.partition("@")
        if at and not app.strip():
            raise ValueError("a budget that ends in @ needs an app's name behind it")
        if at:
            _check_budgets_app(app.strip())
        amount, _, window = rest.partition("/")
        window = window.strip() or "day"
        if window not in get_args(Window):
            raise ValueError(f"a budget's window is one of {', '.join(get_args(Window))}, not {window!r}")
        name = f"{window}@{app.strip()}" if app else window
        if name in [budget.name for budget in budgets]:
            raise ValueError(f"there are two budgets for {name}; give one")
        budgets.append(Budget(name, cast(Window, window), parse_dollars(amount), app.strip() or None))
    if not budgets:  # an empty variable must not mean that there is no limit
        raise ValueError("an amount of US dollars is expected; 0 keeps everything on the edge")
    if all(budget.app for budget in budgets):
        budgets = [*_budgets(DEFAULT_BUDGET), *budgets]
    return tuple(budgets)


def _check_budgets_app(app: str) -> None:
    """Raises ValueError for an app without calls: its budget would limit nothing, and nobody would notice."""
    name, _, window = app.rpartition("/")
    if window in get_args(Window):
        raise ValueError(
            f"the window stands before the app, USD/WINDOW@APP, such as 0.2/{window}@{name or 'kiosk'}"
        )
    _check_app(app)


def _check_app(name: str) -> None:
    """Raises ValueError for what no request can give as its app."""
    try:
        check_app(name)
    except InvalidRequest as error:
        raise ValueError(f"{name!r} is no app's name: {error.message}") from error


def _rates(value: str) -> tuple[Rate, ...]:
    """Rates of `10/60`: at most 10 cloud calls in any 60 seconds."""
    rates = []
    for part in _parts(value):
        calls, slash, seconds = part.partition("/")
        if not slash:
            raise ValueError("CALLS/SECONDS is expected, such as 10/60")
        rates.append(Rate(f"rate {part}", _count(calls.strip()), _seconds(seconds)))
    if len({rate.name for rate in rates}) < len(rates):
        raise ValueError("the same rate is given twice")
    return tuple(rates)


def _setting(default: str, parse: Callable[[str], Any], metavar: str, explanation: str) -> Any:
    return field(
        default_factory=lambda: parse(default),
        metadata={"default": default, "parse": parse, "metavar": metavar, "help": explanation},
    )


@dataclass(frozen=True)
class Settings:
    """Checked settings. Money in micro-dollars, times in seconds."""

    listen: str = _setting(
        "",
        _listen,
        "unix:PATH|HOST:PORT",
        "where apps reach the daemon: a Unix socket, or a loopback address (port 0: a free one); default: "
        "$XDG_RUNTIME_DIR/edge-agent/agent.sock, without that ~/.local/state/routet2i/edge-agent/socket/agent.sock; "
        "on Windows 127.0.0.1:50051",
    )
    cloud: str = _setting(
        "", _cloud, "HOST:PORT", "the cloud server; without one every prompt stays on the edge"
    )
    cloud_ca: str = _setting(
        "",
        _path,
        "FILE",
        "PEM file with the certificates to trust for the cloud server; default: those that come with gRPC, and never "
        "the system's. With it, TLS is used "
        "also towards a cloud server on this machine",
    )
    cloud_token: str = _setting(
        "", _path, "FILE", "file that holds the token which the cloud server knows us by"
    )
    cloud_timeout_s: float = _setting(
        "120", _seconds, "SECONDS", "how long the cloud may take for an image before the edge makes it"
    )
    cloud_connect_timeout_s: float = _setting(
        "5", _seconds, "SECONDS", "how long connecting to the cloud server may take"
    )
    bundle: str = _setting(
        "",
        _path,
        "DIR",
        "the local model: a bundle folder; default: the one chosen with `edge-agent models use`, else the starter "
        "that comes with the project",
    )
    models: str = _setting(
        "",
        _path,
        "DIR",
        "folder of installed models; default: routet2i/models under $XDG_DATA_HOME or ~/.local/share, or on Windows "
        "LOCALAPPDATA",
    )
    routing_rate: float = _setting(
        "0.5", _share, "RHO", "wanted share of prompts in the cloud, 0 to 1; the true share can stay below it"
    )
    follow_prompts: bool = _setting(
        "false",
        _switch,
        "BOOL",
        "whether alpha follows the prompts of this device, so that RHO is a share of them and not of those that the "
        "bundle was calibrated with; keeps their PRS, and no prompts, under --state",
    )
    budget: tuple[Budget, ...] = _setting(
        DEFAULT_BUDGET,
        _budgets,
        "USD_PER_DAY",
        "most to spend in the cloud, in US dollars a day; or several USD/WINDOW[@APP] with commas between, "
        "WINDOW being hour, day, month or total: 1/day,20/month,0.2/day@kiosk; budgets of apps alone leave the "
        "default for all apps together in force",
    )
    pace_budget: bool = _setting(
        "false",
        _switch,
        "BOOL",
        "whether budgets are to last: RHO then falls to what they can pay for until their hour, day or month ends, and "
        "the prompts that gain most go to the cloud; follows the prompts, and keeps how many came when under --state",
    )
    rate: tuple[Rate, ...] = _setting(
        "",
        _rates,
        "CALLS/SECONDS",
        "most cloud calls in any so many seconds, such as 10/60; several with commas",
    )
    max_price: int = _setting(
        "0.01",
        parse_dollars,
        "USD",
        "most that one cloud image may cost, in US dollars; this much is reserved",
    )
    state: str = _setting(
        "",
        _path,
        "DIR",
        "folder of the quota ledger; default: routet2i/edge-agent under $XDG_STATE_HOME or ~/.local/state, or on "
        "Windows LOCALAPPDATA",
    )
    apps: tuple[str, ...] = _setting(
        "", _apps, "APP,APP", "the apps that may call; default: every app, under any name"
    )
    max_queue: int = _setting(
        "64", _count, "N", "images that may wait for this device; more are refused at once"
    )
    max_prompt_characters: int = _setting(
        "2000", _count_from_1, "N", "longest prompt and negative prompt, in characters"
    )
    threads: int = _setting(
        "0",
        _threads,
        "N",
        "threads of a local model, of a small one but one: see docs/settings.md; 0: one a physical core",
    )
    providers: tuple[str, ...] = _setting(
        "",
        _providers,
        "NAME,NAME",
        "what onnxruntime runs the local models on, best first, such as tensorrt,cuda,cpu; default: the best that "
        "works here",
    )
    cache: str = _setting(
        "",
        _path,
        "DIR",
        "folder of what can be made again, such as TensorRT's engines; default: routet2i/edge-agent under "
        "$XDG_CACHE_HOME or ~/.cache, on Windows routet2i/edge-agent/cache under LOCALAPPDATA",
    )
    keep_alive_s: float = _setting(
        "300",
        _seconds_or_none,
        "SECONDS",
        "how long the local models stay in memory after the last request; the next one loads them again; 0: for good",
    )
    png_facts: bool = _setting(
        "true",
        _switch,
        "BOOL",
        "whether images carry prompt, seed, route, model digest and PRS in their text chunks",
    )
    grace_s: float = _setting("30", _seconds, "SECONDS", "how long SIGTERM waits for images in the making")
    log_format: str = _setting("text", _log_format, "FORMAT", "one line a request as text (logfmt) or json")

    @property
    def address(self) -> str:
        """Where to listen. Raises StartRefused where the environment's folders are too deep for a socket."""
        if self.listen:
            return self.listen
        address = default_address()
        try:
            return _listen(address)
        except ValueError as error:
            raise StartRefused(
                f"the default socket {address} cannot be: {error}; choose another with --listen unix:PATH"
            ) from error

    @property
    def bundle_folder(self) -> Path:
        """The bundle to run. Raises StoreError when the chosen model is not there any more."""
        return expanded(self.bundle) if self.bundle else self.store.current_folder

    @property
    def store(self) -> Store:
        """The installed models."""
        return Store(expanded(self.models) if self.models else default_models_folder(), STARTER)

    @property
    def cache_folder(self) -> Path:
        """What can be made again."""
        return expanded(self.cache) if self.cache else default_cache_folder()

    @property
    def ledger_file(self) -> Path:
        """The quota ledger."""
        return self.state_folder / "quota.sqlite3"

    @property
    def state_folder(self) -> Path:
        """Of what outlives the process."""
        return expanded(self.state) if self.state else default_state_folder()


def add_flags(parser: argparse.ArgumentParser, names: tuple[str, ...] | None = None) -> None:
    """Adds --config and one flag for each setting, or for those in `names`; one that is not given leaves no trace."""
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="TOML file with any of the settings"
    )
    for setting in fields(Settings):
        if names is None or setting.name in names:
            default = f" (default: {setting.metadata['default']})" if setting.metadata["default"] else ""
            parser.add_argument(
                flag(setting.name),
                metavar=setting.metadata["metavar"],
                help=setting.metadata["help"] + default,
                default=argparse.SUPPRESS,
            )


def flag(name: str) -> str:
    """--max-price for max_price."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """EDGE_AGENT_MAX_PRICE for max_price."""
    return ENVIRONMENT_PREFIX + name.upper()


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """The settings out of flags, environment and file, checked. `flags` holds what `add_flags` parsed.

    Raises StartRefused naming the setting, where it was set, and what it may be.
    """
    known = {setting.name: setting for setting in fields(Settings)}
    given: dict[str, tuple[Any, str]] = {}
    config = flags.get("config") or environment.get(variable("config"))
    if config:
        for name, value in _read_toml(expanded(config)).items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
                raise StartRefused(f"{config}: unknown setting {name!r}; {hint}")
            given[name] = value, f"{name} in {config}"
    for name in known:
        if variable(name) in environment:
            given[name] = environment[variable(name)], variable(name)
        if name in flags:
            given[name] = flags[name], flag(name)
    settings = Settings(**{name: _parse(known[name], value, where) for name, (value, where) in given.items()})
    for app in {budget.app for budget in settings.budget} - {None, *settings.apps}:
        if settings.apps:
            raise StartRefused(
                f"{given['budget'][1]} limits {app!r}, which is none of the apps that may call: "
                f"{', '.join(settings.apps)} ({given['apps'][1]})"
            )
    return settings


def unknown(environment: Mapping[str, str]) -> list[str]:
    """One sentence for each variable that is called like a setting and is none: it may be misspelt."""
    known = ["ADDRESS", "CONFIG", *(setting.name.upper() for setting in fields(Settings))]
    found = []
    for name in sorted(environment):
        own = name.removeprefix(ENVIRONMENT_PREFIX)
        if name.startswith(ENVIRONMENT_PREFIX) and own not in known:
            close = difflib.get_close_matches(own, known, n=1)
            hint = f": did you mean {ENVIRONMENT_PREFIX}{close[0]}?" if close else ""
            found.append(f"{name} is no setting{hint}")
    return found


def _parse(setting: Field[Any], value: Any, where: str) -> Any:
    """The checked value. A TOML file may also give numbers, booleans, and lists of texts where flags have commas."""
    if isinstance(value, list) and all(isinstance(part, (str, int, float)) for part in value):
        value = ",".join(map(str, value))
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, (int, float)):
        value = str(value)
    try:
        if not isinstance(value, str):
            raise ValueError("text, a number, true or false, or a list of these is expected")
        if "\0" in value:
            raise ValueError("no setting can hold the character NUL")
        return setting.metadata["parse"](value)
    except ValueError as error:
        raise StartRefused(f"{where} is {value!r}: {error}") from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # without an editor's byte order mark
        repr(content)  # Python reads longer numbers than it writes, and no message could name them
    except (OSError, ValueError) as error:
        raise StartRefused(f"cannot read the settings file {path}: {error}") from error
    except RecursionError as error:
        raise StartRefused(f"cannot read the settings file {path}: it is nested too deep") from error
    return content
