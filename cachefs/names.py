"""PURE. Which names a directory shows for the keys under it.

A store's keys are any strings; a directory's names are not. The rules, which SEMANTICS.md repeats:

- A key `a` beside keys under `a/`: the directory keeps the name `a`, the object is shown as `a~file`
  (`a~file2`, ... when that is taken). Nothing is lost.
- Names that a directory entry cannot carry are not shown, and counted: empty (`a//b`), `.`, `..`, with a NUL
  or a slash, longer than 255 bytes, or not encodable as UTF-8.
- An object whose key is the directory's own with a slash (a "directory marker") is not an entry.
"""

from collections.abc import Collection

NAME_BYTES_MAX = 255
"""NAME_MAX of Linux: longer names cannot be looked up."""

COLLISION_SUFFIX = "~file"


def is_showable(name: str) -> bool:
    """Whether a directory entry can carry this name."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    if len(name) * 4 <= NAME_BYTES_MAX and name.isascii():
        return True
    try:
        return len(name.encode()) <= NAME_BYTES_MAX
    except UnicodeEncodeError:  # a lone surrogate
        return False


def renamed_file(name: str, taken: Collection[str]) -> str:
    """Another name for the file `name`, whose own name a directory has: the first that is not in `taken`."""
    number = 1
    while True:
        suffix = COLLISION_SUFFIX if number == 1 else f"{COLLISION_SUFFIX}{number}"
        candidate = _cut(name, NAME_BYTES_MAX - len(suffix)) + suffix
        if candidate not in taken:
            return candidate
        number += 1


def _cut(name: str, bytes_max: int) -> str:
    """The longest start of `name` that has at most `bytes_max` bytes, whole characters only."""
    return name.encode()[:bytes_max].decode(errors="ignore")
