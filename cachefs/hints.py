"""What the bytes that are here already say of what is read next: where the tensors are, which file follows.

No request is made for it, and no reader waits for it: headers are parsed in a thread when a reader has fetched them.
"""

from collections import OrderedDict
from typing import Protocol

import trio

from cachefs import formats
from cachefs.chunk import ObjectId
from cachefs.errors import CachefsError
from cachefs.formats import HEADER_BYTES_MAX, Layout, Need
from cachefs.offload import Offload
from cachefs.tree import Tree

LAYOUTS_BYTES_MAX = 8 * 1024 * 1024
"""Layouts that are kept, least recently used first out: 500,000 tensors."""

INDEXES_MAX = 16
INDEX_NAME = "model.safetensors.index.json"


class Here(Protocol):
    """The part of ChunkCache that tells what is local."""

    def is_here(self, object_id: ObjectId, offset: int, length: int) -> bool: ...
    async def peek(self, object_id: ObjectId, length: int) -> bytes | None: ...


class Hints:
    """One per server. Methods run on the trio thread."""

    def __init__(self, cache: Here, tree: Tree, offload: Offload) -> None:
        self._cache = cache
        self._tree = tree
        self._offload = offload
        self._layouts: OrderedDict[ObjectId, Layout] = OrderedDict()
        self._layouts_bytes = 0  # INVARIANT: sum of memory_bytes of _layouts
        self._indexes: OrderedDict[ObjectId, tuple[str, ...]] = OrderedDict()
        self._parsing = trio.Lock()
        """One header at a time: a hostile one takes 0.3 s of a processor, many must not take all disk threads."""

    def layout(self, object_id: ObjectId) -> Layout | None:
        """What is known. It may be forgotten again at any time."""
        found = self._layouts.get(object_id)
        if found is not None:
            self._layouts.move_to_end(object_id)
        return found or None

    def header_bytes(self, object_id: ObjectId) -> int:
        """How much of the object's start learn() needs at first; 0: there is nothing to learn."""
        if object_id in self._layouts:
            return 0
        return formats.header_bytes_first(object_id.path, object_id.size)

    def is_here(self, object_id: ObjectId, length: int) -> bool:
        """Whether the first `length` bytes of an object are."""
        return self._cache.is_here(object_id, 0, length)

    async def learn(self, object_id: ObjectId, length: int) -> int:
        """Look at the first `length` bytes. How many it takes the next time, 0: no more is to be learned."""
        while length:
            async with self._parsing:
                if object_id in self._layouts:
                    return 0
                head = await self._cache.peek(object_id, length)
                if head is None:
                    return length
                found = await self._offload.disk(formats.layout_of, object_id.path, head, object_id.size)
            if not isinstance(found, Need):
                self._keep(object_id, found or Layout(()))  # an empty one: nobody parses it again
                return 0
            length = found.header_bytes if len(head) < found.header_bytes <= HEADER_BYTES_MAX else 0
        return 0

    def _keep(self, object_id: ObjectId, layout: Layout) -> None:
        old = self._layouts.pop(object_id, None)
        self._layouts[object_id] = layout
        self._layouts_bytes += layout.memory_bytes - (old.memory_bytes if old is not None else 0)
        while self._layouts_bytes > LAYOUTS_BYTES_MAX:
            self._layouts_bytes -= self._layouts.popitem(last=False)[1].memory_bytes

    async def following(self, directory: int, name: str) -> ObjectId | None:
        """The file that a load reads after this one of the directory (its inode); None: nobody knows.

        Names that count themselves say it; for others the index of the model does, if somebody has read it.
        """
        try:
            following = formats.next_numbered(name)
            if following is None and name.endswith(".safetensors"):
                following = await self._after_in_index(directory, name)
            if following is None:
                return None
            node = await self._tree.lookup(directory, following)
        except CachefsError:
            return None
        return node.object_id

    async def _after_in_index(self, directory: int, name: str) -> str | None:
        object_id = (await self._tree.lookup(directory, INDEX_NAME)).object_id
        if object_id is None or object_id.size > HEADER_BYTES_MAX:
            return None
        names = self._indexes.get(object_id)
        if names is None:
            names = await self._learn_index(object_id)
        if name not in names:
            return None
        position = names.index(name) + 1
        return names[position] if position < len(names) else None

    async def _learn_index(self, object_id: ObjectId) -> tuple[str, ...]:
        """The files that an index names; none while it is not here as a whole."""
        async with self._parsing:  # and then the copy: who waits has none
            names = self._indexes.get(object_id)
            if names is None:
                text = await self._cache.peek(object_id, object_id.size)
                if text is None:
                    return ()
                names = self._indexes[object_id] = await self._offload.disk(formats.shard_names, text)
                while len(self._indexes) > INDEXES_MAX:
                    self._indexes.popitem(last=False)
            return names

    def check_invariants(self) -> None:
        assert self._layouts_bytes == sum(layout.memory_bytes for layout in self._layouts.values())
