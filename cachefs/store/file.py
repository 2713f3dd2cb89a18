"""`file://`: a local or network directory as a source, for one's own mounts (never for untrusted volumes)."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from cachefs.chunk import MIB, ObjectId
from cachefs.errors import AccessDenied, IntegrityError, NotFound, ObjectChanged, StoreUnavailable, UsageError
from cachefs.store import ListPage, ObjectInfo
from cachefs.store._base import RangeStore

PIECE_BYTES = MIB
PAGE_ENTRIES = 1000


def _version(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"


class FileStore(RangeStore):
    """Symbolic links are followed as long as they end inside the root; others are left out.

    So is one to a directory that one is in already: the tree would have no end.
    """

    def __init__(self, path: str) -> None:
        if not path.startswith("/"):
            raise UsageError(f"file://{path}: write file:///ABSOLUTE/DIRECTORY")
        if "\x00" in path:
            raise UsageError("a path has no NUL byte in it")
        self._root = Path(os.path.normpath(path))
        self.identity = f"file://{self._root}"
        self.url = self.identity

    def probe(self) -> None:
        """Opens the root: NotFound, AccessDenied, UsageError (no directory)."""
        try:
            with os.scandir(self._root):
                pass
        except NotADirectoryError as error:
            raise UsageError(f"{self.url} is a file: give the directory that it is in") from error
        except OSError as error:
            raise self._translate(error, str(self._root)) from error

    def _translate(self, error: OSError, what: str) -> Exception:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return NotFound(f"{what}: there is no such file or directory")
        if isinstance(error, PermissionError):
            return AccessDenied(f"{what}: permission denied: give the server's user the right to read it")
        return StoreUnavailable(f"{what}: {error.strerror or error}")

    def _inside(self, path: Path) -> Path:
        """The real path; NotFound when it leaves the root by `..` or a symbolic link."""
        try:
            real = path.resolve(strict=True)
            root = self._root.resolve(strict=True)
        except OSError as error:
            raise self._translate(error, str(path)) from error
        except RuntimeError as error:
            raise NotFound(f"{path}: its symbolic links go round in a circle") from error
        if not real.is_relative_to(root):
            raise NotFound(f"{path}: leads out of {self._root}")
        return real

    def list_directory(self, directory: str) -> Iterator[ListPage]:
        """See Store. What is neither file nor directory is left out, and so is a name that is not UTF-8."""
        base = self._inside(self._root / directory if directory else self._root)
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        try:
            with os.scandir(base) as entries:
                for entry in entries:
                    self._add(entry, directory, objects, prefixes)
                    if len(objects) + len(prefixes) >= PAGE_ENTRIES:
                        yield ListPage(tuple(objects), tuple(prefixes))
                        objects, prefixes = [], []
        except OSError as error:
            raise self._translate(error, str(base)) from error
        yield ListPage(tuple(objects), tuple(prefixes))

    def _add(self, entry: os.DirEntry[str], directory: str, objects: list[ObjectInfo], prefixes: list[str]) -> None:
        try:
            entry.name.encode()
            real = self._inside(Path(entry.path)) if entry.is_symlink() else None
            status = os.stat(real or entry.path)
            if real is not None and stat.S_ISDIR(status.st_mode) and self._is_in(directory, real):
                return
        except (UnicodeEncodeError, NotFound, FileNotFoundError):
            return
        if stat.S_ISDIR(status.st_mode):
            prefixes.append(entry.name)
        elif stat.S_ISREG(status.st_mode):
            path = f"{directory}/{entry.name}" if directory else entry.name
            objects.append(ObjectInfo(path, status.st_size, _version(status), status.st_mtime))

    def _is_in(self, directory: str, real: Path) -> bool:
        """Whether one has come through `real` on the way to `directory`."""
        parts = directory.split("/") if directory else []
        way = [self._root.joinpath(*parts[:count]) for count in range(len(parts) + 1)]
        return any(place.resolve() == real for place in way)

    def object_id(self, info: ObjectInfo) -> ObjectId:
        """See Store."""
        return ObjectId(self.identity, info.path, info.size, info.version)

    def _fetch_range(
        self, buffer: memoryview, object_id: ObjectId, start: int, progress: Callable[[int], None]
    ) -> None:
        """The version is compared before and after the bytes are read."""
        path = self._inside(self._root / object_id.path)
        try:
            # O_NONBLOCK: a file that became a pipe must not hang the open.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise self._translate(error, str(path)) from error
        try:
            self._check(fd, path, object_id)
            done = 0
            while done < len(buffer):
                piece = buffer[done : done + PIECE_BYTES]
                got = os.preadv(fd, [piece], start + done)
                if got == 0:
                    self._check(fd, path, object_id)
                    raise IntegrityError(f"{path}: ends before its size")
                done += got
                # INVARIANT: no reader is woken for bytes of another version: the check follows each piece.
                self._check(fd, path, object_id)
                if done < len(buffer):
                    progress(done)
        except OSError as error:
            raise self._translate(error, str(path)) from error
        finally:
            os.close(fd)
        progress(len(buffer))

    def _check(self, fd: int, path: Path, object_id: ObjectId) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or _version(status) != object_id.version:
            raise ObjectChanged(f"{path} changed since it was listed")

    def close(self) -> None:
        """Nothing is held open."""
