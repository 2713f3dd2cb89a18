"""The second S3 store: s3fs (fsspec, aiobotocore), for what obstore cannot reach; several times slower.

The requests are made on the client of the s3fs file system, because its own calls take no condition: two versions
could mix. The client's event loop runs in fsspec's thread; the calls here wait for it.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import aiohttp
import botocore.exceptions  # type: ignore[import-untyped]
import fsspec.asyn
import s3fs

from cachefs.chunk import ObjectId
from cachefs.errors import AccessDenied, CachefsError, IntegrityError, StoreUnavailable, UsageError
from cachefs.store._http import Service
from cachefs.store._s3 import RawObject, RawPage, S3Store, bare_etag, check_range, status_error

T = TypeVar("T")
PIECE_BYTES = 256 * 1024
ATTEMPTS = 3
CONNECT_TIMEOUT_S = 5.0
CONNECTIONS_MAX = 64
GRACE_S = 5.0
"""How much longer than its own deadline a call may take before the waiting thread gives it up."""


class S3fsStore(S3Store):
    """`s3://` by s3fs. Threads may share it."""

    def __init__(self, service: Service, profile: str | None, *, get_timeout_s: float, list_timeout_s: float) -> None:
        super().__init__(service.location, list_timeout_s)
        self._service = service
        self._get_timeout_s = get_timeout_s
        self._fs = _open(service, profile, get_timeout_s)

    # --- one request

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turns what botocore and aiohttp raise into errors of cachefs, by type and by HTTP status."""
        where = f"s3://{self.location.bucket}/{what}"
        try:
            yield
        except botocore.exceptions.ClientError as error:
            raise self._answer_error(error.response, where) from error
        except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
            raise AccessDenied(
                f"{where}: no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or --anonymous"
            ) from error
        except (botocore.exceptions.SSLError, aiohttp.ClientSSLError) as error:
            raise UsageError(
                f"{where}: the store's certificate is not trusted: set AWS_CA_BUNDLE to its CA file"
            ) from error
        except botocore.exceptions.ParamValidationError as error:
            raise UsageError(f"{where}: cannot be asked for with --store fsspec ({error})") from error
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.HTTPClientError, aiohttp.ClientError) as error:
            raise StoreUnavailable(f"{where}: the store does not answer ({type(error).__name__})") from error
        except (TimeoutError, OSError) as error:
            raise StoreUnavailable(f"{where}: the store does not answer in time") from error

    def _answer_error(self, response: dict[str, Any], where: str) -> CachefsError:
        meta = response.get("ResponseMetadata", {})
        code = str(response.get("Error", {}).get("Code", ""))
        # Answers without a body (HEAD) have the number as their code.
        return status_error(
            int(meta.get("HTTPStatusCode", 0)),
            "" if code.isdigit() else code,
            bucket=self.location.bucket,
            what=where,
            region=self._service.region,
            actual_region=meta.get("HTTPHeaders", {}).get("x-amz-bucket-region"),
        )

    def _wait(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Runs `work(client)` on fsspec's loop and waits; its own deadlines end it."""

        async def run() -> T:
            client = await asyncio.wait_for(self._fs.set_session(), self._get_timeout_s)
            return await work(client)

        result: T = fsspec.asyn.sync(self._fs.loop, run)
        return result

    def _list(self, prefix: str, *, delimiter: str, token: str | None, limit: int, timeout_s: float) -> RawPage:
        asked: dict[str, Any] = {"Bucket": self.location.bucket, "Prefix": prefix, "MaxKeys": limit}
        if delimiter:
            asked["Delimiter"] = delimiter
        if token is not None:
            asked["ContinuationToken"] = token

        async def work(client: Any) -> dict[str, Any]:
            answer: dict[str, Any] = await asyncio.wait_for(client.list_objects_v2(**asked), timeout_s)
            return answer

        with self._translated(prefix):
            answer = self._wait(work)
        return self._raw_page(answer, prefix)

    def _raw_page(self, answer: dict[str, Any], prefix: str) -> RawPage:
        where = f"s3://{self.location.bucket}/{prefix}"
        # What is no listing is parsed into nothing: it must not look like an empty directory.
        if not isinstance(answer.get("IsTruncated"), bool):
            raise StoreUnavailable(f"{where}: the answer is no listing; is this an S3 endpoint?")
        token = answer.get("NextContinuationToken") or None
        if answer["IsTruncated"] and token is None:
            raise IntegrityError(f"{where}: the listing says that it goes on, and not where")
        try:
            objects = tuple(
                RawObject(item["Key"], int(item["Size"]), bare_etag(item.get("ETag")), item["LastModified"].timestamp())
                for item in answer.get("Contents", ())
            )
            prefixes = tuple(item["Prefix"] for item in answer.get("CommonPrefixes", ()))
        except (KeyError, ValueError) as error:
            raise IntegrityError(f"{where}: the listing has an entry that cannot be read: {error!r}") from error
        return RawPage(objects, prefixes, token if answer["IsTruncated"] else None)

    def _fetch_range(
        self, buffer: memoryview, object_id: ObjectId, start: int, progress: Callable[[int], None]
    ) -> None:
        """`progress` is called in the thread that called this."""
        stop = start + len(buffer)
        with self._translated(object_id.path):
            body = self._wait(lambda client: self._header(client, object_id, start, stop))
            try:
                self._fill(buffer, body, object_id, progress)
            finally:
                # Before its end a body cannot be left in the connection for the next request.
                self._fs.loop.call_soon_threadsafe(body.close)
        progress(len(buffer))

    async def _header(self, client: Any, object_id: ObjectId, start: int, stop: int) -> Any:
        answer = await asyncio.wait_for(
            client.get_object(
                Bucket=self.location.bucket,
                Key=object_id.path,
                Range=f"bytes={start}-{stop - 1}",
                IfMatch=f'"{object_id.version}"',
            ),
            self._get_timeout_s,
        )
        try:
            check_range(
                object_id,
                start,
                stop,
                status=int(answer["ResponseMetadata"]["HTTPStatusCode"]),
                content_range=answer.get("ContentRange", ""),
                length=answer.get("ContentLength"),
                etag=answer.get("ETag", ""),
            )
        except CachefsError:
            answer["Body"].close()
            raise
        return answer["Body"]

    def _fill(self, buffer: memoryview, body: Any, object_id: ObjectId, progress: Callable[[int], None]) -> None:
        where = f"s3://{self.location.bucket}/{object_id.path}"

        async def read(count: int) -> bytes:
            piece: bytes = await asyncio.wait_for(body.read(count), self._get_timeout_s)
            return piece

        filled = 0
        while filled < len(buffer):
            piece = fsspec.asyn.sync(self._fs.loop, read, min(PIECE_BYTES, len(buffer) - filled))
            if not piece:
                raise StoreUnavailable(f"{where}: the answer was cut after {filled} of {len(buffer)} bytes")
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled < len(buffer):
                progress(filled)
        if fsspec.asyn.sync(self._fs.loop, read, 1):
            raise IntegrityError(f"{where}: the store sent more than the {len(buffer)} bytes of the part")

    def close(self) -> None:
        """See Store."""
        client = getattr(self._fs, "_s3", None)
        if client is not None:
            with contextlib.suppress(Exception):
                fsspec.asyn.sync(self._fs.loop, client.close, timeout=GRACE_S)


def _open(service: Service, profile: str | None, get_timeout_s: float) -> Any:
    chain: dict[str, Any] = {"anon": service.credentials is None}
    if service.credentials is not None and service.static_credentials:
        keys = service.credentials()
        chain |= {"key": keys.access_key, "secret": keys.secret_key, "token": keys.token}
    elif profile:
        chain["profile"] = profile
    return s3fs.S3FileSystem(
        **chain,
        endpoint_url=service.endpoint,
        client_kwargs={"region_name": service.region, **({"verify": service.ca_file} if service.ca_file else {})},
        config_kwargs={
            "connect_timeout": min(CONNECT_TIMEOUT_S, get_timeout_s),
            "read_timeout": get_timeout_s,
            "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"},
            "max_pool_connections": CONNECTIONS_MAX,
            "s3": {"addressing_style": "path"},
            # By default botocore asks for checksums, which it then computes in Python over the whole body.
            "response_checksum_validation": "when_required",
            "request_checksum_calculation": "when_required",
        },
        skip_instance_cache=True,
        use_listings_cache=False,
    )
