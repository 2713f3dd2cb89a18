"""Who is evicted, and how much must go."""

from hypothesis import given
from hypothesis import strategies as st

from cachefs.chunk import ObjectId
from cachefs.policy import Candidate, select_victims, shortfall_bytes

CANDIDATES = st.lists(st.integers(0, 100)).map(
    lambda sizes: [Candidate(ObjectId("s", str(n), size, "v"), size) for n, size in enumerate(sizes)]
)


@given(CANDIDATES, st.integers(-5, 500))
def test_victims_are_the_first_that_free_enough_and_no_more(candidates: list[Candidate], need: int) -> None:
    victims = select_victims(candidates, need)
    sizes = {candidate.object: candidate.disk_bytes for candidate in candidates}
    useful = [candidate.object for candidate in candidates if candidate.disk_bytes]
    if need <= 0 or sum(sizes.values()) < need:
        assert victims == []
    else:
        assert victims == useful[: len(victims)]
        assert sum(sizes[victim] for victim in victims) >= need
        assert sum(sizes[victim] for victim in victims[:-1]) < need


def shortfall(add: int, used: int, capacity: int, free: int) -> int:
    return shortfall_bytes(
        add_bytes=add,
        used_bytes=used,
        capacity_bytes=capacity,
        free_bytes=free,
        disk_bytes=1000,
        free_fraction_min=0.05,
    )


def test_room_is_short_by_the_larger_of_capacity_and_disk() -> None:
    assert shortfall(10, 90, 100, 500) == 0
    assert shortfall(11, 90, 100, 500) == 1
    assert shortfall(10, 0, 100, 60) == 0
    assert shortfall(11, 0, 100, 60) == 1
    assert shortfall(10, 95, 100, 50) == 10
