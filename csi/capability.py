"""Volume capabilities: what of an access mode and type is supported. Everything is mounted read-only."""

from collections.abc import Iterable

from csi.failure import BadRequest
from csi.spec import csi_pb2

Mode = csi_pb2.VolumeCapability.AccessMode

EXCLUSIVE_MODES = frozenset({Mode.SINGLE_NODE_WRITER, Mode.SINGLE_NODE_READER_ONLY, Mode.SINGLE_NODE_SINGLE_WRITER})
"""One target path per node. With the capability SINGLE_NODE_MULTI_WRITER the kubelet asks for ReadWriteOnce as
SINGLE_NODE_MULTI_WRITER, so that two pods of a node can share such a claim."""
MODES = EXCLUSIVE_MODES | frozenset(
    {
        Mode.SINGLE_NODE_MULTI_WRITER,
        Mode.MULTI_NODE_READER_ONLY,
        Mode.MULTI_NODE_SINGLE_WRITER,
        Mode.MULTI_NODE_MULTI_WRITER,
    }
)
FS_TYPES = frozenset({"", "cachefs", "fuse.cachefs"})
FLAGS_MAX = 32
VOLUME_ID_BYTES_MAX = 128
"""CSI: fields of string type have at most 128 bytes unless said otherwise."""


def check_volume_id(volume_id: str) -> str:
    """Raises BadRequest when it is missing or longer than CSI allows."""
    if not volume_id:
        raise BadRequest("volume_id is missing")
    if len(volume_id.encode(errors="replace")) > VOLUME_ID_BYTES_MAX:
        raise BadRequest(f"volume_id has more than {VOLUME_ID_BYTES_MAX} bytes")
    return volume_id


def check_capability(capability: csi_pb2.VolumeCapability) -> None:
    """Raises BadRequest for what is not supported: block access, unknown modes, another file system."""
    kind = capability.WhichOneof("access_type")
    if kind == "block":
        raise BadRequest("block access is not supported")
    if kind != "mount":
        raise BadRequest("volume_capability has no access type")
    if capability.access_mode.mode not in MODES:
        raise BadRequest("the access mode is not supported")
    if capability.mount.fs_type not in FS_TYPES:
        raise BadRequest("fs_type: leave it empty")
    if len(capability.mount.mount_flags) > FLAGS_MAX:
        raise BadRequest("too many mount flags")


def check_capabilities(capabilities: Iterable[csi_pb2.VolumeCapability]) -> None:
    """Each of them, and that there is one."""
    items = list(capabilities)
    if not items:
        raise BadRequest("volume_capabilities is missing")
    for item in items:
        check_capability(item)
