"""The stores that the conformance suite runs over, each with the same tree in it."""

import itertools
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cachefs.config import VolumeConfig
from cachefs.store import ObjectInfo, Store
from cachefs.store.open import open_store
from tests.support.s3 import HadroServer, SeaweedServer

TREE_BUCKET = "tree-bucket"
WIDE = 1005
"""More than the 1000 keys of one LIST page."""

TREE: dict[str, bytes] = {
    "plain.txt": b"plain",
    "empty": b"",
    "with space/ünï côdé 模型.bin": b"unicode",
    "nfc/\u00e9": b"composed",
    "nfd/e\u0301": b"decomposed",
    "odd/%41 +#?&=~!*'()@,;:$[]{}|^`\"<>.txt": b"odd",
    "odd/..dots": b"dots",
    "deep/a/b/c/d.txt": b"deep",
    "deep/a.txt": b"beside",
    "deep/a-1/x": b"before the slash in the order of keys",
    "big.bin": random.Random(1).randbytes(3 * 1024 * 1024 + 17),
    **{f"wide/{number:05}": b"%d" % number for number in range(WIDE)},
}

S3_KINDS = ("auto-seaweed", "auto-hadro", "obstore-seaweed", "obstore-hadro", "fsspec-seaweed")
KINDS = (*S3_KINDS, "file")


def volume(source: str, **options: Any) -> VolumeConfig:
    return VolumeConfig(name="test", source=source, **options)


def open_with(source: str, *, timeout_s: float = 30.0, **options: Any) -> Store:
    """A store with all its defaults."""
    return open_store(volume(source, **options), get_timeout_s=timeout_s, list_timeout_s=timeout_s)


def listing(store: Store, directory: str = "") -> tuple[dict[str, ObjectInfo], list[str]]:
    """Objects by path and sub-directories of one directory; fails for what is listed twice."""
    objects: dict[str, ObjectInfo] = {}
    prefixes: list[str] = []
    for page in store.list_directory(directory):
        for info in page.objects:
            assert info.path not in objects, info
            objects[info.path] = info
        prefixes += page.prefixes
    assert len(set(prefixes)) == len(prefixes), prefixes
    return objects, prefixes


def walk(store: Store, directory: str = "") -> Iterator[ObjectInfo]:
    """All objects below a directory."""
    objects, prefixes = listing(store, directory)
    yield from objects.values()
    for name in prefixes:
        yield from walk(store, f"{directory}/{name}" if directory else name)


def fetch(store: Store, info: ObjectInfo, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes `start` to `stop` of a listed object."""
    end = info.size if stop is None else stop
    buffer = bytearray(end - start)
    store.fetch_into(memoryview(buffer), store.object_id(info), start, end, lambda count: None)
    return bytes(buffer)


class Remote:
    """One kind of store over one kind of server. `put` and `delete` change what is there."""

    def __init__(
        self,
        kind: str,
        source: Callable[[str], str],
        options: dict[str, Any],
        put: Callable[[str, str, bytes], object],
        delete: Callable[[str, str], object],
    ) -> None:
        self.kind = kind
        self.source = source
        self._options = options
        self.put = put
        self.delete = delete
        self._opened: list[Store] = []

    def open(self, bucket: str = TREE_BUCKET, prefix: str = "", **options: Any) -> Store:
        source = self.source(bucket) + (f"/{prefix}" if prefix else "")
        store = open_with(source, **{**self._options, **options})
        self._opened.append(store)
        return store

    def close(self) -> None:
        for store in self._opened:
            store.close()


@pytest.fixture(scope="session")
def seaweed_tree(seaweed: SeaweedServer) -> SeaweedServer:
    seaweed.make_bucket(TREE_BUCKET)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: seaweed.put(TREE_BUCKET, *item), TREE.items()))
    return seaweed


@pytest.fixture(scope="session")
def hadro_tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HadroServer]:
    with HadroServer(tmp_path_factory.mktemp("hadro")) as server:
        for key, data in TREE.items():
            server.put(TREE_BUCKET, key, data)
        yield server


@pytest.fixture(scope="session")
def file_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for key, data in TREE.items():
        _write(root, TREE_BUCKET, key, data)
    return root


def _write(root: Path, bucket: str, key: str, data: bytes) -> None:
    path = root / bucket / key
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_bytes(data)
    if path.stat().st_mtime_ns <= before:
        # The kernel's clock for files may tick only every 4 ms.
        os.utime(path, ns=(before + 1_000_000, before + 1_000_000))


@pytest.fixture(params=KINDS)
def remote(request: pytest.FixtureRequest) -> Iterator[Remote]:
    """Each store with TREE in TREE_BUCKET."""
    made = _remote(request, request.param)
    yield made
    made.close()


@pytest.fixture(params=S3_KINDS)
def s3_remote(request: pytest.FixtureRequest) -> Iterator[Remote]:
    """The same without file://."""
    made = _remote(request, request.param)
    yield made
    made.close()


def _remote(request: pytest.FixtureRequest, kind: str) -> Remote:
    if kind == "file":
        root: Path = request.getfixturevalue("file_tree")

        def put(bucket: str, key: str, data: bytes) -> None:
            _write(root, bucket, key, data)

        return Remote(kind, lambda bucket: f"file://{root}/{bucket}", {}, put, lambda b, k: (root / b / k).unlink())
    library, _, server_name = kind.partition("-")
    options = {"store": library}
    if server_name == "hadro":
        hadro: HadroServer = request.getfixturevalue("hadro_tree")
        options["endpoint_url"] = hadro.endpoint_url
        return Remote(
            kind, lambda bucket: f"s3://{bucket}", options, hadro.put, lambda b, k: (hadro.buckets / b / k).unlink()
        )
    seaweed: SeaweedServer = request.getfixturevalue("seaweed_tree")
    options["endpoint_url"] = seaweed.endpoint_url
    return Remote(kind, lambda bucket: f"s3://{bucket}", options, seaweed.put, seaweed.delete)


@pytest.fixture(scope="session")
def numbers() -> Iterator[int]:
    """For names of buckets and keys that no other test uses."""
    return itertools.count()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1 as PEM files."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "30", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    try:
        subprocess.run(
            [*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True, timeout=60
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return certificate, key
