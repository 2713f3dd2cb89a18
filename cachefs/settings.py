"""Where the configuration comes from: flags > CACHEFS_* > TOML file > defaults, each value with its origin."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from cachefs.chunk import CHUNK_BYTES
from cachefs.config import CREDENTIALS_FD_VARIABLE, GIB, MIB, ServerConfig, VolumeConfig, is_host_name
from cachefs.errors import UsageError
from cachefs.kernel.locks import SOCKET_NAME, runtime_name

SOCKET_PATH_BYTES_MAX = 107  # sun_path has 108 with its NUL
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
OTHER_VARIABLES = ("CACHEFS_CONFIG", CREDENTIALS_FD_VARIABLE)
"""CACHEFS_* of ours that are no settings."""
OTHERS_VARIABLES = r"CACHEFS_(TEST_|([A-Z0-9_]+_)?(SERVICE_(HOST|PORT)|PORT(_|$)))"
"""The tests' own; and what Kubernetes gives to every container where a Service is called cachefs or cachefs-..."""
KERNEL_FEATURES = ("resend", "passthrough", "async_dio", "parallel_dirops", "readahead")


class Setting(msgspec.Struct, frozen=True):
    """One resolved value and where it was set: "--flag", "CACHEFS_X", the file's path or "default"."""

    name: str
    value: Any
    origin: str


class Settings(msgspec.Struct, frozen=True):
    """All settings of one command, by name."""

    items: Mapping[str, Setting]

    def __getitem__(self, name: str) -> Any:
        return self.items[name].value

    def is_set(self, name: str) -> bool:
        """Whether the user chose the value."""
        return self.items[name].origin != "default"


def parse_size(text: str, *, whole_bytes: Callable[[], int] | None = None) -> int:
    """`50GiB`, `512M` (the same as MiB), `1048576` or, of `whole_bytes`, `80%`, in bytes. Raises UsageError."""
    if whole_bytes is not None and (match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", text.strip())):
        percent = float(match[1])
        if not 0 < percent <= 100:
            raise UsageError(f"{text!r} is no part of a file system: write more than 0% and at most 100%")
        return int(whole_bytes() * percent / 100)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(iB|B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise UsageError(f"{text!r} is no size: write it like 50GiB, 512MiB" + (" or 80%" if whole_bytes else ""))
    number, unit, suffix = match[1], match[2].upper(), match[3] or ""
    if unit and suffix.upper() == "B" and suffix != "":
        raise UsageError(f"{text!r} has a decimal unit, sizes here are binary: write {number}{unit}iB")
    return int(Fraction(number) * _UNITS[unit])


def _boolean(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise UsageError(f"{text!r} is neither true nor false")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError as exc:
        raise UsageError(f"{text!r} is no time in seconds") from exc
    if not 0 <= value < 10**9:
        raise UsageError(f"{text!r} is no time in seconds: it must be 0 or more")
    return value


def _identifier(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text.strip()) or int(text) > 2**32 - 2:
        raise UsageError(f"{text!r} is no user or group number")
    return int(text)


def _address(text: str) -> str:
    host, colon, port = text.strip().rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 <= int(port) < 65536:
        raise UsageError(f"{text!r} is no address: write HOST:PORT, like 127.0.0.1:9464")
    return text.strip()


def _items(text: str) -> tuple[str, ...]:
    return tuple(item for item in (part.strip() for part in text.split(",")) if item)


def _features(text: str) -> tuple[str, ...]:
    for item in _items(text):
        if item not in KERNEL_FEATURES:
            raise UsageError(f"{item!r} is no kernel feature: the known ones are {', '.join(KERNEL_FEATURES)}")
    return _items(text)


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise UsageError(f"{text!r} must be one of {', '.join(choices)}")
        return text

    return parse


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise UsageError(f"{text!r} is no path")
    return Path(os.path.abspath(os.path.expanduser(text)))


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", text):
        raise UsageError(f"{text!r} is no endpoint: write http://HOST:PORT or https://HOST, without credentials")
    try:
        host = urlsplit(text).hostname or ""
    except ValueError as error:  # a bracket without the other one
        raise UsageError(f"{text!r} is no endpoint: {error}") from error
    if not is_host_name(host):
        raise UsageError(f"{text!r} is no endpoint: {host!r} is no name of a host")
    return text.rstrip("/")


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError as exc:
        raise UsageError(f"{text!r} is no number between 0 and 0.5") from exc
    if not 0 <= value <= 0.5:
        raise UsageError(f"{text!r} is no number between 0 and 0.5")
    return value


def _raw(text: str) -> str:
    if not text or any(ord(character) < 32 for character in text):
        raise UsageError(f"{text!r} is empty or has control characters")
    return text


SERVER_PARSERS: dict[str, Callable[[str], Any]] = {
    "state_dir": _path,
    "runtime_dir": _path,
    "cache_size": _raw,
    "prefetch_bytes": parse_size,
    "free_fraction_min": _fraction,
    "metrics": _address,
    "log_level": _one_of("debug", "info", "warning", "error"),
    "log_format": _one_of("text", "json"),
    "on_unreachable": _one_of("wait", "error"),
    "read_timeout_s": _seconds,
    "get_timeout_s": _seconds,
    "list_timeout_s": _seconds,
    "offline": _boolean,
    "allow_other": _boolean,
    "keeper_give_up_s": _seconds,
    "bind_timeout_s": _seconds,
    "kernel_disable": _features,
}
VOLUME_PARSERS: dict[str, Callable[[str], Any]] = {
    "mode": _one_of("read-only"),
    "endpoint_url": _url,
    "region": _raw,
    "profile": _raw,
    "anonymous": _boolean,
    "store": _one_of("auto", "obstore", "fsspec"),
    "include": _items,
    "exclude": _items,
    "uid": _identifier,
    "gid": _identifier,
    "prefetch": _one_of("auto", "none", "all"),
}
PARSERS = SERVER_PARSERS | VOLUME_PARSERS


def _as_text(value: Any) -> str:
    """A flag's or the file's value in the form that the environment has it, so that there is one parser for all."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        if not all(isinstance(item, str) for item in value):
            raise UsageError(f"{value!r} must be a list of texts")
        if not all(item.strip() for item in value):
            raise UsageError("an empty text matches nothing: leave it out")
        return ",".join(value)
    if isinstance(value, (str, int, float, Path)):
        return str(value)
    raise UsageError(f"{value!r} is neither a text, a number, true, false nor a list of texts")


def _parse(name: str, value: Any, origin: str) -> Setting:
    try:
        return Setting(name, PARSERS[name](_as_text(value)), origin)
    except UsageError as exc:
        raise UsageError(f"{origin}: {name}: {exc}" if origin[0] != "-" else f"{origin}: {exc}") from exc


ROOT_STATE_DIR, USER_STATE_DIR = "/var/lib/cachefs", ".cache/cachefs"
ROOT_CONFIG, USER_CONFIG = "/etc/cachefs/config.toml", "cachefs/config.toml"
"""Of a user: below HOME, and below XDG_CONFIG_HOME or ~/.config."""
ROOT_CACHE_PART, USER_CACHE_BYTES_MAX = 0.8, 50 * GIB
DEFAULTS: Mapping[str, Any] = {
    field.name: field.default
    for struct in (ServerConfig, VolumeConfig)
    for field in msgspec.structs.fields(struct)
    if field.name in PARSERS and field.default is not msgspec.NODEFAULT
}
"""Of whoever runs the command; the others are in _defaults(). The structs of config.py say them."""
DEFAULTS_IN_WORDS: Mapping[str, str] = {
    "state_dir": f"{ROOT_STATE_DIR} as root, else ~/{USER_STATE_DIR}",
    "runtime_dir": "a directory in /run/cachefs as root, else in $XDG_RUNTIME_DIR/cachefs or /tmp/cachefs-UID",
    "cache_size": f"{ROOT_CACHE_PART:.0%} of the file system as root, else {USER_CACHE_BYTES_MAX // GIB}GiB "
    "or half of what is free, if that is less",
    "allow_other": "true as root, else false",
    "uid": "who mounts",
    "gid": "who mounts",
}
"""Those that depend on who runs the command, and where."""


def default_text(name: str) -> str:
    """The default of a setting as the user would write it, or in words where it depends; "" when there is none."""
    if name in DEFAULTS_IN_WORDS:
        return DEFAULTS_IN_WORDS[name]
    value = DEFAULTS[name]
    if value is None:
        return ""
    if PARSERS[name] is parse_size:
        return f"{value // MIB}MiB"
    return f"{value:g}" if isinstance(value, float) else _as_text(value)


def _defaults(environ: Mapping[str, str], uid: int, gid: int) -> dict[str, Any]:
    root = uid == 0
    home = Path(environ.get("HOME") or "/")
    return {
        **DEFAULTS,
        "state_dir": Path(ROOT_STATE_DIR) if root else home / USER_STATE_DIR,
        "runtime_dir": None,
        "cache_size": None,
        "allow_other": root,
        "uid": uid,
        "gid": gid,
    }


def _read_file(path: Path) -> dict[str, Any]:
    import tomllib  # 3 ms that a command without a file need not wait for

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"the configuration {path} cannot be read: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"the configuration {path} is not valid TOML: {exc}") from exc
    for name in document:
        if name not in PARSERS:
            raise UsageError(f"the configuration {path} has an unknown setting {name!r}: see `cachefs config show`")
    return document


def config_path(flag: str | Path | None, environ: Mapping[str, str], uid: int) -> Path | None:
    """The TOML file to read: --config, CACHEFS_CONFIG, or the usual place if there is one."""
    if chosen := flag or environ.get("CACHEFS_CONFIG"):
        return _path(str(chosen))
    home = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or "/") / ".config")
    usual = Path(ROOT_CONFIG) if uid == 0 else home / USER_CONFIG
    return usual if usual.is_file() else None


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """CACHEFS_* that set nothing: a setting's name is misspelt, or somebody else has such names. Sorted."""
    return sorted(
        name
        for name, value in environ.items()
        if value
        and re.fullmatch(r"CACHEFS_[A-Za-z0-9_]+", name)
        and name.removeprefix("CACHEFS_").lower() not in PARSERS
        and name not in OTHER_VARIABLES
        and not re.match(OTHERS_VARIABLES, name)
    )


def resolve(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    uid: int,
    gid: int,
    config: str | Path | None = None,
) -> Settings:
    """Every setting with its origin. `flags`: what the command line gave, None for what it did not.

    Raises UsageError that names the flag, variable or file of a value that makes no sense.
    """
    items = {name: Setting(name, value, "default") for name, value in _defaults(environ, uid, gid).items()}
    path = config_path(config, environ, uid)
    if path is not None:
        items.update((name, _parse(name, value, str(path))) for name, value in _read_file(path).items())
    for name in PARSERS:
        if text := environ.get(variable := f"CACHEFS_{name.upper()}"):
            items[name] = _parse(name, text, variable)
    for name, value in flags.items():
        if value is not None and value != ():
            items[name] = _parse(name, value, "--" + name.removesuffix("_s").replace("_", "-"))
    return Settings(items)


def runtime_base(environ: Mapping[str, str], uid: int) -> Path:
    """Where the runtime directories of all state directories of this user are."""
    if uid == 0:
        return Path("/run/cachefs")
    if chosen := environ.get("XDG_RUNTIME_DIR"):
        return Path(chosen) / "cachefs"
    return Path(f"/tmp/cachefs-{uid}")


def runtime_dir(settings: Settings, environ: Mapping[str, str], uid: int) -> Path:
    """Sockets and FUSE root of this state directory. Raises UsageError if its sockets' paths would be too long."""
    chosen = cast(Path | None, settings["runtime_dir"])
    if chosen is None:
        chosen = runtime_base(environ, uid) / runtime_name(os.path.realpath(settings["state_dir"]))
    return check_runtime_dir(chosen, what_to_do="set XDG_RUNTIME_DIR")


def check_runtime_dir(chosen: Path, *, what_to_do: str) -> Path:
    """The same. Raises UsageError, with `what_to_do` in it, if a socket in it could not be named."""
    path = chosen / SOCKET_NAME
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(f"the socket path {path} is longer than {SOCKET_PATH_BYTES_MAX} bytes: {what_to_do}")
    return chosen


def _existing_parent(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def cache_bytes(settings: Settings, uid: int) -> int:
    """`cache_size` in bytes, for the file system of the state directory. Raises UsageError if it makes no sense."""
    try:
        usage = os.statvfs(_existing_parent(settings["state_dir"]))
    except OSError as exc:
        raise UsageError(f"the state directory {settings['state_dir']} cannot be used: {exc.strerror}") from exc
    whole, free = usage.f_blocks * usage.f_frsize, usage.f_bavail * usage.f_frsize
    item = settings.items["cache_size"]
    if item.value is None:
        return int(whole * ROOT_CACHE_PART) if uid == 0 else max(CHUNK_BYTES, min(USER_CACHE_BYTES_MAX, free // 2))
    try:
        size = parse_size(item.value, whole_bytes=lambda: whole)
    except UsageError as exc:
        raise UsageError(f"{item.origin}: {exc}") from exc
    if size < CHUNK_BYTES:
        raise UsageError(f"{item.origin}: a cache of {item.value} cannot hold one chunk: give it 8MiB or more")
    if size > whole:
        raise UsageError(
            f"{item.origin}: {item.value} is more than the file system of {settings['state_dir']} has "
            f"({whole / GIB:.1f} GiB): choose another size or --state-dir"
        )
    return size


def server_config(settings: Settings, environ: Mapping[str, str], uid: int) -> ServerConfig:
    """The server's part. Raises UsageError."""
    prefetch_bytes = settings["prefetch_bytes"]
    if 0 < prefetch_bytes < CHUNK_BYTES:
        origin = settings.items["prefetch_bytes"].origin
        raise UsageError(f"{origin}: less than one chunk: give it 8MiB or more, or 0 for no readahead")
    return ServerConfig(
        state_dir=settings["state_dir"],
        runtime_dir=runtime_dir(settings, environ, uid),
        cache_bytes_max=cache_bytes(settings, uid),
        prefetch_bytes=prefetch_bytes,
        **{
            name: settings[name]
            for name in SERVER_PARSERS
            if name not in ("state_dir", "runtime_dir", "cache_size", "prefetch_bytes")
        },
    )


def chosen_server_options(settings: Settings, config: ServerConfig) -> dict[str, Any]:
    """What the user set of the server's options, by the field's name: a running server must agree with these."""
    fields = {name: name for name in SERVER_PARSERS if name not in ("state_dir", "runtime_dir")}
    fields["cache_size"] = "cache_bytes_max"
    return {field: getattr(config, field) for name, field in fields.items() if settings.is_set(name)}


def volume_name(config: VolumeConfig) -> str:
    """The same for the same source and options: its view, and so its inode numbers, come back at the next mount."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", config.source.rstrip("/").rpartition("/")[2])[:40].strip(".-")
    parts = msgspec.to_builtins(msgspec.structs.replace(config, name=""))
    if parts["prefetch"] == "auto":  # names are those that they were before there was a choice
        del parts["prefetch"]
    digest = hashlib.blake2b(msgspec.json.encode(parts), digest_size=5)
    return f"{last or 'volume'}-{digest.hexdigest()}"


def volume_config(settings: Settings, source: str) -> VolumeConfig:
    """The volume's part, with its name."""
    values = {name: settings[name] for name in VOLUME_PARSERS}
    if source.startswith("file://"):  # what the environment or the file says for S3 stores is not meant; a flag is
        for name in ("endpoint_url", "region", "profile", "anonymous", "store"):
            if not settings.items[name].origin.startswith("--"):
                del values[name]
        values.setdefault("anonymous", False)
        values.setdefault("profile", None)
    if values["anonymous"] and values["profile"]:
        raise UsageError("--anonymous and --profile exclude each other: choose one")
    config = VolumeConfig(name="", source=source, **values)
    return msgspec.structs.replace(config, name=volume_name(config))
