"""From a volume's source to its store. Libraries are loaded only when a source needs them."""

import os
from collections.abc import Callable, Mapping

from cachefs.config import VolumeConfig
from cachefs.errors import UsageError
from cachefs.store import Store

SCHEMES = ("s3", "file")


def open_store(
    volume: VolumeConfig,
    *,
    get_timeout_s: float,
    list_timeout_s: float,
    environ: Mapping[str, str] = os.environ,
    count_hedge: Callable[[str], None] = lambda result: None,
) -> Store:
    """The store of `volume.source`; no request is made (`probe` makes one).

    `count_hedge` is told, in the thread of a GET, that a second one for the same bytes was "started" or has "won".

    UsageError for a source, endpoint, profile or combination that makes no sense.
    """
    scheme, separator, rest = volume.source.partition("://")
    known = ", ".join(f"{name}://" for name in SCHEMES)
    if not separator or scheme not in SCHEMES:
        raise UsageError(f"{volume.source!r} is no source that can be mounted: it starts with one of {known}")
    if scheme == "file":
        if volume.store == "obstore" or volume.endpoint_url:
            raise UsageError(f"{volume.source}: --store obstore and --endpoint-url are for s3:// sources")
        from cachefs.store.file import FileStore

        return FileStore(rest)
    if get_timeout_s <= 0 or list_timeout_s <= 0:
        raise UsageError("get_timeout_s and list_timeout_s are more than 0")
    return _open_s3(volume, get_timeout_s, list_timeout_s, environ, count_hedge)


def _open_s3(
    volume: VolumeConfig,
    get_timeout_s: float,
    list_timeout_s: float,
    environ: Mapping[str, str],
    count_hedge: Callable[[str], None],
) -> Store:
    from cachefs.store import _aws as aws
    from cachefs.store._http import Service
    from cachefs.store._s3 import aws_endpoint, parse_location

    if volume.anonymous and volume.profile:
        raise UsageError("--anonymous and --profile contradict each other: give one")
    location = parse_location(volume.source, aws.resolve_endpoint(volume.endpoint_url, environ))
    plain = aws.keys_in_environment(volume.profile, environ)
    session = None if plain or volume.anonymous else aws.open_session(volume.profile, environ)
    region = aws.resolve_region(volume.region, session, environ)
    endpoint = location.endpoint or aws_endpoint(region)
    service = Service(
        location=location,
        endpoint=endpoint,
        region=region,
        credentials=None if volume.anonymous else aws.credential_source(session, environ),
        static_credentials=plain,
        ca_file=ca_file(environ) if endpoint.startswith("https://") else None,
    )
    if volume.store == "fsspec":
        from cachefs.store.fsspec import S3fsStore

        return S3fsStore(service, volume.profile, get_timeout_s=get_timeout_s, list_timeout_s=list_timeout_s)
    if volume.store == "obstore":
        from cachefs.store.obstore import ObstoreStore

        return ObstoreStore(service, get_timeout_s=get_timeout_s, list_timeout_s=list_timeout_s)
    from cachefs.store.direct import DirectStore

    return DirectStore(service, get_timeout_s=get_timeout_s, list_timeout_s=list_timeout_s, count_hedge=count_hedge)


def ca_file(environ: Mapping[str, str]) -> str | None:
    """The file of certificates that the environment names, AWS's variable first; UsageError when it has none."""
    import ssl

    for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE"):
        path = environ.get(name)
        if path:
            try:
                ssl.create_default_context(cafile=path)
            except OSError as error:
                raise UsageError(f"{name} is {path}, which has no certificates that can be read: {error}") from error
            return path
    return None
