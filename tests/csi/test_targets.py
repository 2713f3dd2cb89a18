"""Hostile target paths and foreign mounts."""

import os
import subprocess
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi.failure import BadRequest
from csi.mounts import path_parts
from tests.csi.support import Kubelet, NodeUnderTest, code

Code = grpc.StatusCode


@pytest.mark.parametrize(
    "path",
    [
        "relative/mount",
        "{kubelet}/../root",
        "{kubelet}/pods/./mount",
        "{kubelet}/pods/\0/mount",
        "{kubelet}",
        "/etc",
        "/",
        "//",
        "{kubelet}x/pods/mount",
        "{kubelet}/" + "x" * 300,
        "{kubelet}/" + "x/" * 3000,
    ],
)
def test_path_outside_of_the_kubelets_directory_is_refused(node: NodeUnderTest, kubelet: Kubelet, path: str) -> None:
    target = path.format(kubelet=node.kubelet_dir)
    assert code(lambda: kubelet.publish("vol-1", target)) is Code.INVALID_ARGUMENT
    assert code(lambda: kubelet.unpublish("vol-1", target)) is Code.INVALID_ARGUMENT
    assert code(lambda: kubelet.stats("vol-1", target)) is Code.NOT_FOUND
    node.assert_clean()


@pytest.mark.parametrize("where", ["parent", "target"])
def test_symlink_on_the_way_is_not_followed(node: NodeUnderTest, kubelet: Kubelet, where: str) -> None:
    victim = node.directory / "victim"
    victim.mkdir()
    if where == "parent":
        pods = node.kubelet_dir / "pods"
        pods.mkdir()
        (pods / "pod-1").symlink_to(victim)
        target = pods / "pod-1" / "mount"
    else:
        target = kubelet.target("pod-1")
        target.symlink_to(victim)
    assert code(lambda: kubelet.publish("vol-1", target)) in (Code.INTERNAL, Code.INVALID_ARGUMENT)
    assert list(victim.iterdir()) == []
    mountinfo = Path("/proc/self/mountinfo").read_text()
    assert f" {victim} " not in mountinfo
    assert node.records() == []


def test_target_that_is_a_file_is_refused(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    target.write_text("mine")
    assert code(lambda: kubelet.publish("vol-1", target)) is Code.INVALID_ARGUMENT
    assert target.read_text() == "mine"
    assert node.records() == []


def test_missing_parent_is_a_failed_precondition(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1", make=False)
    assert code(lambda: kubelet.publish("vol-1", target)) is Code.FAILED_PRECONDITION
    node.assert_clean()


def test_foreign_mount_at_the_target_is_left_alone(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "foreign", str(target)], check=True)
    (target / "mine").write_text("mine")
    assert code(lambda: kubelet.publish("vol-1", target)) is Code.FAILED_PRECONDITION
    kubelet.unpublish("vol-1", target)
    assert (target / "mine").read_text() == "mine"
    subprocess.run(["umount", str(target)], check=True)
    kubelet.unpublish("vol-1", target)
    assert not target.exists()
    node.assert_clean()


def test_foreign_mount_over_a_published_volume_is_left_alone(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    subprocess.run(["mount", "-t", "tmpfs", "foreign", str(target)], check=True)
    assert code(lambda: kubelet.publish("vol-1", target)) is Code.FAILED_PRECONDITION
    subprocess.run(["umount", str(target)], check=True)
    kubelet.publish("vol-1", target)
    kubelet.unpublish("vol-1", target)
    node.assert_clean()


def test_target_directory_with_files_in_it_is_not_emptied(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    target.mkdir()
    (target / "below").write_text("mine")
    kubelet.publish("vol-1", target)
    assert not (target / "below").exists()
    kubelet.unpublish("vol-1", target)
    assert (target / "below").read_text() == "mine"
    node.assert_clean()


def test_kubelet_directory_that_is_a_symlink_works(bare_node: NodeUnderTest) -> None:
    node = bare_node
    real = node.directory / "kubelet-real"
    node.kubelet_dir.rename(real)
    node.kubelet_dir.symlink_to(real)
    node.start_server()
    node.start_driver()
    kubelet = node.kubelet()
    target = kubelet.target("pod-1")
    for _ in range(2):
        kubelet.publish("vol-1", target)
    assert os.path.ismount(target)
    kubelet.unpublish("vol-1", target)
    assert not target.exists()


def test_lost_mount_says_restart_the_pod(node: NodeUnderTest, kubelet: Kubelet) -> None:
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    assert not kubelet.stats("vol-1", target).volume_condition.abnormal
    # Keeper and server died at once: the old FUSE session is gone, a new one is mounted in its place.
    subprocess.run(["umount", "-l", str(node.mount_root)], check=True)
    node.mount_fuse_root()
    condition = kubelet.stats("vol-1", target).volume_condition
    assert condition.abnormal
    assert "restart the pod" in condition.message
    kubelet.publish("vol-1", target)
    assert node.mounts() == [str(target)]
    kubelet.unpublish("vol-1", target)
    node.assert_clean()


def test_without_mount_setattr_the_bind_has_the_same_flags(bare_node: NodeUnderTest) -> None:
    from csi.mounts import Kernel, Targets

    class OldKernel(Kernel):
        def _bind_detached(self, source_fd: int, target_fd: int, noexec: bool) -> None:
            raise OSError(38, "ENOSYS")

    (bare_node.mount_root / "view").mkdir()
    targets = Targets(bare_node.kubelet_dir, bare_node.mount_root, OldKernel())
    target = str(bare_node.kubelet_dir / "mount")
    targets.make_directory(target)
    targets.bind("view", target, noexec=True)
    flags = os.statvfs(target).f_flag
    assert flags & os.ST_RDONLY
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV
    assert flags & os.ST_NOEXEC
    assert targets.release(target, frozenset({targets.root_device()}))


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=60), st.booleans())
def test_every_path_is_below_the_base_or_refused(text: str, prefixed: bool) -> None:
    base = Path("/var/lib/kubelet")
    path = f"/var/lib/kubelet/{text}" if prefixed else text
    try:
        parts = path_parts(path, base)
    except BadRequest:
        return
    assert parts
    assert all(part not in ("", ".", "..") and "/" not in part and "\0" not in part for part in parts)
    assert os.path.normpath(path).replace("//", "/") == str(base.joinpath(*parts))
