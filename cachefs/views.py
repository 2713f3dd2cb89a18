"""What a publication of node mode is, and the view that it shows: checked, named, opened."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from cachefs.config import NodeConfig, ServerConfig, VolumeConfig
from cachefs.errors import UsageError
from cachefs.node_policy import volume_location
from cachefs.snapshot import Volume
from cachefs.store import Store
from cachefs.store.given import Given, KeySource, ViewStore, open_given


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """One key, as it is kept in the index: never with credentials."""

    key: str
    view: str
    source: str
    endpoint_url: str | None
    region: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    layout: str
    pin: bool
    prefetch: Literal["auto", "none", "all"]
    isolation: str
    """"" : bytes are shared; else the namespace that has its own."""
    principal: str
    """A digest of the principal and its identity at the store."""
    kind: str
    """Of the credentials."""
    gone: bool = False
    """Unpublished, but files are open: shown until they are closed."""

    def shows(self, request: "Request") -> bool:
        """Whether this is what `request` asks for. Who asks is not compared: keys and tokens are rotated."""
        names = ("source", "endpoint_url", "region", "include", "exclude", "layout")
        same = all(getattr(self, name) == getattr(request, name) for name in names)
        return same and (self.isolation != "") == (request.isolation == "strict")


class Request(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    source: str
    credentials: Given
    endpoint_url: str | None = None
    region: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layout: str = ""
    pin: bool = False
    prefetch: Literal["auto", "none", "all"] = "auto"
    isolation: Literal["shared", "strict"] = "shared"
    principal: str = ""


class View:
    """One directory under the FUSE root, and whose credentials it uses."""

    def __init__(self, volume: Volume, store: ViewStore, keys: KeySource) -> None:
        self.volume = volume
        self.store = store
        self.keys = keys
        self.publications: set[str] = set()
        self.proven: Given | None = None
        """What the store was last listed with at a publish, at `proven_s` (trio's clock)."""
        self.proven_s = -math.inf

    def is_proven(self, given: Given, since_s: float, *, is_account: bool) -> bool:
        """Whether these credentials could list the store lately. Tokens of one service account are one: they rotate."""
        if self.proven is None or self.proven_s < since_s:
            return False
        same_account = is_account and given.kind == "web_identity" and given.identity == self.proven.identity
        return given == self.proven or same_account


def new_publication(request: Request, node: NodeConfig) -> Publication:
    """Checked against the admin's policy. Raises UsageError."""
    location, endpoint, _ = volume_location(request.source, request.endpoint_url, request.region, node)
    request.credentials.check("s3", node_credentials=node.allow_node_credentials)
    if request.isolation == "strict" and not request.principal:
        raise UsageError("isolation strict needs a principal")
    if request.layout and ("/" in request.layout or request.layout in (".", "..") or len(request.layout) > 255):
        raise UsageError("layout: one name of a directory")
    identity = [request.principal, request.credentials.identity]
    principal = digest(identity)
    isolation = digest([request.principal.partition("/")[0]]) if request.isolation == "strict" else ""
    shown = [location.url, endpoint, request.region, request.include, request.exclude, request.layout]
    view = digest([*shown, isolation, principal])
    return Publication(
        key=request.key,
        view=view,
        source=request.source,
        endpoint_url=request.endpoint_url,
        region=request.region,
        include=request.include,
        exclude=request.exclude,
        layout=request.layout,
        pin=request.pin,
        prefetch=request.prefetch,
        isolation=isolation,
        principal=principal,
        kind=request.credentials.kind,
    )


def open_publication(
    publication: Publication, node: NodeConfig, server: ServerConfig, count_hedge: Callable[[str], None]
) -> tuple[Store, KeySource]:
    """A store and where its keys come from; `count_hedge` as for open_store. Raises UsageError."""
    location, endpoint, ca_file = volume_location(
        publication.source, publication.endpoint_url, publication.region, node
    )
    chain = None
    if publication.kind == "chain":
        Given(kind="chain").check("s3", node_credentials=node.allow_node_credentials)
        from cachefs.store import _aws

        plain = _aws.keys_in_environment(None, os.environ)
        chain = _aws.credential_source(None if plain else _aws.open_session(None, os.environ), os.environ)
    region = publication.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    keys = KeySource(region=region or "us-east-1", sts_endpoint=node.sts_endpoint, chain=chain)
    if publication.kind == "chain":
        keys.give(Given(kind="chain"))  # nothing secret is in it: it need not be given again
    store = open_given(
        location,
        endpoint,
        region,
        keys,
        anonymous=publication.kind == "anonymous",
        ca_file=ca_file,
        get_timeout_s=server.get_timeout_s,
        list_timeout_s=server.list_timeout_s,
        count_hedge=count_hedge,
    )
    return store, keys


def volume_config(publication: Publication) -> VolumeConfig:
    """The view as a volume of the tree."""
    return VolumeConfig(
        name=publication.view,
        source=publication.source,
        endpoint_url=publication.endpoint_url,
        region=publication.region,
        anonymous=publication.kind == "anonymous",
        include=tuple(_inside(publication.layout, pattern) for pattern in publication.include),
        exclude=tuple(_inside(publication.layout, pattern) for pattern in publication.exclude),
        principal=f"{publication.principal}{publication.isolation}/{publication.layout}",
    )


def digest(parts: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _inside(layout: str, pattern: str) -> str:
    """A pattern over paths below the source, for paths below the view."""
    anchored = "/" in pattern.rstrip("/")
    return f"/{layout}/{pattern.lstrip('/')}" if layout and anchored else pattern
