"""What a volume on a node may name, whoever wrote it: pods' authors are not trusted."""

import ipaddress
import os
import socket
from urllib.parse import urlsplit

from cachefs.config import NodeConfig
from cachefs.errors import UsageError
from cachefs.store import _aws as aws
from cachefs.store._s3 import REGION, Location, aws_endpoint, parse_location
from cachefs.store.open import ca_file

METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal"})
METADATA_ADDRESSES = frozenset({ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("168.63.129.16")})
PARTITIONS_APART = ("cn-", "us-gov-", "us-iso", "eu-isoe-", "eusc-")
"""How the regions of AWS begin that are not of its public partition."""


def volume_location(
    source: str, endpoint_url: str | None, region: str | None, node: NodeConfig
) -> tuple[Location, str, str | None]:
    """(location, endpoint, file of certificates) of a volume. Raises UsageError for what it may not name."""
    scheme, separator, _ = source.partition("://")
    if not separator or scheme != "s3":
        raise UsageError(f"{scheme[:20]}:// is no source of a volume: only s3:// can be mounted in pods")
    if any(ord(character) < 32 for character in source):
        raise UsageError("a source has no control characters")
    if region is not None and REGION.fullmatch(region) is None:
        raise UsageError("region: at most 63 small letters, digits and dashes")
    endpoint = None
    if endpoint_url is not None:
        endpoint = allowed_endpoint(endpoint_url, node.allow_endpoints)
    endpoint = aws.resolve_endpoint(endpoint, os.environ)
    own_region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or aws.DEFAULT_REGION
    # A bucket's name is one for all of AWS but these partitions, which have names, and owners, of their own.
    apart = own_region.startswith(PARTITIONS_APART)
    location = parse_location(source, endpoint or (aws_endpoint(own_region) if apart else None))
    endpoint = endpoint or aws_endpoint(own_region)
    return location, endpoint, ca_file(os.environ) if endpoint.startswith("https://") else None


def allowed_endpoint(endpoint_url: str, allowed: tuple[str, ...]) -> str:
    """scheme://host[:port] in lower case. Raises UsageError unless the admin allows it (never a metadata service)."""
    endpoint = normal_endpoint(endpoint_url)
    if endpoint not in {normal_endpoint(item) for item in allowed}:
        raise UsageError("the endpoint is not on the admin's list (--allow-endpoint)")
    return endpoint


def normal_endpoint(endpoint_url: str) -> str:
    """Raises UsageError for what is none, or leads to a metadata service."""
    try:
        parts = urlsplit(endpoint_url)
        _ = parts.port
    except ValueError:
        raise UsageError("an endpoint is http://HOST[:PORT] or https://HOST[:PORT]") from None
    plain = parts.path.rstrip("/") == "" and not parts.query and not parts.fragment and "@" not in parts.netloc
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise UsageError("an endpoint is http://HOST[:PORT] or https://HOST[:PORT]")
    _refuse_metadata(parts.hostname)
    return f"{parts.scheme}://{parts.netloc}".lower()


def _refuse_metadata(host: str) -> None:
    name = host.rstrip(".").lower()
    try:
        # Resolvers also take 2852039166 and 0xa9.0xfe.1 for 169.254.x.y; inet_aton knows them all.
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(socket.inet_aton(name))
    except (OSError, UnicodeError):
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            if name in METADATA_NAMES:
                raise UsageError("a metadata service is no endpoint") from None
            return
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_link_local or address.is_unspecified or address in METADATA_ADDRESSES:
        raise UsageError("a link-local address is no endpoint")
