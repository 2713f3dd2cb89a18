"""Frozen, typed configuration; the only reader of flags, environment and file (flags > CACHEFS_* > file > defaults)."""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Literal

import msgspec

MIB = 1024 * 1024
GIB = 1024 * MIB
LABEL_CHARS_MAX = 63
"""Of a host's name, between two dots (RFC 1035)."""


def is_host_name(name: str) -> bool:
    """Whether resolvers can be asked for it; for others they raise what is no OSError."""
    if name.isascii():  # the codec is for the rest: 2 ms to load it
        return all(0 < len(label) <= LABEL_CHARS_MAX for label in name.removesuffix(".").split("."))
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return True


class VolumeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One source under a name, with its options. Credentials are never in here: stores find them in their chains."""

    name: str
    source: str
    mode: Literal["read-only"] = "read-only"
    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    anonymous: bool = False
    store: Literal["auto", "obstore", "fsspec"] = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    uid: int = 0
    gid: int = 0
    prefetch: Literal["auto", "none", "all"] = "auto"
    """Fetched before anybody reads: the small files of models, nothing, or everything."""
    principal: str = ""
    """Node mode: a digest of who asked, and with whose key; listings are shared by the same principal only."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one server (one state directory) runs with. Times in seconds, sizes in bytes."""

    state_dir: Path
    runtime_dir: Path
    """Holds the sockets, the FUSE root (as root) and the ledger; 0700."""
    cache_bytes_max: int
    prefetch_bytes: int = 192 * MIB
    """Most bytes that background fills have in flight together; a source may have a quarter in any case; 0: none."""
    free_fraction_min: float = 0.05
    """This part of the file system is always left free."""
    metrics: str | None = None
    """HOST:PORT of the Prometheus endpoint."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    on_unreachable: Literal["wait", "error"] = "wait"
    read_timeout_s: float = 300.0
    """How long a READ waits for bytes that cannot be fetched; 0: for ever."""
    get_timeout_s: float = 30.0
    """Most time that one GET may go without a byte; making its connection counts."""
    list_timeout_s: float = 30.0
    offline: bool = False
    allow_other: bool = False
    keeper_give_up_s: float = 300.0
    """No server for so long: the keeper aborts the connection; 0: never."""
    bind_timeout_s: float = 30.0
    """As root: a volume that nobody has bind-mounted for so long, though it was asked for, goes again."""
    kernel_disable: tuple[str, ...] = ()
    """Kernel features not to use: "resend", "passthrough", "async_dio", "parallel_dirops", "readahead"."""


class MountConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `cachefs mount` hands to a new keeper, and the keeper to every server: all that a restart needs."""

    server: ServerConfig
    volumes: tuple[VolumeConfig, ...]
    mountpoint: Path
    """Where the FUSE root is mounted: RUNTIME/root as root, the user's own mountpoint otherwise."""
    as_root: bool
    """Each volume is a directory under the FUSE root and bind-mounted; else the one volume is the FUSE root."""
    session: str
    """Random; the same for every server of one mount, another at the next mount."""


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `cachefs serve` hands to its supervisor, and that to every server process: node mode (docs of the driver).

    Credentials are never in here: principals give them with each volume.
    """

    server: ServerConfig
    keeper_socket: Path
    keeper_uid: int = 0
    """Whom the socket must belong to (SO_PEERCRED)."""
    allow_endpoints: tuple[str, ...] = ()
    """Endpoints that volumes may name, as scheme://host[:port]; without one they get the region's own."""
    allow_node_credentials: bool = False
    """Volumes without credentials of their own may use this server's chain."""
    sts_endpoint: str | None = None
    """Where tokens are changed into keys; None: AWS's, of the volume's region."""


def encode_node(config: NodeConfig) -> bytes:
    """JSON, for a memfd."""
    return msgspec.json.encode(config, enc_hook=str)


def decode_node(data: bytes) -> NodeConfig:
    """The inverse of encode_node()."""
    return msgspec.json.decode(data, type=NodeConfig, dec_hook=lambda kind, value: kind(value))


def encode(config: MountConfig) -> bytes:
    """JSON, for the keeper's stdin and for a memfd."""
    return msgspec.json.encode(config, enc_hook=str)


def decode(data: bytes) -> MountConfig:
    """The inverse of encode()."""
    return msgspec.json.decode(data, type=MountConfig, dec_hook=lambda kind, value: kind(value))


CREDENTIAL_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)
"""The environment's secrets. A keeper has none of them: it holds a memfd with them, which only servers read."""

CREDENTIALS_FD_VARIABLE = "CACHEFS_CREDENTIALS_FD"
CREDENTIALS_FD_MIN = 100
"""Its number is the same in every process, out of the way of those that a program gives out by itself."""


def without_credentials(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that has no business with the store."""
    return {name: value for name, value in environ.items() if name not in CREDENTIAL_VARIABLES}


def credentials_fd(environ: Mapping[str, str]) -> int:
    """The descriptor of the memfd; -1: there is none."""
    return int(environ.get(CREDENTIALS_FD_VARIABLE, "-1"))


def write_credentials(descriptor: int, environ: Mapping[str, str]) -> None:
    """Put the environment's secrets into a memfd, as JSON."""
    found = {name: environ[name] for name in CREDENTIAL_VARIABLES if name in environ}
    os.pwrite(descriptor, msgspec.json.encode(found), 0)


def read_credentials(environ: MutableMapping[str, str]) -> None:
    """In a server: the secrets back into its environment, where the stores' libraries look for them."""
    if (descriptor := credentials_fd(environ)) >= 0:
        size = os.fstat(descriptor).st_size
        environ.update(msgspec.json.decode(os.pread(descriptor, size, 0), type=dict[str, str]))
