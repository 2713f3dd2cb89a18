"""The image's root file system under runc, as the manifests run it: uid 65534, read-only, no capabilities."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.manifests.support import REPOSITORY, tool


@pytest.fixture(scope="module")
def rootfs() -> Path:
    path = os.environ.get("IMAGE_ROOTFS")
    if path is None:
        pytest.skip("no image: make test-image")
    return Path(path)


def run(rootfs: Path, bundle: Path, script: str) -> subprocess.CompletedProcess[str]:
    """`script` in a container like the server's."""
    environment = re.search(
        r"^ENV (PATH=.*?)\n(?!    )", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL
    )
    assert environment is not None
    variables = environment[1].replace("\\\n", " ").replace("$PATH", "/usr/local/bin:/usr/bin:/bin").split()
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]},
    ]
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 65534, "gid": 65534},
            "args": ["/bin/sh", "-ec", script],
            "env": variables,
            "cwd": "/",
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "root": {"path": str(rootfs), "readonly": True},
        "mounts": mounts,
        "linux": {"namespaces": [{"type": kind} for kind in ("mount", "pid", "ipc", "uts", "network")]},
    }
    (bundle / "config.json").write_text(json.dumps(config))
    runc = [tool("runc"), "--root", str(bundle / "state")]
    name = f"cachefs-image-{os.getpid()}"
    try:
        return subprocess.run(
            [*runc, "run", "--bundle", str(bundle), name], capture_output=True, text=True, timeout=120, check=False
        )
    finally:
        subprocess.run([*runc, "delete", "--force", name], capture_output=True, check=False)


def test_command_line_works_in_the_image(rootfs: Path, tmp_path: Path) -> None:
    done = run(rootfs, tmp_path, "cachefs --version && cachefs csi --help && python -c 'import cachefs.fuse, obstore'")
    assert done.returncode == 0, done.stderr
    assert "--kubelet-dir" in done.stdout


def test_controller_serves_in_the_image(rootfs: Path, tmp_path: Path) -> None:
    script = """
        cachefs csi --mode=controller --endpoint=unix:///tmp/csi.sock --log-format=json &
        driver=$!
        n=0
        until cachefs csi --check=ready --endpoint=unix:///tmp/csi.sock; do n=$((n+1)); [ $n -lt 40 ]; sleep 0.25; done
        kill $driver
        wait $driver
        echo served
    """
    done = run(rootfs, tmp_path, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("served\n")


def test_image_has_no_compiler_and_no_installer(rootfs: Path) -> None:
    for name in ("gcc", "pip", "curl", "wget", "git"):
        assert shutil.which(name, path=f"{rootfs}/usr/bin:{rootfs}/opt/cachefs/bin") is None
