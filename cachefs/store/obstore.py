"""The S3 store of `--store obstore`: GETs by obstore (Rust), LISTs and odd keys by the small client in _http.

One GET that fails in a way that obstore does not name by type (5xx, a lie, a cut body, another region, no rights)
is asked for once more by the small client, which either gets the rest of the bytes or raises what is wrong.
"""

import datetime
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import obstore.exceptions
import obstore.store

from cachefs.chunk import MIB, ObjectId
from cachefs.errors import IntegrityError, NotFound, ObjectChanged, StoreUnavailable
from cachefs.store._get import get_into
from cachefs.store._http import S3Client, Service
from cachefs.store._s3 import RawPage, S3Store, check_part

STREAM_BYTES = MIB
"""The pieces in which a body is handed on: waiters wake as their span arrives."""
RETRIES = 3
CONNECT_TIMEOUT_S = 5.0
WHOLE_REQUEST_TIMEOUT_S = 3600.0
"""One GET may be slow (obstore's default ends it after 30 s) as long as bytes come; `get_timeout_s` watches that."""
KEYS_VALID_FOR = datetime.timedelta(minutes=5)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def addressable(key: str) -> bool:
    """Whether obstore asks for exactly this key: its paths have no empty parts, no `.` and no `..`."""
    return not CONTROL.search(key) and all(part not in ("", ".", "..") for part in key.split("/"))


class ObstoreStore(S3Store):
    """`s3://` by obstore. Threads may share it."""

    def __init__(self, service: Service, *, get_timeout_s: float, list_timeout_s: float) -> None:
        super().__init__(service.location, list_timeout_s)
        self._client = S3Client(service)
        self._get_timeout_s = get_timeout_s
        self._store = _open(service, get_timeout_s)

    def _list(self, prefix: str, *, delimiter: str, token: str | None, limit: int, timeout_s: float) -> RawPage:
        return self._client.list(prefix, delimiter=delimiter, token=token, limit=limit, timeout_s=timeout_s)

    def _fetch_range(
        self, buffer: memoryview, object_id: ObjectId, start: int, progress: Callable[[int], None]
    ) -> None:
        size = len(buffer)
        if not addressable(object_id.path):
            get_into(self._client, buffer, object_id, start, progress, self._get_timeout_s)
            return
        filled, heard_s = self._stream_into(buffer, object_id, start, start + size, progress)
        if filled == size:
            progress(filled)
            return
        left_s = self._get_timeout_s - (time.monotonic() - heard_s)
        if left_s <= 0:
            raise StoreUnavailable(f"{self.url}: {object_id.path}: no byte for {self._get_timeout_s:g} s")
        get_into(self._client, buffer[filled:], object_id, start + filled, lambda n: progress(filled + n), left_s)

    def _stream_into(
        self, buffer: memoryview, object_id: ObjectId, start: int, stop: int, progress: Callable[[int], None]
    ) -> tuple[int, float]:
        """How many bytes came before a failure without a name, and when (monotonic seconds) something last came."""
        filled, heard_s = 0, time.monotonic()
        size = stop - start
        where = f"s3://{self.location.bucket}/{object_id.path}"
        options: Any = {"range": (start, stop), "if_match": f'"{object_id.version}"'}
        try:
            answer = obstore.get(self._store, object_id.path, options=options)
            meta = answer.meta
            check_part(object_id, (start, stop), answer.range, size=meta["size"], etag=meta["e_tag"] or "")
            for piece in answer.stream(min_chunk_size=STREAM_BYTES):
                if filled + len(piece) > size:
                    raise IntegrityError(f"{where}: the store sent more than the {size} bytes of the part")
                buffer[filled : filled + len(piece)] = piece
                filled, heard_s = filled + len(piece), time.monotonic()
                # The last call waits for the end of the body: only then it is known not to be too long.
                if filled < size:
                    progress(filled)
        except FileNotFoundError as error:
            raise NotFound(f"{where}: not found; was it deleted?") from error
        except obstore.exceptions.PreconditionError as error:
            raise ObjectChanged(f"{where} changed: it is no longer {object_id.version}") from error
        except obstore.exceptions.BaseError:
            # Also a 403: it may be the credentials' service that failed, which passes.
            return filled, heard_s
        if filled < size:
            raise IntegrityError(f"{where}: the store sent {filled} of the {size} bytes of the part")
        return filled, heard_s

    def close(self) -> None:
        """See Store."""
        self._client.close()


def _open(service: Service, get_timeout_s: float) -> obstore.store.S3Store:
    config: dict[str, Any] = {
        "endpoint": service.endpoint,
        # Set too, because it goes before `endpoint` and obstore reads it from the environment.
        "aws_endpoint_url_s3": service.endpoint,
        "region": service.region,
        "virtual_hosted_style_request": False,
        "skip_signature": service.credentials is None,
    }
    client: dict[str, Any] = {
        "allow_http": service.endpoint.startswith("http://"),
        "connect_timeout": datetime.timedelta(seconds=min(CONNECT_TIMEOUT_S, get_timeout_s)),
        "read_timeout": datetime.timedelta(seconds=get_timeout_s),
        "timeout": datetime.timedelta(seconds=max(WHOLE_REQUEST_TIMEOUT_S, 2 * get_timeout_s)),
    }
    if service.ca_file:
        client["root_certificate"] = Path(service.ca_file).read_bytes()
    retry: dict[str, Any] = {
        "max_retries": RETRIES,
        "backoff": {
            "init_backoff": datetime.timedelta(milliseconds=100),
            "max_backoff": datetime.timedelta(seconds=1),
            "base": 2,
        },
        # Less than one read_timeout: a request that hung is not sent again here.
        "retry_timeout": datetime.timedelta(seconds=0.9 * get_timeout_s),
    }
    keys = service.credentials

    def provide() -> Any:
        assert keys is not None
        current = keys()
        return {
            "access_key_id": current.access_key,
            "secret_access_key": current.secret_key,
            "token": current.token,
            "expires_at": datetime.datetime.now(datetime.UTC) + KEYS_VALID_FOR,
        }

    return obstore.store.S3Store(
        service.location.bucket,
        config=config,  # type: ignore[arg-type]
        client_options=client,  # type: ignore[arg-type]
        retry_config=retry,  # type: ignore[arg-type]
        credential_provider=provide if keys is not None else None,
    )
