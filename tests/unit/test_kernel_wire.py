"""The FUSE protocol's bytes, against the layout in the kernel's uapi header."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.kernel import wire

ALL_FLAGS = (1 << 43) - 1


def init_bytes(flags: int = ALL_FLAGS, minor: int = 45, opcode: int = 26) -> bytes:
    body = struct.pack("=IIIII", 7, minor, 131072, flags & 0xFFFFFFFF, flags >> 32) + bytes(44)
    return struct.pack("=IIQQIIIHH", 40 + len(body), opcode, 99, 0, 0, 0, 0, 0, 0) + body


def answered_flags(answer: bytes) -> int:
    body = answer[16:]
    return struct.unpack_from("=I", body, 12)[0] | struct.unpack_from("=I", body, 32)[0] << 32


def test_init_is_answered_with_what_both_sides_know() -> None:
    request = wire.parse_init(init_bytes())
    answer = wire.init_answer(request, ())
    assert struct.unpack_from("=IiQ", answer) == (80, 0, 99)
    assert len(answer) == 80
    major, minor, max_readahead = struct.unpack_from("=III", answer, 16)
    assert (major, minor, max_readahead) == (7, 45, 131072)
    flags = answered_flags(answer)
    assert flags == sum(wire.INIT_FLAGS.values())
    assert not flags & (1 << 14)  # READDIRPLUS_AUTO
    assert not flags & (1 << 16)  # WRITEBACK_CACHE excludes passthrough
    max_stack_depth = struct.unpack_from("=I", answer, 16 + 36)[0]
    assert max_stack_depth == 1


@given(st.integers(0, ALL_FLAGS), st.sets(st.sampled_from(sorted(wire.INIT_FLAGS))))
def test_nothing_is_asked_for_that_was_not_offered_or_is_masked(offered: int, masked: set[str]) -> None:
    data = init_bytes(offered)
    request = wire.parse_init(data)
    answer = wire.init_answer(request, masked)
    flags = answered_flags(answer)
    assert flags & ~offered == 0
    for name in masked:
        assert not flags & wire.INIT_FLAGS[name]
    used = wire.features(data, masked)
    assert ("passthrough" in used) == bool(flags & wire.INIT_FLAGS["passthrough"])
    assert bool(struct.unpack_from("=I", answer, 16 + 36)[0]) == ("passthrough" in used)
    if not offered & wire.INIT_EXT or "init_ext" in masked:
        assert flags >> 32 == 0


def test_resend_is_used_where_the_kernel_has_it() -> None:
    assert "resend" in wire.features(init_bytes(), ())
    assert "resend" not in wire.features(init_bytes(), ("resend",))
    assert "resend" not in wire.features(init_bytes(ALL_FLAGS & ~wire.HAS_RESEND), ())


def test_old_kernel_without_the_second_flags_is_understood() -> None:
    body = struct.pack("=IIII", 7, 31, 65536, 1 << 0 | 1 << 22)
    data = struct.pack("=IIQQIIIHH", 40 + len(body), 26, 1, 0, 0, 0, 0, 0, 0) + body
    request = wire.parse_init(data)
    assert request.minor == 31
    assert wire.features(data, ()) == {"async_read", "max_pages"}
    assert struct.unpack_from("=I", wire.init_answer(request, ()), 20)[0] == 31


@pytest.mark.parametrize("data", [b"", bytes(40), init_bytes(opcode=3), init_bytes() + b"x"])
def test_what_is_no_init_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="the first request"):
        wire.parse_init(data)


def test_notifications_have_the_kernels_layout() -> None:
    assert wire.resend_message() == struct.pack("=IiQ", 16, 7, 0)
    assert wire.forget_entry_message(5, b"name") == struct.pack("=IiQQII", 37, 3, 0, 5, 4, 0) + b"name\0"
    assert wire.forget_attributes_message(6) == struct.pack("=IiQQqq", 40, 2, 0, 6, -1, 0)
