"""The settings of `cloud-server serve`. Each field of `Settings` is a flag, an environment variable, a TOML key.

`price_micro_usd` is --price-micro-usd, CLOUD_SERVER_PRICE_MICRO_USD and price_micro_usd = ... in the file.
Flags beat the environment, the environment beats the file.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from cloud_server.errors import StartRefused

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT_PREFIX = "CLOUD_SERVER_"
MAX_THREADS = 1_024  # more than machines have; torch takes down the process over some numbers
DTYPES = ("auto", "float32", "float16", "bfloat16")
STARTER = Path(__file__).parent / "starter"


def _setting(default: Any, kind: type, metavar: str, explanation: str, choices: tuple[str, ...] = ()) -> Any:
    return field(
        default=default,
        metadata={"kind": kind, "metavar": metavar, "help": explanation, "choices": choices},
    )


def expanded(path: str) -> Path:
    """The path, a leading ~ or ~USER being that user's home. Raises StartRefused where no such home is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise StartRefused(f"{path}: no home folder is known for its ~; write the path out") from error


def default_state_folder() -> Path:
    """Where the journal lies unless --state says otherwise: under XDG_STATE_HOME, or on Windows LOCALAPPDATA."""
    local = os.environ.get("LOCALAPPDATA") if os.name == "nt" else None
    return (
        expanded(os.environ.get("XDG_STATE_HOME") or local or "~/.local/state") / "routet2i" / "cloud-server"
    )


@dataclass(frozen=True)
class Settings:
    """Checked settings. Money in micro-dollars, times in seconds, sides in pixels."""

    listen: str = _setting(
        "127.0.0.1:50052",
        str,
        "HOST:PORT",
        "address to listen on (port 0: a free one); beyond loopback --tls-cert, --tls-key and --tokens are needed",
    )
    model: str = _setting(
        str(STARTER),
        str,
        "DIR_OR_HUB_ID",
        "diffusers pipeline to serve: a folder with model_index.json, or a hub id",
    )
    device: str = _setting(
        "auto", str, "DEVICE", "torch device: auto (CUDA if there is a GPU, else CPU), cpu, cuda:1"
    )
    dtype: str = _setting(
        "auto",
        str,
        "DTYPE",
        "number format of the weights: auto (float16 on CUDA, else float32), float32, float16 or bfloat16",
        DTYPES,
    )
    threads: int = _setting(
        0,
        int,
        "N",
        "torch's threads on a CPU; 0: one for a small denoiser, torch's own choice for a large one",
    )
    price_micro_usd: int = _setting(
        10_000, int, "N", "price of one image in micro-dollars (10000 is one cent)"
    )
    max_queue: int = _setting(
        32,
        int,
        "N",
        "requests that may wait for the model, besides one of each tenant that has none; more are refused at once",
    )
    max_steps: int = _setting(150, int, "N", "most denoising steps a request may ask for")
    max_side: int = _setting(
        1024, int, "PIXELS", "largest width or height, for models that do not list their sizes"
    )
    max_prompt_characters: int = _setting(
        2_000, int, "N", "longest prompt and negative prompt, in characters"
    )
    tls_cert: str = _setting("", str, "FILE", "PEM file with the server's certificate chain; turns TLS on")
    tls_key: str = _setting("", str, "FILE", "PEM file with the private key of --tls-cert")
    tokens: str = _setting(
        "",
        str,
        "FILE",
        "file with a line 'TENANT TOKEN' for each caller; without it, loopback only, tenant 'default'",
    )
    state: str = _setting(
        "",
        str,
        "DIR",
        "folder of the journal; default: routet2i/cloud-server under $XDG_STATE_HOME or ~/.local/state, or on Windows "
        "LOCALAPPDATA",
    )
    keep_images_s: float = _setting(
        3_600.0, float, "SECONDS", "how long a finished image is kept, for edges that lost it on its way"
    )
    grace_s: float = _setting(30.0, float, "SECONDS", "how long SIGTERM waits for requests in flight")
    log_format: str = _setting("text", str, "FORMAT", "one line a request as text or json", ("text", "json"))

    @property
    def tls(self) -> bool:
        """Whether callers must use TLS."""
        return bool(self.tls_cert)

    @property
    def journal_file(self) -> Path:
        """The journal of generations."""
        folder = expanded(self.state) if self.state else default_state_folder()
        return folder / "generations.sqlite"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --config and one flag for each setting; a flag that is not given leaves no trace."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of the settings below")
    for setting in fields(Settings):
        default = f" (default: {setting.default})" if setting.default != "" else ""
        if setting.name == "model":
            default = " (default: the starter model that comes with the project)"
        parser.add_argument(
            "--" + setting.name.replace("_", "-"),
            metavar=setting.metadata["metavar"],
            help=setting.metadata["help"] + default,
            default=argparse.SUPPRESS,
        )


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """The settings out of flags, environment and file, checked. `flags` holds what add_flags() parsed.

    Raises StartRefused naming the setting, where it was set, and what it may be.
    """
    values: dict[str, Any] = {}
    known = {setting.name: setting for setting in fields(Settings)}
    config = flags.get("config") or environment.get(ENVIRONMENT_PREFIX + "CONFIG")
    if config:
        for name, value in _read_toml(expanded(config)).items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
                raise StartRefused(f"{config}: unknown setting {name!r}{hint}")
            values[name] = _parse(known[name], value, f"{name} in {config}")
    for name, setting in known.items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        if variable in environment:
            values[name] = _parse(setting, environment[variable], variable)
        if name in flags:
            values[name] = _parse(setting, flags[name], "--" + name.replace("_", "-"))
    if not values.get("model"):  # nor is it the working directory where a variable was left empty
        values.pop("model", None)
    settings = Settings(**values)
    _check(settings)
    return settings


def unknown(environment: Mapping[str, str]) -> list[str]:
    """One sentence for each variable that is called like a setting and is none: it may be misspelt."""
    known = ["CONFIG", *(setting.name.upper() for setting in fields(Settings))]
    found = []
    for name in sorted(environment):
        own = name.removeprefix(ENVIRONMENT_PREFIX)
        if name.startswith(ENVIRONMENT_PREFIX) and own not in known:
            close = difflib.get_close_matches(own, known, n=1)
            hint = f": did you mean {ENVIRONMENT_PREFIX}{close[0]}?" if close else ""
            found.append(f"{name} is no setting{hint}")
    return found


def split_address(listen: str) -> tuple[str, int]:
    """("::1", 50052) for "[::1]:50052". Raises StartRefused when it is not HOST:PORT."""
    host, _, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    valid = (
        bare and not {"[", "]"} & set(bare) and port.isdecimal() and len(port) <= 5 and int(port) <= 65_535
    )
    if not valid or bracketed is not (":" in bare):
        raise StartRefused(
            f"--listen must be HOST:PORT, such as 127.0.0.1:50052 or [::1]:50052, not {listen!r}"
        )
    return bare, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Other names than localhost are taken as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # without an editor's byte order mark
        repr(content)  # Python reads longer numbers than it writes, and no message could name them
    except (OSError, ValueError) as error:
        raise StartRefused(f"cannot read the settings file {path}: {error}") from error
    except RecursionError as error:
        raise StartRefused(f"cannot read the settings file {path}: it is nested too deep") from error
    return content


def _parse(setting: Field[Any], value: Any, where: str) -> Any:
    kind, choices = setting.metadata["kind"], setting.metadata["choices"]
    wrong = StartRefused(f"{where} must be {_KINDS[kind]}, not {value!r}")
    if kind is str:
        if not isinstance(value, str):
            raise wrong
        if "\0" in value:
            raise StartRefused(f"{where} is {value!r}; no setting can hold the character NUL")
        if choices and value not in choices:
            raise StartRefused(f"{where} must be one of {', '.join(choices)}, not {value!r}")
        return value
    if (
        isinstance(value, bool)
        or not isinstance(value, (str, int, float))
        or (kind is int and type(value) is float)
    ):
        raise wrong
    if isinstance(value, str) and ("_" in value or (kind is int and not re.fullmatch("[0-9]+", value))):
        raise wrong  # Python takes 1_0 for 10
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise wrong from None
    # Whole numbers also travel on the wire; 2**53 refuses infinity and what a float cannot count.
    if not 0 <= number < (2**31 if kind is int else 2**53):
        raise wrong
    return number


_KINDS = {str: "text", int: "a whole number from 0 to 2147483647", float: "a number of seconds, 0 or more"}


def _check(settings: Settings) -> None:
    host, _ = split_address(settings.listen)
    for name in ("max_steps", "max_side", "max_prompt_characters"):
        if getattr(settings, name) == 0:
            raise StartRefused(f"--{name.replace('_', '-')} must be at least 1")
    if settings.threads > MAX_THREADS:
        raise StartRefused(f"--threads must be at most {MAX_THREADS}, not {settings.threads}")
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise StartRefused(
            "--tls-cert and --tls-key go together; give both, or neither for loopback without TLS"
        )
    if not is_loopback(host):
        if not settings.tls:
            raise StartRefused(
                f"{settings.listen} can be reached from other machines, and prompts and tokens would cross "
                "the network in clear. Give --tls-cert and --tls-key, or listen on 127.0.0.1"
            )
        if not settings.tokens:
            raise StartRefused(
                f"{settings.listen} can be reached from other machines, and anyone could use the model. "
                "Give --tokens, or listen on 127.0.0.1"
            )
