"""The Controller service. Stateless: a volume is its parameters; all that CreateVolume does is to check and name them.

The id is a hash of name and parameters with a check sum in it, so that ValidateVolumeCapabilities can tell an id of
this driver from any other string without having stored one.
"""

import hashlib
import re
from collections.abc import Mapping

import msgspec

from csi.capability import check_capabilities, check_volume_id
from csi.failure import BadRequest, Unknown
from csi.options import Policy, parse_options
from csi.rpc import rpc
from csi.spec import csi_pb2, csi_pb2_grpc

PVC_NAME_KEY = "csi.storage.k8s.io/pvc/name"
PVC_NAMESPACE_KEY = "csi.storage.k8s.io/pvc/namespace"
PV_NAME_KEY = "csi.storage.k8s.io/pv/name"
METADATA = {"${pvc.name}": PVC_NAME_KEY, "${pvc.namespace}": PVC_NAMESPACE_KEY, "${pv.name}": PV_NAME_KEY}
ID_PATTERN = re.compile(r"cachefs-([0-9a-f]{32})([0-9a-f]{8})")
NAME_BYTES_MAX = 128

Capability = csi_pb2.ControllerServiceCapability.RPC
CAPABILITIES = (Capability.CREATE_DELETE_VOLUME, Capability.SINGLE_NODE_MULTI_WRITER)


def make_volume_id(name: str, parameters: Mapping[str, str]) -> str:
    """cachefs- and 40 hex digits."""
    body = hashlib.sha256(msgspec.json.encode([name, sorted(parameters.items())])).hexdigest()[:32]
    return f"cachefs-{body}{_check_sum(body)}"


def is_volume_id(volume_id: str) -> bool:
    """Whether make_volume_id() made it."""
    match = ID_PATTERN.fullmatch(volume_id)
    return match is not None and _check_sum(match[1]) == match[2]


def _check_sum(body: str) -> str:
    return hashlib.sha256(b"csi.cachefs.io volume " + body.encode()).hexdigest()[:8]


def volume_context(parameters: Mapping[str, str]) -> dict[str, str]:
    """The StorageClass's parameters with ${pvc.name}, ${pvc.namespace}, ${pv.name} filled in."""
    context = {name: value for name, value in parameters.items() if not name.startswith("csi.storage.k8s.io/")}

    def metadata(match: re.Match[str]) -> str:
        if match[0] not in METADATA:
            raise BadRequest(f"parameters: ${{...}} knows {', '.join(METADATA)}")
        value = parameters.get(METADATA[match[0]], "")
        if not value or "/" in value or value in (".", ".."):
            raise BadRequest(f"parameters: {match[0]} needs the provisioner's --extra-create-metadata")
        return value

    if "uri" in context:
        context["uri"] = re.sub(r"\$\{[^}]*\}", metadata, context["uri"])
    return context


class Controller(csi_pb2_grpc.ControllerServicer):
    """CreateVolume, DeleteVolume, ValidateVolumeCapabilities, GetCapabilities."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @rpc
    def CreateVolume(self, request: csi_pb2.CreateVolumeRequest) -> csi_pb2.CreateVolumeResponse:
        if not request.name:
            raise BadRequest("name is missing")
        if len(request.name.encode(errors="replace")) > NAME_BYTES_MAX:
            raise BadRequest(f"name has more than {NAME_BYTES_MAX} bytes")
        check_capabilities(request.volume_capabilities)
        if request.HasField("volume_content_source"):
            raise BadRequest("volume_content_source is not supported: a volume's content is its uri")
        if request.mutable_parameters:
            raise BadRequest("mutable_parameters are not supported")
        limits = request.capacity_range
        if limits.required_bytes < 0 or limits.limit_bytes < 0 or 0 < limits.limit_bytes < limits.required_bytes:
            raise BadRequest("capacity_range makes no sense")
        context = volume_context(request.parameters)
        volume_id = make_volume_id(request.name, request.parameters)
        self._check_options(volume_id, context)
        # Capacity 0: unknown. What a claim asks for is not held against it.
        return csi_pb2.CreateVolumeResponse(volume=csi_pb2.Volume(volume_id=volume_id, volume_context=context))

    def _check_options(self, volume_id: str, context: Mapping[str, str]) -> None:
        # The namespace is the pod's and known at publish only: here strict isolation is just a known word.
        known = {**context, "isolation": "shared"} if context.get("isolation") == "strict" else dict(context)
        parse_options(volume_id, known, self._policy)

    @rpc
    def DeleteVolume(self, request: csi_pb2.DeleteVolumeRequest) -> csi_pb2.DeleteVolumeResponse:
        check_volume_id(request.volume_id)
        return csi_pb2.DeleteVolumeResponse()

    @rpc
    def ValidateVolumeCapabilities(
        self, request: csi_pb2.ValidateVolumeCapabilitiesRequest
    ) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        check_volume_id(request.volume_id)
        if not request.volume_capabilities:
            raise BadRequest("volume_capabilities is missing")
        if not is_volume_id(request.volume_id) and "uri" not in request.volume_context:
            raise Unknown("no such volume")
        try:
            check_capabilities(request.volume_capabilities)
            if request.volume_context:
                self._check_options(request.volume_id, dict(request.volume_context))
        except BadRequest as exc:
            return csi_pb2.ValidateVolumeCapabilitiesResponse(message=str(exc))
        confirmed = csi_pb2.ValidateVolumeCapabilitiesResponse.Confirmed(
            volume_context=request.volume_context,
            volume_capabilities=request.volume_capabilities,
            parameters=request.parameters,
        )
        return csi_pb2.ValidateVolumeCapabilitiesResponse(confirmed=confirmed)

    @rpc
    def ControllerGetCapabilities(
        self, request: csi_pb2.ControllerGetCapabilitiesRequest
    ) -> csi_pb2.ControllerGetCapabilitiesResponse:
        rpcs = [csi_pb2.ControllerServiceCapability(rpc=Capability(type=kind)) for kind in CAPABILITIES]
        return csi_pb2.ControllerGetCapabilitiesResponse(capabilities=rpcs)
