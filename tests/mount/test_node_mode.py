"""Node mode: keeper, supervisor and server of one node are killed, one after the other and together, under readers."""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.kernel.mounts import mount_as_root, unmount
from cachefs.kernel.newmount import make_ledger
from cachefs.kernel.session import Message, receive_message, send_message
from tests.mount.harness import alive, needs_fuse, read_only, wait_for
from tests.mount.node_support import SERVER_UID, Node, Refused, running_node, static
from tests.support.lying import LyingServer

pytestmark = needs_fuse

MODEL = os.urandom(40 * 1024 * 1024)
SUM = hashlib.sha256(MODEL).hexdigest()
GOOD = static("AKIAGOOD", "secret")

READER = """
import hashlib, os, sys, time
stop = sys.argv[2]
rounds = 0
while not os.path.exists(stop) or not rounds:
    digest = hashlib.sha256()
    with open(sys.argv[1], "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != sys.argv[3]:
        sys.exit("wrong bytes")
    rounds += 1
    print(rounds, flush=True)
"""


@contextlib.contextmanager
def reading(path: Path, stop: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that reads the model again and again; at the end it must have read nothing wrong."""
    command = [sys.executable, "-c", READER, str(path), str(stop), SUM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "1\n"
            yield process
            stop.touch()
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
        finally:
            process.kill()


@pytest.fixture
def bucket(origin: LyingServer) -> LyingServer:
    origin.put("models", "llama/model.safetensors", MODEL)
    return origin


def test_a_server_without_any_right_serves_everybody(bucket: LyingServer) -> None:
    with running_node(bucket.endpoint_url) as node:
        view = node.publish("pod", "s3://models/llama", GOOD, prefetch="none")
        status = Path(f"/proc/{node.server_pid()}/status").read_text()
        assert f"Uid:\t{SERVER_UID}\t{SERVER_UID}\t{SERVER_UID}" in status
        assert "CapEff:\t0000000000000000" in status
        pod = node.directory / "pod"
        pod.mkdir(mode=0o755)
        subprocess.run(["mount", "--bind", str(view), str(pod)], check=True)
        command = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "sha256sum"]
        done = subprocess.run([*command, str(pod / "model.safetensors")], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(SUM)
        # The way to other principals' views is closed.
        assert subprocess.run([*command[:-1], "ls", str(node.root)], capture_output=True).returncode != 0
        assert node.ask("status")["volumes"][0]["passthrough"] is True


@pytest.mark.parametrize("mask", ["", "passthrough"])
def test_readers_notice_nothing_of_dying_servers_and_keepers(bucket: LyingServer, mask: str) -> None:
    with running_node(bucket.endpoint_url, keeper=[f"--kernel-disable={mask}"]) as node:
        view = node.publish("pod", "s3://models/llama", GOOD, prefetch="none")
        device = node.mount()
        with reading(view / "model.safetensors", node.directory / "stop"):
            node.kill_server()
            node.kill_keeper()
            node.kill_server()
            # Both at once: the supervisor holds the mount for a server that finds no keeper.
            assert node.keeper is not None
            node.keeper.kill()
            node.keeper.wait()
            node.kill_server()
            before = node.takeovers()
            node.start_keeper()
            wait_for(lambda: node.takeovers() > before, "the takeover")
            assert node.stop_supervisor() == 0
            node.start_supervisor()
        assert node.mount() == device


def test_a_keeper_that_ends_leaves_the_mount(bucket: LyingServer) -> None:
    with running_node(bucket.endpoint_url) as node:
        view = node.publish("pod", "s3://models/llama", GOOD)
        device = node.mount()
        assert node.keeper is not None
        node.keeper.terminate()
        assert node.keeper.wait(60) == 0
        assert (view / "model.safetensors").read_bytes() == MODEL
        node.start_keeper()
        wait_for(lambda: node.takeovers() == 1, "the takeover")
        assert node.mount() == device


def test_a_keeper_that_is_to_unmount_makes_nothing() -> None:
    with Node() as node:
        command = [sys.executable, "-P", "-m", "cachefs.cli", "keeper", "--node-dir", str(node.node_dir), "--unmount"]

        def unmount_all() -> None:
            subprocess.run(command, env=node.environment(), cwd="/", check=True, timeout=60)

        unmount_all()
        assert not node.node_dir.exists()
        node.node_dir.mkdir()
        unmount_all()
        assert os.listdir(node.node_dir) == []
        node.start_keeper()
        assert node.keeper is not None
        node.keeper.kill()
        node.keeper.wait()
        assert node.mount() is not None
        before = sorted(os.listdir(node.node_dir))
        unmount_all()
        assert node.mount() is None
        assert sorted(os.listdir(node.node_dir)) == before


def test_after_the_death_of_all_a_new_mount_shows_the_same_volumes(bucket: LyingServer) -> None:
    with running_node(bucket.endpoint_url) as node:
        view = node.publish("pod", "s3://models/llama", GOOD, prefetch="all")
        wait_for(lambda: node.stats("pod")["objects_sealed"] == 1, "prefetched")
        before = node.mount()
        assert before is not None
        assert node.keeper is not None
        node.keeper.kill()
        node.keeper.wait()
        node.kill_supervisor()
        node.start_keeper()
        wait_for(lambda: "mounting anew" in node.log("keeper.log"), "a fresh mount")
        node.start_supervisor()
        assert (view / "model.safetensors").read_bytes() == MODEL
        assert node.condition("pod") == "credentials"


def test_keepers_in_containers_of_their_own_hand_the_mount_on(bucket: LyingServer) -> None:
    with Node([bucket.endpoint_url]) as node:
        node.isolate()
        node.start_keeper()
        node.start_supervisor()
        view = node.publish("pod", "s3://models/llama", GOOD, prefetch="none")
        device = node.mount()
        with reading(view / "model.safetensors", node.directory / "stop"):
            for _ in range(2):
                node.kill_keeper()
                node.kill_server()
        assert node.mount() == device
        # And from nothing, when all of them died.
        assert node.keeper is not None
        node.keeper.kill()
        node.keeper.wait()
        node.kill_supervisor()
        node.start_keeper()
        wait_for(lambda: "mounting anew" in node.log("keeper.log"), "a fresh mount")
        node.start_supervisor()
        assert (view / "model.safetensors").read_bytes() == MODEL


@contextlib.contextmanager
def node_with_a_model(bucket: LyingServer) -> Iterator[tuple[Node, Path]]:
    """And the model in a view; a disk that becomes read-only here does so in the containers too."""
    bucket.put("models", "llama/more/weights", MODEL[:1000])
    with Node([bucket.endpoint_url]) as node:
        node.isolate()
        node.start_keeper()
        node.start_supervisor()
        view = node.publish("pod", "s3://models/llama", GOOD, prefetch="none")
        assert (view / "model.safetensors").read_bytes() == MODEL
        wait_for(lambda: node.stats("pod")["objects_sealed"] == 1, "sealed")
        yield node, view


def is_right(model: Path) -> bool:
    """Not what the kernel keeps of it."""
    with model.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.readall() == MODEL


def test_servers_are_replaced_on_a_read_only_disk(bucket: LyingServer) -> None:
    with node_with_a_model(bucket) as (node, view):
        device = node.mount()
        node.publish("pinned pod", "s3://models/llama", GOOD, prefetch="none", pin=True)
        with read_only(node.node_dir / "cache"):
            node.kill_server()
            for _ in range(2):  # what is in the spill ends with the mount: it is to be asked again
                with pytest.raises(Refused, match="cannot be written"):
                    node.unpublish("pinned pod")
            assert "cannot be written" in node.ask("status")["tiers"][0]["trouble"]
            assert is_right(view / "model.safetensors")
            assert (view / "more" / "weights").read_bytes() == MODEL[:1000]
            other = node.publish("other pod", "s3://models/llama", GOOD, prefetch="none", include=["model*"])
            number = (view / "more" / "weights").stat().st_ino
            node.kill_server()
            assert (view / "more" / "weights").stat().st_ino == number
            assert is_right(other / "model.safetensors")
        node.kill_server()
        assert node.ask("status")["tiers"][0]["trouble"] == ""
        assert (view / "more" / "weights").stat().st_ino == number
        assert is_right(view / "model.safetensors")
        assert is_right(other / "model.safetensors")
        assert node.mount() == device
        assert any(found["pinned"] for found in node.ask("ls")["objects"])
        node.unpublish("pinned pod")
        assert not any(found["pinned"] for found in node.ask("ls")["objects"])


def test_a_server_starts_also_where_nothing_at_all_can_be_written(bucket: LyingServer) -> None:
    with node_with_a_model(bucket) as (node, view):
        device, pid = node.mount(), node.server_pid()
        with read_only(node.node_dir / "cache"), read_only(node.node_dir / "run"):
            ready = node.log("server.log").count(" is ready after ")
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: node.log("server.log").count(" is ready after ") > ready, "the next server")
            assert is_right(view / "model.safetensors")
            with pytest.raises(OSError, match="No space"):
                (view / "more" / "weights").read_bytes()
        wait_for(lambda: node.server_pid_or_none() not in (None, pid), "it answers commands again")
        node.kill_server()
        assert (view / "more" / "weights").read_bytes() == MODEL[:1000]
        assert node.mount() == device


def test_a_server_may_start_before_its_keeper(bucket: LyingServer) -> None:
    with Node([bucket.endpoint_url]) as node:
        node.start_supervisor(wait=False)
        wait_for(lambda: "started server" in node.log("server.log"), "the supervisor starts a server")
        node.start_keeper()
        node.wait_ready()
        view = node.publish("pod", "s3://models/llama", GOOD)
        assert (view / "model.safetensors").read_bytes() == MODEL


def test_without_a_server_nobody_hangs_for_ever(bucket: LyingServer) -> None:
    with running_node(bucket.endpoint_url, keeper=["--give-up=2"]) as node:
        view = node.publish("pod", "s3://models/llama", GOOD, prefetch="none")
        node.kill_supervisor()
        with subprocess.Popen(["cat", str(view / "model.safetensors")], stdout=subprocess.PIPE) as reader:
            reader.communicate(timeout=60)
            assert reader.returncode != 0
        wait_for(lambda: "aborting the mount" in node.log("keeper.log"), "the keeper gives up")
        wait_for(lambda: node.log("keeper.log").count(" mounted ") >= 2, "a fresh mount")
        node.start_supervisor()
        assert node.publish("pod", "s3://models/llama", GOOD, prefetch="none") == view
        assert (view / "model.safetensors").read_bytes() == MODEL


def test_a_keeper_believes_no_offer_of_another_mount(bucket: LyingServer) -> None:
    with running_node(bucket.endpoint_url) as node:
        view = node.publish("pod", "s3://models/llama", GOOD, prefetch="none")
        assert node.supervisor is not None
        assert node.keeper is not None
        server = node.server_pid()
        for pid in (node.supervisor.pid, server):
            os.kill(pid, signal.SIGSTOP)
        node.keeper.kill()
        node.keeper.wait()
        node.start_keeper()
        wait_for(lambda: "waiting for who holds it" in node.log("keeper.log"), "the keeper waits")
        other = node.directory / "other"
        other.mkdir()
        fuse_fd = mount_as_root(other, allow_other=False)
        try:
            ledger_fd, memory_fd = make_ledger(), os.memfd_create("x")
            assert offer(node, [fuse_fd, ledger_fd, memory_fd]) == "closed"
            assert offer(node, [ledger_fd, ledger_fd, memory_fd]) == "closed"
            assert offer(node, []) == "closed"
            assert node.log("keeper.log").count("refused what server") == 2
        finally:
            unmount(other, as_root=True)
            os.close(fuse_fd)
            for pid in (node.supervisor.pid, server):
                os.kill(pid, signal.SIGCONT)
        wait_for(lambda: "took the mount back" in node.log("keeper.log"), "the right offer is taken")
        assert (view / "model.safetensors").read_bytes() == MODEL
        assert alive(server)


def offer(node: Node, descriptors: list[int]) -> str:
    """What the keeper makes of it: the kind of its answer, or "closed"."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(60)
        sock.connect(str(node.node_dir / "run" / "keeper.sock"))
        send_message(sock, Message("hello"), descriptors)
        packet = receive_message(sock)
        return "closed" if packet is None else packet[0].kind


def test_a_connection_without_the_session_registers_nothing(bucket: LyingServer) -> None:
    with running_node(bucket.endpoint_url) as node:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, Path("/etc/hostname").open("rb") as file:
            sock.settimeout(60)
            sock.connect(str(node.node_dir / "run" / "keeper.sock"))
            send_message(sock, Message("register", request=1, node=2), [file.fileno()])
            assert receive_message(sock) is None
        assert offer(node, []) == "closed"  # one server at a time
        command = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "ls", str(node.node_dir / "run")]
        assert subprocess.run(command, capture_output=True).returncode != 0
        node.kill_server()
