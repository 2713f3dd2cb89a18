"""The volume's attributes, parsed and refused by name. PURE: no I/O, no values in messages (a token may stand there).

`uri` and the options are what the user or the admin wrote in `volumeAttributes` (or StorageClass `parameters`);
an ephemeral inline volume is written by whoever may create a pod and is not trusted.
"""

import ipaddress
import re
import socket
import unicodedata
from collections.abc import Mapping
from typing import Literal
from urllib.parse import SplitResult, urlsplit

import msgspec

from csi.failure import BadRequest
from csi.records import KUBERNETES_PREFIXES

TOKENS_KEY = "csi.storage.k8s.io/serviceAccount.tokens"
EPHEMERAL_KEY = "csi.storage.k8s.io/ephemeral"
POD_NAMESPACE_KEY = "csi.storage.k8s.io/pod.namespace"
SERVICE_ACCOUNT_KEY = "csi.storage.k8s.io/serviceAccount.name"

OPTIONS = (
    "uri",
    "revision",
    "endpoint",
    "region",
    "role",
    "pin",
    "prefetch",
    "isolation",
    "noexec",
    "include",
    "exclude",
    "layout",
)
EPHEMERAL_REFUSED = frozenset({"pin"})
"""A tenant's pod must not take cache space from others for good."""
SCHEMES = ("s3", "gs", "az", "hf", "https")
VALUE_CHARS_MAX = 4096
INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's control, format (bidirectional overrides), surrogate and line ends: they forge what a log shows."""
GLOBS_MAX = 64
GLOB_SLASHES_MAX = 256
"""In all patterns: each name of a listing is matched against them in the one server that all tenants have."""
LINK_LOCAL_NAMES = frozenset({"metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal"})
METADATA_ADDRESSES = frozenset({ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("168.63.129.16")})
INLINE_HANDLE = re.compile(r"csi-[0-9a-f]{64}")
"""The kubelet names inline volumes so: known as ephemeral even where the CSIDriver object sends no pod info."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What the cluster admin allows, from the driver's command line."""

    endpoints: tuple[str, ...] = ()
    """scheme://host[:port] that ephemeral volumes may name (`--allow-endpoint`)."""
    node_credentials: bool = False
    """Persistent volumes without credentials of their own use the server's chain (`--allow-node-credentials`)."""
    context_tokens: bool = False
    """Take tokens from the volume context: clusters before serviceAccountTokenInSecrets."""


class VolumeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One volume as asked for."""

    source: str
    """The uri, for hf:// with `@revision`."""
    scheme: str
    endpoint_url: str | None = None
    region: str | None = None
    role: str | None = None
    pin: bool = False
    prefetch: Literal["auto", "none", "all"] = "auto"
    isolation: Literal["shared", "strict"] = "shared"
    noexec: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layout: str = ""
    """"" : the model is the volume's root; else the name of the one subdirectory that it is in."""
    ephemeral: bool = False
    namespace: str = ""
    service_account: str = ""

    @property
    def principal(self) -> str:
        """Whose access the server checks: namespace/service account; "" outside of Kubernetes."""
        return f"{self.namespace}/{self.service_account}" if self.namespace else ""


def is_ephemeral(volume_id: str, context: Mapping[str, str]) -> bool:
    """Whether a pod's author wrote the attributes."""
    return context.get(EPHEMERAL_KEY) == "true" or INLINE_HANDLE.fullmatch(volume_id) is not None


def plain_options(context: Mapping[str, str]) -> dict[str, str]:
    """Without what Kubernetes adds. Raises BadRequest naming what nobody knows."""
    plain = {name: value for name, value in context.items() if not name.startswith(KUBERNETES_PREFIXES)}
    unknown = sorted(name for name in plain if name not in OPTIONS)
    if unknown:
        names = ", ".join(printable(name) for name in unknown[:8])
        raise BadRequest(f"unknown option: {names} (known: {', '.join(OPTIONS)})")
    for name, value in plain.items():
        if len(value) > VALUE_CHARS_MAX or any(unicodedata.category(char) in INVISIBLE for char in value):
            raise BadRequest(f"option {name}: too long, or a control character in it")
    return plain


def parse_options(volume_id: str, context: Mapping[str, str], policy: Policy) -> VolumeOptions:
    """Raises BadRequest naming the option that is wrong or that this kind of volume may not have."""
    plain = plain_options(context)
    ephemeral = is_ephemeral(volume_id, context)
    source, scheme = parse_uri(plain.get("uri", ""), plain.get("revision", ""))
    endpoint = plain.get("endpoint") or None
    if endpoint is not None:
        parse_endpoint(endpoint)
    namespace = context.get(POD_NAMESPACE_KEY, "")
    isolation = _one_of("isolation", plain.get("isolation", "shared"), ("shared", "strict"))
    if isolation == "strict" and not namespace:
        raise BadRequest("option isolation: strict needs the pod's namespace (podInfoOnMount in the CSIDriver object)")
    if ephemeral:
        _check_ephemeral(plain, source, scheme, endpoint, policy)
    return VolumeOptions(
        source=source,
        scheme=scheme,
        endpoint_url=endpoint,
        region=_matching("region", plain.get("region", ""), r"[a-zA-Z0-9-]{0,63}") or None,
        role=_matching("role", plain.get("role", ""), r"[\w+=,.@:/-]{0,512}") or None,
        pin=_boolean("pin", plain.get("pin", "false")),
        prefetch=_one_of("prefetch", plain.get("prefetch", "auto"), ("auto", "none", "all")),  # type: ignore[arg-type]
        isolation=isolation,  # type: ignore[arg-type]
        noexec=_boolean("noexec", plain.get("noexec", "true")),
        include=_globs("include", plain.get("include", "")),
        exclude=_globs("exclude", plain.get("exclude", "")),
        layout=_layout(plain.get("layout", "root")),
        ephemeral=ephemeral,
        namespace=namespace,
        service_account=context.get(SERVICE_ACCOUNT_KEY, ""),
    )


def parse_uri(uri: str, revision: str) -> tuple[str, str]:
    """(source, scheme)."""
    if not uri:
        raise BadRequest("option uri is missing")
    parts = _split("uri", uri)
    if parts.scheme not in SCHEMES:
        raise BadRequest(f"option uri: unknown scheme (known: {', '.join(SCHEMES)})")
    if not parts.hostname:
        raise BadRequest("option uri: no bucket, repository or host in it")
    if any(part in (".", "..") for part in parts.path.split("/")):
        raise BadRequest("option uri: `.` or `..` in the path")
    if parts.scheme == "https":
        refuse_metadata_host("uri", parts.hostname)
    if not revision:
        return uri, parts.scheme
    if parts.scheme != "hf" or "@" in parts.path:
        raise BadRequest("option revision: only for hf:// uris that have no @revision themselves")
    _matching("revision", revision, r"[\w./-]{1,256}")
    return f"{uri.rstrip('/')}@{revision}", parts.scheme


def parse_endpoint(endpoint: str) -> str:
    """scheme://host[:port] in lower case."""
    parts = _split("endpoint", endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadRequest("option endpoint: http://HOST[:PORT] or https://HOST[:PORT]")
    refuse_metadata_host("endpoint", parts.hostname)
    return f"{parts.scheme}://{parts.netloc}".lower()


def _split(option: str, text: str) -> SplitResult:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        raise BadRequest(f"option {option}: not a url") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise BadRequest(f"option {option}: no user, password, query or fragment in it; credentials go into a secret")
    return parts


def refuse_metadata_host(option: str, host: str) -> None:
    """Link-local addresses answer with the node's own credentials: no volume may point there."""
    name = host.rstrip(".").lower()
    try:
        # inet_aton also knows 2852039166 and 0xa9.0xfe.1, which resolvers accept.
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(socket.inet_aton(name))
    except (OSError, UnicodeError):
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            if name in LINK_LOCAL_NAMES:
                raise BadRequest(f"option {option}: metadata services are not a source") from None
            return
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_link_local or address.is_unspecified or address in METADATA_ADDRESSES:
        raise BadRequest(f"option {option}: link-local addresses are not a source")


def _check_ephemeral(plain: dict[str, str], source: str, scheme: str, endpoint: str | None, policy: Policy) -> None:
    for name in sorted(EPHEMERAL_REFUSED & plain.keys()):
        raise BadRequest(f"option {name}: not for ephemeral volumes; use a persistent volume")
    allowed = {item.rstrip("/").lower() for item in policy.endpoints}
    if endpoint is not None and parse_endpoint(endpoint) not in allowed:
        raise BadRequest("option endpoint: not on the admin's list for ephemeral volumes (--allow-endpoint)")
    if scheme == "https":
        parts = urlsplit(source)
        if f"https://{parts.netloc}".lower() not in allowed:
            raise BadRequest("option uri: the host is not on the admin's list for ephemeral volumes (--allow-endpoint)")


def _one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise BadRequest(f"option {option}: one of {', '.join(known)}")
    return value


def _boolean(option: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise BadRequest(f"option {option}: true or false")
    return value.lower() == "true"


def _matching(option: str, value: str, pattern: str) -> str:
    if re.fullmatch(pattern, value) is None:
        raise BadRequest(f"option {option}: malformed")
    return value


def _globs(option: str, value: str) -> tuple[str, ...]:
    globs = tuple(item.strip() for item in value.split(",") if item.strip())
    if len(globs) > GLOBS_MAX:
        raise BadRequest(f"option {option}: more than {GLOBS_MAX} patterns")
    if value.count("/") > GLOB_SLASHES_MAX:
        raise BadRequest(f"option {option}: more than {GLOB_SLASHES_MAX} slashes in its patterns")
    return globs


def _layout(value: str) -> str:
    if value in ("", "root"):
        return ""
    kind, _, name = value.partition(":")
    if kind != "subdirectory" or re.fullmatch(r"[\w][\w.-]{0,254}", name, re.ASCII) is None:
        raise BadRequest("option layout: root, or subdirectory:NAME (letters, digits, `_`, `-`, `.`)")
    return name


def printable(text: str) -> str:
    """Of a hostile string: at most 64 characters, control characters escaped, so that it cannot forge a log line."""
    return text[:64].encode("unicode_escape").decode("ascii")
