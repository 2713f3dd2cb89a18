"""A keeper that is not root: the mount goes through fusermount3, and all of it still works."""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.keeper_support import REPOSITORY, needs_root_mount

pytestmark = needs_root_mount

AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
# A mount namespace in which /dev/fuse is open to everybody, as distributions have it. Where the tests run it may not
# be, and that is nobody else's business.
NAMESPACE = """set -eu
mount --make-rprivate /
mknod "$0/fuse" c 10 229; chmod 666 "$0/fuse"; mount --bind "$0/fuse" /dev/fuse
cd /
exec "$@"
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that everybody may enter, with the package and these tests in it."""
    directory = Path(tempfile.mkdtemp(prefix="cachefs-keeper-"))
    directory.chmod(0o755)
    for name in ("cachefs", "tests/mount"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, directory / "lib" / name, ignore=ignored)
    (directory / "lib" / "tests" / "__init__.py").touch()
    (directory / "work").mkdir()
    shutil.chown(directory / "work", 65534, 65534)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def interpreter(directory: Path) -> list[str]:
    """A Python that user 65534 may run; the one of the tests may lie in root's home."""
    libraries = f"PYTHONPATH={directory / 'lib'}:{sysconfig.get_path('platlib')}"
    for python in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        command = ["env", libraries, "PYTHONDONTWRITEBYTECODE=1", python, "-P"]
        tried = [*AS_NOBODY, *command, "-c", "import tests.mount.tiny_server"]
        if subprocess.run(tried, capture_output=True, cwd="/", check=False).returncode == 0:
            return command
    pytest.skip("user 65534 may not run this interpreter")


def test_user_who_is_not_root_has_it_all_but_passthrough(shared: Path) -> None:
    for program in ("setpriv", "unshare", "fusermount3"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    command = [*AS_NOBODY, *interpreter(shared), "-m", "tests.mount.keeper_as_user", str(shared / "work")]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", NAMESPACE, str(shared), *command],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words = [line.split(" ")[0] for line in done.stdout.splitlines()]
    assert words == ["survived", "without", "recovered", "unmounted", "ended", "refused"]
    refusal = done.stdout.splitlines()[-1]
    assert "cannot mount at" in refusal
