"""The command line of a user who is not root: one mount per state directory, through fusermount3."""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.harness import REPOSITORY, needs_fuse

pytestmark = needs_fuse

AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]

# In a mount namespace of its own, where /dev/fuse is open to everybody as distributions have it.
SCRIPT = """
set -eu
mount --make-rprivate /
mknod "$DIR/fuse" c 10 229; chmod 666 "$DIR/fuse"; mount --bind "$DIR/fuse" /dev/fuse
cd /
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that everybody may enter, with the package in it."""
    directory = Path(tempfile.mkdtemp(prefix="cachefs-user-"))
    directory.chmod(0o755)
    shutil.copytree(REPOSITORY / "cachefs", directory / "lib" / "cachefs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("home", "one", "two", "source"):
        (directory / name).mkdir()
    for name in ("home", "one", "two"):
        shutil.chown(directory / name, 65534, 65534)
    (directory / "source" / "a").write_bytes(b"hello\n")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def interpreter(directory: Path) -> list[str]:
    """`cachefs` as a command that user 65534 may run."""
    libraries = f"{directory / 'lib'}:{sysconfig.get_path('platlib')}"
    version = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, version):
        command = ["env", f"PYTHONPATH={libraries}", "PYTHONDONTWRITEBYTECODE=1", f"HOME={directory}/home"]
        command += [f"XDG_RUNTIME_DIR={directory}/home", python, "-P"]
        tried = [*AS_NOBODY, *command, "-c", "import cachefs.daemon"]
        if shutil.which("setpriv") and subprocess.run(tried, capture_output=True, cwd="/", check=False).returncode == 0:
            return [*command, "-m", "cachefs.cli"]
    pytest.skip("user 65534 may not run this interpreter")


def test_one_mount_per_state_directory(shared: Path) -> None:
    command = " ".join([*AS_NOBODY, *interpreter(shared)])
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed")
    script = (
        SCRIPT
        + f"""
C="{command}"
trap '$C umount --all --lazy >&2 || true' EXIT
$C mount "file://$DIR/source" "$DIR/one"
{" ".join(AS_NOBODY)} cat "$DIR/one/a"
$C mount "file://$DIR/source" "$DIR/one"
if $C mount "file://$DIR/source" "$DIR/two" 2>"$DIR/said"; then exit 90; fi
cat "$DIR/said"
$C status
$C umount "$DIR/one"
$C mount "file://$DIR/source" "$DIR/two"
{" ".join(AS_NOBODY)} cat "$DIR/two/a"
$C umount --all
if grep -q "fuse.cachefs.*$DIR" /proc/self/mountinfo; then exit 91; fi
if [ -n "$(ls -A "$DIR/home/cachefs")" ]; then exit 92; fi
"""
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        env={"DIR": str(shared), "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("hello") == 2
    assert any(line.endswith("already") for line in lines)
    assert any("--state-dir" in line for line in lines)
