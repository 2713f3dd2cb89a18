"""What is particular to local directories as a source."""

import os
from pathlib import Path

import pytest

from cachefs.errors import CachefsError, NotFound, ObjectChanged, UsageError
from cachefs.store.file import FileStore
from tests.store.conftest import fetch, listing, walk


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "root"
    (directory / "sub").mkdir(parents=True)
    (directory / "sub" / "x").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    return directory


def test_links_inside_are_followed_and_links_out_are_not_shown(root: Path) -> None:
    (root / "inner").symlink_to("sub/x")
    (root / "inner-directory").symlink_to("sub")
    (root / "outer").symlink_to("../secret")
    (root / "outer-directory").symlink_to("..")
    (root / "broken").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    store = FileStore(str(root))
    objects, prefixes = listing(store)
    assert set(objects) == {"inner"}
    assert sorted(prefixes) == ["inner-directory", "sub"]
    assert fetch(store, objects["inner"]) == b"inside"


def test_links_to_directories_that_one_is_in_are_not_shown(root: Path) -> None:
    (root / "sub" / "here").symlink_to(".")
    (root / "sub" / "up").symlink_to("..")
    (root / "other").mkdir()
    (root / "other" / "y").write_bytes(b"y")
    (root / "other" / "across").symlink_to("../sub")
    (root / "sub" / "back").symlink_to("../other")
    paths = sorted(info.path for info in walk(FileStore(str(root))))
    assert paths == ["other/across/x", "other/y", "sub/back/y", "sub/x"]


@pytest.mark.parametrize("as_directory", [False, True])
def test_a_file_that_became_a_link_out_is_refused(root: Path, as_directory: bool) -> None:
    store = FileStore(str(root))
    info = next(iter(walk(store)))
    if as_directory:
        (root / "sub" / "x").unlink()
        (root / "sub").rmdir()
        outside = root.parent / "elsewhere"
        outside.mkdir()
        (outside / "x").write_bytes(b"inside")
        (root / "sub").symlink_to(outside)
    else:
        (root / "sub" / "x").unlink()
        (root / "sub" / "x").symlink_to(root.parent / "secret")
    with pytest.raises((NotFound, ObjectChanged)):
        fetch(store, info)
    with pytest.raises(NotFound):
        list(store.list_directory("../"))


def test_a_root_that_is_a_link_itself_is_fine(root: Path) -> None:
    (root.parent / "alias").symlink_to(root)
    store = FileStore(str(root.parent / "alias"))
    store.probe()
    assert [fetch(store, info) for info in walk(store)] == [b"inside"]


def test_a_change_while_the_bytes_are_read_is_caught(root: Path) -> None:
    path = root / "big"
    path.write_bytes(b"a" * 3_000_000)
    store = FileStore(str(root))
    info = listing(store)[0]["big"]

    def progress(count: int) -> None:
        if path.stat().st_size == info.size:
            with path.open("ab") as file:
                file.write(b"b")

    with pytest.raises(ObjectChanged):
        store.fetch_into(memoryview(bytearray(info.size)), store.object_id(info), 0, info.size, progress)


def test_what_is_no_file_and_no_text_is_left_out(root: Path) -> None:
    os.mkfifo(root / "pipe")
    (Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe"))).write_bytes(b"x")
    assert listing(FileStore(str(root))) == ({}, ["sub"])


def test_a_file_that_became_a_pipe_does_not_hang(root: Path) -> None:
    store = FileStore(str(root))
    info = next(iter(walk(store)))
    (root / "sub" / "x").unlink()
    os.mkfifo(root / "sub" / "x")
    with pytest.raises(ObjectChanged):
        fetch(store, info)


@pytest.mark.parametrize(
    ("path", "error"),
    [("", UsageError), ("relative/path", UsageError), ("/no/such/directory", NotFound), ("/etc/passwd", UsageError)],
)
def test_a_root_that_cannot_be_used_is_an_error(path: str, error: type[CachefsError]) -> None:
    with pytest.raises(error):
        FileStore(path).probe()
