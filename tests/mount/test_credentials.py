"""The environment's secrets reach every server of a mount, and no keeper."""

import os
import signal
from pathlib import Path

import pytest

from tests.mount.harness import mounted, needs_fuse, volume, wait_for
from tests.support.s3 import SECRET_KEY, HadroServer

pytestmark = needs_fuse
CHUNK = 8 << 20


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def test_no_keeper_has_the_secrets_and_every_server_does(
    tmp_path: Path, hadro: HadroServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hadro checks signatures: each chunk that is read proves that the server of that moment has the keys."""
    for name, value in hadro.env().items():
        monkeypatch.setenv(name, value)
    data = os.urandom(4 * CHUNK)
    hadro.put("secrets", "model/weights.bin", data)
    with (
        mounted(tmp_path, volume("m", "s3://secrets/model", hadro.endpoint_url), prefetch_bytes=1) as mount,
        open(mount.path("m/weights.bin"), "rb", buffering=0) as file,
    ):
        for index, victim in enumerate(("", "server", "keeper", "server")):
            if victim:
                old = mount.status()[victim]["pid"]
                os.kill(old, signal.SIGKILL)
                wait_for(lambda v=victim, o=old: mount.status()[v]["pid"] not in (0, o), f"a new {victim}")
            got = os.pread(file.fileno(), 4096, index * CHUNK)
            assert got == data[index * CHUNK : index * CHUNK + 4096]
            mount.keeper_pid = mount.status()["keeper"]["pid"]
            assert SECRET_KEY.encode() not in environment_of(mount.keeper_pid)
