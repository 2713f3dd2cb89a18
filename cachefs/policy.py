"""PURE. What to evict: whole objects, least recently used first."""

from collections.abc import Iterable
from typing import NamedTuple

from cachefs.chunk import ObjectId


class Candidate(NamedTuple):
    """An object that may go; `disk_bytes` is what deleting it gives back."""

    object: ObjectId
    disk_bytes: int


def select_victims(candidates: Iterable[Candidate], need_bytes: int) -> list[ObjectId]:
    """The first candidates (given least recently used first) that give back `need_bytes` together.

    Empty when all of them together would not do: throwing out what others use would then buy nothing.
    """
    victims: list[ObjectId] = []
    freed = 0
    if need_bytes <= 0:
        return victims
    for candidate in candidates:
        if candidate.disk_bytes <= 0:
            continue
        victims.append(candidate.object)
        freed += candidate.disk_bytes
        if freed >= need_bytes:
            return victims
    return []


def shortfall_bytes(
    *, add_bytes: int, used_bytes: int, capacity_bytes: int, free_bytes: int, disk_bytes: int, free_fraction_min: float
) -> int:
    """How much must go before `add_bytes` more fit: into the capacity, and into the disk with its reserve left free."""
    over_capacity = used_bytes + add_bytes - capacity_bytes
    over_disk = int(disk_bytes * free_fraction_min) + add_bytes - free_bytes
    return max(0, over_capacity, over_disk)
