"""Download, then start: the peers that are no file system, and JuiceFS, whose data is imported before the clock."""

import contextlib
import os
import sqlite3
import subprocess
from pathlib import Path

from tests.support.s3 import S3Server

from .harness import BUCKET, BenchError, LocalBucket, Target, program, unmount
from .peers import DEFAULT, Foreground, Juicefs, rclone_environment


class Download:
    """A peer whose start() is the whole download; what was downloaded is then read as a local file.

    The page cache keeps what was downloaded, as it does for whoever does this in earnest.
    """

    name = "?"

    def __init__(self, target: Target = DEFAULT) -> None:
        self._target = target
        self.cpu_seconds = 0.0
        self.rss_mib = 0.0

    def command(self, work: Path, server: S3Server, destination: Path) -> tuple[list[str], dict[str, str]]:
        """Command and environment that put all keys under the prefix into `destination`."""
        raise NotImplementedError

    def start(self, work: Path, server: S3Server) -> Path:
        destination = work / "downloaded"
        destination.mkdir()
        command, environment = self.command(work, server, destination)
        with (work / "peer.log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
        # Popen does not know that wait4 has taken its child.
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise BenchError(f"{self.name}: {(work / 'peer.log').read_text(errors='replace')[-500:]}")
        self.cpu_seconds = usage.ru_utime + usage.ru_stime
        self.rss_mib = usage.ru_maxrss / 1024
        return self._target.under(destination)

    def make_warm(self, path: Path) -> None:
        return None

    def pids(self) -> list[int]:
        return []

    def upcalls(self) -> float | None:
        return None

    def stop(self) -> None:
        return None


class S5cmd(Download):
    """s5cmd with 16 parts of 8 MiB at once for each object."""

    name = "s5cmd"

    def command(self, work: Path, server: S3Server, destination: Path) -> tuple[list[str], dict[str, str]]:
        copy = ["cp", "--concurrency", "16", "--part-size", "8"]
        source = f"s3://{BUCKET}/{self._target.prefix}/*"
        return [program("s5cmd"), "--endpoint-url", server.endpoint_url, *copy, source, f"{destination}/"], server.env()


class RcloneCopy(Download):
    """rclone copy with 16 streams of 8 MiB for each object."""

    name = "rclone-copy"

    def command(self, work: Path, server: S3Server, destination: Path) -> tuple[list[str], dict[str, str]]:
        flags = "--multi-thread-streams 16 --multi-thread-cutoff 32M --multi-thread-chunk-size 8M --transfers 4"
        flags += " --checkers 16 --ignore-checksum --no-traverse --size-only"
        source = f"bench:{BUCKET}/{self._target.prefix}"
        return [program("rclone"), "copy", source, str(destination), *flags.split()], rclone_environment(work, server)


class JuicefsImport:
    """Data that JuiceFS has been given once; each cold mount gets a copy of its metadata and an empty cache."""

    def __init__(self, root: Path, work: Path) -> None:
        """`root`: the buckets, served from there by localbucket for the import and by the links afterwards."""
        self._root = root
        self._work = work

    def make(self, sources: list[Path]) -> None:
        """Imports directories of the bucket under their names."""
        self._work.mkdir()
        with LocalBucket(self._work, self._root) as server:
            importer = _Importer(sources)
            try:
                importer.start(self._work, server)
            finally:
                importer.stop()

    def metadata_for(self, work: Path, server: S3Server) -> str:
        """A copy that names this server; returns its address."""
        # Not a copy of the file: JuiceFS leaves its last transactions in the write-ahead log beside it.
        with (
            contextlib.closing(sqlite3.connect(self._work / "meta.db")) as original,
            contextlib.closing(sqlite3.connect(work / "meta.db")) as copy,
        ):
            original.backup(copy)
        meta = f"sqlite3://{work / 'meta.db'}"
        command = [program("juicefs"), "config", meta, "--bucket", f"{server.endpoint_url}/juicefs", "--yes", "--force"]
        done = subprocess.run(command, env=server.env(), capture_output=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"juicefs config: {done.stderr.decode(errors='replace')[-500:]}")
        return meta


class _Importer(Juicefs):
    """Mounted once, to copy into."""

    def __init__(self, sources: list[Path]) -> None:
        super().__init__(sources[0])
        self._sources = sources

    def path(self, mountpoint: Path) -> Path:
        return mountpoint

    def start(self, work: Path, server: S3Server) -> Path:
        mountpoint = super().start(work, server)
        for source in self._sources:
            subprocess.run(["cp", "-r", str(source), str(mountpoint)], check=True)
        # An umount waits for uploads.
        unmount(mountpoint)
        return mountpoint


class JuicefsCold(Foreground):
    """JuiceFS over data that was imported before the clock started."""

    name = "juicefs"

    def __init__(self, imported: JuicefsImport, target: Target) -> None:
        super().__init__(target)
        self._imported = imported

    def prepare(self, work: Path, server: S3Server) -> None:
        """Before the clock: the metadata's copy."""
        self._meta = self._imported.metadata_for(work, server)

    def command(self, work: Path, server: S3Server, mountpoint: Path) -> tuple[list[str], dict[str, str]]:
        flags = ["--no-usage-report", "--read-only", "--cache-dir", str(work / "cache"), "--open-cache", "3600"]
        flags += ["--attr-cache", "3600", "--entry-cache", "3600", "--buffer-size", "300", "--max-downloads", "64"]
        return [program("juicefs"), "mount", self._meta, str(mountpoint), *flags], server.env()
