"""What a log line or an error message may show of a request: never a field that the proto marks `csi_secret`, never a
token, never a value of the volume context."""

from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from csi.credentials import secret_values
from csi.options import printable
from csi.spec import csi_pb2

HIDDEN = "***"
MESSAGE_CHARS_MAX = 512


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def redacted(message: Message) -> dict[str, Any]:
    """The request as plain values. Maps show their keys only: a user may have put a token into any attribute."""
    shown: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.GetOptions().Extensions[cast(Any, csi_pb2.csi_secret)]:
            shown[field.name] = HIDDEN
        elif _is_map(field):
            shown[field.name] = {printable(str(name)): HIDDEN for name in sorted(value)[:32]}
        elif isinstance(value, Message):
            shown[field.name] = redacted(value)
        elif isinstance(value, str):
            shown[field.name] = printable(value)
        elif isinstance(value, (bool, int)):
            shown[field.name] = value
        else:
            shown[field.name] = f"{len(value)} items"
    return shown


def hide_secrets(text: str, request: Message) -> str:
    """`text` without any secret string of `request`, in one line of at most MESSAGE_CHARS_MAX characters."""
    secrets = dict(getattr(request, "secrets", {}))
    context = dict(getattr(request, "volume_context", {}))
    for value in secret_values(secrets, context):
        text = text.replace(value, HIDDEN)
    line = "".join(char if char.isprintable() else " " for char in text)
    return line[:MESSAGE_CHARS_MAX]
