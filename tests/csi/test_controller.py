"""The Controller: stateless volumes from StorageClass parameters."""

from collections.abc import Iterator

import grpc
import pytest

import cachefs
from csi import DRIVER_NAME
from csi.controller import is_volume_id
from csi.spec import csi_pb2, csi_pb2_grpc
from tests.csi.support import Mode, NodeUnderTest, capability, code

Code = grpc.StatusCode
METADATA = {
    "csi.storage.k8s.io/pvc/name": "llama3-70b",
    "csi.storage.k8s.io/pvc/namespace": "team-a",
    "csi.storage.k8s.io/pv/name": "pvc-1",
}


@pytest.fixture(scope="module")
def controller() -> Iterator[csi_pb2_grpc.ControllerStub]:
    with NodeUnderTest() as node:
        node.start_driver("--mode", "controller")
        yield node.controller()


def create(controller: csi_pb2_grpc.ControllerStub, name: str = "pvc-1", **changes: object) -> csi_pb2.Volume:
    fields: dict[str, object] = {
        "volume_capabilities": [capability()],
        "parameters": {"uri": "s3://models/${pvc.namespace}/${pvc.name}", **METADATA},
        **changes,
    }
    return controller.CreateVolume(csi_pb2.CreateVolumeRequest(name=name, **fields), timeout=60).volume  # type: ignore[arg-type]


def test_identity_and_capabilities(bare_node: NodeUnderTest) -> None:
    bare_node.start_driver()
    identity = bare_node.identity()
    info = identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=60)
    assert (info.name, info.vendor_version) == (DRIVER_NAME, cachefs.__version__)
    capabilities = identity.GetPluginCapabilities(csi_pb2.GetPluginCapabilitiesRequest(), timeout=60).capabilities
    assert [item.service.type for item in capabilities] == [csi_pb2.PluginCapability.Service.CONTROLLER_SERVICE]
    stub = csi_pb2_grpc.NodeStub(bare_node.channel())
    kinds = {item.rpc.type for item in stub.NodeGetCapabilities(csi_pb2.NodeGetCapabilitiesRequest()).capabilities}
    rpc = csi_pb2.NodeServiceCapability.RPC
    assert kinds == {rpc.GET_VOLUME_STATS, rpc.VOLUME_CONDITION, rpc.SINGLE_NODE_MULTI_WRITER}
    assert stub.NodeGetInfo(csi_pb2.NodeGetInfoRequest()).node_id == "node-1"


def test_claims_name_and_namespace_stand_in_the_uri(controller: csi_pb2_grpc.ControllerStub) -> None:
    volume = create(controller)
    assert dict(volume.volume_context) == {"uri": "s3://models/team-a/llama3-70b"}
    assert volume.capacity_bytes == 0
    assert is_volume_id(volume.volume_id)
    assert len(volume.volume_id) <= 128


def test_same_name_and_parameters_are_the_same_volume(controller: csi_pb2_grpc.ControllerStub) -> None:
    assert create(controller).volume_id == create(controller).volume_id
    assert create(controller).volume_id != create(controller, name="pvc-2").volume_id
    other = create(controller, parameters={"uri": "s3://models/other"})
    assert create(controller).volume_id != other.volume_id


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "x" * 129},
        {"volume_capabilities": []},
        {"volume_capabilities": [csi_pb2.VolumeCapability()]},
        {"volume_capabilities": [capability(Mode.UNKNOWN)]},
        {"volume_capabilities": [capability(99)]},
        {
            "volume_capabilities": [
                csi_pb2.VolumeCapability(
                    block=csi_pb2.VolumeCapability.BlockVolume(), access_mode=Mode(mode=Mode.MULTI_NODE_READER_ONLY)
                )
            ]
        },
        {"parameters": {}},
        {"parameters": {"uri": "s3://models/${pvc.name}"}},
        {"parameters": {"uri": "s3://models/${secret.value}", **METADATA}},
        {"parameters": {"uri": "s3://models/x", "cacheSize": "1"}},
        {"capacity_range": csi_pb2.CapacityRange(required_bytes=2, limit_bytes=1)},
        {"capacity_range": csi_pb2.CapacityRange(required_bytes=-1)},
        {"volume_content_source": csi_pb2.VolumeContentSource()},
        {"mutable_parameters": {"a": "b"}},
    ],
)
def test_what_cannot_be_created_is_an_invalid_argument(
    controller: csi_pb2_grpc.ControllerStub, changes: dict[str, object]
) -> None:
    assert code(lambda: create(controller, **changes)) is Code.INVALID_ARGUMENT  # type: ignore[arg-type]


def test_delete_of_anything_is_ok_and_of_nothing_is_not(controller: csi_pb2_grpc.ControllerStub) -> None:
    for volume_id in (create(controller).volume_id, "unknown", "../../etc"):
        controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=volume_id), timeout=60)
    assert code(lambda: controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(), timeout=60)) is Code.INVALID_ARGUMENT


def test_validate_knows_its_own_ids_and_static_volumes(controller: csi_pb2_grpc.ControllerStub) -> None:
    def validate(volume_id: str, mode: int = Mode.MULTI_NODE_READER_ONLY, **context: str) -> object:
        request = csi_pb2.ValidateVolumeCapabilitiesRequest(
            volume_id=volume_id, volume_capabilities=[capability(mode)], volume_context=context
        )
        return controller.ValidateVolumeCapabilities(request, timeout=60)

    volume_id = create(controller).volume_id
    assert validate(volume_id).confirmed.volume_capabilities  # type: ignore[attr-defined]
    assert validate("static", uri="s3://models/x").confirmed.volume_capabilities  # type: ignore[attr-defined]
    assert not validate(volume_id, Mode.UNKNOWN).HasField("confirmed")  # type: ignore[attr-defined]
    assert not validate("static", uri="file:///x").HasField("confirmed")  # type: ignore[attr-defined]
    forged = volume_id[:-1] + ("0" if volume_id[-1] != "0" else "1")
    assert code(lambda: validate(forged)) is Code.NOT_FOUND
