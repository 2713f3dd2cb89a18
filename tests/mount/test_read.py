"""Reading through a real kernel mount."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from cachefs.chunk import CHUNK_BYTES, MIB
from tests.mount.harness import mounted, needs_fuse, volume
from tests.support.lying import LyingServer

pytestmark = needs_fuse


def test_cat_gives_the_bytes_of_the_object(tmp_path: Path, origin: LyingServer) -> None:
    data = os.urandom(2 * CHUNK_BYTES + 12345)
    origin.put("models", "m/weights.bin", data)
    with mounted(tmp_path, volume("m", "s3://models/m", origin.endpoint_url)) as mount:
        got = subprocess.run(["cat", mount.path() / "weights.bin"], check=True, capture_output=True, timeout=60).stdout
        assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
        assert sorted(os.listdir(mount.path())) == ["weights.bin"]
