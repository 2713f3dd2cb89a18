"""SIGKILL of driver and server at every step: the next call of the kubelet finishes the work, nothing is left."""

import contextlib
import os
import subprocess
from pathlib import Path

import grpc
import pytest

from tests.csi.standin import MODEL
from tests.csi.support import Kubelet, NodeUnderTest, poll

KILLER = str(Path(__file__).with_name("killing_driver.py"))
PUBLISH_STEPS = [
    f"{when}:{where}"
    for where in (
        "records.put:1",
        "server.publish:1",
        "targets.mkdir:1",
        "records.put:2",
        "kernel.bind:1",
        "records.put:3",
    )
    for when in ("before", "after")
]
UNPUBLISH_STEPS = [
    f"{when}:{where}"
    for where in ("kernel.unmount:1", "records.put:1", "server.unpublish:1", "records.remove:1")
    for when in ("before", "after")
]


def die_in(node: NodeUnderTest, step: str, call: object) -> None:
    """Start the driver that dies at `step`, make the call, see it dead, start a sound one."""
    node.start_driver(program=(KILLER, step))
    assert callable(call)
    with contextlib.suppress(grpc.RpcError):
        call()
    assert node.driver is not None
    assert node.driver.wait(60) == -9, f"nothing died at {step}"
    node.start_driver()


@pytest.mark.parametrize("step", PUBLISH_STEPS)
def test_killed_in_publish(bare_node: NodeUnderTest, step: str) -> None:
    node = bare_node
    node.start_server()
    kubelet = node.kubelet()
    target = kubelet.target("pod-1")
    die_in(node, step, lambda: kubelet.publish("vol-1", target))
    kubelet.publish("vol-1", target)
    assert (target / MODEL).read_text() == "s3://models/llama"
    assert node.mounts() == [str(target)]
    kubelet.unpublish("vol-1", target)
    assert not target.exists()
    # And with the pod deleted instead of started again.
    node.stop_driver()
    die_in(node, step, lambda: kubelet.publish("vol-2", target))
    kubelet.unpublish("vol-2", target)
    assert not target.exists()
    node.assert_clean()


@pytest.mark.parametrize("step", UNPUBLISH_STEPS)
def test_killed_in_unpublish(bare_node: NodeUnderTest, step: str) -> None:
    node = bare_node
    node.start_server()
    node.start_driver()
    kubelet = node.kubelet()
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    node.stop_driver()
    die_in(node, step, lambda: kubelet.unpublish("vol-1", target))
    kubelet.unpublish("vol-1", target)
    assert not target.exists()
    node.assert_clean()


def test_a_reader_goes_on_while_the_driver_is_killed_and_started_again(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    with (target / MODEL).open() as file:
        node.kill_driver()
        assert file.read() == "s3://models/llama"
    node.start_driver()
    kubelet.publish("vol-1", target)
    assert node.mounts() == [str(target)]
    kubelet.stats("vol-1", target)
    kubelet.unpublish("vol-1", target)
    node.assert_clean()


def test_server_killed_while_it_publishes(node: NodeUnderTest, kubelet: Kubelet) -> None:
    from concurrent.futures import ThreadPoolExecutor

    target = kubelet.target("pod-1")
    slow = {"uri": "s3://slow/x"}
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(kubelet.publish, "vol-1", target, attributes=slow)
        poll(lambda: node.calls.exists() and "volume_publish" in node.calls.read_text(), "the server was asked")
        node.kill_server()
        error = future.exception(60)
    assert isinstance(error, grpc.RpcError)
    assert error.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    (node.directory / "release").touch()
    node.start_server()
    kubelet.publish("vol-1", target, attributes=slow)
    assert (target / MODEL).exists()
    kubelet.unpublish("vol-1", target)
    node.assert_clean()


def test_publication_of_a_pod_that_went_while_no_driver_ran_is_forgotten(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    node.kill_driver()
    subprocess.run(["umount", str(target)], check=True)
    target.rmdir()
    target.parent.rmdir()
    node.start_driver()
    node.assert_clean()


def test_lost_state_directory_is_no_lost_volume(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    node.kill_driver()
    for name in node.records():
        (node.state_dir / "publications" / name).write_bytes(b"\0garbage")
    node.start_driver()
    assert any(name.endswith(".damaged") for name in node.records())
    kubelet.unpublish("vol-1", target)
    assert not target.exists()
    assert node.mounts() == []
    assert node.server_keys() == []


def test_no_descriptor_stays_open(node: NodeUnderTest, kubelet: Kubelet) -> None:
    assert node.driver is not None

    def descriptors() -> int:
        assert node.driver is not None
        return len(os.listdir(f"/proc/{node.driver.pid}/fd"))

    def cycle() -> None:
        target = kubelet.target("pod-1")
        kubelet.publish("vol-1", target)
        kubelet.stats("vol-1", target)
        kubelet.unpublish("vol-1", target)

    cycle()
    before = descriptors()
    for _ in range(20):
        cycle()
    poll(lambda: descriptors() <= before + 2, "descriptors are closed")
