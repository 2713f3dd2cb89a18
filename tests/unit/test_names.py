"""Names that a directory can show."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.names import NAME_BYTES_MAX, is_showable, renamed_file


@pytest.mark.parametrize("name", ["a", "with space", "ü", "模型.safetensors", "...", "-", "a\nb", "x" * 255, "é" * 127])
def test_ordinary_names_are_showable(name: str) -> None:
    assert is_showable(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 256, "é" * 128, "\ud800"])
def test_names_that_no_entry_can_carry_are_not_showable(name: str) -> None:
    assert not is_showable(name)


def test_collision_takes_the_first_free_name() -> None:
    assert renamed_file("a", {"a"}) == "a~file"
    assert renamed_file("a", {"a", "a~file"}) == "a~file2"
    assert renamed_file("a", {"a", "a~file", "a~file2"}) == "a~file3"


@given(st.text(min_size=1, max_size=300), st.sets(st.text(max_size=5), max_size=5))
def test_renamed_file_is_free_and_showable(name: str, taken: set[str]) -> None:
    if not is_showable(name):
        return
    renamed = renamed_file(name, taken | {name})
    assert renamed not in taken | {name}
    assert is_showable(renamed)


def test_long_names_are_cut_at_a_whole_character() -> None:
    renamed = renamed_file("é" * 127, {"é" * 127})
    assert renamed == "é" * ((NAME_BYTES_MAX - 5) // 2) + "~file"
