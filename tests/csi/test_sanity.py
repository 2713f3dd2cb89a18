"""csi-sanity, the conformance suite of the CSI community, in full against the running driver."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.csi.support import NodeUnderTest, tool

SECRETS = """\
NodePublishVolumeSecret:
  AWS_ACCESS_KEY_ID: sanity
  AWS_SECRET_ACCESS_KEY: sanity-secret
"""


@pytest.mark.timeout(300)
def test_csi_sanity_passes_in_full(node: NodeUnderTest, tmp_path: Path) -> None:
    (tmp_path / "parameters.yaml").write_text("uri: s3://models/sanity\n")
    (tmp_path / "secrets.yaml").write_text(SECRETS)
    run_sanity(node, tmp_path)
    assert "sanity-secret" not in node.log.read_text()


def run_sanity(node: NodeUnderTest, tmp_path: Path) -> None:
    """The suite with parameters.yaml and secrets.yaml of `tmp_path`: nothing fails, nothing is left."""
    sanity = tool("csi-sanity")
    command = [
        sanity,
        f"--csi.endpoint=unix://{node.endpoint}",
        f"--csi.mountdir={node.kubelet_dir}/mount",
        f"--csi.stagingdir={node.kubelet_dir}/staging",
        f"--csi.testvolumeparameters={tmp_path}/parameters.yaml",
        f"--csi.secrets={tmp_path}/secrets.yaml",
        "--ginkgo.no-color",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path)
    summary = re.search(r"Ran (\d+) of (\d+) Specs.*\n.*?(\d+) Passed \| (\d+) Failed \| (\d+) Pending", done.stdout)
    assert summary is not None, done.stdout[-4000:] + done.stderr[-2000:]
    print(summary[0])
    assert int(summary[4]) == 0, done.stdout[-8000:]
    assert done.returncode == 0
    # What runs is what this driver has; a driver that lost a capability would skip more.
    assert int(summary[3]) >= 30, summary[0]
    node.assert_clean()
