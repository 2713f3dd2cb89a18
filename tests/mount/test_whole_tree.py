"""A client that knows nothing of cachefs: random trees, copied, read from 16 processes and by mmap, origin gone."""

import os
import random
import subprocess
import sys
from pathlib import Path

from tests.mount.cli_support import Cli, cli
from tests.mount.harness import needs_fuse
from tests.support.s3 import HadroServer, SeaweedServer

pytestmark = needs_fuse
__all__ = ["cli"]

READERS = 16

# argv: mount, reference, seed. Every process picks files and places of its own, by read and by mmap; prints "ok".
READER = """
import mmap, os, random, sys
mount, reference, seed = sys.argv[1:]
generator = random.Random(int(seed))
places = [os.path.join(at, name) for at, _, found in os.walk(reference) for name in found]
names = sorted(os.path.relpath(place, reference) for place in places)
for _ in range(40):
    name = generator.choice(names)
    with open(os.path.join(reference, name), "rb") as file:
        wanted = file.read()
    with open(os.path.join(mount, name), "rb", buffering=0) as file:
        assert os.fstat(file.fileno()).st_size == len(wanted), name
        if wanted and generator.random() < 0.5:
            view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            read = lambda offset, length: view[offset:offset + length]
        else:
            read = lambda offset, length: os.pread(file.fileno(), length, offset)
        for _ in range(5):
            offset, length = generator.randrange(len(wanted) + 1), generator.choice((1, 4095, 4096, 70000, 2 << 20))
            assert read(offset, length) == wanted[offset:offset + length], (name, offset, length)
print("ok")
"""


def random_tree(seed: int) -> dict[str, bytes]:
    """Paths and bytes: deep and flat, empty files, spaces, unicode, sizes round the chunk's edges."""
    generator = random.Random(seed)
    chunk = 8 << 20
    sizes = [0, 1, 4095, 4096, 4097, 131072, chunk - 1, chunk, chunk + 1, 3 * chunk + 12345]
    names = ["config.json", "a b c.txt", "größe.bin", "模型.safetensors", "#1?&=+%.bin", "trailing ", "UPPER", "x"]
    directories = ["", "weights/", "weights/deep/er/", "with space/", "日本/", "a/b/c/d/e/f/"]
    tree = {}
    for number in range(40):
        size = sizes[number] if number < len(sizes) else generator.choice(sizes[:7])
        path = f"{generator.choice(directories)}{number:02d} {generator.choice(names)}"
        tree[path] = generator.randbytes(size)
    return tree


def write(tree: dict[str, bytes], directory: Path) -> None:
    for path, data in tree.items():
        place = directory / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)


def shown(directory: Path) -> set[str]:
    return {os.path.relpath(os.path.join(at, name), directory) for at, _, found in os.walk(directory) for name in found}


def compare(mount: Path, reference: Path, seed: int) -> None:
    """16 processes at once; AssertionError with what the first one that failed said."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", READER, mount, reference, str(seed + number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(READERS)
    ]
    try:
        for process in started:
            out, err = process.communicate(timeout=120)
            assert (process.returncode, out) == (0, "ok\n"), err
    finally:
        for process in started:
            process.kill()
            process.communicate()


def copy_and_compare(mount: Path, reference: Path, copy: Path) -> None:
    subprocess.run(["cp", "-r", mount, copy], check=True, timeout=120)
    subprocess.run(["diff", "-r", reference, copy], check=True, timeout=120)


def test_a_random_tree_is_the_same_through_the_mount_and_with_the_origin_gone(
    cli: Cli, tmp_path: Path, seaweed: SeaweedServer
) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    tree = random_tree(seed)
    reference = tmp_path / "reference"
    write(tree, reference)
    bucket = f"tree-{seed}"
    seaweed.make_bucket(bucket)
    for path, data in tree.items():
        seaweed.put(bucket, f"models/{path}", data)
    mount = cli.place()
    source = f"s3://{bucket}/models"
    cli.run("mount", source, mount, "--endpoint-url", seaweed.endpoint_url, "--read-timeout", "20")
    assert shown(mount) == set(tree)
    compare(mount, reference, seed)
    copy_and_compare(mount, reference, tmp_path / "copy")
    seaweed.pause()
    try:
        compare(mount, reference, seed + READERS)
        copy_and_compare(mount, reference, tmp_path / "copy again")
    finally:
        seaweed.resume()
    # Another session on the same state: nothing is fetched again, with the origin gone as well.
    cli.run("umount", mount)
    cli.run("mount", source, mount, "--endpoint-url", seaweed.endpoint_url, "--offline")
    compare(mount, reference, seed + 2 * READERS)
    status = cli.status()
    assert status["volumes"][0]["bytes_local"] == sum(map(len, tree.values()))
    assert status["volumes"][0]["objects_total"] == len(tree)


def test_an_object_of_100_gib_is_read_in_places(cli: Cli, hadro: HadroServer) -> None:
    """The middle and the end of a sparse giant, at once and without its size in memory or on the disk."""
    size = 100 * 1024**3
    path = hadro.put_sparse("giants", "models/giant.bin", size)
    with open(path, "r+b") as file:
        for offset in (0, size // 2, size - 7):
            file.seek(offset)
            file.write(b"tensors")
    mount = cli.place()
    cli.run("mount", "s3://giants/models", mount, "--endpoint-url", hadro.endpoint_url)
    giant = mount / "giant.bin"
    assert giant.stat().st_size == size
    with open(giant, "rb", buffering=0) as file:
        for offset in (size - 7, 0, size // 2):
            assert os.pread(file.fileno(), 7, offset) == b"tensors"
        assert os.pread(file.fileno(), 4096, size - 7) == b"tensors"
        assert not any(os.pread(file.fileno(), 1 << 20, size // 3))
    assert cli.status()["tiers"][0]["used_bytes"] < 1024**3
