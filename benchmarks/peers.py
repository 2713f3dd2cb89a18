"""The file systems that are compared, each behind the same four verbs."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tests.support.s3 import S3Server

from .harness import (
    BUCKET,
    BenchError,
    Target,
    descendants,
    free_port,
    is_mounted,
    metric_sum,
    program,
    read_metrics,
    run_cachefs,
    unmount,
    wait_for,
)

DEFAULT = Target()
COMMAND_SECONDS_MAX = 120


class Peer(Protocol):
    """One way to read the object as a file. `work` is a directory of its own, empty before start()."""

    name: str

    def start(self, work: Path, server: S3Server) -> Path:
        """Ready: the path to read. An empty cache."""

    def make_warm(self, path: Path) -> None:
        """All bytes are local afterwards."""

    def pids(self) -> list[int]:
        """The processes whose processor time and memory count."""

    def upcalls(self) -> float | None:
        """READ requests that reached the process so far; None where it does not tell."""

    def stop(self) -> None:
        """Unmounted, ended. Never raises for what was never started."""


class Native:
    """A plain local file on the same file system: what warm reads are measured against."""

    name = "native"

    def __init__(self, original: Path) -> None:
        """`original`: a file or a directory."""
        self._original = original

    def start(self, work: Path, server: S3Server) -> Path:
        target = work / self._original.name
        # A copy that shares no blocks: a reflink would share page cache with nobody, but be laid out differently.
        subprocess.run(["cp", "-r", "--reflink=never", str(self._original), str(target)], check=True)
        forget_pages(target)
        return target

    def make_warm(self, path: Path) -> None:
        read_whole(path)

    def pids(self) -> list[int]:
        return []

    def upcalls(self) -> float | None:
        return 0.0

    def stop(self) -> None:
        return None


class Cachefs:
    """This project."""

    name = "cachefs"

    def __init__(self, target: Target = DEFAULT, settings: Mapping[str, str] | None = None) -> None:
        """`settings`: CACHEFS_* variables."""
        self._target = target
        self._settings = dict(settings or {})
        self._mountpoints: list[Path] = []
        self._state = Path()
        self._environment: dict[str, str] = {}
        self._metrics = ""
        self._source: list[str] = []
        self._pids: list[int] = []

    def _run(self, *arguments: str) -> str:
        return run_cachefs(
            *arguments, state=self._state, environment=self._environment, seconds_max=COMMAND_SECONDS_MAX
        )

    def start(self, work: Path, server: S3Server) -> Path:
        self._state = work / "state"
        self._environment = server.env() | self._settings
        self._metrics = f"127.0.0.1:{free_port()}"
        return self.mount_at(work / "mnt", server, "--metrics", self._metrics)

    def mount_at(self, mountpoint: Path, server: S3Server, *options: str) -> Path:
        """Mounts the source there, also a second time on the same state directory; the path to read."""
        mountpoint.mkdir()
        self._mountpoints.append(mountpoint)
        source, *where = self._source = [f"s3://{BUCKET}/{self._target.prefix}", "--endpoint-url", server.endpoint_url]
        done = json.loads(self._run("mount", source, str(mountpoint), *where, *options, "--json"))
        self._pids = [done["server_pid"], done["keeper_pid"]]
        return self._target.under(mountpoint)

    def fill(self) -> None:
        """All bytes are local afterwards, and nobody has read them."""
        self._run("warm", *self._source)

    def make_warm(self, path: Path) -> None:
        files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
        for file in files:
            read_whole(file)

        def sealed() -> bool:
            volume = json.loads(self._run("status", "--json"))["volumes"][0]
            return bool(volume["objects_sealed"] >= len(files))

        wait_for(sealed, "the objects are sealed", 120)

    def pids(self) -> list[int]:
        # What the mount told, and no `cachefs status`: that takes time in which prefetch goes on.
        return self._pids

    def upcalls(self) -> float | None:
        return metric_sum(read_metrics(self._metrics), "cachefs_read_requests_total")

    def stop(self) -> None:
        for mountpoint in reversed(self._mountpoints):
            if is_mounted(mountpoint):
                try:
                    self._run("umount", str(mountpoint))
                except BenchError:
                    # The server ends with its last mount.
                    self._run("umount", "--lazy", str(mountpoint))
                    raise


class Foreground:
    """A peer that is one process in the foreground while it is mounted."""

    name = "?"

    def __init__(self, target: Target = DEFAULT) -> None:
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None
        self._mountpoint: Path | None = None

    def command(self, work: Path, server: S3Server, mountpoint: Path) -> tuple[list[str], dict[str, str]]:
        """Command and environment."""
        raise NotImplementedError

    def path(self, mountpoint: Path) -> Path:
        return self._target.under(mountpoint / self._target.prefix)

    def prepare(self, work: Path, server: S3Server) -> None:
        """What comes before the clock."""

    def start(self, work: Path, server: S3Server) -> Path:
        mountpoint = work / "mnt"
        mountpoint.mkdir()
        command, environment = self.command(work, server, mountpoint)
        self._mountpoint = mountpoint
        with (work / "peer.log").open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

        def ready() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise BenchError(f"{self.name} ended: {(work / 'peer.log').read_text(errors='replace')[-500:]}")
            return is_mounted(mountpoint) and self.path(mountpoint).exists()

        wait_for(ready, f"{self.name} is mounted")
        return self.path(mountpoint)

    def make_warm(self, path: Path) -> None:
        read_whole(path)

    def pids(self) -> list[int]:
        return descendants(self._process.pid) if self._process else []

    def upcalls(self) -> float | None:
        return None

    def stop(self) -> None:
        if self._mountpoint is not None:
            unmount(self._mountpoint)
        if self._process is not None:
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def rclone_environment(work: Path, server: S3Server) -> dict[str, str]:
    """The server as rclone's remote `bench`, and nobody's configuration file."""
    remote = {"TYPE": "s3", "PROVIDER": "Other", "ENDPOINT": server.endpoint_url, "ENV_AUTH": "true"}
    remote |= {"FORCE_PATH_STYLE": "true", "REGION": "us-east-1"}
    environment = server.env() | {f"RCLONE_CONFIG_BENCH_{key}": value for key, value in remote.items()}
    return environment | {"RCLONE_CONFIG": str(work / "rclone.conf")}


class Rclone(Foreground):
    """rclone mount with its full cache and parallel streams (they came after 1.60: Debian's is no fair peer)."""

    name = "rclone"

    def command(self, work: Path, server: S3Server, mountpoint: Path) -> tuple[list[str], dict[str, str]]:
        flags = "--read-only --vfs-cache-mode full --vfs-read-ahead 256M --buffer-size 16M --dir-cache-time 1h"
        flags += " --attr-timeout 1h --no-modtime --no-checksum --vfs-fast-fingerprint --max-read-ahead 1M"
        flags += " --vfs-read-chunk-size 8M --vfs-read-chunk-streams 16"
        (work / "cache").mkdir()
        where = [f"bench:{BUCKET}", str(mountpoint), "--cache-dir", str(work / "cache")]
        return [program("rclone"), "mount", *where, *flags.split()], rclone_environment(work, server)


class S3fs(Foreground):
    """s3fs-fuse, 16 parallel requests of 10 MB (its smallest useful part)."""

    name = "s3fs"

    def command(self, work: Path, server: S3Server, mountpoint: Path) -> tuple[list[str], dict[str, str]]:
        passwords = work / "passwd"
        passwords.touch(0o600)
        passwords.write_text(f"{server.access_key}:{server.secret_key}\n")
        (work / "cache").mkdir()
        options = [f"use_cache={work / 'cache'}", "parallel_count=16", "multipart_size=10", "multireq_max=64"]
        options += ["kernel_cache", "stat_cache_expire=3600", "sigv4", "use_path_request_style", "ro"]
        options += [f"url={server.endpoint_url}", f"passwd_file={passwords}", "endpoint=us-east-1"]
        return [program("s3fs"), BUCKET, str(mountpoint), "-f", "-o", ",".join(options)], server.env()


class Juicefs(Foreground):
    """JuiceFS over the same server, with SQLite for its metadata. It cannot show a prefix: the data is imported."""

    name = "juicefs"

    def __init__(self, original: Path) -> None:
        super().__init__()
        self._original = original

    def command(self, work: Path, server: S3Server, mountpoint: Path) -> tuple[list[str], dict[str, str]]:
        meta = f"sqlite3://{work / 'meta.db'}"
        storage = ["--storage", "s3", "--bucket", f"{server.endpoint_url}/juicefs", "--trash-days", "0"]
        keys = {"ACCESS_KEY": server.access_key, "SECRET_KEY": server.secret_key}
        environment = server.env() | keys
        server.request("PUT", "/juicefs")
        done = subprocess.run(
            [program("juicefs"), "format", meta, "bench", *storage], env=environment, capture_output=True, check=False
        )
        if done.returncode != 0:
            raise BenchError(f"juicefs format: {done.stderr.decode(errors='replace')[-500:]}")
        flags = ["--no-usage-report", "--cache-dir", str(work / "cache"), "--open-cache", "3600"]
        flags += ["--attr-cache", "3600", "--entry-cache", "3600"]
        return [program("juicefs"), "mount", meta, str(mountpoint), *flags], environment

    def path(self, mountpoint: Path) -> Path:
        target = mountpoint / self._target.name
        if is_mounted(mountpoint) and not target.exists():
            subprocess.run(["cp", str(self._original), str(target)], check=True)
            os.sync()
        return target


class MountS3(Foreground):
    """mountpoint-s3 with its disk cache, where its binary is on PATH."""

    name = "mount-s3"

    def command(self, work: Path, server: S3Server, mountpoint: Path) -> tuple[list[str], dict[str, str]]:
        (work / "cache").mkdir()
        flags = ["--foreground", "--read-only", "--force-path-style", "--region", "us-east-1"]
        flags += ["--endpoint-url", server.endpoint_url, "--cache", str(work / "cache"), "--metadata-ttl", "3600"]
        return [program("mount-s3"), BUCKET, str(mountpoint), *flags], server.env()


class Geesefs(Foreground):
    """geesefs with its disk cache, where its binary is on PATH."""

    name = "geesefs"

    def command(self, work: Path, server: S3Server, mountpoint: Path) -> tuple[list[str], dict[str, str]]:
        (work / "cache").mkdir()
        flags = ["-f", "-o", "ro", "--region", "us-east-1", "--endpoint", server.endpoint_url]
        flags += ["--cache", str(work / "cache"), "--stat-cache-ttl", "1h"]
        return [program("geesefs"), *flags, BUCKET, str(mountpoint)], server.env()


def forget_pages(path: Path) -> None:
    """The kernel forgets what it has cached of a file, or of all files of a directory."""
    for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # Only clean pages are dropped.
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_whole(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1024 * 1024)
        while file.readinto(buffer):
            pass
