"""A GGUF model of any size that a real engine takes: Llama's architecture, random weights, a vocabulary of words.

What it says has no sense, and is the same for the same file. Layout: GGUF version 3 (ggml's docs/gguf.md).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

ALIGNMENT = 32
VOCABULARY = 32000
WIDTH = 2048
FEED_FORWARD = 5632
HEADS = 32
U32, F32, TEXT, ARRAY, I32 = 4, 6, 8, 9, 5
"""Types of values."""
TENSOR_F32, TENSOR_Q8_0 = 0, 8
BLOCK_WEIGHTS = 32
BLOCK_BYTES = 2 + BLOCK_WEIGHTS
"""Q8_0: a scale (f16) and so many weights (int8)."""
SCALE = 0.0003
"""Weights of a standard deviation of 0.022, about WIDTH ** -0.5: what goes in comes out as large, no infinities."""
PART_BLOCKS = 256 * 1024


class Tensor(NamedTuple):
    name: str
    columns: int
    rows: int
    """0: a vector of 32-bit floats, all 1. Otherwise a matrix in Q8_0."""

    @property
    def bytes(self) -> int:
        return self.columns // BLOCK_WEIGHTS * BLOCK_BYTES * self.rows if self.rows else 4 * self.columns


def layer(number: int) -> list[Tensor]:
    """The tensors of one layer: 55 MB."""
    square = [Tensor(f"blk.{number}.attn_{name}.weight", WIDTH, WIDTH) for name in ("q", "k", "v", "output")]
    up = [Tensor(f"blk.{number}.ffn_{name}.weight", WIDTH, FEED_FORWARD) for name in ("gate", "up")]
    norms = [Tensor(f"blk.{number}.{name}_norm.weight", WIDTH, 0) for name in ("attn", "ffn")]
    return [*norms, *square, *up, Tensor(f"blk.{number}.ffn_down.weight", FEED_FORWARD, WIDTH)]


def tensors_of(total: int) -> tuple[int, list[Tensor]]:
    """The number of layers (at least one: 125 MB), and all tensors of a model of about `total` bytes."""
    outer = [Tensor("token_embd.weight", WIDTH, VOCABULARY), Tensor("output_norm.weight", WIDTH, 0)]
    layers = max(1, round((total - sum(one.bytes for one in outer)) / sum(one.bytes for one in layer(0))))
    return layers, [*outer, *(one for number in range(layers) for one in layer(number))]


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _words() -> list[tuple[str, float, int]]:
    """Text, score and type of each token: three special ones, all bytes (type 6), words."""
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    octets = [(f"<0x{value:02X}>", 0.0, 6) for value in range(256)]
    count = VOCABULARY - len(special) - len(octets)
    return [
        *special,
        *octets,
        *((f"\N{LOWER ONE EIGHTH BLOCK}w{number}", -float(number), 1) for number in range(count)),
    ]


def _metadata(layers: int) -> list[bytes]:
    """Keys with their values, encoded."""
    words = _words()
    texts = {"general.architecture": "llama", "tokenizer.ggml.model": "llama"}
    numbers = {
        "general.file_type": 7,
        "llama.context_length": 2048,
        "llama.embedding_length": WIDTH,
        "llama.block_count": layers,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HEADS,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    scores = struct.pack(f"<{len(words)}f", *(score for _, score, _ in words))
    kinds = struct.pack(f"<{len(words)}i", *(kind for _, _, kind in words))
    arrays = {
        "tokens": (TEXT, b"".join(_text(text) for text, _, _ in words)),
        "scores": (F32, scores),
        "token_type": (I32, kinds),
    }
    return [
        *(_text(key) + struct.pack("<I", TEXT) + _text(value) for key, value in texts.items()),
        *(_text(key) + struct.pack("<II", U32, value) for key, value in numbers.items()),
        _text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", F32, 1e-5),
        *(
            _text(f"tokenizer.ggml.{name}") + struct.pack("<IIQ", ARRAY, kind, len(words)) + data
            for name, (kind, data) in arrays.items()
        ),
    ]


def header(layers: int, tensors: list[Tensor]) -> bytes:
    """Everything before the tensors' bytes, padded."""
    metadata = _metadata(layers)
    found = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata)), *metadata]
    offset = 0
    for one in tensors:
        shape = struct.pack("<IQQ", 2, one.columns, one.rows) if one.rows else struct.pack("<IQ", 1, one.columns)
        kind = TENSOR_Q8_0 if one.rows else TENSOR_F32
        found.append(_text(one.name) + shape + struct.pack("<IQ", kind, offset))
        offset += _padded(one.bytes)
    encoded = b"".join(found)
    return encoded.ljust(_padded(len(encoded)), b"\0")


def _padded(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _data(tensor: Tensor, seed: int) -> Iterator[bytes]:
    """A tensor's bytes in parts, the same for the same seed."""
    import numpy as np  # takes 0.1 s: who only starts an engine needs it not

    if not tensor.rows:
        yield np.ones(tensor.columns, dtype="<f4").tobytes()
        return
    generator = np.random.default_rng(seed)
    left = tensor.bytes // BLOCK_BYTES
    while left:
        count = min(PART_BLOCKS, left)
        blocks = np.empty(count, dtype=[("scale", "<f2"), ("weights", "i1", BLOCK_WEIGHTS)])
        blocks["scale"] = SCALE
        blocks["weights"] = np.frombuffer(generator.bytes(count * BLOCK_WEIGHTS), dtype="i1").reshape(count, -1)
        yield blocks.tobytes()
        left -= count


def write_tensors(file: IO[bytes], layers: int, tensors: list[Tensor]) -> None:
    file.write(header(layers, tensors))
    for number, one in enumerate(tensors):
        for part in _data(one, number):
            file.write(part)
        file.write(bytes(_padded(one.bytes) - one.bytes))


def write(path: Path, total: int) -> None:
    """A model of about `total` bytes, the same each time; its directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        write_tensors(file, *tensors_of(total))
