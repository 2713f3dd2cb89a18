"""What is published on this node: one small file per publication, so that a restarted driver knows it.

The name of a file is a hash: volume ids and target paths are other people's strings. Nothing secret is in it.
Order (crash at any point is repaired by the next publish or unpublish of the same target):
publish: record `publishing` -> server -> directory -> mount -> record `published`;
unpublish: unmount -> directory -> record `leaving` -> server -> record removed.
"""

import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from csi.failure import Conflict, NotAllowedNow

FORMAT = 1
RECIPE = 1
"""Version of arguments_digest(). A record of another recipe cannot be compared and is taken as the same."""
KUBERNETES_PREFIXES = ("csi.storage.k8s.io/", "storage.kubernetes.io/")


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """One volume at one target path."""

    format: int = FORMAT
    recipe: int = RECIPE
    key: str
    volume_id: str
    target: str
    digest: str
    state: Literal["publishing", "published", "leaving"]
    exclusive: bool = False
    """The capability allows one target per node."""
    root: str = ""
    """The view's path below the mount root, once the server said it."""
    device: str = ""
    """major:minor of the mounted file system: another one under the mount root means that the mount was lost."""


def publication_key(volume_id: str, target: str) -> str:
    """Hex, 40 characters: the record's name and the server's name of the publication."""
    return hashlib.sha256(f"{volume_id}\0{target}".encode()).hexdigest()[:40]


def arguments_digest(
    volume_id: str, context: Mapping[str, str], access_mode: int, mount_flags: tuple[str, ...], readonly: bool
) -> str:
    """Of what makes a publication another one. What the kubelet adds (pod info, tokens) and secrets are left out:
    they change at each republish."""
    plain = sorted((name, value) for name, value in context.items() if not name.startswith(KUBERNETES_PREFIXES))
    parts = [volume_id, plain, access_mode, sorted(mount_flags), readonly]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def same_arguments(record: Publication, digest: str) -> bool:
    """Whether `record` was made with the arguments of `digest` (this version's recipe)."""
    return record.recipe != RECIPE or record.digest == digest


class Publications:
    """All records, in memory and in `directory`. INVARIANT: memory == files, but for a put that failed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mutex = threading.Lock()
        self._records: dict[str, Publication] = {}
        self.damaged: list[str] = []
        """Names of files that could not be read; they are set aside as NAME.damaged."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in sorted(directory.iterdir()):
            if path.suffix == ".new":
                path.unlink()
            elif path.suffix == ".json":
                self._load(path)

    def _load(self, path: Path) -> None:
        try:
            record = msgspec.json.decode(path.read_bytes(), type=Publication)
            if record.key != path.stem:
                raise msgspec.ValidationError("the record is another one's")
        except msgspec.MsgspecError:
            path.rename(path.with_suffix(".damaged"))
            self.damaged.append(path.name)
            return
        self._records[record.key] = record

    def get(self, key: str) -> Publication | None:
        """The record of `key`."""
        with self._mutex:
            return self._records.get(key)

    def all(self) -> tuple[Publication, ...]:
        """A copy of all."""
        with self._mutex:
            return tuple(self._records.values())

    def reserve(self, record: Publication) -> None:
        """Write a `publishing` record, unless another volume has the target (Conflict) or the volume, published
        for one target only, has another (NotAllowedNow)."""
        with self._mutex:
            for other in self._records.values():
                if other.key == record.key or other.state == "leaving":
                    continue
                if other.target == record.target:
                    raise Conflict("another volume is published at this target path")
                if other.volume_id == record.volume_id and (other.exclusive or record.exclusive):
                    raise NotAllowedNow("the access mode allows one target path, and the volume has another")
            self._write(record)

    def put(self, record: Publication) -> None:
        """Write durably: after this returns a crash keeps the record."""
        with self._mutex:
            self._write(record)

    def _write(self, record: Publication) -> None:
        path = self._directory / f"{record.key}.json"
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
        self._sync_directory()
        self._records[record.key] = record

    def remove(self, key: str) -> None:
        """Forget; nothing happens when there is none."""
        with self._mutex:
            (self._directory / f"{key}.json").unlink(missing_ok=True)
            self._sync_directory()
            self._records.pop(key, None)

    def _sync_directory(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
