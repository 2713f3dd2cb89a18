"""A node to test the driver on: a tmpfs as the FUSE root, the stand-in server, the driver as a process, a kubelet."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi import DRIVER_NAME
from csi.registration import SOCKET_NAME
from csi.spec import csi_pb2, csi_pb2_grpc, registration_pb2, registration_pb2_grpc

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
Mode = csi_pb2.VolumeCapability.AccessMode
TOKENS_KEY = "csi.storage.k8s.io/serviceAccount.tokens"


def poll(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """The first true value of `condition`."""
    end_s = time.monotonic() + deadline_s
    while time.monotonic() < end_s:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {deadline_s:.0f} s: {what}")


def tool(name: str) -> str:
    """Path of csi-sanity or grpcurl; skips visibly, fails where CI says that it must be there."""
    path = REPOSITORY / ".setup" / "csi" / "bin" / name
    found = str(path) if path.exists() else shutil.which(name)
    if found is not None:
        return found
    if os.environ.get("CSI_TOOLS_REQUIRED") == "1":
        pytest.fail(f"{name} is missing: make setup-csi")
    pytest.skip(f"{name} is missing: make setup-csi")


def capability(mode: int = Mode.MULTI_NODE_READER_ONLY, flags: tuple[str, ...] = ()) -> csi_pb2.VolumeCapability:
    """A mount capability."""
    return csi_pb2.VolumeCapability(
        mount=csi_pb2.VolumeCapability.MountVolume(mount_flags=flags), access_mode=Mode(mode=mode)
    )


class NodeUnderTest:
    """Use as a context manager: whatever was started is stopped, whatever was mounted is unmounted."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="csi.", dir="/tmp"))
        self.kubelet_dir = self.directory / "kubelet"
        self.mount_root = self.directory / "root"
        self.state_dir = self.directory / "state"
        self.registration_dir = self.directory / "reg"
        self.endpoint = self.directory / "csi.sock"
        self.server_socket = self.directory / "control.sock"
        self.log = self.directory / "driver.log"
        self.calls = self.directory / "calls.jsonl"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[grpc.Channel] = []
        self.driver: subprocess.Popen[bytes] | None = None
        self.server: subprocess.Popen[bytes] | None = None
        for path in (self.kubelet_dir, self.mount_root, self.registration_dir):
            path.mkdir()

    def __enter__(self) -> "NodeUnderTest":
        self.mount_fuse_root()
        return self

    def __exit__(self, *exc: object) -> None:
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            path = line.split(" ")[4]
            if path.startswith(f"{self.directory}/"):
                subprocess.run(["umount", "-l", path], check=False)
        shutil.rmtree(self.directory, ignore_errors=True)

    def mount_fuse_root(self) -> None:
        """A fresh file system where the FUSE root belongs."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "cachefs", str(self.mount_root)], check=True)

    def _spawn(self, arguments: list[str], log: Path) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GRPC_ENABLE_FORK_SUPPORT": "0"}
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments], env=environment, cwd=REPOSITORY, stdout=output, stderr=output
            )
        self._processes.append(process)
        return process

    def start_server(self, *extra: str) -> None:
        """The stand-in, until it is ready."""
        self.start_server_process(*extra)
        poll(self._server_answers, "the stand-in server answers")

    def start_server_process(self, *extra: str) -> None:
        """The stand-in, until it listens."""
        arguments = ["-m", "tests.csi.standin", "--socket", str(self.server_socket), "--root", str(self.mount_root)]
        arguments += ["--state", str(self.directory / "keys.json"), "--calls", str(self.calls), *extra]
        self.server_socket.unlink(missing_ok=True)
        self.server = self._spawn(arguments, self.directory / "server.log")
        poll(self.server_socket.exists, "the stand-in server listens")

    def _server_answers(self) -> bool:
        try:
            return bool(self.ask_server("probe")["ready"])
        except OSError:
            return False

    def ask_server(self, method: str) -> Any:
        """Past the driver."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE_S)
            sock.connect(str(self.server_socket))
            sock.sendall(json.dumps({"method": method, "params": {}}).encode() + b"\n")
            return json.loads(sock.makefile().readlines()[-1])["result"]

    def server_keys(self) -> list[str]:
        """What the server believes to be published."""
        keys: list[str] = self.ask_server("keys")["keys"]
        return keys

    def driver_arguments(self, *extra: str) -> list[str]:
        """The command line without the interpreter's part."""
        return [
            *("--endpoint", f"unix://{self.endpoint}", "--node-id", "node-1", "--kubelet-dir", str(self.kubelet_dir)),
            *("--server-socket", str(self.server_socket), "--mount-root", str(self.mount_root)),
            *("--state-dir", str(self.state_dir), "--registration-dir", str(self.registration_dir)),
            *("--log-level", "debug", *extra),
        ]

    def start_driver(self, *extra: str, program: tuple[str, ...] = ("-m", "csi"), wait: bool = True) -> None:
        """The driver; with `wait` until it answers."""
        self.driver = self._spawn([*program, *self.driver_arguments(*extra)], self.log)
        if wait:
            poll(self._driver_answers, "the driver answers")

    def _driver_answers(self) -> bool:
        assert self.driver is not None
        if self.driver.poll() is not None:
            raise AssertionError(f"the driver ended: {self.log.read_text()[-2000:]}")
        try:
            # A connection that is closed again: left open, it would come up later and count as a leak.
            with grpc.insecure_channel(f"unix:{self.endpoint}") as channel:
                csi_pb2_grpc.IdentityStub(channel).GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=5)
        except grpc.RpcError:
            return False
        return True

    def kill_driver(self) -> None:
        """SIGKILL."""
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait()

    def stop_driver(self) -> int:
        """SIGTERM; the exit code."""
        assert self.driver is not None
        self.driver.send_signal(signal.SIGTERM)
        return self.driver.wait(DEADLINE_S)

    def kill_server(self) -> None:
        """SIGKILL."""
        assert self.server is not None
        self.server.kill()
        self.server.wait()

    def channel(self, path: Path | None = None) -> grpc.Channel:
        """As the kubelet: `:authority: localhost`."""
        options = (
            ("grpc.default_authority", "localhost"),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 200),
        )
        channel = grpc.insecure_channel(f"unix:{path or self.endpoint}", options=options)
        self._channels.append(channel)
        return channel

    def identity(self) -> csi_pb2_grpc.IdentityStub:
        """A stub on a connection of its own."""
        return csi_pb2_grpc.IdentityStub(self.channel())

    def controller(self) -> csi_pb2_grpc.ControllerStub:
        """A stub on a connection of its own."""
        return csi_pb2_grpc.ControllerStub(self.channel())

    def kubelet(self) -> "Kubelet":
        """A kubelet with a connection of its own."""
        return Kubelet(self)

    def registered_endpoint(self) -> str:
        """What the kubelet's plugin watcher does."""
        stub = registration_pb2_grpc.RegistrationStub(self.channel(self.registration_dir / SOCKET_NAME))
        # The registration socket comes after the CSI socket.
        info = stub.GetInfo(registration_pb2.InfoRequest(), timeout=DEADLINE_S, wait_for_ready=True)
        assert (info.type, info.name, list(info.supported_versions)) == ("CSIPlugin", DRIVER_NAME, ["1.0.0"])
        stub.NotifyRegistrationStatus(registration_pb2.RegistrationStatus(plugin_registered=True), timeout=DEADLINE_S)
        return str(info.endpoint)

    def mounts(self) -> list[str]:
        """Mountpoints below the kubelet's directory."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.split(" ")[4] for line in lines if line.split(" ")[4].startswith(f"{self.kubelet_dir}/")]

    def records(self) -> list[str]:
        """Files of publications."""
        return sorted(path.name for path in (self.state_dir / "publications").iterdir())

    def assert_clean(self) -> None:
        """No mount, no record, no key at the server is left."""
        assert self.mounts() == []
        poll(lambda: not self.records(), "the records are gone")
        poll(lambda: not self.server_keys(), "the server's keys are gone")


class Kubelet:
    """Publishes as a kubelet does: real target paths, pod info, tokens, NodePublish again and again."""

    def __init__(self, node: NodeUnderTest) -> None:
        self._node = node
        self._stub = csi_pb2_grpc.NodeStub(node.channel())

    def target(self, pod: str, volume: str = "model", *, make: bool = True) -> Path:
        """<kubelet>/pods/<uid>/volumes/kubernetes.io~csi/<name>/mount; the kubelet makes all but `mount`."""
        parent = self._node.kubelet_dir / "pods" / pod / "volumes" / "kubernetes.io~csi" / volume
        if make:
            parent.mkdir(parents=True, exist_ok=True)
        return parent / "mount"

    def publish(
        self,
        volume_id: str,
        target: Path | str,
        *,
        attributes: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
        ephemeral: bool = False,
        namespace: str = "default",
        mode: int = Mode.MULTI_NODE_READER_ONLY,
        flags: tuple[str, ...] = (),
        readonly: bool = False,
        patient: bool = True,
    ) -> None:
        """NodePublishVolume with the pod's information. Raises grpc.RpcError.

        `patient`: asks again while the driver is busy with this target, as a kubelet does (a driver that was started
        again tidies up what the last one left).
        """
        context = {
            **(attributes if attributes is not None else {"uri": "s3://models/llama"}),
            "csi.storage.k8s.io/pod.name": "pod",
            "csi.storage.k8s.io/pod.namespace": namespace,
            "csi.storage.k8s.io/pod.uid": "uid",
            "csi.storage.k8s.io/serviceAccount.name": "default",
            "csi.storage.k8s.io/ephemeral": str(ephemeral).lower(),
        }
        request = csi_pb2.NodePublishVolumeRequest(
            volume_id=volume_id,
            target_path=str(target),
            volume_capability=capability(mode, flags),
            volume_context=context,
            secrets=dict(secrets or {}),
            readonly=readonly,
        )
        self._call(self._stub.NodePublishVolume, request, patient)

    def unpublish(self, volume_id: str, target: Path | str, *, patient: bool = True) -> None:
        """NodeUnpublishVolume; `patient` as in publish()."""
        request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(target))
        self._call(self._stub.NodeUnpublishVolume, request, patient)

    @staticmethod
    def _call(method: Callable[..., object], request: object, patient: bool) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while True:
            try:
                method(request, timeout=DEADLINE_S, wait_for_ready=True)
                return
            except grpc.RpcError as exc:
                if not patient or exc.code() is not grpc.StatusCode.ABORTED or time.monotonic() > end_s:
                    raise
            time.sleep(0.05)

    def stats(self, volume_id: str, target: Path | str) -> csi_pb2.NodeGetVolumeStatsResponse:
        """NodeGetVolumeStats."""
        request = csi_pb2.NodeGetVolumeStatsRequest(volume_id=volume_id, volume_path=str(target))
        return self._stub.NodeGetVolumeStats(request, timeout=DEADLINE_S, wait_for_ready=True)


def code(call: Callable[[], object]) -> grpc.StatusCode:
    """The code that the call fails with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status: grpc.StatusCode = caught.value.code()
    return status
