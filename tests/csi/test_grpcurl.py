"""A client that nobody here wrote: grpcurl, from the CSI proto, on every RPC with empty, huge and hostile fields."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi.spec import csi_pb2
from tests.csi.support import REPOSITORY, NodeUnderTest, tool

SERVICES = ("Identity", "Controller", "Node", "GroupController", "SnapshotMetadata")
CAPABILITY = {"mount": {}, "access_mode": {"mode": "MULTI_NODE_READER_ONLY"}}
IMPLEMENTED = {
    *("GetPluginInfo", "GetPluginCapabilities", "Probe"),
    *("CreateVolume", "DeleteVolume", "ValidateVolumeCapabilities", "ControllerGetCapabilities"),
    *("NodePublishVolume", "NodeUnpublishVolume", "NodeGetVolumeStats", "NodeGetCapabilities", "NodeGetInfo"),
}
EMPTY_IS_FINE = {
    *("GetPluginInfo", "GetPluginCapabilities", "Probe"),
    *("ControllerGetCapabilities", "NodeGetCapabilities", "NodeGetInfo"),
}
HOSTILE = "../../\u0000\n\u202e%s${pvc.name}'\";DROP"


@pytest.fixture(scope="module")
def served() -> Iterator[NodeUnderTest]:
    with NodeUnderTest() as node:
        node.start_server()
        node.start_driver()
        yield node


def curl(node: NodeUnderTest, service: str, method: str, request: object) -> str:
    """The status code's name, `OK` for an answer."""
    command = [
        *(tool("grpcurl"), "-plaintext", "-unix", "-authority", "localhost", "-max-time", "60"),
        *("-import-path", str(REPOSITORY), "-proto", "csi/spec/csi.proto", "-format-error", "-d", "@"),
        *(f"unix://{node.endpoint}", f"csi.v1.{service}/{method}"),
    ]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=90, check=False)
    if done.returncode == 0:
        return "OK"
    try:
        number = int(json.loads(done.stderr)["code"])
    except (ValueError, KeyError):
        raise AssertionError(f"{method}: {done.stderr[-1000:]}") from None
    names = ("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS")
    more = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE")
    return (*names, *more, "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE")[number]


def methods() -> list[tuple[str, str, str]]:
    services = csi_pb2.DESCRIPTOR.services_by_name
    return [
        (name, method.name, method.input_type.name)
        for name in SERVICES
        if name in services
        for method in services[name].methods
    ]


def filled(message: str, text: str, size: int) -> dict[str, object]:
    """Every string of the request `text`, every map `size` entries of it, one sound capability."""
    request: dict[str, object] = {}
    for field in csi_pb2.DESCRIPTOR.message_types_by_name[message].fields:
        if field.name in ("volume_capability", "volume_capabilities"):
            request[field.name] = [CAPABILITY] if field.name.endswith("s") else CAPABILITY
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            request[field.name] = {f"{text}{number}": text for number in range(size)}
        elif field.type == field.TYPE_STRING and field.is_repeated:
            request[field.name] = [text]
        elif field.type == field.TYPE_STRING:
            request[field.name] = text
    return request


@pytest.mark.parametrize(("service", "method", "message"), methods())
def test_every_rpc_answers_hostile_requests_with_the_right_code(
    served: NodeUnderTest, service: str, method: str, message: str
) -> None:
    check_rpc(served, service, method, message)


def check_rpc(served: NodeUnderTest, service: str, method: str, message: str) -> None:
    """Empty, hostile, huge and far too large: the right code each time, and the driver goes on."""
    tool("grpcurl")
    if method not in IMPLEMENTED:
        assert curl(served, service, method, {}) == "UNIMPLEMENTED"
        return
    expected = "OK" if method in EMPTY_IS_FINE else "INVALID_ARGUMENT"
    assert curl(served, service, method, {}) == expected
    # DeleteVolume and the getters have nothing to refuse in a string.
    hostile = "OK" if method in (*EMPTY_IS_FINE, "DeleteVolume") else "INVALID_ARGUMENT"
    not_found = method in ("ValidateVolumeCapabilities", "NodeGetVolumeStats")
    assert curl(served, service, method, filled(message, HOSTILE, 3)) == ("NOT_FOUND" if not_found else hostile)
    huge = "OK" if method in EMPTY_IS_FINE else "INVALID_ARGUMENT"
    assert curl(served, service, method, filled(message, "x" * 100_000, 3)) == huge
    if method not in EMPTY_IS_FINE:
        assert curl(served, service, method, filled(message, "x" * 5_000_000, 1)) == "RESOURCE_EXHAUSTED"
    assert served.driver is not None
    assert served.driver.poll() is None
    assert curl(served, "Identity", "Probe", {}) == "OK"


def test_publish_and_unpublish_by_grpcurl(served: NodeUnderTest) -> None:
    target = served.kubelet().target("grpcurl")
    base = {"volume_id": "grpcurl", "target_path": str(target)}
    context = {"volume_context": {"uri": "s3://models/m"}, "volume_capability": CAPABILITY}
    assert curl(served, "Node", "NodePublishVolume", {**base, **context}) == "OK"
    assert Path(target, "model.safetensors").exists()
    stats = {"volume_id": "grpcurl", "volume_path": str(target)}
    assert curl(served, "Node", "NodeGetVolumeStats", stats) == "OK"
    assert curl(served, "Node", "NodeUnpublishVolume", base) == "OK"
    assert not target.exists()
    served.assert_clean()


def test_no_traceback_in_the_log(served: NodeUnderTest) -> None:
    text = served.log.read_text()
    assert "Traceback" not in text
    assert "an error in the driver" not in text
    assert all(len(line) < 8192 for line in text.splitlines())
