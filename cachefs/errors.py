"""Every error that cachefs raises on purpose; each class carries the errno that `fuse.py` answers with.

Code raises meaning (`raise ObjectChanged(...)`); only `fuse.py` turns it into an errno, and only `cli.py`
turns it into an exit code. A message is one line that says what to do.
"""

import errno

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
DISK_FAILURES = DISK_FULL | {errno.EROFS, errno.EIO, errno.EUCLEAN, errno.EBADMSG}


def is_disk_failure(number: int | None) -> bool:
    """Whether a system call that failed with this errno says that a disk takes no writes: read-only, failing, full."""
    return number in DISK_FAILURES


def is_disk_full(number: int | None) -> bool:
    """The failure that passes when somebody makes room."""
    return number in DISK_FULL


def printable(text: str) -> str:
    """Without control characters: stores send line ends, and escape sequences for the terminal, in keys and headers."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class CachefsError(Exception):
    """The root of the tree. `errno` is what a FUSE request is answered with, `exit_code` how a command ends."""

    errno = errno.EIO
    exit_code = 1


class NotFound(CachefsError):
    """No such object, prefix, bucket, name or inode."""

    errno = errno.ENOENT


class NotADirectory(CachefsError):
    """A directory was asked for, and the name is a file."""

    errno = errno.ENOTDIR


class IsADirectory(CachefsError):
    """A file was asked for, and the name is a directory."""

    errno = errno.EISDIR


class AccessDenied(CachefsError):
    """The store refused the credentials (403), or the request carried none."""

    errno = errno.EACCES


class ObjectChanged(CachefsError):
    """The store no longer has the version that was asked for (412, another etag or another size)."""

    errno = errno.ESTALE


class StaleInode(CachefsError):
    """An inode of a superseded version was opened: ESTALE makes the kernel look the name up again."""

    errno = errno.ESTALE


class IntegrityError(CachefsError):
    """Bytes that fail a check: a wrong digest, range, length or etag."""

    errno = errno.EIO


class StoreUnavailable(CachefsError):
    """A failure that may pass: no connection, 5xx, 429, a cut body. The caller may wait and ask again.

    `retry_after_s`: for how long the store itself asked to wait, None when it did not.
    """

    errno = errno.EIO

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreTimeout(CachefsError):
    """The store did not answer within the reader's deadline (`read_timeout_s`)."""

    errno = errno.ETIMEDOUT


class Offline(CachefsError):
    """The bytes are not local and the store may not be asked (`--offline`)."""

    errno = errno.EIO


class ReadOnly(CachefsError):
    """A write to a read-only tree."""

    errno = errno.EROFS


class NoSpace(CachefsError):
    """The local tier or the index is full. Never the answer to a read: it is served uncached."""

    errno = errno.ENOSPC


class IndexUnwritable(NoSpace):
    """The disk takes no records: it is full, read-only or failing. What is in the index can be read."""


class IndexFull(IndexUnwritable):
    """There is no room for records now; there may be soon."""


class WorkFailed(CachefsError):
    """The request was right, the work failed: exit code 1."""


class UsageError(CachefsError):
    """The request is wrong or cannot be met as asked: exit code 2."""

    errno = errno.EINVAL
    exit_code = 2


class StateBusy(UsageError):
    """Another live server or command holds the state directory."""


class StateUnwritable(UsageError):
    """The disk of the state directory takes no writes: it is read-only, full or failing. It may be readable."""


class StateDamaged(UsageError):
    """The index cannot be read: move it away."""


class StateTooNew(UsageError):
    """The state directory was written by a newer format than this version reads."""
