"""The GGUF models that the benchmarks write, read back by what the format says."""

import struct
from pathlib import Path

import pytest

from benchmarks.gguf_write import ALIGNMENT, Tensor, header, layer, tensors_of, write_tensors

GIB = 2**30


class Reader:
    """Takes a header apart."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def number(self, form: str) -> int:
        value: int = struct.unpack_from(f"<{form}", self._data, self.position)[0]
        self.position += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.position += length
        return self._data[self.position - length : self.position].decode()

    def value(self, kind: int) -> object:
        if kind == 8:
            return self.text()
        if kind == 9:
            of, count = self.number("I"), self.number("Q")
            return [self.value(of) for _ in range(count)]
        return self.number({4: "I", 5: "i", 6: "f"}[kind])


def metadata_and_offsets(data: bytes) -> tuple[dict[str, object], dict[str, int], int]:
    """Values by key, offsets by tensor, where the header ends."""
    reader = Reader(data)
    assert data.startswith(b"GGUF")
    reader.position = 4
    version, tensors, keys = reader.number("I"), reader.number("Q"), reader.number("Q")
    assert version == 3
    values = {reader.text(): reader.value(reader.number("I")) for _ in range(keys)}
    offsets: dict[str, int] = {}
    for _ in range(tensors):
        name = reader.text()
        for _ in range(reader.number("I")):
            reader.number("Q")
        reader.number("I")
        offsets[name] = reader.number("Q")
    return values, offsets, reader.position


def test_a_header_tells_the_shape_and_where_each_tensor_begins() -> None:
    layers, tensors = tensors_of(GIB)
    data = header(layers, tensors)
    values, offsets, end = metadata_and_offsets(data)
    assert len(data) % ALIGNMENT == 0
    assert 0 <= len(data) - end < ALIGNMENT
    assert values["llama.block_count"] == layers
    assert len(values["tokenizer.ggml.tokens"]) == tensors[0].rows  # type: ignore[arg-type]
    expected = 0
    for one in tensors:
        assert offsets[one.name] == expected
        expected += -(-one.bytes // ALIGNMENT) * ALIGNMENT


@pytest.mark.parametrize("total", [0, GIB, 8 * GIB])
def test_a_model_is_as_large_as_was_asked_to_half_a_layer(total: int) -> None:
    layers, tensors = tensors_of(total)
    size = sum(one.bytes for one in tensors)
    assert layers >= 1
    assert total == 0 or abs(size - total) <= sum(one.bytes for one in layer(0)) / 2


def test_the_same_model_is_written_each_time(tmp_path: Path) -> None:
    tensors = [Tensor("a", 64, 0), Tensor("b", 32, 3), Tensor("c", 64, 2)]
    for name in ("one", "other"):
        with (tmp_path / name).open("wb") as file:
            write_tensors(file, 1, tensors)
    data = (tmp_path / "one").read_bytes()
    assert data == (tmp_path / "other").read_bytes()
    assert len(data) == len(header(1, tensors)) + 256 + 128 + 160
    assert data[-24:] == bytes(24)
