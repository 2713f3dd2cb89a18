"""What headers of model files say, and that no header can hurt."""

import json
import struct
import time

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from cachefs import formats
from cachefs.chunk import MIB
from cachefs.formats import HEADER_BYTES_MAX, Layout, Need, gguf_spans, layout_of, safetensors_spans, shard_names
from tests.support.model_files import gguf_header, gguf_string, safetensors_header

GIB = 1024 * MIB
NAMES = st.text(max_size=30)


def spans(found: Layout | Need | None) -> list[tuple[int, int]]:
    assert isinstance(found, Layout), found
    return found.spans()


@settings(deadline=None)
@given(st.dictionaries(NAMES, st.integers(0, 2**40), min_size=1, max_size=30), st.dictionaries(NAMES, NAMES))
def test_safetensors_spans_are_those_of_the_writer(tensors, metadata):
    tensors.pop("__metadata__", None)
    metadata.pop("data_offsets", None)
    head = safetensors_header(tensors, metadata)
    size = len(head) + sum(tensors.values())
    wanted, at = [], len(head)
    for count in tensors.values():
        if count:
            wanted.append((at, at + count))
        at += count
    found = safetensors_spans(head, size)
    assert spans(found) == wanted if wanted else found is None
    for length in (8, len(head) - 1):
        assert safetensors_spans(head[:length], size) == Need(len(head))


@settings(deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.integers(1, 2**40)), min_size=1, max_size=30),
    st.sampled_from([2, 3]),
    st.sampled_from([None, 8, 32, 4096]),
    st.integers(0, 200),
)
def test_gguf_spans_are_those_of_the_writer(tensors, version, alignment, words):
    head, wanted = gguf_header(tensors, version=version, alignment=alignment, words=words)
    assert spans(gguf_spans(head, wanted[-1][1])) == wanted


def test_file_of_the_real_writer_is_understood():
    tensors = {f"layer.{n:02}": numpy.zeros((n + 1, 64), dtype=numpy.float32) for n in range(20)}
    data = save(tensors, metadata={"format": "pt"})
    found = spans(safetensors_spans(data, len(data)))
    assert [stop - start for start, stop in found] == [256 * (n + 1) for n in range(20)]
    assert found[-1][1] == len(data)


def test_gguf_header_that_goes_on_asks_for_more_until_it_is_there_as_a_whole():
    head, wanted = gguf_header([("a", 5000), ("b", 70)], words=100_000)
    length, tries = formats.header_bytes_first("x.gguf", GIB), 0
    while isinstance(found := layout_of("x.gguf", head[:length], wanted[-1][1]), Need):
        assert length < found.header_bytes <= 2 * length
        length, tries = found.header_bytes, tries + 1
    assert spans(found) == wanted
    assert 0 < tries < 9


def test_a_tensor_is_found_by_any_of_its_bytes_and_the_next_one_between_them():
    layout = Layout([(100, 200), (200, 300), (400, 500)])
    assert [layout.at(offset) for offset in (0, 100, 199, 200, 300, 450, 499)] == [
        (100, 200),
        (100, 200),
        (100, 200),
        (200, 300),
        (400, 500),
        (400, 500),
        (400, 500),
    ]
    assert layout.at(500) is None


def safetensors(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def tensor(start: object, stop: object) -> bytes:
    return json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [start, stop]}}).encode()


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"1234567",
        safetensors(b""),
        safetensors(b"{}"),
        safetensors(b"{}", 2**64 - 1),
        safetensors(b"{}", 2**40),
        safetensors(b"{}", HEADER_BYTES_MAX),
        safetensors(b"[]"),
        safetensors(b'{"a":'),
        safetensors(b'{"a":"' + b"x" * 1000),
        safetensors(b'{"a\xff":{"data_offsets":[0,1]}}'),
        safetensors(tensor(-1, 4)),
        safetensors(tensor(4, 0)),
        safetensors(tensor(0, 1.5)),
        safetensors(tensor(0, 2**63)),
        safetensors(tensor(0, 2**70)),
        safetensors(b'{"a":{"data_offsets":[0,' + b"9" * 10_000 + b"]}}"),
        safetensors(b'{"a":{"data_offsets":[0,1,2]}}'),
        safetensors(b'{"a":{"data_offsets":[0,8]},"b":{"data_offsets":[4,12]}}'),  # overlap
        safetensors(b'{"a":{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"),
        safetensors(b'{"a":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001),
        safetensors(b"{" + b",".join(b'"%d":{}' % number for number in range(200_000)) + b"}"),
    ],
    ids=lambda head: repr(head[8:40]),
)
def test_safetensors_header_of_no_use_is_none(head: bytes) -> None:
    started_s = time.monotonic()
    assert safetensors_spans(head, 10 * MIB) is None
    assert time.monotonic() - started_s < 30


def gguf(*parts: bytes, tensors: int = 1, values: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return struct.pack("<4sIQQ", magic, version, tensors, values) + b"".join(parts)


KEY = gguf_string(b"k")
INFO = gguf_string(b"t") + struct.pack("<IQI", 1, 1, 0)


@pytest.mark.parametrize(
    "head",
    [
        gguf(INFO, struct.pack("<Q", 0), magic=b"GGML"),
        gguf(INFO, struct.pack("<Q", 0), version=1),
        gguf(INFO, struct.pack("<Q", 0), version=0x03000000),  # big endian
        gguf(tensors=0),
        gguf(tensors=2**64 - 1),
        gguf(values=2**64 - 1),
        gguf(struct.pack("<Q", 2**64 - 1), values=1),  # a key without end
        gguf(KEY, struct.pack("<I", 99), values=1),
        gguf(KEY, struct.pack("<IIQ", 9, 9, 1), values=1),  # an array of arrays
        gguf(KEY, struct.pack("<IIQ", 9, 10, 2**63), values=1),
        gguf(KEY, struct.pack("<IIQ", 9, 8, 2**63), values=1),
        gguf(KEY, struct.pack("<IIQQ", 9, 8, 2, 2**64 - 1), values=1),  # a word without end
        gguf(gguf_string(b"general.alignment"), struct.pack("<II", 4, 0), INFO, bytes(8), values=1),
        gguf(gguf_string(b"general.alignment"), struct.pack("<II", 4, 2**31), INFO, bytes(8), values=1),
        gguf(gguf_string(b"t"), struct.pack("<I", 2**32 - 1)),
        gguf(INFO, struct.pack("<Q", 33)),  # not aligned
        gguf(INFO, struct.pack("<Q", 2**63)),  # behind the end
    ],
    ids=lambda head: repr(head[4:40]),
)
def test_gguf_header_of_no_use_is_none(head: bytes) -> None:
    assert gguf_spans(head + bytes(HEADER_BYTES_MAX - len(head)), GIB) is None


def test_header_longer_than_the_limit_is_none_in_bounded_time() -> None:
    words = (HEADER_BYTES_MAX - 1000) // 8
    head = gguf(KEY, struct.pack("<IIQ", 9, 8, 2 * words), bytes(8 * words), values=1)
    started_s = time.monotonic()
    assert gguf_spans(head.ljust(HEADER_BYTES_MAX, b"\0"), GIB) is None
    assert time.monotonic() - started_s < 30


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 2**63), st.booleans())
def test_no_bytes_make_it_fail(data, size, framed):
    for head in (data, safetensors(data), b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + data, safetensors(b'{"a":' + data)):
        for parse in (safetensors_spans, gguf_spans):
            found = parse(memoryview(head) if framed else head, size)
            if isinstance(found, Need):
                assert len(head) < found.header_bytes <= min(HEADER_BYTES_MAX, max(size, len(head)))
            elif found is not None:
                for start, stop in spans(found):
                    assert 0 < start < stop <= size
    assert isinstance(shard_names(data), tuple)


@settings(deadline=None, max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "data_offsets"]), inner),
    )
)
def test_no_json_makes_it_fail(value):
    text = json.dumps({"a": value, "weight_map": value}).encode()
    found = safetensors_spans(safetensors(text), GIB)
    assert found is None or spans(found)
    assert isinstance(shard_names(text), tuple)


def test_shards_come_by_number_whatever_the_order_in_the_index() -> None:
    names = [f"part-{number}.safetensors" for number in (10, 2, 1, 2)]
    index = {"metadata": {"total_size": 1}, "weight_map": {f"t{n}": name for n, name in enumerate(names)}}
    assert shard_names(json.dumps(index).encode()) == tuple(f"part-{number}.safetensors" for number in (1, 2, 10))


@pytest.mark.parametrize(
    "index",
    [b"", b"{}", b"[]", b'{"weight_map":{"a":1}}', b'{"weight_map":{"a":"../x"}}', b'{"weight_map":{"a":""}}'],
)
def test_index_of_no_use_names_nothing(index: bytes) -> None:
    assert shard_names(index) == ()


def test_huge_index_names_nothing() -> None:
    many = b'{"weight_map":{' + b",".join(b'"%d":"%d"' % (n, n % 7) for n in range(400_000)) + b"}}"
    assert shard_names(many) == ()


def test_numbered_names_follow_each_other() -> None:
    following = formats.next_numbered
    assert following("model-00001-of-00003.safetensors") == "model-00002-of-00003.safetensors"
    assert following("x-00009-of-00010.gguf") == "x-00010-of-00010.gguf"
    assert following("model-00003-of-00003.safetensors") is None
    assert following("model.safetensors") is None
    assert following("a-1-of-2") is None
