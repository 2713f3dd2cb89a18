"""Model files as their writers lay them out: safetensors (8 bytes, JSON padded with spaces, tensors) and GGUF."""

import json
import struct
from collections.abc import Mapping, Sequence


def safetensors_header(tensors: Mapping[str, int], metadata: Mapping[str, str] | None = None) -> bytes:
    """The start of a file with tensors of so many bytes, in this order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    at = 0
    for name, count in tensors.items():
        header[name] = {"dtype": "U8", "shape": [count], "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def safetensors_file(tensors: Mapping[str, int], fill: bytes = b"\0") -> bytes:
    head = safetensors_header(tensors)
    return head + fill * sum(tensors.values())


def gguf_string(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def gguf_header(
    tensors: Sequence[tuple[str, int]], *, version: int = 3, alignment: int | None = None, words: int = 10
) -> tuple[bytes, list[tuple[int, int]]]:
    """The start of a GGUF up to its data, and (start, stop) of its tensors with their padding."""
    values = [
        gguf_string(b"general.architecture") + struct.pack("<I", 8) + gguf_string(b"llama"),
        gguf_string(b"llama.context_length") + struct.pack("<II", 4, 4096),
        gguf_string(b"llama.rope.freq_base") + struct.pack("<If", 6, 1e6),
        gguf_string(b"tokenizer.ggml.add_bos_token") + struct.pack("<I?", 7, True),
        gguf_string(b"tokenizer.ggml.tokens")
        + struct.pack("<IIQ", 9, 8, words)
        + b"".join(gguf_string(b"word%d" % number) for number in range(words)),
        gguf_string(b"tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, words) + bytes(4 * words),
    ]
    if alignment is not None:
        values.append(gguf_string(b"general.alignment") + struct.pack("<II", 4, alignment))
    step = alignment or 32
    infos, offsets, at = [], [], 0
    for name, count in tensors:
        infos.append(gguf_string(name.encode()) + struct.pack("<IQQIQ", 2, count, 1, 2, at))
        offsets.append(at)
        at += -(-count // step) * step
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(values)) + b"".join(values) + b"".join(infos)
    head += b"\0" * (-len(head) % step)
    ends = [*offsets[1:], at]
    return head, [(len(head) + start, len(head) + stop) for start, stop in zip(offsets, ends, strict=True)]
