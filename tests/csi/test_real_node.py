"""The driver with the real thing: a node's keeper (root), its server (uid 65534), a real S3 server, a kubelet."""

import concurrent.futures
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tests.csi.support import Kubelet, NodeUnderTest, poll, tool
from tests.csi.test_containers import container_config
from tests.csi.test_grpcurl import IMPLEMENTED, check_rpc, methods
from tests.csi.test_sanity import run_sanity
from tests.mount.harness import needs_fuse
from tests.mount.node_support import SERVER_UID, Node, running_node
from tests.support.s3 import SeaweedServer

pytestmark = needs_fuse

MODELS = {f"llama-{number}": os.urandom(400_000 + number) for number in range(10)}


class RealNode(NodeUnderTest):
    """The driver on a real server instead of the stand-in."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.real = node
        self.mount_root = node.root
        self.server_socket = node.socket

    def mount_fuse_root(self) -> None:
        """The keeper's."""

    def start_driver(self, *extra: str, program: tuple[str, ...] = ("-m", "csi"), wait: bool = True) -> None:
        flags = ["--server-uid", str(SERVER_UID)]
        flags += [part for endpoint in self.real.endpoints for part in ("--allow-endpoint", endpoint)]
        super().start_driver(*flags, *extra, program=program, wait=wait)

    def server_keys(self) -> list[str]:
        """The views that are still shown."""
        return os.listdir(self.real.root)


class Cluster:
    """One node, one bucket with three models."""

    def __init__(self, node: RealNode, s3: SeaweedServer) -> None:
        self.node = node
        self.real = node.real
        self.s3 = s3
        self.secrets = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}

    def attributes(self, model: str, **more: str) -> dict[str, str]:
        return {"uri": f"s3://csi-models/{model}", "endpoint": self.s3.endpoint_url, **more}

    def publish(self, kubelet: Kubelet, pod: str, model: str, **options: object) -> Path:
        target = kubelet.target(pod)
        volume = f"vol-{pod}"
        kubelet.publish(volume, target, attributes=self.attributes(model), secrets=self.secrets, **options)  # type: ignore[arg-type]
        return target


@pytest.fixture
def cluster(seaweed: SeaweedServer) -> Iterator[Cluster]:
    for name, data in MODELS.items():
        seaweed.put("csi-models", f"{name}/model.safetensors", data)
        seaweed.put("csi-models", f"{name}/config.json", b"{}")
    with running_node(seaweed.endpoint_url) as real, RealNode(real) as node:
        node.start_driver()
        yield Cluster(node, seaweed)


def test_pods_publish_read_and_unpublish(cluster: Cluster) -> None:
    node = cluster.node
    models = sorted(MODELS)

    def one(number: int) -> None:
        kubelet = node.kubelet()
        model = models[number % len(models)]
        target = cluster.publish(kubelet, f"pod-{number}", model, ephemeral=number % 2 == 1)
        assert (target / "model.safetensors").read_bytes() == MODELS[model]
        cluster.publish(kubelet, f"pod-{number}", model, ephemeral=number % 2 == 1)  # republish
        stats = kubelet.stats(f"vol-pod-{number}", target)
        assert not stats.volume_condition.abnormal, stats.volume_condition.message
        assert stats.usage[0].total == len(MODELS[model]) + 2
        kubelet.unpublish(f"vol-pod-{number}", target)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(50)))
    node.assert_clean()


def test_pods_go_on_while_driver_server_and_keeper_are_killed(cluster: Cluster) -> None:
    node, real = cluster.node, cluster.real
    kubelet = node.kubelet()
    target = cluster.publish(kubelet, "pod-1", "llama-0")
    inner = node.kubelet_dir / "subpath"
    inner.mkdir()
    subprocess.run(["mount", "--bind", str(target), str(inner)], check=True)  # as for a subPath
    with (inner / "model.safetensors").open("rb") as file:
        assert file.read(100) == MODELS["llama-0"][:100]
        node.kill_driver()
        real.kill_server()
        real.kill_keeper()
        node.start_driver()
        file.seek(0)
        assert file.read() == MODELS["llama-0"]
    assert cluster.publish(kubelet, "pod-1", "llama-0") == target
    assert (target / "config.json").read_bytes() == b"{}"
    other = cluster.publish(kubelet, "pod-2", "llama-1")
    assert (other / "model.safetensors").read_bytes() == MODELS["llama-1"]
    # The container of the server is replaced: what is not local waits for the kubelet's republish.
    real.kill_supervisor()
    real.start_supervisor()
    assert "credentials" in kubelet.stats("vol-pod-2", other).volume_condition.message
    cluster.publish(kubelet, "pod-2", "llama-1")
    poll(lambda: not kubelet.stats("vol-pod-2", other).volume_condition.abnormal, "healthy again")
    subprocess.run(["umount", "-l", str(inner)], check=True)
    for pod, place in (("pod-1", target), ("pod-2", other)):
        kubelet.unpublish(f"vol-{pod}", place)
    node.assert_clean()


def test_the_documented_order_of_an_upgrade_disturbs_no_pod(cluster: Cluster) -> None:
    """Server, driver, keeper: each ends as on a rollout (SIGTERM) and another takes its place while a pod reads."""
    node, real = cluster.node, cluster.real
    kubelet = node.kubelet()
    target = cluster.publish(kubelet, "pod-1", "llama-5")
    model = target / "model.safetensors"
    assert model.read_bytes() == MODELS["llama-5"]
    rounds: list[int] = []
    over = threading.Event()

    def read_on() -> None:
        while not over.is_set():
            assert model.read_bytes() == MODELS["llama-5"]
            rounds.append(len(rounds))

    def reads_on() -> None:
        before = len(rounds)
        poll(lambda: len(rounds) > before + 1 or reader.done(), "the pod reads on")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read_on)
        try:
            reads_on()
            real.stop_supervisor()
            real.start_supervisor()
            reads_on()
            assert node.stop_driver() == 0
            node.start_driver()
            reads_on()
            assert real.keeper is not None
            before = real.takeovers()
            real.keeper.terminate()
            real.keeper.wait()
            real.start_keeper()
            poll(lambda: real.takeovers() > before, "the new keeper has the mount")
            reads_on()
        finally:
            over.set()
        reader.result()
    cluster.publish(kubelet, "pod-1", "llama-5")  # the kubelet's next republish brings the credentials back
    other = cluster.publish(kubelet, "pod-2", "llama-6")
    assert (other / "model.safetensors").read_bytes() == MODELS["llama-6"]
    for pod, place in (("pod-1", target), ("pod-2", other)):
        kubelet.unpublish(f"vol-{pod}", place)
    node.assert_clean()


def test_a_container_of_uid_1000_reads_on_while_server_and_keeper_are_killed(cluster: Cluster) -> None:
    node, real = cluster.node, cluster.real
    runc = tool("runc")
    node.directory.chmod(0o755)
    kubelet = node.kubelet()
    target = cluster.publish(kubelet, "pod-1", "llama-3")
    bundle, out = node.directory / "bundle", node.directory / "out"
    (bundle / "rootfs").mkdir(parents=True)
    out.mkdir()
    out.chmod(0o777)
    (bundle / "config.json").write_text(json.dumps(container_config(target, out)))
    name = f"cachefs-{node.directory.name}"
    state = str(node.directory / "runc")
    read, log = out / "read", node.directory / "runc.log"
    with log.open("ab") as output:
        command = [runc, "--root", state, "run", "--bundle", str(bundle), name]
        container = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        for step in (real.kill_server, real.kill_keeper, node.kill_driver, real.kill_server):
            before = read.stat().st_size if read.exists() else 0
            poll(lambda before=before: read.exists() and read.stat().st_size > before, "the container reads on")
            assert container.poll() is None, log.read_text()
            step()
        before = read.stat().st_size
        poll(lambda: read.stat().st_size > before, "the container reads on")
    finally:
        subprocess.run([runc, "--root", state, "delete", "--force", name], check=False)
        container.wait(60)
    assert not (out / "errors").exists()
    data = read.read_bytes()
    model = MODELS["llama-3"]
    assert all(data[at : at + len(model)] == model for at in range(0, len(data) - len(model), len(model)))
    node.start_driver()
    kubelet.unpublish("vol-pod-1", target)
    node.assert_clean()


def test_a_pod_whose_mount_was_lost_is_told_to_restart(cluster: Cluster) -> None:
    node, real = cluster.node, cluster.real
    kubelet = node.kubelet()
    target = cluster.publish(kubelet, "pod-1", "llama-2")
    assert real.keeper is not None
    real.keeper.kill()
    real.keeper.wait()
    real.kill_supervisor()
    real.start_keeper()
    poll(lambda: "mounting anew" in real.log("keeper.log"), "a fresh mount")
    real.start_supervisor()
    condition = kubelet.stats("vol-pod-1", target).volume_condition
    assert condition.abnormal
    assert "restart" in condition.message
    kubelet.unpublish("vol-pod-1", target)
    again = cluster.publish(kubelet, "pod-1", "llama-2")
    assert (again / "model.safetensors").read_bytes() == MODELS["llama-2"]
    kubelet.unpublish("vol-pod-1", again)
    node.assert_clean()


def test_another_principals_secret_is_not_enough(cluster: Cluster) -> None:
    node = cluster.node
    kubelet = node.kubelet()
    target = cluster.publish(kubelet, "pod-1", "llama-0", namespace="team-a")
    wrong = {**cluster.secrets, "AWS_SECRET_ACCESS_KEY": "PLANTED-wrong-secret"}
    place = kubelet.target("pod-2")
    with pytest.raises(grpc.RpcError, match=r"PERMISSION_DENIED|UNAUTHENTICATED"):
        kubelet.publish("vol-2", place, attributes=cluster.attributes("llama-0"), secrets=wrong, namespace="team-b")
    assert not place.exists()
    # Nor is a name: the same namespace, service account and key id, listed a moment ago with the right secret.
    with pytest.raises(grpc.RpcError, match=r"PERMISSION_DENIED|UNAUTHENTICATED"):
        kubelet.publish("vol-2", place, attributes=cluster.attributes("llama-0"), secrets=wrong, namespace="team-a")
    assert not place.exists()
    assert (target / "config.json").read_bytes() == b"{}"
    assert not kubelet.stats("vol-pod-1", target).volume_condition.abnormal
    assert "PLANTED" not in cluster.real.log("server.log") + node.log.read_text()
    kubelet.unpublish("vol-2", place)
    kubelet.unpublish("vol-pod-1", target)
    node.assert_clean()


def test_publishes_and_unpublishes_survive_a_server_that_keeps_dying(cluster: Cluster) -> None:
    node = cluster.node
    models = sorted(MODELS)
    kills_left = threading.Semaphore(0)

    def again(call: Callable[[], object]) -> None:
        """As the kubelet does."""

        def tried() -> bool:
            try:
                call()
            except grpc.RpcError as exc:
                if exc.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                return False
            return True

        poll(tried, "the kubelet's call succeeds")

    def one(number: int) -> None:
        kubelet = node.kubelet()
        model = models[number % len(models)]
        target = kubelet.target(f"pod-{number}")
        again(lambda: cluster.publish(kubelet, f"pod-{number}", model))
        kills_left.release()
        again(lambda: cluster.publish(kubelet, f"pod-{number}", model))
        assert (target / "model.safetensors").read_bytes() == MODELS[model]
        again(lambda: kubelet.unpublish(f"vol-pod-{number}", target))
        assert not target.exists()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        done = pool.map(one, range(12))
        for _ in range(3):
            assert kills_left.acquire(timeout=60)
            cluster.real.kill_server()
        list(done)
    node.assert_clean()


@pytest.mark.timeout(300)
def test_csi_sanity_passes_in_full(cluster: Cluster, tmp_path: Path) -> None:
    attributes = cluster.attributes("llama-0")
    (tmp_path / "parameters.yaml").write_text("".join(f"{name}: {value}\n" for name, value in attributes.items()))
    secrets = "".join(f"  {name}: {value}\n" for name, value in cluster.secrets.items())
    (tmp_path / "secrets.yaml").write_text(f"NodePublishVolumeSecret:\n{secrets}")
    run_sanity(cluster.node, tmp_path)
    # It did come to the server and the store.
    assert "published s3://csi-models/llama-0" in cluster.real.log("server.log")
    for text in (cluster.node.log.read_text(), cluster.real.log("server.log"), cluster.real.log("keeper.log")):
        assert cluster.s3.secret_key not in text


@pytest.mark.timeout(300)
def test_grpcurl_with_empty_and_hostile_fields(cluster: Cluster) -> None:
    for service, method, message in methods():
        if method in IMPLEMENTED:
            check_rpc(cluster.node, service, method, message)
    logs = (cluster.node.log.read_text(), cluster.real.log("server.log"), cluster.real.log("keeper.log"))
    assert not any("Traceback" in text for text in logs)
    kubelet = cluster.node.kubelet()
    target = cluster.publish(kubelet, "pod-1", "llama-1")
    assert (target / "model.safetensors").read_bytes() == MODELS["llama-1"]
    kubelet.unpublish("vol-pod-1", target)
    cluster.node.assert_clean()


@pytest.mark.parametrize(
    ("attributes", "secrets", "named"),
    [
        ({"uri": "hf://org/model", "revision": "main"}, {"HF_TOKEN": "PLANTED-token"}, "hf://"),
        ({"uri": "gs://bucket/model"}, {}, "gs://"),
        ({"uri": "s3://csi-models/llama-0", "revision": "main"}, {}, "revision"),
        ({"uri": "s3://csi-models/llama-0", "endpoint": "http://127.0.0.1:1"}, {}, "--allow-endpoint"),
        ({"uri": "s3://csi-models/llama-0", "endpoint": "http://2852039166"}, {}, "link-local"),
        ({"uri": "s3://csi-models/llama-0", "region": "127.0.0.1:1/"}, {}, "region"),
    ],
)
def test_what_cannot_be_mounted_is_refused_by_name(
    cluster: Cluster, attributes: dict[str, str], secrets: dict[str, str], named: str
) -> None:
    kubelet = cluster.node.kubelet()
    target = kubelet.target("pod-1")
    for ephemeral in (False, True):
        with pytest.raises(grpc.RpcError) as caught:
            kubelet.publish("vol-1", target, attributes=attributes, secrets=secrets, ephemeral=ephemeral)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert named in caught.value.details()
        assert "PLANTED" not in caught.value.details()
        assert not target.exists()
    kubelet.unpublish("vol-1", target)
    cluster.node.assert_clean()
