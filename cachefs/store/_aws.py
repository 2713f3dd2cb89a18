"""Who signs a request to S3, with which keys, for which region, and how (signature version 4)."""

import datetime
import hashlib
import hmac
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol
from urllib.parse import parse_qsl, quote, urlsplit

from cachefs.config import is_host_name
from cachefs.errors import AccessDenied, StoreUnavailable, UsageError

UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"
DEFAULT_REGION = "us-east-1"
UNRESERVED = "-_.~"


class Credentials(NamedTuple):
    """Keys that are valid now. Never logged: repr hides all but the access key."""

    access_key: str
    secret_key: str
    token: str | None

    def __repr__(self) -> str:
        return f"Credentials({self.access_key!r}, ...)"


class _Frozen(Protocol):
    access_key: str
    secret_key: str
    token: str | None


class _Refreshing(Protocol):
    def get_frozen_credentials(self) -> _Frozen: ...


class _Session(Protocol):
    def get_credentials(self) -> _Refreshing | None: ...

    def get_scoped_config(self) -> object: ...

    def get_config_variable(self, name: str) -> str | None: ...


def resolve_endpoint(endpoint_url: str | None, environ: Mapping[str, str]) -> str | None:
    """The endpoint as asked for, else AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL; None is AWS itself.

    UsageError when it is no http or https URL.
    """
    endpoint = endpoint_url or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None
    if endpoint is None:
        return None
    advice = "give --endpoint-url http://HOST:PORT or https://HOST"
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError as error:
        raise UsageError(f"endpoint {endpoint!r} is no URL ({error}): {advice}") from error
    # The endpoint is part of an object's identity, which is written to disk and logs.
    if not usable or parts.username is not None or parts.query or parts.fragment:
        raise UsageError(f"endpoint {parts._replace(netloc=parts.netloc.rpartition('@')[2]).geturl()!r}: {advice}")
    if not is_host_name(parts.hostname or ""):
        raise UsageError(f"endpoint {endpoint!r}: {parts.hostname!r} is no name of a host: {advice}")
    return endpoint.rstrip("/")


def open_session(profile: str | None, environ: Mapping[str, str]) -> _Session:
    """The AWS SDK's own chain: environment, profile, web identity, SSO, container, then instance metadata."""
    import botocore.exceptions  # type: ignore[import-untyped]
    import botocore.session  # type: ignore[import-untyped]

    session: _Session = botocore.session.Session(profile=profile or environ.get("AWS_PROFILE") or None)
    try:
        session.get_scoped_config()
    except botocore.exceptions.ProfileNotFound as error:
        raise UsageError(f"{error}: name an existing one with --profile, or AWS_PROFILE") from error
    return session


def resolve_region(region: str | None, session: _Session | None, environ: Mapping[str, str]) -> str:
    """The region asked for, the environment's, the profile's, else us-east-1; no network is asked."""
    found = region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if not found and session is not None:
        found = session.get_config_variable("region")
    return found or DEFAULT_REGION


def credential_source(session: _Session | None, environ: Mapping[str, str]) -> Callable[[], Credentials]:
    """A function that gives valid keys each time (it refreshes what expires); called from any thread.

    Keys in the environment are used as they are (no SDK is loaded); else `session`'s chain.
    AccessDenied when there are none, StoreUnavailable when a service that hands them out does not answer.
    """
    if session is None:
        keys = Credentials(
            environ["AWS_ACCESS_KEY_ID"], environ["AWS_SECRET_ACCESS_KEY"], environ.get("AWS_SESSION_TOKEN") or None
        )
        return lambda: keys
    return _from_session(session)


def _from_session(session: _Session) -> Callable[[], Credentials]:
    import botocore.exceptions

    def current() -> Credentials:
        try:
            refreshing = session.get_credentials()
            if refreshing is None:
                raise AccessDenied(
                    "no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                    "or --profile NAME, or --anonymous for a public bucket"
                )
            frozen = refreshing.get_frozen_credentials()
        except botocore.exceptions.ClientError as error:
            raise AccessDenied(f"the S3 credentials could not be fetched: {error}") from error
        except botocore.exceptions.BotoCoreError as error:
            raise StoreUnavailable(f"the S3 credentials could not be fetched: {error}") from error
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token)

    return current


def keys_in_environment(profile: str | None, environ: Mapping[str, str]) -> bool:
    """Whether plain keys are set and used: a profile that is asked for goes before them, AWS_PROFILE does not.

    The same order as in the AWS SDKs.
    """
    plain = bool(environ.get("AWS_ACCESS_KEY_ID")) and bool(environ.get("AWS_SECRET_ACCESS_KEY"))
    return plain and not profile


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def sign(
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    *,
    credentials: Credentials,
    region: str,
    now: datetime.datetime | None = None,
) -> dict[str, str]:
    """The headers to add to a request for it to be signed (AWS Signature Version 4, service s3).

    `path` and `query` are percent-encoded as sent, `headers` (lower-case names, with host) are all signed; the body
    is not (UNSIGNED-PAYLOAD).
    """
    stamp = (now or datetime.datetime.now(datetime.UTC)).strftime("%Y%m%dT%H%M%SZ")
    added = {"x-amz-content-sha256": UNSIGNED_PAYLOAD, "x-amz-date": stamp}
    if credentials.token:
        added["x-amz-security-token"] = credentials.token
    signed = {name.lower(): " ".join(value.split()) for name, value in {**headers, **added}.items()}
    names = ";".join(sorted(signed))
    pairs = sorted(
        (quote(k, safe=UNRESERVED), quote(v, safe=UNRESERVED)) for k, v in parse_qsl(query, keep_blank_values=True)
    )
    canonical = "\n".join(
        (
            method,
            path,
            "&".join(f"{name}={value}" for name, value in pairs),
            "".join(f"{name}:{signed[name]}\n" for name in sorted(signed)),
            names,
            UNSIGNED_PAYLOAD,
        )
    )
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    key = f"AWS4{credentials.secret_key}".encode()
    for part in scope.split("/"):
        key = _hmac(key, part)
    signature = _hmac(key, f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}").hex()
    added["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return added
