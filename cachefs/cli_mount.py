"""`mount`, `umount` and `upgrade`: what the command line does around keeper and server."""

import contextlib
import functools
import os
import select
import signal
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from cachefs import client
from cachefs.cli_context import Command
from cachefs.client import RemoteError, ServerGone
from cachefs.config import MountConfig, ServerConfig, VolumeConfig
from cachefs.errors import CachefsError, UsageError, WorkFailed
from cachefs.kernel.locks import MOUNT_LOCK, ROOT_NAME, STATE_LOCK, is_locked, remove_runtime_dir
from cachefs.settings import PARSERS, chosen_server_options, runtime_base
from cachefs.state import file_lock, make_state_dir, remove_state_dir, state_lock

MOUNT_LOCK_S = 120.0
COMING_UP_S = 30.0
"""A server that is restarted by its keeper answers within this, or something is wrong."""
ORPHAN_PROBE_S = 1.0
GONE_S = 60.0
LAZY_S = 3.0
MADE_MAX = 100
"""How often the runtime directory may vanish while it is made: each time a session has ended."""
UPGRADE_S = 90.0
_IGNORED_OPTIONS = ("ro", "nosuid", "nodev", "default_permissions", "noatime", "_netdev", "nofail", "defaults", "auto")


def with_mount_options(flags: Mapping[str, Any], options: tuple[str, ...]) -> dict[str, Any]:
    """`-o a,b=c` as flags, for fstab. Raises UsageError for an option that nobody knows, or one given twice."""
    merged = dict(flags)
    for option in (part for text in options for part in text.split(",") if part):
        name, equals, value = option.partition("=")
        if name in _IGNORED_OPTIONS:
            continue
        key = {"read_timeout": "read_timeout_s"}.get(name, name).replace("-", "_")
        if key not in PARSERS:
            raise UsageError(f"-o {option}: unknown; mount options are settings like uid=1000 or offline")
        if merged.get(key) not in (None, ()):
            raise UsageError(f"-o {option}: {name} is given twice")
        merged[key] = value if equals else True
    return merged


# -- mount --------------------------------------------------------------------------------------------------------


def mount(command: Command, source: str, mountpoint: str, *, foreground: bool) -> dict[str, Any]:
    """Mount, or find the same mount there already. Raises UsageError; then nothing is left mounted."""
    from cachefs.kernel.mounts import recover_dead_mount

    volume = command.volume_config(source)
    server = command.server_config()
    if not mountpoint or "\0" in mountpoint:
        raise UsageError(f"{mountpoint!r} is no mount point: give an empty directory")
    place = Path(os.path.realpath(mountpoint))
    check_places(server, place)
    shown = Path(os.path.realpath(volume.source.removeprefix("file://")))
    if volume.source.startswith("file://") and (place == shown or shown in place.parents):
        raise UsageError(f"the mount point {place} lies in the source {shown}: it would show itself")
    make = functools.partial(_make_runtime_dir, server.runtime_dir, command)
    made = not server.runtime_dir.exists()
    make()
    try:
        busy = f"another mount on {server.state_dir} (process {{holder}}) does not end: see its log"
        with (
            file_lock(server.runtime_dir / MOUNT_LOCK, wait_s=MOUNT_LOCK_S, busy=busy, make=make),
            _made_state_dir(server.state_dir),
        ):
            recover_dead_mount(place)
            done = _mount_locked(command, server, volume, place, foreground=foreground)
    except BaseException:
        remove_runtime_dir(server.runtime_dir, ours=made)
        raise
    return {
        "source": volume.source,
        "mountpoint": str(place),
        "volume": volume.name,
        "state_dir": str(server.state_dir),
        **done,
    }


def check_places(server: ServerConfig, place: Path, *, device: str = "/dev/fuse") -> None:
    """Raises UsageError for what cannot work, before anything is made."""
    if not os.path.exists(device):
        raise UsageError(
            "there is no /dev/fuse: load the kernel module with `modprobe fuse`, or let the container have it"
        )
    if not os.access(device, os.R_OK | os.W_OK):
        raise UsageError("/dev/fuse may not be opened by this user: give access to it, or run as root")
    state_dir = Path(os.path.realpath(server.state_dir))
    if place == state_dir or place in state_dir.parents or state_dir in place.parents:
        raise UsageError(
            f"the mount point {place} and the state directory {state_dir} lie in each other: separate them"
        )


def _make_runtime_dir(runtime_dir: Path, command: Command) -> None:
    """Raises UsageError unless it is, or can be made, a directory of this user's alone."""
    for attempt in range(MADE_MAX):
        try:
            _make_private_dir(runtime_dir, command)
            return
        except (FileNotFoundError, FileExistsError) as exc:  # removed meanwhile, by a session that has ended
            if attempt == MADE_MAX - 1:
                raise UsageError(f"{runtime_dir} cannot be made ({exc.strerror}): set XDG_RUNTIME_DIR") from exc
        except OSError as exc:
            raise UsageError(f"{runtime_dir} cannot be made ({exc.strerror}): set XDG_RUNTIME_DIR") from exc


def _make_private_dir(runtime_dir: Path, command: Command) -> None:
    base = runtime_base(command.environ, command.uid)  # maybe in /tmp, where anybody could have made it
    for directory in (base, runtime_dir) if runtime_dir.parent == base else (runtime_dir,):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat() if directory == base else directory.stat()
        if found.st_uid != command.uid:
            raise UsageError(f"{directory} belongs to user {found.st_uid}: set XDG_RUNTIME_DIR to a directory of yours")
    if found.st_mode & 0o077:
        if any(runtime_dir.iterdir()):  # /tmp or /run must not become 0700
            raise UsageError(f"{runtime_dir} is open to other users: choose a directory of mode 0700, or an empty one")
        runtime_dir.chmod(0o700)


@contextlib.contextmanager
def _made_state_dir(state_dir: Path) -> Iterator[None]:
    """The state directory; when nothing comes of the mount, one that this command made is removed. Under mount.lock."""
    made = not state_dir.exists()
    try:
        make_state_dir(state_dir)
        yield
    except BaseException:
        if made:
            remove_state_dir(state_dir)
        raise


def _mount_locked(
    command: Command, server: ServerConfig, volume: VolumeConfig, place: Path, *, foreground: bool
) -> dict[str, Any]:
    from cachefs.kernel.bind import ours_at
    from cachefs.kernel.mounts import check_mountpoint

    as_root = command.uid == 0
    command.check_owner()
    deadline = time.monotonic() + GONE_S
    while True:
        running = _running(server, as_root=as_root, place=place)
        there = ours_at(place)
        if there is None:
            check_mountpoint(place)
        elif running is None or not _is_same(running, there.root, place, volume):
            raise UsageError(
                f"{place} is busy: {_what(running, there.root) or 'another cachefs mount'} is mounted there, "
                f"not {volume.source} with these options; unmount it first (`cachefs umount {place}`)"
            )
        if running is None:
            return _start(command, server, volume, place, foreground=foreground)
        options = msgspec.to_builtins(chosen_server_options(command.settings, server), enc_hook=str)
        if there is not None and running["as_root"] == as_root:
            client.call(server.runtime_dir, "check_options", {"options": options})
            return _answer(running, already=True)
        if foreground:
            raise UsageError(
                f"{server.state_dir} has a server in the background: give --foreground another --state-dir"
            )
        try:
            params = {"volume": msgspec.to_builtins(volume), "options": options}
            added = client.call(server.runtime_dir, "volume_add", params, timeout_s=180.0)
        except (ServerGone, RemoteError) as exc:
            if (isinstance(exc, RemoteError) and exc.kind != "ServerStopping") or time.monotonic() > deadline:
                raise
            time.sleep(0.1)  # its last mount has just gone: a new server is started when it has ended
            continue
        _bind(server, Path(added["path"]), place, volume.name)
        return _answer(running, already=False)


def _answer(running: Mapping[str, Any], *, already: bool) -> dict[str, Any]:
    return {"already": already, "server_pid": running["pid"], "keeper_pid": running["keeper_pid"]}


def _running(server: ServerConfig, *, as_root: bool, place: Path) -> dict[str, Any] | None:
    """The server of this state directory, waiting for one that comes up; None when there is none."""
    from cachefs.launch import is_supervised, no_answer

    deadline = time.monotonic() + COMING_UP_S
    while True:
        try:
            found: dict[str, Any] = {
                **client.call(server.runtime_dir, "ping", timeout_s=10.0),
                **client.call(server.runtime_dir, "volumes", timeout_s=10.0),
            }
        except ServerGone:
            late = time.monotonic() > deadline
            if not is_supervised(server.runtime_dir):
                if late or not _has_orphan(server, as_root=as_root, place=place):
                    return None
            elif late:
                raise no_answer(server.state_dir, server.runtime_dir) from None
            time.sleep(0.05)
        else:
            return found


def _has_orphan(server: ServerConfig, *, as_root: bool, place: Path) -> bool:
    """Whether there is a mount that a server holds alone: its keeper was killed before it was ready.

    Such a server starts another keeper, or ends, as soon as it runs.
    """
    from cachefs.kernel.mounts import FSTYPE, find_mount, probe

    root = Path(os.path.realpath(server.runtime_dir)) / ROOT_NAME if as_root else place
    mount = find_mount(root)
    if mount is None or mount.fstype != FSTYPE:
        return False
    # Not root, it may be another state directory's: only this one's server holds this lock.
    return (as_root or is_locked(server.state_dir / STATE_LOCK)) and probe(root, ORPHAN_PROBE_S) != "dead"


def _name_of(running: Mapping[str, Any], root: str) -> str | None:
    """The volume whose bind shows `root` (mountinfo's field): a directory under the FUSE root, or all of it."""
    if running["as_root"]:
        return root.split("/")[1] if root != "/" else None
    return str(running["volumes"][0]["name"]) if running["volumes"] else None


def _is_same(running: Mapping[str, Any], root: str, place: Path, volume: VolumeConfig) -> bool:
    if not running["as_root"] and running["mountpoint"] != str(place):
        return False
    name = _name_of(running, root)
    return name == volume.name and any(item["name"] == name for item in running["volumes"])


def _what(running: Mapping[str, Any] | None, root: str) -> str | None:
    if running is None:
        return None
    name = _name_of(running, root)
    return next((str(item["source"]) for item in running["volumes"] if item["name"] == name), None)


def _start(
    command: Command, server: ServerConfig, volume: VolumeConfig, place: Path, *, foreground: bool
) -> dict[str, Any]:
    """A new keeper and server."""
    from cachefs.launch import start_keeper

    as_root = command.uid == 0
    with state_lock(server.state_dir, wait_s=5.0):
        pass  # held by a command, or a server elsewhere: said before anything is started
    config = MountConfig(
        server=server,
        volumes=(volume,),
        mountpoint=server.runtime_dir / ROOT_NAME if as_root else place,
        as_root=as_root,
        session=uuid.uuid4().hex,
    )
    started = start_keeper(config, foreground=foreground)
    if as_root:
        _bind(server, config.mountpoint / volume.name, place, volume.name)
    return {"already": False, "server_pid": started.server_pid, "keeper_pid": started.keeper_pid}


def _bind(server: ServerConfig, path: Path, place: Path, name: str) -> None:
    """Bind a volume; if that fails, the volume is taken back, and the server with it if it has no other."""
    from cachefs.kernel.bind import bind

    try:
        bind(path, place)
    except CachefsError:
        waiting = _Gone(server.runtime_dir)
        with contextlib.suppress(CachefsError):
            client.call(server.runtime_dir, "volume_remove", {"name": name})
            waiting.wait(name, GONE_S)
        waiting.close()
        raise


def wait_in_foreground(done: Mapping[str, Any]) -> None:
    """Until the keeper ends; SIGINT and SIGTERM are passed on to it, which unmounts."""
    try:
        pidfd = os.pidfd_open(done["keeper_pid"])
    except ProcessLookupError:
        return
    try:

        def pass_on(number: int, frame: object) -> None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, pass_on)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        while not poller.poll(1000):
            pass
    finally:
        os.close(pidfd)


# -- umount -------------------------------------------------------------------------------------------------------


class _Gone:
    """Waits until a volume, or the whole server with its keeper, is gone. Made before the unmount."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._pidfds: list[int] = []
        self.was_running = False
        try:
            found = client.call(runtime_dir, "ping", timeout_s=5.0)
        except ServerGone:
            return
        self.was_running = True
        for pid in (found["pid"], found["keeper_pid"]):
            with contextlib.suppress(ProcessLookupError):
                self._pidfds.append(os.pidfd_open(pid))

    def close(self) -> None:
        for pidfd in self._pidfds:
            os.close(pidfd)
        self._pidfds.clear()

    def _ended(self) -> bool:
        poller = select.poll()
        for pidfd in self._pidfds:
            poller.register(pidfd, select.POLLIN)
        return len(poller.poll(0)) == len(self._pidfds)

    def wait(self, name: str | None, timeout_s: float) -> bool:
        """Until the processes have ended, or (with `name`) the server goes on without this volume. False: neither."""
        deadline = time.monotonic() + timeout_s
        while not self._ended():
            if name is not None:
                with contextlib.suppress(ServerGone, RemoteError):
                    names = [
                        item["name"] for item in client.call(self._runtime_dir, "volumes", timeout_s=5.0)["volumes"]
                    ]
                    if names and name not in names:
                        return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.03)
        return True


def umount(command: Command, mountpoint: str | None, *, everything: bool, lazy: bool) -> dict[str, Any]:
    """Unmount one place, or all of this state directory; waits for the processes when that was the last."""
    if everything == (mountpoint is not None):
        raise UsageError("give either a mount point or --all")
    if everything or command.settings.is_set("state_dir"):
        command.check_owner()
    if mountpoint is not None:
        place = Path(os.path.realpath(mountpoint))
        return _umount_one(command, place, lazy=lazy)
    return _umount_all(command, lazy=lazy)


def _runtime_dirs(command: Command) -> Iterator[Path]:
    """Where a server may be: this state directory's first; others only if none was asked for by name."""
    yield command.runtime_dir
    if command.settings.is_set("state_dir") or command.settings.is_set("runtime_dir"):
        return
    with contextlib.suppress(OSError):
        yield from sorted(runtime_base(command.environ, command.uid).iterdir())


def _runtime_of(command: Command, place: Path, major_minor: str) -> Path | None:
    """The runtime directory of the server behind a mount."""
    from cachefs.kernel.mounts import read_mounts

    roots = {mount.mountpoint for mount in read_mounts() if mount.major_minor == major_minor and mount.root == "/"}
    for directory in _runtime_dirs(command):
        if str(Path(os.path.realpath(directory)) / ROOT_NAME) in roots:
            return directory
        with contextlib.suppress(ServerGone, RemoteError):
            found = client.call(directory, "volumes", timeout_s=5.0)
            if not found["as_root"] and found["mountpoint"] == str(place):
                return directory
    return None


def _umount_one(command: Command, place: Path, *, lazy: bool) -> dict[str, Any]:
    from cachefs.kernel.bind import ours_at, unmount_at
    from cachefs.kernel.mounts import read_mounts, recover_dead_mount

    there = ours_at(place)
    if there is None:
        raise UsageError(f"{place} is not a cachefs mount")
    runtime_dir = _runtime_of(command, place, there.major_minor)
    if runtime_dir is None:
        gone = recover_dead_mount(place)
        if gone:
            return {"unmounted": gone, "in_use": False}
        if command.settings.is_set("state_dir"):
            raise UsageError(f"{place} is not a mount of the state directory {command.state_dir}")
        unmount_at(place, as_root=command.uid == 0, lazy=lazy)
        return {"unmounted": [str(place)], "in_use": False}
    waiting = _Gone(runtime_dir)
    if not waiting.was_running and (gone := recover_dead_mount(place)):
        _tidy(command, runtime_dir)
        return {"unmounted": [path for path in gone if not path.endswith(f"/{ROOT_NAME}")], "in_use": False}
    try:
        unmount_at(place, as_root=command.uid == 0, lazy=lazy)
        left = [mount for mount in read_mounts() if mount.major_minor == there.major_minor and mount.root == there.root]
        if left and there.root != "/":
            return {"unmounted": [str(place)], "in_use": False}  # the same volume is bound elsewhere
        name = there.root.split("/")[1] if there.root != "/" else None
        in_use = not waiting.wait(name, LAZY_S if lazy else GONE_S)
    finally:
        waiting.close()
    if in_use and not lazy:
        raise WorkFailed(f"{place} is unmounted, but its server does not end: see {command.state_dir}/log/server.log")
    _tidy(command, runtime_dir)
    return {"unmounted": [str(place)], "in_use": in_use}


def _umount_all(command: Command, *, lazy: bool) -> dict[str, Any]:
    from cachefs.kernel.bind import unmount_at
    from cachefs.kernel.mounts import find_mount, read_mounts, recover_dead_mount, unmount_device

    runtime_dir = command.runtime_dir
    as_root = command.uid == 0
    root = Path(os.path.realpath(runtime_dir)) / ROOT_NAME
    unmounted: list[str] = []
    waiting = _Gone(runtime_dir)
    try:
        with contextlib.suppress(ServerGone):
            found = client.call(runtime_dir, "volumes", timeout_s=5.0)
            if not found["as_root"]:
                root = Path(found["mountpoint"])
        mount = find_mount(root)
        if mount is None:
            if not waiting.was_running:
                _tidy(command, runtime_dir)  # what a session that was killed has left
            return {"unmounted": [], "in_use": False}
        if gone := recover_dead_mount(root):
            _tidy(command, runtime_dir)
            return {"unmounted": [place for place in gone if place != str(root)] or gone, "in_use": False}
        for other in reversed(read_mounts()):
            if other.major_minor == mount.major_minor and (other.root != "/" or not as_root):
                unmount_at(Path(other.mountpoint), as_root=as_root, lazy=lazy)
                unmounted.append(other.mountpoint)
        if not lazy:
            with contextlib.suppress(ServerGone, RemoteError):
                client.call(runtime_dir, "stop", timeout_s=5.0)
        in_use = not waiting.wait(None, LAZY_S if lazy else GONE_S)
        if find_mount(root) is not None and not in_use:
            unmount_device(mount.major_minor, as_root=as_root)  # no server that could be asked
    finally:
        waiting.close()
    if in_use and not lazy:
        raise WorkFailed(f"the server of {command.state_dir} does not end: see {command.state_dir}/log/server.log")
    _tidy(command, runtime_dir)
    return {"unmounted": unmounted, "in_use": in_use}


def _tidy(command: Command, runtime_dir: Path) -> None:
    """What the session left, unless the keeper has removed it itself or somebody goes on there."""
    remove_runtime_dir(runtime_dir, ours=runtime_dir.parent == runtime_base(command.environ, command.uid))


# -- upgrade ------------------------------------------------------------------------------------------------------


def upgrade(command: Command, mountpoint: str, python: str) -> dict[str, Any]:
    """Hand over and wait for the new server. Raises WorkFailed when it was rolled back."""
    from cachefs.kernel.bind import ours_at

    place = Path(os.path.realpath(mountpoint))
    there = ours_at(place)
    if there is None:
        raise UsageError(f"{place} is not a cachefs mount")
    runtime_dir = _runtime_of(command, place, there.major_minor)
    if runtime_dir is None:
        raise UsageError(f"no server of this user's answers for {place}: give its --state-dir")
    before = client.call(runtime_dir, "ping")
    client.call(runtime_dir, "upgrade", {"python": python})
    deadline = time.monotonic() + UPGRADE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ServerGone, RemoteError):
            now: dict[str, Any] = client.call(runtime_dir, "ping", timeout_s=5.0)
            if now["pid"] != before["pid"] and now["upgrade_result"]:
                if now["upgrade_result"] != "ok":
                    raise WorkFailed(f"the new version was rolled back: {now['upgrade_result']}")
                return {"mountpoint": str(place), "from_version": before["version"], **now}
        time.sleep(0.05)
    raise WorkFailed(f"no server answers for {place} after the hand-over: see the state directory's log")
