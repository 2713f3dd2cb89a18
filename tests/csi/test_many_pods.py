"""50 pods, 10 models, all at once; and a kubelet that publishes again every 0.1 s."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from csi.service import PUBLISHES_MAX
from tests.csi.standin import MODEL
from tests.csi.support import Kubelet, NodeUnderTest, poll

PODS = 50
MODELS = 10


def test_fifty_pods_of_ten_models_publish_read_unpublish_at_once(node: NodeUnderTest) -> None:
    kubelet = node.kubelet()

    def pod(number: int) -> str:
        target = kubelet.target(f"pod-{number}")
        uri = f"s3://models/m{number % MODELS}"
        kubelet.publish(f"vol-{number % MODELS}", target, attributes={"uri": uri})
        kubelet.publish(f"vol-{number % MODELS}", target, attributes={"uri": uri})
        text = (target / MODEL).read_text()
        assert text == uri
        kubelet.stats(f"vol-{number % MODELS}", target)
        kubelet.unpublish(f"vol-{number % MODELS}", target)
        return text

    with ThreadPoolExecutor(PODS) as pool:
        texts = list(pool.map(pod, range(PODS)))
    assert len(set(texts)) == MODELS
    node.assert_clean()
    assert node.driver is not None
    status = Path(f"/proc/{node.driver.pid}/status").read_text()
    rss_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    assert rss_kib < 80 * 1024


def test_republish_every_tenth_of_a_second_never_disturbs_a_reader(node: NodeUnderTest) -> None:
    kubelet: Kubelet = node.kubelet()
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    stop = threading.Event()
    done: list[int] = []

    def republish() -> None:
        mine = node.kubelet()
        while not stop.wait(0.1):
            mine.publish("vol-1", target)
            done.append(1)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(republish)
        try:

            def read_while_republished() -> bool:
                assert (target / MODEL).read_text() == "s3://models/llama"
                return len(done) >= 20

            poll(read_while_republished, "20 republishes")
        finally:
            stop.set()
        future.result()
    assert node.mounts() == [str(target)]
    kubelet.unpublish("vol-1", target)
    node.assert_clean()


def test_hung_store_keeps_no_unpublish_waiting(node: NodeUnderTest) -> None:
    kubelet = node.kubelet()
    quick = kubelet.target("quick")
    kubelet.publish("quick", quick)
    slow = {"uri": "s3://slow/m"}
    refused: list[grpc.StatusCode] = []

    def publish(number: int) -> None:
        try:
            kubelet.publish(f"vol-{number}", kubelet.target(f"pod-{number}"), attributes=slow)
        except grpc.RpcError as exc:
            refused.append(exc.code())  # type: ignore[attr-defined]

    pods = PUBLISHES_MAX + 4
    with ThreadPoolExecutor(pods) as pool:
        futures = [pool.submit(publish, number) for number in range(pods)]
        try:
            poll(lambda: len(refused) == 4, "the publishes beyond the bound are refused")
            kubelet.stats("quick", quick)
            kubelet.unpublish("quick", quick)
            assert not quick.exists()
        finally:
            (node.directory / "release").touch()
        for future in futures:
            future.result()
    assert refused == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 4
    for number in range(pods):
        kubelet.unpublish(f"vol-{number}", kubelet.target(f"pod-{number}"))
    node.assert_clean()
