"""The Node service: requests to Publisher and back, no decisions."""

from csi.capability import EXCLUSIVE_MODES, check_capability, check_volume_id
from csi.failure import BadRequest
from csi.publisher import Publisher, PublishRequest
from csi.redact import MESSAGE_CHARS_MAX
from csi.rpc import rpc
from csi.server import VolumeStats
from csi.spec import csi_pb2, csi_pb2_grpc

Capability = csi_pb2.NodeServiceCapability.RPC
CAPABILITIES = (Capability.GET_VOLUME_STATS, Capability.VOLUME_CONDITION, Capability.SINGLE_NODE_MULTI_WRITER)


class Node(csi_pb2_grpc.NodeServicer):
    """Publish, Unpublish, GetCapabilities, GetVolumeStats, GetInfo. There is no staging."""

    def __init__(self, publisher: Publisher, node_id: str) -> None:
        self._publisher = publisher
        self._node_id = node_id

    @rpc
    def NodePublishVolume(self, request: csi_pb2.NodePublishVolumeRequest) -> csi_pb2.NodePublishVolumeResponse:
        check_volume_id(request.volume_id)
        if not request.target_path:
            raise BadRequest("target_path is missing")
        if not request.HasField("volume_capability"):
            raise BadRequest("volume_capability is missing")
        check_capability(request.volume_capability)
        mode = request.volume_capability.access_mode.mode
        self._publisher.publish(
            PublishRequest(
                volume_id=request.volume_id,
                target=request.target_path,
                context=dict(request.volume_context),
                secrets=dict(request.secrets),
                access_mode=mode,
                exclusive=mode in EXCLUSIVE_MODES,
                mount_flags=tuple(request.volume_capability.mount.mount_flags),
                readonly=request.readonly,
            )
        )
        return csi_pb2.NodePublishVolumeResponse()

    @rpc
    def NodeUnpublishVolume(self, request: csi_pb2.NodeUnpublishVolumeRequest) -> csi_pb2.NodeUnpublishVolumeResponse:
        check_volume_id(request.volume_id)
        if not request.target_path:
            raise BadRequest("target_path is missing")
        self._publisher.unpublish(request.volume_id, request.target_path)
        return csi_pb2.NodeUnpublishVolumeResponse()

    @rpc
    def NodeGetVolumeStats(self, request: csi_pb2.NodeGetVolumeStatsRequest) -> csi_pb2.NodeGetVolumeStatsResponse:
        check_volume_id(request.volume_id)
        if not request.volume_path:
            raise BadRequest("volume_path is missing")
        return _stats(self._publisher.stats(request.volume_id, request.volume_path))

    @rpc
    def NodeGetCapabilities(self, request: csi_pb2.NodeGetCapabilitiesRequest) -> csi_pb2.NodeGetCapabilitiesResponse:
        rpcs = [csi_pb2.NodeServiceCapability(rpc=Capability(type=kind)) for kind in CAPABILITIES]
        return csi_pb2.NodeGetCapabilitiesResponse(capabilities=rpcs)

    @rpc
    def NodeGetInfo(self, request: csi_pb2.NodeGetInfoRequest) -> csi_pb2.NodeGetInfoResponse:
        return csi_pb2.NodeGetInfoResponse(node_id=self._node_id)


def _stats(stats: VolumeStats) -> csi_pb2.NodeGetVolumeStatsResponse:
    """Used: what is local. Available: what still comes from the store."""
    usages = (
        (csi_pb2.VolumeUsage.BYTES, stats.bytes_total, stats.bytes_local),
        (csi_pb2.VolumeUsage.INODES, stats.objects_total, stats.objects_sealed),
    )
    usage = [
        csi_pb2.VolumeUsage(unit=unit, total=total, used=min(used, total), available=max(0, total - used))
        for unit, total, used in usages
    ]
    message = " ".join(stats.condition.message.split())[:MESSAGE_CHARS_MAX] or "healthy"
    condition = csi_pb2.VolumeCondition(abnormal=stats.condition.abnormal, message=message)
    return csi_pb2.NodeGetVolumeStatsResponse(usage=usage, volume_condition=condition)
