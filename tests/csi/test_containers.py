"""As on a node: the driver in a mount namespace of its own (Bidirectional and HostToContainer), the pod under runc."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csi.support import Kubelet, NodeUnderTest, poll

READER = (
    "while :; do cat /models/model.safetensors >>/out/read || { echo failed >>/out/errors; exit 1; }; sleep 0.05; done"
)


def container_config(target: Path, out: Path) -> dict[str, object]:
    """A container as uid 1000 with the host's programs, the volume as the kubelet gives it, and a place to write."""
    mounts: list[dict[str, object]] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/out", "type": "bind", "source": str(out), "options": ["rbind", "rw"]},
        {"destination": "/models", "type": "bind", "source": str(target), "options": ["rbind", "ro", "rslave"]},
    ]
    for name in ("/bin", "/lib", "/lib64", "/usr"):
        if Path(name).exists():
            real = os.path.realpath(name)
            mounts.append({"destination": name, "type": "bind", "source": real, "options": ["rbind", "ro", "rslave"]})
    namespaces = [{"type": kind} for kind in ("mount", "pid", "ipc", "uts")]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 1000, "gid": 1000},
            "args": ["/bin/sh", "-c", READER],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": False},
        "hostname": "pod",
        "mounts": mounts,
        "linux": {"namespaces": namespaces},
    }


def start_isolated_driver(node: NodeUnderTest) -> None:
    """The driver where the kubelet's directory propagates both ways and the FUSE root only inwards."""
    command = f'mount --make-slave {node.mount_root} && exec {sys.executable} -m csi "$@"'
    node.start_driver(program=("-c", ISOLATE, command))


ISOLATE = (
    "import os, sys; os.execvp('unshare', "
    "['unshare', '--mount', '--propagation', 'unchanged', 'sh', '-c', sys.argv[1], 'sh', *sys.argv[2:]])"
)


def test_container_of_uid_1000_reads_on_while_driver_and_server_are_restarted(bare_node: NodeUnderTest) -> None:
    runc = shutil.which("runc")
    if runc is None:
        if os.environ.get("CSI_TOOLS_REQUIRED") == "1":
            pytest.fail("runc is missing: make setup-csi")
        pytest.skip("runc is missing: make setup-csi")
    node = bare_node
    node.directory.chmod(0o755)
    subprocess.run(["mount", "--bind", str(node.kubelet_dir), str(node.kubelet_dir)], check=True)
    for path in (node.kubelet_dir, node.mount_root):
        subprocess.run(["mount", "--make-shared", str(path)], check=True)
    node.start_server()
    start_isolated_driver(node)
    kubelet: Kubelet = node.kubelet()
    target = kubelet.target("pod-1")
    kubelet.publish("vol-1", target)
    assert (target / "model.safetensors").exists(), "the driver's mount did not reach the host"

    bundle, out = node.directory / "bundle", node.directory / "out"
    (bundle / "rootfs").mkdir(parents=True)
    out.mkdir()
    out.chmod(0o777)
    (bundle / "config.json").write_text(json.dumps(container_config(target, out)))
    name = f"cachefs-{node.directory.name}"
    log = (node.directory / "runc.log").open("ab")
    container = subprocess.Popen(
        [runc, "--root", str(node.directory / "runc"), "run", "--bundle", str(bundle), name], stdout=log, stderr=log
    )
    try:

        def reads_on() -> None:
            before = (out / "read").stat().st_size if (out / "read").exists() else 0

            def more() -> bool:
                assert container.poll() is None, (node.directory / "runc.log").read_text()
                return (out / "read").exists() and (out / "read").stat().st_size > before

            poll(more, "the container reads on")

        reads_on()
        for _ in range(3):
            node.kill_driver()
            node.kill_server()
            reads_on()
            node.start_server()
            start_isolated_driver(node)
            kubelet.publish("vol-1", target)
            reads_on()
    finally:
        subprocess.run([runc, "--root", str(node.directory / "runc"), "delete", "--force", name], check=False)
        container.wait(60)
        log.close()
    assert not (out / "errors").exists()
    kubelet.unpublish("vol-1", target)
    assert not target.exists()
    # The kubelet's directory itself is a mount in this test.
    assert [path for path in node.mounts() if path != str(node.kubelet_dir)] == []
