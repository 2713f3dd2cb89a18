"""Registration with the kubelet, readiness, start and stop."""

import stat
import subprocess
import sys

import grpc
import pytest

from csi.registration import SOCKET_NAME
from csi.spec import csi_pb2, registration_pb2, registration_pb2_grpc
from tests.csi.support import REPOSITORY, NodeUnderTest, poll


def test_kubelet_finds_the_driver_through_its_registration(node: NodeUnderTest) -> None:
    assert node.registered_endpoint() == str(node.endpoint)
    assert stat.S_IMODE((node.registration_dir / SOCKET_NAME).stat().st_mode) == 0o600
    assert stat.S_IMODE(node.endpoint.stat().st_mode) == 0o600


def test_endpoint_as_the_kubelet_sees_it(bare_node: NodeUnderTest) -> None:
    bare_node.start_driver("--kubelet-endpoint", "/var/lib/kubelet/plugins/csi.cachefs.io/csi.sock")
    assert bare_node.registered_endpoint() == "/var/lib/kubelet/plugins/csi.cachefs.io/csi.sock"


def test_refused_registration_ends_the_driver_so_that_it_is_started_again(node: NodeUnderTest) -> None:
    stub = registration_pb2_grpc.RegistrationStub(node.channel(node.registration_dir / SOCKET_NAME))
    status = registration_pb2.RegistrationStatus(plugin_registered=False, error="bad\nversion")
    stub.NotifyRegistrationStatus(status, timeout=60, wait_for_ready=True)
    assert node.driver is not None
    assert node.driver.wait(60) == 1
    assert "bad\\nversion" in node.log.read_text()


def test_probe_is_not_ready_only_while_the_server_starts(bare_node: NodeUnderTest) -> None:
    node = bare_node
    node.start_driver()
    identity = node.identity()
    assert identity.Probe(csi_pb2.ProbeRequest(), timeout=60).ready.value is False
    (node.directory / "starting").touch()
    node.start_server_process()
    assert identity.Probe(csi_pb2.ProbeRequest(), timeout=60).ready.value is False
    (node.directory / "starting").unlink()
    poll(lambda: identity.Probe(csi_pb2.ProbeRequest(), timeout=60).ready.value, "ready")
    node.kill_server()
    assert identity.Probe(csi_pb2.ProbeRequest(), timeout=60).ready.value is True


def test_sigterm_ends_it_and_removes_the_sockets(node: NodeUnderTest) -> None:
    assert node.stop_driver() == 0
    assert not node.endpoint.exists()
    assert list(node.registration_dir.iterdir()) == []


def test_controller_mode_needs_neither_node_nor_server(bare_node: NodeUnderTest) -> None:
    node = bare_node
    node.start_driver("--mode", "controller")
    assert node.identity().Probe(csi_pb2.ProbeRequest(), timeout=60).ready.value is True
    with pytest.raises(grpc.RpcError) as caught:
        node.kubelet().publish("vol-1", node.kubelet_dir / "x")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert list(node.registration_dir.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--endpoint", "tcp://127.0.0.1:1", "--node-id", "n"],
        ["--endpoint", "unix://relative", "--node-id", "n"],
        ["--endpoint", "unix:///" + "x" * 200, "--node-id", "n"],
        ["--endpoint", "unix:///proc/nope/csi.sock", "--node-id", "n"],
        ["--endpoint", "unix:///tmp/csi.sock"],
        [],
    ],
)
def test_wrong_command_line_is_one_line_and_exit_2(arguments: list[str], tmp_path: object) -> None:
    command = [sys.executable, "-m", "csi", *arguments, "--state-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("cachefs csi: ")
    assert "Traceback" not in done.stderr


def test_check_tells_a_running_driver_from_a_ready_one_and_a_dead_one(bare_node: NodeUnderTest) -> None:
    node = bare_node

    def check(what: str) -> int:
        command = [sys.executable, "-m", "csi", f"--check={what}", f"--endpoint=unix://{node.endpoint}"]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=60, check=False).returncode

    assert check("live") == 1
    node.start_driver()
    assert (check("live"), check("ready")) == (0, 1)
    node.start_server()
    assert (check("live"), check("ready")) == (0, 0)
    node.kill_driver()
    assert check("live") == 1


def test_driver_loads_of_cachefs_only_what_a_small_process_may() -> None:
    script = "import sys, csi.service; print(*sorted(name for name in sys.modules if name.startswith('cachefs.')))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    allowed = ("cachefs.kernel", "cachefs.config", "cachefs.errors", "cachefs.client")
    assert all(name.startswith(allowed) for name in done.stdout.split()), done.stdout


def test_cachefs_csi_runs_the_driver_without_loading_grpc_itself() -> None:
    script = "import sys; from cachefs.cli_csi import csi; assert 'grpc' not in sys.modules; csi(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--kubelet-dir" in done.stdout


def test_cachefs_csi_hands_its_flags_on(bare_node: NodeUnderTest) -> None:
    node = bare_node
    node.start_driver("--json", program=("-m", "cachefs.cli", "csi"))
    assert (node.state_dir / "publications").is_dir()
    poll(lambda: '"level": "info"' in node.log.read_text(), "a JSON line in the log")
    assert node.stop_driver() == 0
