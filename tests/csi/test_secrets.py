"""Planted secrets are in no output: logs, errors, records, conditions, process arguments."""

import contextlib
import json
from pathlib import Path
from urllib.parse import quote

import grpc

from csi.credentials import Credentials
from csi.redact import hide_secrets, redacted
from csi.spec import csi_pb2
from tests.csi.support import TOKENS_KEY, NodeUnderTest

PLANTED = "PLANTED-SECRET-VALUE"


def tokens(name: str) -> str:
    return json.dumps({"sts.amazonaws.com": {"token": f"{PLANTED}-{name}", "expirationTimestamp": "2030"}})


def test_no_output_holds_a_planted_secret(node: NodeUnderTest) -> None:
    kubelet = node.kubelet()
    outputs: list[str] = []
    good = {"AWS_ACCESS_KEY_ID": f"{PLANTED}-id", "AWS_SECRET_ACCESS_KEY": f"{PLANTED}-key"}
    cases = [
        ({"uri": "s3://models/m"}, good),
        ({"uri": "s3://echo/m"}, good),
        ({"uri": "s3://echo/m", "role": "arn:x"}, {TOKENS_KEY: tokens("in-secret")}),
        ({"uri": "s3://denied/m"}, good),
        ({"uri": "s3://models/m", "token": f"{PLANTED}-option"}, {}),
        ({"uri": f"s3://user:{PLANTED}-uri@models/m"}, {}),
        ({"uri": f"https://host/m?sig={PLANTED}-query"}, {}),
        ({"uri": "s3://models/m", "region": f"{PLANTED} region"}, {}),
        ({"uri": "s3://models/m", "pin": f"{PLANTED}-pin"}, {}),
        ({"uri": "s3://models/m", TOKENS_KEY: tokens("in-context")}, {}),
        ({"uri": "s3://models/m"}, {"AWS_ACCESS_KEY_ID": f"{PLANTED}-alone"}),
        ({"uri": "s3://models/m"}, {"unknown": f"{PLANTED}-unknown"}),
        ({"uri": "s3://models/m", "role": "arn:x"}, {TOKENS_KEY: f"{PLANTED} not json"}),
        ({"uri": "hf://org/repo"}, {"HF_TOKEN": f"{PLANTED}\0hf"}),
    ]
    for number, (attributes, secrets) in enumerate(cases):
        target = kubelet.target(f"pod-{number}")
        try:
            kubelet.publish(f"vol-{number}", target, attributes=attributes, secrets=secrets)
        except grpc.RpcError as exc:
            outputs.append(str(exc.details()))  # type: ignore[attr-defined]
        with contextlib.suppress(grpc.RpcError):
            outputs.append(str(kubelet.stats(f"vol-{number}", target)))
    for path in (node.state_dir / "publications").iterdir():
        outputs.append(path.read_text())
    assert node.driver is not None
    outputs.append(Path(f"/proc/{node.driver.pid}/cmdline").read_text())
    outputs.append(Path(f"/proc/{node.driver.pid}/environ").read_text())
    controller = node.controller()
    with contextlib.suppress(grpc.RpcError):
        controller.CreateVolume(
            csi_pb2.CreateVolumeRequest(name="x", secrets=good, parameters={"uri": f"s3://u:{PLANTED}@b"}), timeout=60
        )
    for number in range(len(cases)):
        kubelet.unpublish(f"vol-{number}", kubelet.target(f"pod-{number}"))
    node.stop_driver()
    outputs.append(node.log.read_text())
    assert "NodePublishVolume" in outputs[-1]
    for output in outputs:
        assert PLANTED not in output
    node.assert_clean()


def test_fields_that_the_proto_marks_as_secret_are_not_shown() -> None:
    shown = []
    for kind in (
        csi_pb2.NodePublishVolumeRequest,
        csi_pb2.NodeStageVolumeRequest,
        csi_pb2.CreateVolumeRequest,
        csi_pb2.DeleteVolumeRequest,
        csi_pb2.ValidateVolumeCapabilitiesRequest,
    ):
        request = kind(secrets={"key": PLANTED})
        shown.append(repr(redacted(request)))
        assert PLANTED not in hide_secrets(f"the store said {PLANTED}", request)
    context = csi_pb2.NodePublishVolumeRequest(volume_id="v", volume_context={"uri": PLANTED}, readonly=True)
    shown.append(repr(redacted(context)))
    assert all(PLANTED not in text for text in shown)
    assert "'volume_id': 'v'" in shown[-1]


def test_a_secret_is_hidden_however_it_is_written() -> None:
    secret = 'PLANTED+key/with "quotes"\nPLANTED second line é='
    request = csi_pb2.NodePublishVolumeRequest(secrets={"key": secret, "none": "", "short": "ab"})
    forms = (secret, json.dumps(secret), repr(secret), quote(secret), quote(secret, safe=""), secret.splitlines()[1])
    for form in forms:
        shown = hide_secrets(f"the store said about {form}: no", request)
        assert "PLANTED" not in shown
        assert shown.startswith("the store said about")
        assert shown.endswith(": no")


def test_credentials_do_not_show_themselves() -> None:
    credentials = Credentials(kind="static", values={"hf_token": PLANTED}, tokens={"a": {"token": PLANTED}})
    assert PLANTED not in repr(credentials)
    assert PLANTED not in f"{credentials}"
    assert "hf_token" in repr(credentials)
