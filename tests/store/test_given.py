"""Keys of a volume's own: given, exchanged at STS, refreshed; never another's."""

import http.server
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from cachefs.errors import AccessDenied, StoreUnavailable, UsageError
from cachefs.store.given import Given, KeySource

TOKEN = "token-of-a-service-account"


class Sts:
    """AssumeRoleWithWebIdentity on loopback; keys are numbered and live an hour."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.works = True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                outer.tokens += [part.partition("=")[2] for part in body.split("&") if part.startswith("WebId")]
                expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))
                answer = (
                    "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
                    f"<AccessKeyId>ASIA{len(outer.tokens)}</AccessKeyId><SecretAccessKey>s</SecretAccessKey>"
                    f"<SessionToken>t</SessionToken><Expiration>{expires}</Expiration>"
                    "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
                ).encode()
                code = b"<ErrorResponse><Error><Code>ExpiredTokenException</Code></Error></ErrorResponse>"
                answer = answer if outer.works else code
                self.send_response(200 if outer.works else 400)
                self.send_header("Content-Type", "text/xml")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def sts() -> Iterator[Sts]:
    service = Sts()
    yield service
    service.server.shutdown()
    service.server.server_close()


def web(token: str = TOKEN) -> Given:
    role = "arn:aws:iam::123456789012:role/models"
    return Given(kind="web_identity", tokens={"sts.amazonaws.com": {"token": token}}, role=role)


def test_keys_are_refreshed_before_they_expire_with_the_newest_token(sts: Sts) -> None:
    now_s = time.time()
    keys = KeySource(region="us-east-1", sts_endpoint=sts.endpoint, clock=lambda: now_s)
    keys.give(web())
    assert keys().access_key == "ASIA1"
    assert keys().access_key == "ASIA1"
    keys.give(web("rotated-token"))
    assert keys().access_key == "ASIA1"
    now_s += 3400
    assert keys().access_key == "ASIA2"
    assert sts.tokens == [TOKEN, "rotated-token"]


def test_keys_that_still_live_are_used_while_sts_refuses(sts: Sts) -> None:
    now_s = time.time()
    keys = KeySource(region="us-east-1", sts_endpoint=sts.endpoint, clock=lambda: now_s)
    keys.give(web())
    assert keys().access_key == "ASIA1"
    sts.works = False
    now_s += 3400
    assert keys().access_key == "ASIA1"
    assert keys().access_key == "ASIA1"
    assert len(sts.tokens) == 2  # not asked again at once
    now_s += 300
    with pytest.raises(AccessDenied) as refused:
        keys()
    assert TOKEN not in str(refused.value)
    with pytest.raises(AccessDenied):  # not asked again at once; a refusal stays one
        keys()
    sts.works = True
    keys.give(web("new-token-of-it"))
    assert keys().access_key == "ASIA4"


def test_without_credentials_it_waits_and_takes_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANODE")
    keys = KeySource(region="us-east-1", sts_endpoint=None)
    with pytest.raises(StoreUnavailable, match="waits for credentials"):
        keys()
    keys.give(Given(kind="static", values={"aws_access_key_id": "AKIA", "aws_secret_access_key": "s"}))
    assert keys().access_key == "AKIA"
    keys.give(Given(kind="chain"))
    with pytest.raises(AccessDenied):
        keys()
    keys.give(None)
    with pytest.raises(StoreUnavailable):
        keys()


def test_credentials_that_cannot_be_used_are_refused_without_their_values() -> None:
    bad = [
        Given(kind="static", values={"aws_access_key_id": "AKIA"}),
        Given(kind="web_identity", tokens={"sts.amazonaws.com": {"token": TOKEN}}),
        Given(kind="web_identity", tokens={"a": {"token": TOKEN}, "b": {"token": TOKEN}}, role="r"),
        Given(kind="chain"),
        Given(kind=TOKEN * 10),
    ]
    for given in bad:
        assert TOKEN not in repr(msgspec.structs.replace(given, kind="x"))
        with pytest.raises(UsageError):
            given.check("s3", node_credentials=False)
    with pytest.raises(UsageError):
        web().check("gs", node_credentials=False)
