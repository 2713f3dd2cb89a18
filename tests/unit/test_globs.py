"""Include and exclude patterns."""

import time
from collections.abc import Sequence
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.errors import UsageError
from cachefs.globs import Globs


@pytest.mark.parametrize(
    ("pattern", "path", "shown"),
    [
        ("*.safetensors", "model.safetensors", True),
        ("*.safetensors", "a/b/model.safetensors", True),
        ("*.safetensors", "model.safetensors.bak", False),
        ("*.safetensors", "model.bin", False),
        ("config.json", "sub/config.json", True),
        ("/config.json", "config.json", True),
        ("/config.json", "sub/config.json", False),
        ("onnx/*.onnx", "onnx/m.onnx", True),
        ("onnx/*.onnx", "onnx/deep/m.onnx", False),
        ("onnx/*.onnx", "x/onnx/m.onnx", False),
        ("**/x", "x", True),
        ("**/x", "a/b/x", True),
        ("**/x", "a/b/xx", False),
        ("**/x", "a/x/under", True),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/1/2/b", True),
        ("a/**/b", "a/1/2/c", False),
        ("logs/**", "logs/1/2", True),
        ("logs/**", "logs", False),
        ("**", "any/thing", True),
        ("tokenizer", "tokenizer/vocab.txt", True),
        ("tokenizer/", "tokenizer/vocab.txt", True),
        ("tokenizer/", "tokenizer", False),
        ("tokenizer/", "a/tokenizer/vocab.txt", True),
        ("shard-?.bin", "shard-1.bin", True),
        ("shard-?.bin", "shard-12.bin", False),
        ("shard-[0-3].bin", "shard-2.bin", True),
        ("shard-[!0-3].bin", "shard-2.bin", False),
        ("shard-[!0-3].bin", "shard-7.bin", True),
        ("a[/]b", "a/b", False),
        ("[", "[", True),
        ("[]]", "]", True),
        ("a^b+(c)", "a^b+(c)", True),
        ("[^a]", "^", True),
        ("[a-]", "-", True),
        ("[]-a]", "_", True),
        ("[!]-a]", "]", False),
        ("[a-ce-g]", "d", False),
        ("[!a-cb-d]", "e", True),
        ("[é-ü]x", "öx", True),
        ("[!é-ü]x", "öx", False),
        ("?", "\U0010ffff", True),
        ("a*?b*", "a\nb", True),
        ("A*", "abc", False),
        ("*", "line\nbreak", True),
    ],
)
def test_include_pattern(pattern: str, path: str, shown: bool) -> None:
    assert Globs(include=[pattern]).shows_file(path) is shown


def test_without_patterns_everything_is_shown() -> None:
    assert Globs().shows_all
    assert Globs().shows_file("a/b")
    assert Globs().shows_directory("a")


def test_exclude_wins_over_include() -> None:
    globs = Globs(include=["*.bin"], exclude=["secret.bin", "tmp/"])
    assert globs.shows_file("a.bin")
    assert not globs.shows_file("secret.bin")
    assert not globs.shows_file("x/tmp/a.bin")
    assert not globs.shows_directory("tmp")
    assert globs.shows_file("tmp.bin")


def test_excluded_directory_hides_all_under_it() -> None:
    globs = Globs(exclude=["onnx"])
    assert not globs.shows_directory("onnx")
    assert not globs.shows_directory("onnx/deep")
    assert not globs.shows_file("onnx/deep/m.onnx")
    assert globs.shows_directory("onnx2")


def test_exclude_of_what_is_under_a_directory_keeps_the_directory() -> None:
    globs = Globs(exclude=["logs/**"])
    assert globs.shows_directory("logs")
    assert not globs.shows_file("logs/a")


def test_directories_that_may_lead_to_an_included_file_are_shown() -> None:
    assert Globs(include=["*.bin"]).shows_directory("any/where")
    anchored = Globs(include=["a/*/c.bin"])
    assert anchored.shows_directory("a")
    assert anchored.shows_directory("a/b")
    assert not anchored.shows_directory("b")
    assert not anchored.shows_directory("a/b/c")
    deep = Globs(include=["a/**/c.bin"])
    assert deep.shows_directory("a/1/2/3")
    assert not deep.shows_directory("b/1")


@pytest.mark.parametrize("pattern", ["", "/", "//", "a//b", "[z-a]"])
def test_patterns_without_sense_are_a_usage_error(pattern: str) -> None:
    with pytest.raises(UsageError):
        Globs(include=[pattern])


def test_many_stars_do_not_blow_up() -> None:
    globs = Globs(include=["*a" * 12 + "b", "/".join(["**", "a"] * 12) + "/b"])
    started = time.monotonic()
    assert not globs.shows_file("a" * 200)
    assert not globs.shows_file("/".join(["a"] * 200))
    assert time.monotonic() - started < 20


def test_many_double_stars_in_a_row_are_as_one() -> None:
    globs = Globs(include=["/".join(["**"] * 1300) + "/x"], exclude=["logs/**/**"])
    started = time.monotonic()
    for number in range(1000):
        assert not globs.shows_file(f"a/b/{number}")
    assert time.monotonic() - started < 20  # 90 s when each star is walked over
    assert globs.shows_file("a/b/x")
    assert globs.shows_file("x")
    assert globs.shows_directory("logs")
    assert not globs.shows_file("logs/a/x")


_paths = st.lists(st.text("ab.*[]!?", min_size=1, max_size=4), min_size=1, max_size=4).map("/".join)


@given(_paths, _paths)
def test_a_shown_file_has_shown_directories(pattern: str, path: str) -> None:
    for globs in (Globs(include=[pattern]), Globs(exclude=[pattern])):
        if globs.shows_file(path):
            parents = path.split("/")[:-1]
            assert all(globs.shows_directory("/".join(parents[: n + 1])) for n in range(len(parents)))


def test_no_pattern_makes_a_name_cost_more_than_its_length() -> None:
    # Each stays alive to the end of the name, or fails at the last character of a long tail.
    globs = Globs(exclude=["*" + "[ab]" * 1000 + f"c{number}" for number in range(10)])
    started_s = time.process_time()
    for _ in range(60):
        assert globs.shows_file("a" * 20_000)
    assert time.process_time() - started_s < 15  # over 25 s when each place of a name is tried


def _fits(segments: Sequence[str], parts: Sequence[str]) -> bool:
    """The reference: whether all segments match all parts."""
    if not segments:
        return not parts
    if segments[0] == "**":
        if len(segments) == 1:
            return bool(parts)
        return _fits(segments[1:], parts) or (bool(parts) and _fits(segments, parts[1:]))
    return bool(parts) and fnmatchcase(parts[0], segments[0]) and _fits(segments[1:], parts[1:])


def _may_fit(segments: Sequence[str], parts: Sequence[str]) -> bool:
    """The reference: whether more parts could be matched by what is left of the segments."""
    if not segments or not parts:
        return bool(segments)
    if segments[0] == "**":
        return _may_fit(segments[1:], parts) or _may_fit(segments, parts[1:])
    return fnmatchcase(parts[0], segments[0]) and _may_fit(segments[1:], parts[1:])


def _split(pattern: str) -> list[str]:
    segments = pattern.strip("/").split("/")
    return ["**", *segments] if len(segments) == 1 and not pattern.startswith("/") else segments


def _matches(pattern: str, path: str, *, is_directory: bool) -> bool:
    parts = path.split("/")
    ends = [end for end in range(1, len(parts) + 1) if _fits(_split(pattern), parts[:end])]
    return any(is_directory or not pattern.endswith("/") or end < len(parts) for end in ends)


def _leads(pattern: str, path: str) -> bool:
    return _matches(pattern, path, is_directory=True) or _may_fit(_split(pattern), path.split("/"))


_patterns = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "", "/"]),
    st.lists(
        st.one_of(st.sampled_from(["**", "*", "a", "b"]), st.text("ab^*?[]!", min_size=1, max_size=6)),
        min_size=1,
        max_size=4,
    ).map("/".join),
    st.sampled_from(["", "", "/"]),
)
_names = st.lists(st.text("ab^[", min_size=1, max_size=5), min_size=1, max_size=5).map("/".join)


@given(st.lists(_patterns, max_size=3), st.lists(_patterns, max_size=3), _names)
def test_all_patterns_together_are_as_each_by_itself(include: list[str], exclude: list[str], path: str) -> None:
    globs = Globs(include, exclude)
    excluded = any(_matches(pattern, path, is_directory=False) for pattern in exclude)
    included = not include or any(_matches(pattern, path, is_directory=False) for pattern in include)
    assert globs.shows_file(path) is (included and not excluded)
    excluded = any(_matches(pattern, path, is_directory=True) for pattern in exclude)
    included = not include or any(_leads(pattern, path) for pattern in include)
    assert globs.shows_directory(path) is (included and not excluded)
