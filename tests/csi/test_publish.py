"""Publish, read, republish, unpublish through the kubelet stand-in."""

import errno
import json
import os
import subprocess
from pathlib import Path

import grpc
import pytest

from tests.csi.standin import MODEL
from tests.csi.support import TOKENS_KEY, Kubelet, Mode, NodeUnderTest, code, poll

Code = grpc.StatusCode
TOKEN = {"sts.amazonaws.com": {"token": "eyJ.first", "expirationTimestamp": "2030-01-01T00:00:00Z"}}


def test_published_volume_is_read_and_gone_after_unpublish(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    assert (target / MODEL).read_text() == "s3://models/llama"
    kubelet.unpublish("vol-1", target)
    assert not target.exists()
    assert target.parent.exists()
    node.assert_clean()


def test_mount_is_read_only_nosuid_nodev_and_noexec_unless_lifted(kubelet: Kubelet) -> None:
    for pod, options, noexec in (("pod-1", {}, True), ("pod-2", {"noexec": "false"}, False)):
        target = kubelet.target(pod)
        kubelet.publish("vol-1", target, attributes={"uri": "s3://models/llama", **options})
        with pytest.raises(OSError, match="Read-only") as caught:
            (target / "new").write_text("x")
        assert caught.value.errno == errno.EROFS
        flags = os.statvfs(target).f_flag
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NODEV
        assert bool(flags & os.ST_NOEXEC) is noexec


def test_subpath_bind_of_the_published_volume_reads(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target, attributes={"uri": "s3://models/llama", "layout": "subdirectory:llama3-70b"})
    subpath = node.kubelet_dir / "pods" / "pod-1" / "volume-subpaths" / "0"
    subpath.mkdir(parents=True)
    subprocess.run(["mount", "--bind", str(target / "llama3-70b"), str(subpath)], check=True)
    assert (subpath / MODEL).read_text() == "s3://models/llama"
    subprocess.run(["umount", str(subpath)], check=True)
    kubelet.unpublish("vol-1", target)
    node.assert_clean()


def test_same_publish_again_is_the_same_mount(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    for _ in range(5):
        kubelet.publish("vol-1", target)
    assert node.mounts() == [str(target)]


@pytest.mark.parametrize("change", [{"attributes": {"uri": "s3://models/other"}}, {"readonly": True}, {"mode": 5}])
def test_other_arguments_at_the_same_target_already_exist(kubelet: Kubelet, change: dict[str, object]) -> None:
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    assert code(lambda: kubelet.publish("vol-1", target, **change)) is Code.ALREADY_EXISTS  # type: ignore[arg-type]
    assert (target / MODEL).read_text() == "s3://models/llama"


def test_another_volume_at_a_taken_target_already_exists(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    assert code(lambda: kubelet.publish("vol-2", target)) in (Code.ALREADY_EXISTS, Code.FAILED_PRECONDITION)
    kubelet.unpublish("vol-2", target)
    assert node.mounts() == [str(target)]


def test_second_target_of_a_single_node_mode_is_refused_until_the_first_is_gone(kubelet: Kubelet) -> None:
    first, second = kubelet.target("pod-1"), kubelet.target("pod-2")
    for mode in (Mode.SINGLE_NODE_WRITER, Mode.SINGLE_NODE_READER_ONLY, Mode.SINGLE_NODE_SINGLE_WRITER):
        kubelet.publish("vol-1", first, mode=mode)
        assert code(lambda mode=mode: kubelet.publish("vol-1", second, mode=mode)) is Code.FAILED_PRECONDITION
        kubelet.unpublish("vol-1", first)
        kubelet.publish("vol-1", second, mode=mode)
        kubelet.unpublish("vol-1", second)


def test_shared_modes_publish_at_many_targets(kubelet: Kubelet) -> None:
    for mode in (
        Mode.SINGLE_NODE_MULTI_WRITER,
        Mode.MULTI_NODE_READER_ONLY,
        Mode.MULTI_NODE_SINGLE_WRITER,
        Mode.MULTI_NODE_MULTI_WRITER,
    ):
        for pod in ("pod-1", "pod-2"):
            target = kubelet.target(pod, f"model-{mode}")
            kubelet.publish(f"vol-{mode}", target, mode=mode)
            assert (target / MODEL).exists()


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://missing/x", Code.NOT_FOUND),
        ("s3://denied/x", Code.PERMISSION_DENIED),
        ("s3://down/x", Code.UNAVAILABLE),
        ("s3://escape/x", Code.INTERNAL),
        ("file:///etc", Code.INVALID_ARGUMENT),
        ("", Code.INVALID_ARGUMENT),
    ],
)
def test_failed_publish_leaves_nothing(node: NodeUnderTest, kubelet: Kubelet, uri: str, expected: Code) -> None:
    target = kubelet.target("pod-1")
    assert code(lambda: kubelet.publish("vol-1", target, attributes={"uri": uri})) is expected
    kubelet.unpublish("vol-1", target)
    assert not target.exists()
    node.assert_clean()


def test_unknown_option_is_refused_by_name_and_without_its_value(kubelet: Kubelet) -> None:
    attributes = {"uri": "s3://models/llama", "preftech": "hf_secretvalue"}
    with pytest.raises(grpc.RpcError) as caught:
        kubelet.publish("vol-1", kubelet.target("pod-1"), attributes=attributes)
    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert "preftech" in caught.value.details()
    assert "hf_secretvalue" not in caught.value.details()


def test_unpublish_of_the_unknown_is_ok(node: NodeUnderTest, kubelet: Kubelet) -> None:
    kubelet.unpublish("never-seen", kubelet.target("pod-1"))
    kubelet.unpublish("never-seen", kubelet.target("no-such-pod", make=False))
    node.assert_clean()


def test_second_request_for_a_target_in_progress_is_aborted(node: NodeUnderTest, kubelet: Kubelet) -> None:
    from concurrent.futures import ThreadPoolExecutor

    target = kubelet.target("pod-1")
    with ThreadPoolExecutor(1) as pool:
        slow = {"uri": "s3://slow/x"}
        future = pool.submit(kubelet.publish, "vol-1", target, attributes=slow)
        poll(lambda: node.calls.exists() and "volume_publish" in node.calls.read_text(), "the server was asked")
        assert code(lambda: kubelet.publish("vol-1", target, attributes=slow, patient=False)) is Code.ABORTED
        assert code(lambda: kubelet.unpublish("vol-1", target, patient=False)) is Code.ABORTED
        (node.directory / "release").touch()
        future.result()
    assert (target / MODEL).exists()


def test_tokens_rotate_and_a_republish_never_fails_for_them(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    attributes = {"uri": "s3://models/llama", "role": "arn:aws:iam::123456789012:role/models"}
    secrets = {TOKENS_KEY: json.dumps(TOKEN)}
    kubelet.publish("vol-1", target, attributes=attributes, secrets=secrets)
    for generation in range(20):
        token = {"sts.amazonaws.com": {"token": f"eyJ.next{generation}", "expirationTimestamp": ""}}
        kubelet.publish("vol-1", target, attributes=attributes, secrets={TOKENS_KEY: json.dumps(token)})
    (credentials,) = node.ask_server("keys")["credentials"].values()
    assert credentials["tokens"]["sts.amazonaws.com"]["token"] == "eyJ.next19"
    assert credentials["role"] == attributes["role"]
    kubelet.publish("vol-1", target, attributes=attributes, secrets={TOKENS_KEY: "not json"})
    node.kill_server()
    kubelet.publish("vol-1", target, attributes=attributes, secrets=secrets)
    assert (target / MODEL).read_text() == "s3://models/llama"
    node.start_server()
    kubelet.publish("vol-1", target, attributes=attributes, secrets=secrets)
    (credentials,) = node.ask_server("keys")["credentials"].values()
    assert credentials["tokens"]["sts.amazonaws.com"]["token"] == "eyJ.first"


def test_server_that_lost_its_keys_gets_the_volume_again_at_republish(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    node.kill_server()
    (node.directory / "keys.json").unlink()
    node.start_server()
    kubelet.publish("vol-1", target)
    assert len(node.server_keys()) == 1


def test_unpublish_does_not_wait_for_a_server_that_is_gone(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    node.kill_server()
    kubelet.unpublish("vol-1", target)
    assert not target.exists()
    node.start_server()
    node.assert_clean()


def test_tokens_in_the_volume_context_count_only_where_the_admin_says(bare_node: NodeUnderTest) -> None:
    bare_node.start_server()
    attributes = {"uri": "s3://models/llama", "role": "arn:x", TOKENS_KEY: json.dumps(TOKEN)}
    for flags, kind in (((), "anonymous"), (("--tokens-from-context",), "web_identity")):
        bare_node.start_driver(*flags)
        kubelet = bare_node.kubelet()
        kubelet.publish("vol-1", kubelet.target("pod-1"), attributes=attributes)
        (credentials,) = bare_node.ask_server("keys")["credentials"].values()
        assert credentials["kind"] == kind
        kubelet.unpublish("vol-1", kubelet.target("pod-1"))
        assert bare_node.stop_driver() == 0


def test_the_nodes_own_credentials_are_for_persistent_volumes_where_the_admin_allows(bare_node: NodeUnderTest) -> None:
    bare_node.start_server()
    bare_node.start_driver("--allow-node-credentials")
    kubelet = bare_node.kubelet()
    for volume_id, ephemeral, kind in (("vol-1", False, "chain"), ("vol-2", True, "anonymous")):
        kubelet.publish(volume_id, kubelet.target("pod-1", volume_id), ephemeral=ephemeral)
        (credentials,) = bare_node.ask_server("keys")["credentials"].values()
        assert credentials["kind"] == kind
        kubelet.unpublish(volume_id, kubelet.target("pod-1", volume_id))


def test_secrets_are_not_sent_to_a_process_of_another_uid(bare_node: NodeUnderTest) -> None:
    bare_node.directory.chmod(0o777)
    bare_node.start_server("--uid", "12345")
    bare_node.start_driver()
    kubelet = bare_node.kubelet()
    secrets = {"AWS_ACCESS_KEY_ID": "AKIAGOOD", "AWS_SECRET_ACCESS_KEY": "planted"}
    target = kubelet.target("pod-1")
    assert code(lambda: kubelet.publish("vol-1", target, secrets=secrets)) is Code.INTERNAL
    assert "volume_publish" not in bare_node.calls.read_text()


def test_views_of_one_model_with_other_principals_are_apart(node: NodeUnderTest, kubelet: Kubelet) -> None:
    secrets = {"AWS_ACCESS_KEY_ID": "AKIAGOOD", "AWS_SECRET_ACCESS_KEY": "s"}
    allowed, refused = kubelet.target("pod-1"), kubelet.target("pod-2")
    private = {"uri": "s3://denied/model"}
    kubelet.publish("vol-1", allowed, attributes=private, secrets=secrets, namespace="a")
    refuse = {"AWS_ACCESS_KEY_ID": "AKIABAD", "AWS_SECRET_ACCESS_KEY": "s"}
    result = code(lambda: kubelet.publish("vol-2", refused, attributes=private, secrets=refuse, namespace="b"))
    assert result is Code.PERMISSION_DENIED
    assert not Path(refused).exists()
    assert (allowed / MODEL).exists()


def test_credentials_that_were_withdrawn_get_no_view_of_before(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    attributes = {"uri": "s3://denied/model"}
    good = {"AWS_ACCESS_KEY_ID": "AKIAGOOD", "AWS_SECRET_ACCESS_KEY": "secret"}
    kubelet.publish("vol-1", target, attributes=attributes, secrets=good)
    node.kill_server()
    kubelet.unpublish("vol-1", target)  # the server is told later
    assert len(node.records()) == 1
    node.start_server()
    bad = {**good, "AWS_ACCESS_KEY_ID": "AKIABAD"}
    refused = code(lambda: kubelet.publish("vol-1", target, attributes=attributes, secrets=bad))
    assert refused is Code.PERMISSION_DENIED
    assert not target.exists()
    kubelet.publish("vol-1", target, attributes=attributes, secrets=good)
    kubelet.unpublish("vol-1", target)
    node.assert_clean()


def test_a_record_of_another_recipe_is_taken_as_the_same_and_brought_up_to_date(
    node: NodeUnderTest, kubelet: Kubelet
) -> None:
    """An upgraded driver cannot compare digests that it did not make: a running pod's republish must not fail."""
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    assert node.stop_driver() == 0
    (name,) = node.records()
    path = node.state_dir / "publications" / name
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "recipe": written["recipe"] + 1, "digest": "0" * 64}))
    node.start_driver()
    mounted = node.mounts()
    kubelet.publish("vol-1", target)
    assert node.mounts() == mounted
    assert json.loads(path.read_text()) == written
    other = code(lambda: kubelet.publish("vol-1", target, attributes={"uri": "s3://models/other"}))
    assert other is Code.ALREADY_EXISTS
    kubelet.unpublish("vol-1", target)
    node.assert_clean()
