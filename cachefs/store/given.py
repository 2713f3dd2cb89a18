"""Stores of node mode: s3:// with the credentials that a volume came with, and a log of how its store answers.

The small client of _http and no library: it follows no redirect (a bucket's owner could send the signed request of
another one's key elsewhere), and it asks for nothing but what it is told to.
"""

import datetime
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from cachefs.chunk import ObjectId
from cachefs.errors import AccessDenied, CachefsError, StoreUnavailable, UsageError
from cachefs.store import ListPage, ObjectInfo, Store
from cachefs.store._aws import DEFAULT_REGION, Credentials
from cachefs.store._http import Service
from cachefs.store._s3 import Location
from cachefs.store.direct import DirectStore

STS_TIMEOUT_S = 10.0
REFRESH_BEFORE_S = 300.0
RETRY_STS_S = 5.0
STS_AUDIENCE = "sts.amazonaws.com"


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """Credentials as the driver hands them on (csi/credentials.py). `repr` shows no value."""

    kind: str
    values: dict[str, str] = {}
    tokens: dict[str, dict[str, str]] = {}
    role: str | None = None

    def __repr__(self) -> str:
        return f"Given(kind={self.kind!r}, names={sorted(self.values)}, audiences={sorted(self.tokens)})"

    @property
    def identity(self) -> str:
        """What stays the same while keys and tokens are rotated, and differs for another right to look."""
        return f"{self.kind}\0{self.values.get('aws_access_key_id', '')}\0{self.role or ''}"

    def check(self, scheme: str, *, node_credentials: bool) -> None:
        """Raises UsageError for what cannot be used; names no value."""
        if scheme != "s3":
            raise UsageError(f"{scheme}:// cannot be mounted yet: use s3://")
        if self.kind == "static":
            for name in ("aws_access_key_id", "aws_secret_access_key"):
                if not self.values.get(name):
                    raise UsageError(f"the credentials have no {name.upper()}")
        elif self.kind == "web_identity":
            if not self.role:
                raise UsageError("a service account token needs the option role (EKS Pod Identity is not known yet)")
            self.token()
        elif self.kind == "chain":
            if not node_credentials:
                raise UsageError("volumes without credentials of their own are not allowed (--allow-node-credentials)")
        elif self.kind != "anonymous":
            raise UsageError(f"credentials of an unknown kind: {self.kind[:40]!r}")

    def token(self) -> str:
        """The token for STS. Raises UsageError."""
        item = self.tokens.get(STS_AUDIENCE) or (next(iter(self.tokens.values())) if len(self.tokens) == 1 else None)
        if item is None or not item.get("token"):
            raise UsageError(f"the volume came without a service account token for {STS_AUDIENCE}")
        return item["token"]


class KeySource:
    """Valid keys from what was given last; called from any thread. No fallback to anything else."""

    def __init__(
        self,
        *,
        region: str,
        sts_endpoint: str | None,
        chain: Callable[[], Credentials] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`chain`: the server's own keys, for volumes that may use them; `clock`: seconds since 1970."""
        self._region = region
        self._sts_endpoint = sts_endpoint
        self._chain = chain
        self._clock = clock
        self._lock = threading.Lock()
        self._given: Given | None = None
        self._keys: tuple[Credentials, float] | None = None  # of STS, with their expiry
        self._next_sts_s = 0.0
        self._sts_error: CachefsError | None = None

    def give(self, given: Given | None) -> None:
        """From now on these; None: none, until the next ones come."""
        with self._lock:
            if given is None or self._given is None or (given.kind, given.role) != (self._given.kind, self._given.role):
                self._keys = None
            self._given = given
            self._next_sts_s = 0.0

    @property
    def given(self) -> Given | None:
        return self._given

    def __call__(self) -> Credentials:
        """Raises StoreUnavailable while there are none, AccessDenied when STS refuses the token."""
        given = self._given
        if given is None:
            raise StoreUnavailable("waits for credentials: the volume's own are not known since the server started")
        if given.kind == "static":
            values = given.values
            return Credentials(
                values["aws_access_key_id"], values["aws_secret_access_key"], values.get("aws_session_token")
            )
        if given.kind == "chain" and self._chain is not None:
            return self._chain()
        if given.kind == "web_identity":
            return self._assumed(given)
        raise AccessDenied("the volume has no credentials")

    def _assumed(self, given: Given) -> Credentials:
        with self._lock:
            now_s = self._clock()
            keys = self._keys
            if keys is not None and now_s < keys[1] - REFRESH_BEFORE_S:
                return keys[0]
            if now_s < self._next_sts_s:  # the last try failed a moment ago
                if keys is not None and now_s < keys[1]:
                    return keys[0]
                assert self._sts_error is not None
                raise type(self._sts_error)(*self._sts_error.args)
            try:
                self._keys = assume_role(given, region=self._region, endpoint=self._sts_endpoint)
            except CachefsError as error:
                self._next_sts_s = self._clock() + RETRY_STS_S
                self._sts_error = error.with_traceback(None)
                if keys is not None and now_s < keys[1]:
                    return keys[0]
                raise
            return self._keys[0]


def assume_role(given: Given, *, region: str, endpoint: str | None) -> tuple[Credentials, float]:
    """Keys for a token (AssumeRoleWithWebIdentity) and when they expire, seconds since 1970. Blocks.

    Raises AccessDenied, StoreUnavailable; messages hold no token.
    """
    import botocore.config  # type: ignore[import-untyped]
    import botocore.exceptions  # type: ignore[import-untyped]
    import botocore.session  # type: ignore[import-untyped]

    config = botocore.config.Config(
        signature_version=botocore.UNSIGNED,
        connect_timeout=STS_TIMEOUT_S,
        read_timeout=STS_TIMEOUT_S,
        retries={"total_max_attempts": 2},
    )
    # A session without the environment's profile: nothing of this server's own may come in.
    session = botocore.session.Session(profile=None, session_vars={"profile": (None, None, None, None)})
    try:
        client = session.create_client("sts", region_name=region, endpoint_url=endpoint, config=config)
        answer: Mapping[str, Any] = client.assume_role_with_web_identity(
            RoleArn=given.role, RoleSessionName="cachefs", WebIdentityToken=given.token()
        )["Credentials"]
    except botocore.exceptions.ClientError as exc:
        code = str(exc.response.get("Error", {}).get("Code", ""))
        raise AccessDenied(f"STS refuses the service account's token ({code[:60]})") from None
    except botocore.exceptions.ParamValidationError:
        raise AccessDenied("the role or the service account's token is malformed") from None
    except botocore.exceptions.BotoCoreError as exc:
        raise StoreUnavailable(f"STS does not answer ({type(exc).__name__})") from None
    expires = answer["Expiration"]
    assert isinstance(expires, datetime.datetime)
    keys = Credentials(answer["AccessKeyId"], answer["SecretAccessKey"], answer["SessionToken"])
    return keys, expires.timestamp()


def open_given(
    location: Location,
    endpoint: str,
    region: str | None,
    keys: KeySource,
    *,
    anonymous: bool,
    ca_file: str | None,
    get_timeout_s: float,
    list_timeout_s: float,
    count_hedge: Callable[[str], None] = lambda result: None,
) -> DirectStore:
    """The store of a volume; no request is made."""
    service = Service(
        location=location,
        endpoint=endpoint,
        region=region or DEFAULT_REGION,
        credentials=None if anonymous else keys,
        static_credentials=False,
        ca_file=ca_file,
    )
    return DirectStore(service, get_timeout_s=get_timeout_s, list_timeout_s=list_timeout_s, count_hedge=count_hedge)


class ViewStore:
    """A store as one view shows it: in a sub-directory (`layout`), maybe with bytes of its own (`isolation`), and
    with what it answered last (`trouble`)."""

    def __init__(self, inner: Store, *, layout: str, isolation: str) -> None:
        """`layout`: the one directory that everything is in, or "". `isolation`: added to the source of every
        ObjectId, so that no byte is shared with another view that has not the same; or ""."""
        self._inner = inner
        self._layout = self.layout = layout
        self.url = inner.url
        self.identity = f"{inner.identity}#{isolation}" if isolation else inner.identity
        self.trouble: CachefsError | None = None
        """The error of the last request, None when it was answered well."""

    def _inside(self, path: str) -> str:
        if not self._layout:
            return path
        head, _, rest = path.partition("/")
        assert head == self._layout, path
        return rest

    def _outside(self, path: str) -> str:
        return f"{self._layout}/{path}" if self._layout else path

    def probe(self) -> None:
        """See Store."""
        self._watched(self._inner.probe)

    def list_directory(self, directory: str) -> Iterator[ListPage]:
        """See Store."""
        if self._layout and not directory:
            yield ListPage((), (self._layout,))
            return
        if self._layout and directory.partition("/")[0] != self._layout:
            yield ListPage((), ())
            return
        try:
            for page in self._inner.list_directory(self._inside(directory)):
                objects = tuple(msgspec.structs.replace(info, path=self._outside(info.path)) for info in page.objects)
                yield ListPage(objects, page.prefixes)
        except CachefsError as exc:
            self.trouble = exc
            raise
        self.trouble = None

    def object_id(self, info: ObjectInfo) -> ObjectId:
        """See Store. The path is the object's real key."""
        inner = msgspec.structs.replace(info, path=self._inside(info.path))
        return msgspec.structs.replace(self._inner.object_id(inner), source=self.identity)

    def key_of_source(self) -> str:
        """The path of ObjectIds that all objects of the source are under; "" for a whole bucket."""
        return self._inner.object_id(ObjectInfo("x", 0, "", 0.0)).path.removesuffix("x").strip("/")

    def fetch_into(
        self, buffer: memoryview, object_id: ObjectId, start: int, stop: int, progress: Callable[[int], None]
    ) -> None:
        """See Store."""
        self._watched(lambda: self._inner.fetch_into(buffer, object_id, start, stop, progress))

    def _watched(self, request: Callable[[], None]) -> None:
        try:
            request()
        except CachefsError as exc:
            self.trouble = exc
            raise
        self.trouble = None

    def close(self) -> None:
        """See Store."""
        self._inner.close()
