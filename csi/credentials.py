"""Secrets and service account tokens -> what the server gets. They pass through: never stored, never logged."""

import json
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import quote

import msgspec

from csi.failure import BadRequest
from csi.options import TOKENS_KEY, Policy, VolumeOptions

POD_IDENTITY_AUDIENCE = "pods.eks.amazonaws.com"
"""EKS Pod Identity trusts tokens of this audience and needs no role."""
VALUE_CHARS_MAX = 64 * 1024
TOKENS_MAX = 16

SECRET_NAMES: dict[str, tuple[str, ...]] = {
    "s3": ("aws_access_key_id", "aws_secret_access_key", "aws_session_token"),
    "gs": ("google_service_account_key",),
    "az": ("azure_storage_account_name", "azure_storage_account_key", "azure_storage_sas_token"),
    "hf": ("hf_token",),
    "https": ("http_bearer_token",),
}
"""Keys of a node-publish secret by scheme, in either case (`AWS_ACCESS_KEY_ID`); other keys are left alone."""
REQUIRED_TOGETHER = ("aws_access_key_id", "aws_secret_access_key")


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What a principal may see a source with. `repr` shows no value."""

    kind: Literal["static", "web_identity", "chain", "anonymous"]
    values: dict[str, str] = {}
    """kind static: by the names of SECRET_NAMES."""
    tokens: dict[str, dict[str, str]] = {}
    """kind web_identity: audience -> {"token", "expires"} (RFC 3339)."""
    role: str | None = None

    def __repr__(self) -> str:
        return f"Credentials(kind={self.kind!r}, names={sorted(self.values)}, audiences={sorted(self.tokens)})"

    def document(self) -> dict[str, Any]:
        """For the control socket."""
        return {"kind": self.kind, "values": self.values, "tokens": self.tokens, "role": self.role}


def secret_values(secrets: Mapping[str, str], context: Mapping[str, str]) -> tuple[str, ...]:
    """Every string of a request that must not be seen in any output, longest first; also as JSON, repr() and urls
    write it (a key of AWS may hold `+` and `/`), and each line of it."""
    values = set(secrets.values()) | {value for name, value in context.items() if name == TOKENS_KEY}
    for text in tuple(values):
        values.update(_nested_tokens(text))
    for text in tuple(values):
        values.update(text.splitlines())
        plain = text.encode(errors="replace").decode()
        values.update((json.dumps(text)[1:-1], repr(text)[1:-1], quote(plain, safe=""), quote(plain)))
    return tuple(sorted((value for value in values if len(value) >= 4), key=len, reverse=True))


def _nested_tokens(text: str) -> list[str]:
    try:
        return [item["token"] for item in _decode_tokens(text).values()]
    except BadRequest:
        return []


def choose_credentials(
    options: VolumeOptions, secrets: Mapping[str, str], context: Mapping[str, str], policy: Policy
) -> Credentials:
    """The volume's own secret, else its pod's token where that leads anywhere, else the node's chain where the admin
    allows it (never for ephemeral volumes), else none. Raises BadRequest naming a key, never a value."""
    given = {name: value for name, value in secrets.items() if name != TOKENS_KEY}
    if given:
        return Credentials(kind="static", values=_static(options.scheme, given))
    text = secrets.get(TOKENS_KEY) or (context.get(TOKENS_KEY, "") if policy.context_tokens else "")
    tokens = _decode_tokens(text) if text else {}
    if tokens and options.scheme in ("s3", "gs", "az"):
        if options.scheme != "s3" or options.role is not None:
            return Credentials(kind="web_identity", tokens=tokens, role=options.role)
        if POD_IDENTITY_AUDIENCE in tokens:
            return Credentials(kind="web_identity", tokens=tokens)
    if policy.node_credentials and not options.ephemeral:
        return Credentials(kind="chain")
    return Credentials(kind="anonymous")


def _static(scheme: str, given: Mapping[str, str]) -> dict[str, str]:
    known = SECRET_NAMES[scheme]
    values = {name.lower(): value for name, value in given.items() if name.lower() in known}
    if not values:
        names = ", ".join(name.upper() for name in known)
        raise BadRequest(f"the secret has no key that {scheme}:// knows ({names})")
    for name, value in values.items():
        if not value or len(value) > VALUE_CHARS_MAX or any(ord(char) < 32 and char not in "\n\r\t" for char in value):
            raise BadRequest(f"the secret's key {name.upper()} is empty, too long or has a control character in it")
    if scheme == "s3":
        for name in REQUIRED_TOGETHER:
            if name not in values:
                raise BadRequest(f"the secret has no {name.upper()}")
    return values


def _decode_tokens(text: str) -> dict[str, dict[str, str]]:
    """The kubelet's {"audience": {"token": ..., "expirationTimestamp": ...}}."""
    try:
        document = msgspec.json.decode(text.encode(), type=dict[str, dict[str, str | None]])
        if len(document) > TOKENS_MAX or len(text) > TOKENS_MAX * VALUE_CHARS_MAX:
            raise BadRequest("service account tokens: too many or too long")
        tokens = {}
        for audience, item in document.items():
            token = item["token"]
            if not token:
                raise BadRequest("service account tokens: an empty token")
            tokens[audience] = {"token": token, "expires": item.get("expirationTimestamp") or ""}
        return tokens
    except (msgspec.MsgspecError, UnicodeError, KeyError):
        raise BadRequest("service account tokens: not the kubelet's JSON") from None
