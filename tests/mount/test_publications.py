"""What the CSI driver asks of a node's server: real keeper, real server (uid 65534), real S3 servers, real mounts."""

import ctypes
import http.server
import json
import mmap
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.mount.harness import needs_fuse, wait_for
from tests.mount.node_support import Node, Refused, key_of, running_node, static
from tests.support.lying import LyingServer
from tests.support.s3 import HadroServer

pytestmark = needs_fuse

MODEL = os.urandom(9 * 1024 * 1024)
SECRETS = ("PLANTED-SECRET-KEY-4711", "PLANTED-TOKEN-0815", "PLANTED-WEB-TOKEN-1234")


@pytest.fixture
def node(origin: LyingServer) -> Iterator[Node]:
    """A node whose volumes may name the counting origin, with a small model in it."""
    origin.put("models", "llama/model.safetensors", MODEL)
    origin.put("models", "llama/config.json", b"{}")
    origin.put("models", "llama/onnx/model.onnx", b"onnx")
    with running_node(origin.endpoint_url) as running:
        yield running


GOOD = static("AKIAGOOD", "secret-key-of-a")


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_options_choose_what_a_view_shows(node: Node) -> None:
    whole = node.publish("whole", "s3://models/llama", GOOD)
    assert names(whole) == ["config.json", "model.safetensors", "onnx"]
    assert (whole / "model.safetensors").read_bytes() == MODEL
    some = node.publish("some", "s3://models/llama", GOOD, include=["*.json", "onnx/*"], exclude=["config.json"])
    assert names(some) == ["onnx"]
    inside = node.publish("inside", "s3://models/llama", GOOD, layout="1", include=["onnx/*"])
    assert names(inside) == ["1"]
    assert names(inside / "1") == ["onnx"]
    assert (inside / "1" / "onnx" / "model.onnx").read_bytes() == b"onnx"
    assert len({whole, some, inside}) == 3


def test_a_known_view_is_published_again_at_once_and_without_a_request(node: Node, origin: LyingServer) -> None:
    first = node.publish("pod-1", "s3://models/llama", GOOD, principal="ns/sa", prefetch="none")
    origin.forget_requests()
    started_s = time.monotonic()
    assert node.publish("pod-2", "s3://models/llama", GOOD, principal="ns/sa", prefetch="none") == first
    took_s = time.monotonic() - started_s
    print(f"publish of a known snapshot: {1000 * took_s:.1f} ms")
    assert took_s < 1.0
    assert origin.requests == ()


def test_a_known_key_with_other_options_is_refused_until_it_is_unpublished(node: Node) -> None:
    options = {"principal": "ns/sa", "prefetch": "none"}
    first = node.publish("pod", "s3://models/llama", GOOD, **options)
    assert node.publish("pod", "s3://models/llama", static("AKIAROTATED", "x"), **options) == first
    for more in ({"include": ["*.json"]}, {"layout": "1"}, {"isolation": "strict"}, {"region": "eu-west-1"}):
        with pytest.raises(Refused, match="other options"):
            node.publish("pod", "s3://models/llama", GOOD, **options, **more)
    with pytest.raises(Refused, match="other options"):
        node.publish("pod", "s3://models/llama/onnx", GOOD, **options)
    node.unpublish("pod")
    assert names(node.publish("pod", "s3://models/llama/onnx", GOOD, **options)) == ["model.onnx"]


def test_bytes_are_shared_by_content_and_access_is_not(tmp_path: Path) -> None:
    with HadroServer(tmp_path / "hadro") as s3:
        s3.put("models", "llama/model.safetensors", MODEL)
        mine = static(s3.access_key, s3.secret_key)
        with running_node(s3.endpoint_url) as node:
            first = node.publish("a", "s3://models/llama", mine, principal="team-a/default", prefetch="none")
            assert (first / "model.safetensors").read_bytes() == MODEL
            with pytest.raises(Refused) as refused:
                node.publish("b", "s3://models/llama", static(s3.access_key, "wrong"), principal="team-b/default")
            assert refused.value.kind == "AccessDenied"
            with pytest.raises(Refused) as unknown:
                node.stats("b")
            assert unknown.value.kind == "NotFound"
            gets = sum("model.safetensors" in line for line in s3.requests())
            second = node.publish("c", "s3://models/llama", mine, principal="team-c/default", prefetch="none")
            assert second != first
            assert (second / "model.safetensors").read_bytes() == MODEL
            assert sum("model.safetensors" in line for line in s3.requests()) == gets


def test_strict_isolation_shares_no_byte(node: Node, origin: LyingServer) -> None:
    key = "llama/model.safetensors"
    shared = node.publish("shared", "s3://models/llama", GOOD, principal="a/sa", prefetch="none")
    assert (shared / "model.safetensors").read_bytes() == MODEL
    once = origin.gets(key)
    strict = node.publish("s1", "s3://models/llama", GOOD, principal="b/sa", isolation="strict", prefetch="none")
    assert (strict / "model.safetensors").read_bytes() == MODEL
    twice = origin.gets(key)
    assert twice > once
    again = node.publish("s2", "s3://models/llama", GOOD, principal="b/other", isolation="strict", prefetch="none")
    assert (again / "model.safetensors").read_bytes() == MODEL  # the same namespace
    assert origin.gets(key) == twice


def test_what_a_volume_may_not_name_is_refused(node: Node) -> None:
    bad = (
        ("file:///etc", {}),
        ("https://example.invalid/x", {}),
        ("s3://models/llama", {"endpoint_url": "http://127.0.0.1:1"}),
        ("s3://models/llama", {"endpoint_url": "http://169.254.169.254"}),
        ("s3://models/llama", {"endpoint_url": "http://2852039166"}),
        ("s3://models/llama", {"isolation": "strict", "principal": ""}),
        ("s3://models/llama", {"layout": "../x"}),
        ("s3://models/llama", {"region": "x.evil.example/"}),
        ("s3://models/llama", {"pin": "yes"}),
    )
    for source, options in bad:
        with pytest.raises(Refused) as refused:
            node.publish("bad", source, static("AKIAGOOD", SECRETS[0]), **options)
        assert refused.value.kind == "UsageError", (source, options)
        assert SECRETS[0] not in str(refused.value)
    for credentials in ({"kind": "chain"}, {"kind": "static", "values": {}}, {"kind": "web_identity", "role": "r"}):
        with pytest.raises(Refused) as refused:
            node.publish("bad", "s3://models/llama", credentials)
        assert refused.value.kind == "UsageError", credentials
    with pytest.raises(Refused) as missing:
        node.publish("bad", "s3://models/nothing-here", GOOD)
    assert missing.value.kind == "NotFound"
    assert names(node.root) == []


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        target: ClassVar[str] = ""

        def do_GET(self) -> None:
            seen.append(f"{self.server.server_address[1]}{self.path}")
            self.send_response(302 if self.target else 200)
            if self.target:
                self.send_header("Location", self.target + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    def serve(target: str) -> http.server.ThreadingHTTPServer:
        handler = type("One", (Handler,), {"target": target})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    thief = serve("")
    honest = serve(f"http://127.0.0.1:{thief.server_address[1]}")
    try:
        with running_node(f"http://127.0.0.1:{honest.server_address[1]}") as node, pytest.raises(Refused):
            node.publish("a", "s3://models/llama", GOOD)
        assert [line for line in seen if line.startswith(str(honest.server_address[1]))]
        assert not [line for line in seen if line.startswith(str(thief.server_address[1]))]
    finally:
        for server in (thief, honest):
            server.shutdown()
            server.server_close()


def test_credentials_live_as_long_as_the_supervisor_and_a_republish_brings_them_back(
    node: Node, origin: LyingServer
) -> None:
    view = node.publish("pod", "s3://models/llama", GOOD, prefetch="none")
    node.kill_server()
    assert (view / "config.json").read_bytes() == b"{}"  # was not local: fetched with what the supervisor kept
    assert node.condition("pod") == "healthy"
    node.kill_supervisor()
    node.start_supervisor()
    assert node.condition("pod") == "credentials"
    assert (view / "config.json").read_bytes() == b"{}"
    gets = origin.gets()
    reader = subprocess.Popen(["cat", str(view / "model.safetensors")], stdout=subprocess.PIPE)
    try:
        assert origin.gets() == gets
        assert node.publish("pod", "s3://models/llama", GOOD, prefetch="none") == view
        output, _ = reader.communicate(timeout=60)
        assert output == MODEL
    finally:
        reader.kill()
        reader.wait()
    assert node.condition("pod") == "healthy"


def test_an_unpublished_view_lives_until_its_files_are_closed(node: Node) -> None:
    view = node.publish("pod", "s3://models/llama", GOOD, prefetch="none")
    with (view / "model.safetensors").open("rb") as file:
        assert file.read(4096) == MODEL[:4096]
        node.unpublish("pod")
        node.unpublish("pod")
        with pytest.raises(Refused):
            node.stats("pod")
        node.kill_server()
        file.seek(0)
        assert file.read() == MODEL
    wait_for(lambda: names(node.root) == [], "the view is gone")
    again = node.publish("pod", "s3://models/llama", GOOD, prefetch="none")
    assert (again / "model.safetensors").read_bytes() == MODEL


def test_the_condition_says_what_is_wrong(node: Node, origin: LyingServer) -> None:
    view = node.publish("pod", "s3://models/llama", GOOD, prefetch="none")
    assert (view / "config.json").read_bytes() == b"{}"
    assert node.condition("pod") == "healthy"
    origin.lie("403")
    with pytest.raises(PermissionError):
        (view / "model.safetensors").read_bytes()
    assert node.condition("pod") == "denied"
    assert node.stats("pod")["condition"]["abnormal"] is True
    origin.tell_the_truth()
    origin.lie("503")
    reader = subprocess.Popen(["cat", str(view / "model.safetensors")], stdout=subprocess.PIPE)
    try:
        wait_for(lambda: node.condition("pod") == "offline", "offline")
        assert (view / "config.json").read_bytes() == b"{}"
        origin.tell_the_truth()
        output, _ = reader.communicate(timeout=60)
        assert output == MODEL
    finally:
        reader.kill()
        reader.wait()
    assert node.condition("pod") == "healthy"


def test_prefetch_begins_at_publish_and_a_pin_ends_with_thekey_of(node: Node, origin: LyingServer) -> None:
    node.publish("small", "s3://models/llama", GOOD, principal="a/sa")
    wait_for(lambda: node.stats("small")["objects_sealed"] == 1, "small files of the top are fetched")
    assert origin.gets("llama/model.safetensors") == 0
    node.publish("all", "s3://models/llama", GOOD, principal="b/sa", prefetch="all", pin=True)
    wait_for(lambda: node.stats("all")["objects_sealed"] == 3, "everything is fetched")
    stats = node.stats("all")
    assert stats["bytes_local"] == stats["bytes_total"] == len(MODEL) + 2 + 4
    assert all(item["pinned"] for item in node.ask("ls")["objects"])
    node.unpublish("all")
    assert not any(item["pinned"] for item in node.ask("ls")["objects"])


def test_prefetch_goes_on_when_a_republish_brings_the_credentials_back(node: Node, origin: LyingServer) -> None:
    node.publish("pod", "s3://models/llama", GOOD, prefetch="all")
    wait_for(lambda: node.stats("pod")["objects_sealed"] == 3, "everything is fetched")
    node.kill_supervisor()
    node.start_supervisor()
    assert node.condition("pod") == "credentials"
    source = {"name": "m", "source": "s3://models/llama", "endpoint_url": origin.endpoint_url}
    node.ask("evict", source=source)
    assert node.stats("pod")["bytes_local"] == 0
    node.publish("pod", "s3://models/llama", GOOD, prefetch="all")
    wait_for(lambda: node.stats("pod")["objects_sealed"] == 3, "everything is fetched again")


def test_the_servers_own_keys_are_used_only_where_the_admin_allows_it(tmp_path: Path) -> None:
    with HadroServer(tmp_path / "hadro") as s3:
        s3.put("models", "llama/config.json", b"{}")
        keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
        with running_node(s3.endpoint_url, server=["--allow-node-credentials"], variables=keys) as node:
            view = node.publish("pod", "s3://models/llama", {"kind": "chain"})
            assert (view / "config.json").read_bytes() == b"{}"
            node.kill_supervisor()
            node.start_supervisor("--allow-node-credentials")
            assert node.condition("pod") == "healthy"
            for other in ({"kind": "anonymous"}, static("AKIAOTHER", "secret")):  # no fallback to them
                with pytest.raises(Refused) as refused:
                    node.publish("other", "s3://models/llama", other, principal="b/sa")
                assert refused.value.kind == "AccessDenied"
            node.kill_supervisor()
            node.start_supervisor()
            with pytest.raises(Refused):
                node.stats("pod")


def test_two_principals_have_one_page_cache(node: Node) -> None:
    views = [
        node.publish(name, "s3://models/llama", GOOD, principal=f"{name}/sa", prefetch="all") for name in ("a", "b")
    ]
    wait_for(lambda: node.stats("a")["objects_sealed"] == 3, "everything is local")
    blobs = [path for path in (node.node_dir / "cache" / "blobs").rglob("*") if path.is_file()]
    assert sorted(path.stat().st_size for path in blobs) == sorted([len(MODEL), 2, 4])
    (blob,) = (path for path in blobs if path.stat().st_size == len(MODEL))
    with blob.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with (
        (views[1] / "model.safetensors").open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        assert resident_pages(mapped) < 10
        assert (views[0] / "model.safetensors").read_bytes() == MODEL
        assert resident_pages(mapped) == len(MODEL) // mmap.PAGESIZE


def resident_pages(mapped: mmap.mmap) -> int:
    """How many pages of a mapping are in memory (mincore(2)), whoever read them."""
    pages = -(-len(mapped) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    address = address_of(mapped)
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), found) == 0
    return sum(byte & 1 for byte in found)


def address_of(mapped: mmap.mmap) -> int:
    """Of a read-only mapping, which ctypes does not tell: by the buffer protocol of the interpreter."""
    view = PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapped), ctypes.byref(view), 0)
    address = int(view.buf)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
    return address


class PyBuffer(ctypes.Structure):
    """Py_buffer, as far as it is looked at."""

    _fields_: ClassVar = [("buf", ctypes.c_void_p), ("obj", ctypes.c_void_p), ("rest", ctypes.c_byte * 128)]


class Sts(http.server.BaseHTTPRequestHandler):
    """AssumeRoleWithWebIdentity, for tokens that start with GOOD."""

    bodies: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        self.bodies.append(body)
        good = "WebIdentityToken=GOOD" in body
        expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))
        answer = (
            "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
            f"<AccessKeyId>ASIASTS</AccessKeyId><SecretAccessKey>{SECRETS[0]}</SecretAccessKey>"
            f"<SessionToken>{SECRETS[1]}</SessionToken><Expiration>{expires}</Expiration>"
            "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
            if good
            else "<ErrorResponse><Error><Code>InvalidIdentityToken</Code><Message>no</Message></Error></ErrorResponse>"
        ).encode()
        self.send_response(200 if good else 400)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        pass


def web_identity(token: str) -> dict[str, object]:
    tokens = {"sts.amazonaws.com": {"token": token, "expires": "2030-01-01T00:00:00Z"}}
    return {"kind": "web_identity", "tokens": tokens, "role": "arn:aws:iam::123456789012:role/models"}


def test_a_service_account_token_becomes_keys_at_the_configured_sts(origin: LyingServer) -> None:
    origin.put("models", "llama/config.json", b"{}")
    sts = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sts)
    threading.Thread(target=sts.serve_forever, args=(0.05,), daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{sts.server_address[1]}"
        with running_node(origin.endpoint_url, server=["--sts-endpoint", endpoint]) as node:
            view = node.publish("pod", "s3://models/llama", web_identity("GOOD-" + SECRETS[2]))
            assert (view / "config.json").read_bytes() == b"{}"
            assert all(request.signed for request in origin.requests)
            assert len(Sts.bodies) == 1
            origin.forget_requests()
            again = node.publish("pod-2", "s3://models/llama", web_identity("GOOD-of-pod-2"), principal="ns/pod")
            assert again == view
            assert origin.requests == ()  # the same service account
            node.ask("volume_credentials", key=key_of("pod"), credentials=web_identity("GOOD-rotated"))
            with pytest.raises(Refused) as refused:
                node.publish("other", "s3://models/llama", web_identity("BAD-token-of-another"), principal="b/sa")
            assert refused.value.kind == "AccessDenied"
            assert "BAD-token" not in str(refused.value)
            assert node.condition("pod") == "healthy"
            assert_no_secret(node)
    finally:
        sts.shutdown()
        sts.server_close()


def assert_no_secret(node: Node) -> None:
    """In no log, no file of the node, no status."""
    said = json.dumps([node.ask("status"), node.ask("volumes"), node.ask("ls")])
    assert not [secret for secret in SECRETS if secret in said]
    for path in node.directory.rglob("*"):
        if path == node.root or node.root in path.parents or not path.is_file() or path.suffix == ".sock":
            continue
        content = path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], path


def test_planted_secrets_are_nowhere(node: Node, origin: LyingServer) -> None:
    credentials = static("AKIAGOOD", SECRETS[0])
    credentials["values"]["aws_session_token"] = SECRETS[1]
    view = node.publish("pod", "s3://models/llama", credentials, prefetch="none")
    assert (view / "config.json").read_bytes() == b"{}"
    origin.lie("403")
    with pytest.raises(PermissionError):
        (view / "model.safetensors").read_bytes()
    with pytest.raises(Refused) as refused:
        node.ask("volume_publish", key="x" * 40, source=5, credentials=credentials)
    assert SECRETS[0] not in str(refused.value)
    with pytest.raises(Refused) as refused:
        node.ask("volume_credentials", key=key_of("pod"), credentials={"kind": "static", "values": SECRETS[0]})
    assert SECRETS[0] not in str(refused.value)
    node.kill_server()
    assert_no_secret(node)
