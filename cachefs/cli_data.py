"""Commands on the cache: through the running server, or directly under the state directory's lock."""

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import msgspec

from cachefs import client
from cachefs.cli_context import Command
from cachefs.client import RemoteError, ServerGone
from cachefs.errors import CachefsError, StateBusy, UsageError
from cachefs.output import Show, human_bytes, progress
from cachefs.state import remembered_size, state_lock

BUSY_S = 20.0
"""A server that restarts answers again well within this."""


def work(
    command: Command,
    method: str,
    source: str | None,
    params: Mapping[str, Any],
    show: Show = lambda state: None,
    *,
    create: bool = False,
) -> Any:
    """Have a request of work.py done. `create`: it makes sense without a cache that is there already."""
    everything = dict(params)
    if source is not None:
        everything["source"] = msgspec.to_builtins(command.source_config(source))
    if command.settings.is_set("state_dir"):
        command.check_owner()
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            return client.call(command.runtime_dir, method, everything, on_progress=show, timeout_s=None)
        except ServerGone:
            pass
        if _is_coming_up(command, deadline):
            continue  # not directly: that would hold the lock that the next server waits for, and its readers
        if not create and not command.state_dir.is_dir():
            raise UsageError(f"there is no cache in {command.state_dir}: give its place with --state-dir")
        try:
            with state_lock(command.state_dir):
                return _directly(command, method, everything, show)
        except StateBusy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def warm(command: Command, sources: Sequence[str], *, pin: bool) -> Iterator[tuple[str, dict[str, Any] | CachefsError]]:
    """Each source, when it is done, with its result or what was wrong with it; the next ones are fetched all the same.

    Raises UsageError, before anything is fetched, for what cannot be a source.
    """
    for source in sources:
        command.source_config(source)
    for source in sources:
        outcome: dict[str, Any] | CachefsError
        try:
            with progress(f"warm {source}", quiet=command.as_json) as show:
                outcome = work(command, "warm", source, {"pin": pin}, show, create=True)
        except CachefsError as exc:
            outcome = exc
        yield source, outcome


def describe(error: CachefsError) -> dict[str, Any]:
    """An error in a JSON document, as the control socket has it."""
    kind = error.kind if isinstance(error, RemoteError) else type(error).__name__
    return {"type": kind, "message": str(error), "exit_code": error.exit_code}


def _is_coming_up(command: Command, deadline: float) -> bool:
    """Whether no server answers but a keeper lives, which starts one. Raises StateBusy when that takes too long."""
    from cachefs.launch import is_supervised, no_answer

    if not is_supervised(command.runtime_dir):
        return False
    if time.monotonic() > deadline:
        raise no_answer(command.state_dir, command.runtime_dir)
    time.sleep(0.05)
    return True


def _directly(command: Command, method: str, params: Mapping[str, Any], show: Show) -> Any:
    """The same code that a server runs; the caller holds the lock."""
    import os

    import trio

    from cachefs import logs
    from cachefs.control import Caller
    from cachefs.core import first_error, open_core
    from cachefs.metrics import Metrics
    from cachefs.work import work_methods

    logs.set_up(command.state_dir, "error", "text")
    config = command.server_config()
    remembered = remembered_size(command.state_dir)
    if remembered is not None and not command.settings.is_set("cache_size"):
        config = msgspec.structs.replace(config, cache_bytes_max=remembered)

    async def run() -> Any:
        async with open_core(config, Metrics(), session=uuid.uuid4().hex) as core:
            return await work_methods(core)[method](params, show, Caller(os.getpid(), command.uid, os.getegid()))

    try:
        return trio.run(run)
    except BaseExceptionGroup as group:
        raise first_error(group) from group


def status(command: Command) -> dict[str, Any]:
    """The server's status; without a server, what lies in the state directory, with the same keys in `cache`."""
    if command.settings.is_set("state_dir"):
        command.check_owner()
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            answer: dict[str, Any] = client.call(command.runtime_dir, "status")
        except ServerGone:
            if not _is_coming_up(command, deadline):
                break
        else:
            return answer
    answer = {
        "server": None,
        "keeper": None,
        "volumes": [],
        "tiers": [],
        "cache": {"hit_bytes": 0, "miss_bytes": 0, "store_bytes": 0, "evicted_bytes": 0},
    }
    if command.state_dir.is_dir():
        with contextlib.suppress(StateBusy):  # a long command without a server: it says nothing meanwhile
            answer["tiers"] = work(command, "tiers", None, {})
    return answer


def print_status(found: dict[str, Any]) -> None:
    """For people."""
    server = found["server"]
    if server is None:
        click.echo("no server is running for this state directory")
    else:
        click.echo(
            f"server {server['pid']} (version {server['version']}, {server['restarts']} restarts), "
            f"keeper {found['keeper']['pid']}, state {server['state_dir']}"
        )
    for volume in found["volumes"]:
        more = "" if volume["listing_complete"] else ", not all directories listed yet"
        click.echo(f"{volume['source']} on {', '.join(volume['mountpoints']) or '(no mount point)'} ({volume['mode']})")
        click.echo(
            f"  {human_bytes(volume['bytes_local'])} of {human_bytes(volume['bytes_total'])} local, "
            f"{volume['objects_sealed']} of {volume['objects_total']} objects sealed{more}"
        )
        for reason in volume["mode_reasons"]:
            click.echo(f"  no passthrough: {reason}")
    for tier in found["tiers"]:
        click.echo(
            f"tier {tier['name']}: {human_bytes(tier['used_bytes'])} of {human_bytes(tier['capacity_bytes'])} used"
        )
        if tier.get("trouble"):
            click.echo(f"  nothing is kept in it: {tier['trouble']}")
    if server is not None:
        counts = {name: human_bytes(count) for name, count in found["cache"].items()}
        click.echo(f"readers got {counts['hit_bytes']} from the cache, {counts['miss_bytes']} that had to be fetched")
        click.echo(f"fetched from the store in all: {counts['store_bytes']}; evicted: {counts['evicted_bytes']}")


def log_lines(command: Command, lines: int) -> list[str]:
    """Raises UsageError when nothing has been logged."""
    from cachefs import logs

    if not (command.state_dir / "log" / logs.LOG_NAME).exists():
        raise UsageError(f"there is no log in {command.state_dir}: no server has run in the background there")
    return logs.tail(command.state_dir, lines)


def settings(command: Command, *, origin: bool) -> dict[str, Any]:
    """Every setting, sorted; with its origin if wanted. `runtime_dir` and `cache_size` as they come out."""
    config = command.server_config()
    found: dict[str, Any] = {}
    for name, item in sorted(command.settings.items.items()):
        value = item.value
        if name == "cache_size" and value is None:
            value = config.cache_bytes_max
        elif name == "runtime_dir":
            value = config.runtime_dir
        plain = msgspec.to_builtins(value, enc_hook=str)
        found[name] = {"value": plain, "origin": item.origin} if origin else plain
    return found
