"""PURE. What the names in a directory say: whether it is a model's, what every load reads first, in which order."""

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from cachefs.chunk import CHUNK_BYTES, MIB
from cachefs.formats import natural

WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx")
CONFIGURATIONS = ("config.json", "model_index.json")

SMALL_NAMES = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.py", "vocab*", "merges*")
SMALL_BYTES = CHUNK_BYTES
"""Of one file: what comes with one GET."""

SMALL_BYTES_TOTAL = 64 * MIB
SMALL_FILES_MAX = 256

ENTRIES_MAX = 10_000
"""A directory with more names is no model's; looking through a million takes 0.3 s."""


class Item(Protocol):
    """The part of snapshot.Entry that counts."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def is_directory(self) -> bool: ...


T = TypeVar("T", bound=Item)


def looks_like_model(entries: Sequence[Item]) -> bool:
    """Whether weights or a model's configuration are among the files."""
    if len(entries) > ENTRIES_MAX:
        return False
    return any(
        not entry.is_directory and (entry.name.endswith(WEIGHTS) or entry.name in CONFIGURATIONS) for entry in entries
    )


def small_files(entries: Iterable[T]) -> list[T]:
    """What every load reads first (configuration, tokenizer, index), in the order of names, within the bounds."""
    found: list[T] = []
    left_bytes = SMALL_BYTES_TOTAL
    for entry in entries:
        if entry.is_directory or not 0 < entry.size <= min(SMALL_BYTES, left_bytes) or len(found) == SMALL_FILES_MAX:
            continue
        if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in SMALL_NAMES):
            found.append(entry)
            left_bytes -= entry.size
    return found


def load_order(entries: Iterable[T]) -> list[T]:
    """The files of a directory as a load reads them: the small ones, then the weights, shard by shard."""
    files = [entry for entry in entries if not entry.is_directory and entry.size > 0]
    return sorted(files, key=lambda entry: (entry.size > SMALL_BYTES, natural(entry.name)))
