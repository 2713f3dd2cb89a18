"""What every store must do, over real servers and a real directory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachefs.chunk import ObjectId
from cachefs.errors import NotFound, ObjectChanged, UsageError
from tests.store.conftest import TREE, TREE_BUCKET, WIDE, Remote, fetch, listing, open_with, walk

BIG = TREE["big.bin"]


def test_tree_is_listed_whole_and_reads_back(remote: Remote) -> None:
    store = remote.open()
    store.probe()
    found = {info.path: info for info in walk(store)}
    assert set(found) == set(TREE)
    for path, info in found.items():
        assert info.size == len(TREE[path])
        assert info.version
        assert info.modified_s > 1_600_000_000
        if not path.startswith("wide/"):
            assert fetch(store, info) == TREE[path], path


def test_one_directory_shows_its_objects_and_the_names_of_its_subdirectories(remote: Remote) -> None:
    objects, prefixes = listing(remote.open(), "deep")
    assert set(objects) == {"deep/a.txt"}
    assert sorted(prefixes) == ["a", "a-1"]


def test_a_directory_of_more_than_one_page_comes_in_pages_and_whole(remote: Remote) -> None:
    store = remote.open()
    pages = list(store.list_directory("wide"))
    assert len(pages) >= 2
    assert sorted(info.path for page in pages for info in page.objects) == [f"wide/{n:05}" for n in range(WIDE)]


def test_names_are_neither_decoded_nor_normalised(remote: Remote) -> None:
    store = remote.open()
    assert list(listing(store, "nfc")[0]) == ["nfc/\u00e9"]
    assert list(listing(store, "nfd")[0]) == ["nfd/e\u0301"]
    assert "odd/%41 +#?&=~!*'()@,;:$[]{}|^`\"<>.txt" in listing(store, "odd")[0]


def test_paths_are_relative_to_the_prefix_and_object_ids_are_not(remote: Remote) -> None:
    below = remote.open(prefix="deep/")
    below.probe()
    objects, prefixes = listing(below)
    assert set(objects) == {"a.txt"}
    assert sorted(prefixes) == ["a", "a-1"]
    assert {info.path for info in walk(below)} == {"a.txt", "a/b/c/d.txt", "a-1/x"}
    assert fetch(below, objects["a.txt"]) == b"beside"
    if remote.kind != "file":
        whole = remote.open()
        assert below.object_id(objects["a.txt"]) == whole.object_id(listing(whole, "deep")[0]["deep/a.txt"])


@pytest.fixture
def big(remote: Remote) -> Iterator[tuple[Remote, object]]:
    store = remote.open()
    return store, listing(store)[0]["big.bin"]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, len(BIG)), length=st.integers(0, 300_000))
def test_any_range_is_what_was_asked_for(big, start: int, length: int) -> None:
    store, info = big
    stop = min(len(BIG), start + length)
    assert fetch(store, info, start, stop) == BIG[start:stop]


def test_progress_grows_to_the_whole_and_nothing_beyond_is_touched(big) -> None:
    store, info = big
    buffer = bytearray(b"\xee" * (len(BIG) + 100))
    seen: list[int] = []

    def progress(count: int) -> None:
        assert bytes(buffer[:count]) == BIG[:count]
        seen.append(count)

    store.fetch_into(memoryview(buffer), store.object_id(info), 0, len(BIG), progress)
    assert seen == sorted(set(seen))
    assert len(seen) >= 2
    assert seen[-1] == len(BIG)
    assert bytes(buffer[len(BIG) :]) == b"\xee" * 100


def test_progress_may_give_the_request_up(big) -> None:
    store, info = big

    class EnoughError(Exception):
        pass

    def progress(count: int) -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        store.fetch_into(memoryview(bytearray(len(BIG))), store.object_id(info), 0, len(BIG), progress)
    assert fetch(store, info) == BIG


def test_many_threads_share_one_store(big) -> None:
    store, info = big
    step = 65536
    starts = list(range(0, len(BIG), step))
    with ThreadPoolExecutor(32) as pool:
        pieces = list(pool.map(lambda start: fetch(store, info, start, min(len(BIG), start + step)), starts * 2))
    assert b"".join(pieces) == BIG * 2


@pytest.mark.parametrize("after", [b"the new one", b"new"], ids=["same size", "shorter"])
def test_an_object_that_changed_is_never_read_as_the_old_version(remote: Remote, after: bytes, numbers) -> None:
    bucket, key = f"changing-{next(numbers)}", "sub/model.bin"
    remote.put(bucket, key, b"the old one")
    store = remote.open(bucket)
    old = next(iter(walk(store)))
    assert fetch(store, old) == b"the old one"
    remote.put(bucket, key, after)
    for start, stop in ((0, 11), (2, 5), (8, 11)):
        with pytest.raises(ObjectChanged):
            fetch(store, old, start, stop)
    new = next(iter(walk(store)))
    assert new.version != old.version
    assert fetch(store, new) == after


def test_a_deleted_object_is_not_found(remote: Remote, numbers) -> None:
    bucket = f"deleting-{next(numbers)}"
    remote.put(bucket, "x", b"x")
    remote.put(bucket, "y", b"y")
    store = remote.open(bucket)
    info = listing(store)[0]["x"]
    remote.delete(bucket, "x")
    with pytest.raises(NotFound):
        fetch(store, info)


def test_an_object_that_never_was_is_not_found(remote: Remote) -> None:
    store = remote.open()
    with pytest.raises(NotFound):
        store.fetch_into(
            memoryview(bytearray(1)), ObjectId(store.identity, "no/such", 1, "0" * 32), 0, 1, lambda count: None
        )


def test_a_source_that_is_not_there_is_not_found(remote: Remote) -> None:
    with pytest.raises(NotFound, match="no-such-bucket"):
        remote.open("no-such-bucket").probe()
    with pytest.raises(NotFound, match="no/such/prefix"):
        remote.open(prefix="no/such/prefix").probe()


def test_a_source_that_is_one_object_names_its_directory(remote: Remote) -> None:
    with pytest.raises(UsageError, match="directory"):
        remote.open(prefix="deep/a.txt").probe()


def test_a_directory_marker_shows_as_a_directory_and_never_as_a_file(remote: Remote, seaweed, numbers) -> None:
    bucket = f"marked-{next(numbers)}"
    if remote.kind == "file":
        remote.put(bucket, "full/x", b"x")
        (Path(remote.source(bucket).removeprefix("file://")) / "bare").mkdir()
    elif remote.kind.endswith("seaweed"):
        seaweed.put(bucket, "full/", b"")
        seaweed.put(bucket, "full/x", b"x")
        seaweed.put(bucket, "bare/", b"")
    else:
        pytest.skip("hadro serves files: it has no directory markers")
    store = remote.open(bucket)
    objects, prefixes = listing(store)
    assert objects == {}
    assert sorted(prefixes) == ["bare", "full"]
    assert listing(store, "bare") == ({}, [])
    assert set(listing(store, "full")[0]) == {"full/x"}


def test_all_s3_libraries_agree_on_every_object(seaweed_tree) -> None:
    ids = []
    for library in ("auto", "obstore", "fsspec"):
        store = open_with(f"s3://{TREE_BUCKET}", endpoint_url=seaweed_tree.endpoint_url, store=library)
        ids.append({store.object_id(info) for info in walk(store)})
        store.close()
    assert ids[0] == ids[1] == ids[2]
