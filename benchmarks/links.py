"""Networks to measure on: nginx in front of a directory, as slow as wanted, and a namespace of the run's own.

A `LinkPlan` says what a network is like; `Links` makes them, all at once or none, and takes them away again. nginx
serves ranges and etags from the files; lists come from benchmarks/origin.py. Only the constrained link needs root:
its server sits behind a veth pair in a network namespace, whose qdisc (TBF) is the link. netem is not asked for.
"""

import contextlib
import http.client
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.support.s3 import S3Server
from tests.support.servers import ServerProcess

from .harness import BenchError

MODULES = Path("/usr/lib/nginx/modules")
NAMESPACE_PREFIX = "cachefs-bench-"
# 198.18.0.0/15 is set aside for benchmarks of networks (RFC 2544): no host has a route there.
SERVER_ADDRESS = "198.18.93.1"
CLIENT_ADDRESS = "198.18.93.2"
SETUP_HINT = "run `make setup-bench`"


class LinkPlan(msgspec.Struct, frozen=True):
    """What one network is like. Shares are of object GETs, 0 to 1."""

    name: str
    first_byte_ms: int = 0
    connection_mb_per_s: int = 0
    """Bytes per second in 10^6 for each connection; 0: no limit."""
    total_mbit_per_s: int = 0
    """The whole link, in 10^6 bits per second; 0: no limit and no namespace."""
    tls: bool = False
    unavailable_share: float = 0.0
    """Answered with 503."""
    cut_share: float = 0.0
    """The connection ends somewhere in the body."""


PLANS = {
    plan.name: plan
    for plan in (
        LinkPlan("loopback"),
        LinkPlan("slow", first_byte_ms=30, connection_mb_per_s=90),
        # 250 MB/s in all: the link and not two cores is the limit.
        LinkPlan("constrained", first_byte_ms=30, total_mbit_per_s=2000),
        LinkPlan("tls", tls=True),
        LinkPlan("faults", first_byte_ms=30, connection_mb_per_s=90, unavailable_share=0.1, cut_share=0.1),
    )
}


def shaping_command(plan: LinkPlan, device: str) -> list[str]:
    """The tc(8) command that makes the device as slow as the plan.

    A burst of 1 ms of the rate and at least one GSO packet of 64 KiB, or TBF drops it; a queue of 20 ms, so that a
    sender sees loss and not seconds of delay.
    """
    bytes_per_s = plan.total_mbit_per_s * 1_000_000 // 8
    burst = max(bytes_per_s // 1000, 128 * 1024)
    queue = max(bytes_per_s // 50, 512 * 1024)
    shape = f"rate {plan.total_mbit_per_s}mbit burst {burst} limit {queue}"
    return ["tc", "qdisc", "add", "dev", device, "root", "tbf", *shape.split()]


def lua_for(plan: LinkPlan) -> str:
    """What happens to a GET of an object before nginx serves it. Empty: nothing."""
    lines = []
    if plan.first_byte_ms:
        lines.append(f"ngx.sleep({plan.first_byte_ms / 1000:.3f})")
    if plan.unavailable_share or plan.cut_share:
        lines.append("local dice = math.random()")
        lines.append(f"if dice < {plan.unavailable_share} then return ngx.exit(503) end")
        lines.append(f'if dice < {plan.unavailable_share + plan.cut_share} then return ngx.exec("@cut") end')
    return "\n            ".join(lines)


def nginx_config(plan: LinkPlan, *, listen: str, root: Path, origin: Path, work: Path) -> str:
    """A whole nginx.conf. `listen`: address:port; `root`: the buckets; `origin`: the socket that answers lists."""
    lua, limits = lua_for(plan), ""
    if plan.connection_mb_per_s:
        # Small steps: with the default of 2 MiB the limit would come in bursts.
        limits = f"limit_rate {plan.connection_mb_per_s}m;\n        sendfile_max_chunk 512k;"
    access = f"access_by_lua_block {{\n            {lua}\n        }}" if lua else ""
    tls = f"ssl_certificate {work}/server.pem;\n    ssl_certificate_key {work}/server.key;" if plan.tls else ""
    temporary = "\n    ".join(
        f"{kind}_temp_path {work}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # One process: when this run is killed, the kernel ends it too (a master's workers would live on).
    return f"""\
load_module {MODULES}/ndk_http_module.so;
load_module {MODULES}/ngx_http_lua_module.so;
daemon off;
master_process off;
worker_processes 1;
pid {work}/nginx.pid;
error_log {work}/error.log warn;
events {{ worker_connections 4096; }}
http {{
    {temporary}
    log_format bytes '$request_method $status $body_bytes_sent $uri';
    access_log {work}/access.log bytes;
    sendfile on;
    tcp_nopush on;
    etag on;
    keepalive_requests 1000000;
    keepalive_timeout 120s;
    client_max_body_size 0;
    default_type application/octet-stream;
    init_worker_by_lua_block {{ math.randomseed(20240601) }}
    {tls}
    server {{
        listen {listen}{" ssl" if plan.tls else ""} backlog=1024;
        root {root};
        location ~ ^/[^/]*/?$ {{
            {"access_by_lua_block { ngx.sleep(%.3f) }" % (plan.first_byte_ms / 1000) if plan.first_byte_ms else ""}
            proxy_pass http://unix:{origin}:$request_uri;
        }}
        location / {{
        # A directory is no object: without this nginx would answer 301.
        if (-d $request_filename) {{ return 404; }}
        {limits}
        {access}
        }}
        location @cut {{
        {limits}
        body_filter_by_lua_block {{
            ngx.ctx.stop = ngx.ctx.stop or math.random(65536, 4194304)
            ngx.ctx.sent = (ngx.ctx.sent or 0) + #ngx.arg[1]
            if ngx.ctx.sent > ngx.ctx.stop then return ngx.ERROR end
        }}
        }}
    }}
}}
"""


def bytes_served(log: str, prefix: str) -> int:
    """Body bytes of the GETs under `prefix` in lines of the access log."""
    total = 0
    for line in log.splitlines():
        parts = line.split(" ", 3)
        if len(parts) == 4 and parts[0] == "GET" and parts[1].startswith("2") and parts[3].startswith(prefix):
            total += int(parts[2])
    return total


class Certificates(NamedTuple):
    """PEM files of a certificate authority that nobody else trusts, and a server's that it signed."""

    authority: Path
    certificate: Path
    key: Path


def make_certificates(directory: Path, address: str) -> Certificates:
    """By openssl(1). Raises BenchError when it fails."""
    authority, key = directory / "ca.pem", directory / "server.key"
    made = Certificates(authority, directory / "server.pem", key)
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    days = ["-days", "2"]
    ca = ["-keyout", f"{directory}/ca.key", "-out", f"{authority}", "-subj", "/CN=benchmark authority"]
    run(["openssl", "req", "-x509", *new_key, *ca, *days])
    run(["openssl", "req", *new_key, "-keyout", f"{key}", "-out", f"{directory}/server.csr", "-subj", "/CN=server"])
    extension = directory / "san"
    extension.write_text(f"subjectAltName=IP:{address}\n")
    sign = ["-CA", f"{authority}", "-CAkey", f"{directory}/ca.key", "-CAcreateserial", "-extfile", f"{extension}"]
    request = ["-in", f"{directory}/server.csr", "-out", f"{made.certificate}"]
    run(["openssl", "x509", "-req", *request, *sign, *days])
    return made


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BenchError(f"{command[0]} is not installed: {SETUP_HINT}") from None
    if done.returncode != 0:
        raise BenchError(f"`{' '.join(command)}`: {done.stderr.strip()[-500:]}")


def forget_dead_namespaces() -> None:
    """Those of runs that were killed: a run's namespace bears its pid."""
    for path in Path("/run/netns").glob(f"{NAMESPACE_PREFIX}*"):
        owner = path.name.removeprefix(NAMESPACE_PREFIX)
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            run(["ip", "netns", "del", path.name])


@contextmanager
def namespace(plan: LinkPlan) -> Iterator[str]:
    """A network namespace with SERVER_ADDRESS, reached from CLIENT_ADDRESS over a veth pair that is slow towards us."""
    if os.geteuid() != 0:
        raise BenchError(f"the {plan.name} link needs root (network namespace): leave it out with --links")
    forget_dead_namespaces()
    name = f"{NAMESPACE_PREFIX}{os.getpid()}"
    near, far = f"cfb{os.getpid()}n", f"cfb{os.getpid()}f"
    inside = ["ip", "netns", "exec", name]
    run(["ip", "netns", "add", name])
    try:
        run(["ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name])
        run(["ip", "addr", "add", f"{CLIENT_ADDRESS}/30", "dev", near])
        run([*inside, "ip", "addr", "add", f"{SERVER_ADDRESS}/30", "dev", far])
        run([*inside, "ip", "link", "set", "lo", "up"])
        run([*inside, "ip", "link", "set", far, "up"])
        run(["ip", "link", "set", near, "up"])
        run([*inside, *shaping_command(plan, far)])
        yield name
    finally:
        # The pair goes with the namespace, as soon as the last process in it has ended.
        with contextlib.suppress(BenchError):
            run(["ip", "link", "del", near])
        run(["ip", "netns", "del", name])


class Origin(ServerProcess):
    """benchmarks/origin.py on a socket file."""

    def __init__(self, root: Path, work: Path) -> None:
        super().__init__(work / "origin.log")
        self.socket_path = work / "origin.sock"
        self._root = root

    def start(self) -> None:
        command = [sys.executable, "-m", "benchmarks.origin", str(self.socket_path), str(self._root)]
        cwd = Path(__file__).resolve().parents[1]
        self.launch(command, ready=self.socket_path.exists, env=dict(os.environ), cwd=cwd)


class Link(S3Server):
    """One network with the buckets under `root` at its far end."""

    def __init__(self, plan: LinkPlan, root: Path, origin: Path, work: Path, inside: str | None) -> None:
        super().__init__(work)
        self.plan = plan
        self.address = SERVER_ADDRESS if inside else "127.0.0.1"
        self.scheme = "https" if plan.tls else "http"
        self._root = root
        self._origin = origin
        self._inside = inside
        self._authority = make_certificates(work, self.address).authority if plan.tls else None

    @property
    def endpoint_url(self) -> str:
        return f"{self.scheme}://{self.address}:{self.port}"

    def _launch(self) -> None:
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        if not Path(nginx).exists() or not (MODULES / "ngx_http_lua_module.so").exists():
            raise BenchError(f"nginx with its lua module is not installed: {SETUP_HINT}")
        config = self.directory / "nginx.conf"
        listen = f"{self.address}:{self.port}"
        config.write_text(
            nginx_config(self.plan, listen=listen, root=self._root, origin=self._origin, work=self.directory)
        )
        command = [nginx, "-e", f"{self.directory}/error.log", "-c", f"{config}"]
        if self._inside:
            # exec: the pid is nginx's.
            command = [shutil.which("ip") or "/usr/sbin/ip", "netns", "exec", self._inside, *command]
        self.launch(command, ready=self._ready, env=dict(os.environ), cwd=self.directory)

    def _ready(self) -> bool:
        try:
            connection: http.client.HTTPConnection
            if self.plan.tls:
                context = ssl.create_default_context(cafile=str(self._authority))
                connection = http.client.HTTPSConnection(self.address, self.port, timeout=10, context=context)
            else:
                connection = http.client.HTTPConnection(self.address, self.port, timeout=10)
            with contextlib.closing(connection):
                connection.request("GET", "/")
                return connection.getresponse().status == 200
        except OSError:
            return False

    def env(self) -> dict[str, str]:
        environment = super().env() | {"NO_PROXY": f"127.0.0.1,localhost,{self.address}"}
        if self._authority:
            # botocore, OpenSSL and Go, curl: each looks for another name.
            names = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE")
            environment |= dict.fromkeys(names, str(self._authority))
        return environment

    def log_position(self) -> int:
        """Where the access log ends now: for bytes_since()."""
        log = self.directory / "access.log"
        return log.stat().st_size if log.exists() else 0

    def bytes_since(self, position: int, prefix: str) -> int:
        """Body bytes of objects under `prefix` that have left since `position`, those that nobody read included."""
        # A request is logged when it ends; one whose client went away ends at the next write to it.
        end = time.monotonic() + 1.0
        size = self.log_position()
        while time.monotonic() < end:
            time.sleep(0.05)
            size, before = self.log_position(), size
            if size == before:
                break
        with (self.directory / "access.log").open() as log:
            log.seek(position)
            return bytes_served(log.read(), prefix)


@contextmanager
def links(names: list[str], root: Path, work: Path) -> Iterator[dict[str, Link]]:
    """The links of these names, running. Raises BenchError for one that this machine cannot make."""
    unknown = [name for name in names if name not in PLANS]
    if unknown:
        raise BenchError(f"no such link: {unknown[0]} (known: {', '.join(PLANS)})")
    with ExitStack() as stack:
        origin = stack.enter_context(Origin(root, work))
        made: dict[str, Link] = {}
        for name in names:
            plan = PLANS[name]
            inside = stack.enter_context(namespace(plan)) if plan.total_mbit_per_s else None
            directory = work / name
            directory.mkdir()
            made[name] = stack.enter_context(Link(plan, root, origin.socket_path, directory, inside))
        yield made
