"""The requests that need no mount, by name: a server answers them over its socket, a command without one does them
itself. Parameters and results are plain JSON values."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from cachefs.config import VolumeConfig
from cachefs.control import Caller, Method, Params, Progress
from cachefs.core import Core, Source
from cachefs.errors import UsageError

T = TypeVar("T")


def convert(value: Any, kind: type[T]) -> T:
    """A parameter as its type. Raises UsageError that says what is wrong."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        raise UsageError(f"a parameter is wrong: {exc}") from exc


def work_methods(core: Core) -> Mapping[str, Method]:
    """warm, ls, pin, unpin, evict, verify, gc."""

    def source(params: Params) -> Source:
        return core.source(convert(params.get("source"), VolumeConfig))

    def optional(params: Params) -> Source | None:
        return source(params) if params.get("source") is not None else None

    async def warm(params: Params, progress: Progress, caller: Caller) -> Any:
        return await core.warm(source(params), pin=bool(params.get("pin")), progress=progress)

    async def ls(params: Params, progress: Progress, caller: Caller) -> Any:
        return {"objects": core.list_objects(optional(params))}

    async def pin(params: Params, progress: Progress, caller: Caller) -> Any:
        return await core.pin(source(params))

    async def unpin(params: Params, progress: Progress, caller: Caller) -> Any:
        return await core.unpin(source(params))

    async def evict(params: Params, progress: Progress, caller: Caller) -> Any:
        return await core.evict(source(params))

    async def verify(params: Params, progress: Progress, caller: Caller) -> Any:
        return await core.verify(
            optional(params),
            repair=bool(params.get("repair")),
            rebuild=bool(params.get("rebuild")),
            progress=progress,
        )

    async def gc(params: Params, progress: Progress, caller: Caller) -> Any:
        return await core.gc(dry_run=bool(params.get("dry_run")))

    async def tiers(params: Params, progress: Progress, caller: Caller) -> Any:
        return core.tiers()

    methods: dict[str, Callable[[Params, Progress, Caller], Any]] = {
        "warm": warm,
        "ls": ls,
        "pin": pin,
        "unpin": unpin,
        "evict": evict,
        "verify": verify,
        "gc": gc,
        "tiers": tiers,
    }
    return methods
