"""What is fetched ahead of readers on real mounts, by the S3 server's log of requests."""

import os
import signal
from pathlib import Path

from cachefs.chunk import CHUNK_BYTES, MIB
from tests.mount.cli_support import Cli, cli
from tests.mount.harness import mounted, needs_fuse, volume, wait_for
from tests.support.lying import LyingServer
from tests.support.model_files import safetensors_file

__all__ = ["cli"]
pytestmark = needs_fuse

TENSORS = {f"t{number}": 3 * CHUNK_BYTES for number in range(4)}
SHARDS = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
SMALL = {"config.json": b"{}", "tokenizer.json": b"[]"}


def chunks(origin: LyingServer, key: str) -> list[int]:
    """The chunks of an object that were asked for, in order."""
    ranges = [request.range for request in origin.requests if request.key == key and request.method == "GET"]
    return [int(text.removeprefix("bytes=").partition("-")[0]) // CHUNK_BYTES for text in ranges]


def model(origin: LyingServer, weights: int = 2 * CHUNK_BYTES + 640) -> None:
    for name, data in SMALL.items():
        origin.put("models", f"m/{name}", data)
    for name in SHARDS:
        origin.put("models", f"m/{name}", os.urandom(64) * (weights // 64))


def test_jump_to_a_tensor_fetches_that_tensor(tmp_path: Path, origin: LyingServer) -> None:
    data = safetensors_file(TENSORS)
    origin.put("models", "m/x.safetensors", data)
    source = volume("m", "s3://models/m", origin.endpoint_url)
    with mounted(tmp_path, source) as mount, (mount.path() / "x.safetensors").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert file.read(4096) == data[:4096]
        wait_for(lambda: sorted(chunks(origin, "m/x.safetensors")) == [0, 1, 2], "the start of the file")
        start = len(data) - sum(TENSORS.values()) + 2 * 3 * CHUNK_BYTES
        assert os.pread(file.fileno(), 4096, start) == data[start : start + 4096]
        wait_for(lambda: sorted(chunks(origin, "m/x.safetensors")) == [0, 1, 2, 6, 7, 8, 9], "the tensor")


def test_next_shard_is_on_its_way_before_the_last_read_of_the_first(tmp_path: Path, origin: LyingServer) -> None:
    model(origin)
    source = volume("m", "s3://models/m", origin.endpoint_url)
    with mounted(tmp_path, source) as mount, (mount.path() / SHARDS[0]).open("rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size - MIB
        while left > 0:
            left -= len(file.read(min(left, MIB)))
        wait_for(lambda: sorted(chunks(origin, f"m/{SHARDS[1]}")) == [0, 1, 2], "the second shard is fetched")
        assert len(file.read()) == MIB
        assert len((mount.path() / SHARDS[1]).read_bytes()) == os.fstat(file.fileno()).st_size
        assert sorted(chunks(origin, f"m/{SHARDS[1]}")) == [0, 1, 2]


def test_small_files_come_with_the_mount_and_none_brings_nothing(cli: Cli, origin: LyingServer) -> None:
    model(origin)
    place = cli.place()
    cli.run("mount", "s3://models/m", place, "--endpoint-url", origin.endpoint_url)
    wait_for(lambda: all(origin.gets(f"m/{name}") for name in SMALL), "the small files")
    assert not any(origin.gets(f"m/{name}") for name in SHARDS)
    assert (place / "config.json").read_bytes() == b"{}"
    cli.run("umount", place)
    cli.run("evict", "s3://models/m", "--endpoint-url", origin.endpoint_url)
    origin.forget_requests()
    cli.run("mount", "s3://models/m", place, "--endpoint-url", origin.endpoint_url, "--prefetch", "none")
    assert sorted(os.listdir(place)) == sorted([*SMALL, *SHARDS])
    other = cli.run(
        "mount", "s3://models/m", place, "-o", "prefetch=all", "--endpoint-url", origin.endpoint_url, code=2
    )
    assert "busy" in other.stderr
    cli.run("umount", place)
    assert origin.gets() == 0


def test_all_goes_on_after_a_server_was_killed_and_ends_with_everything_sealed(
    tmp_path: Path, origin: LyingServer
) -> None:
    model(origin)
    origin.lie("hang", key=f"m/{SHARDS[1]}")
    source = volume("m", "s3://models/m", origin.endpoint_url, prefetch="all")
    with mounted(tmp_path, source) as mount:
        wait_for(lambda: mount.status()["tiers"][0]["objects_sealed"] == 3, "all but what hangs")
        origin.wait_waiting(1)
        os.kill(mount.server_pid(), signal.SIGKILL)
        origin.tell_the_truth()
        wait_for(lambda: mount.status()["volumes"][0]["objects_sealed"] == 4, "everything is sealed")
        status = mount.status()
        assert status["server"]["restarts"] >= 1
        assert status["volumes"][0]["bytes_local"] == status["volumes"][0]["bytes_total"]
        assert origin.gets(f"m/{SHARDS[0]}") == 3  # once
