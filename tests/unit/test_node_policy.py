"""What a volume on a node may name, and whose bytes it may share."""

from pathlib import Path

import pytest

from cachefs.config import NodeConfig, ServerConfig
from cachefs.errors import UsageError
from cachefs.node_policy import volume_location


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> NodeConfig:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    server = ServerConfig(state_dir=Path("/cache"), runtime_dir=Path("/run"), cache_bytes_max=0)
    return NodeConfig(server=server, keeper_socket=Path("/run/keeper.sock"), allow_endpoints=("https://minio:9000",))


def identity(node: NodeConfig, region: str | None, endpoint: str | None = None) -> str:
    return volume_location("s3://models/llama", endpoint, region, node)[0].identity


def test_a_bucket_is_one_in_all_regions_of_a_partition_and_another_in_the_next(node: NodeConfig) -> None:
    assert identity(node, None) == identity(node, "eu-central-1") == "s3://models"
    others = [identity(node, region) for region in ("cn-north-1", "us-gov-west-1", "us-iso-east-1")]
    others.append(identity(node, None, "https://minio:9000"))
    assert len({identity(node, None), *others}) == 5


@pytest.mark.parametrize(
    ("endpoint", "region"),
    [
        ("https://minio:9001", None),
        ("http://minio:9000", None),
        ("https://minio:9000@169.254.169.254", None),
        ("https://minio:9000#@elsewhere", None),
        ("https://minio:9000.elsewhere", None),
        ("http://169.254.169.254", None),
        ("http://[::ffff:a9fe:a9fe]", None),
        ("http://0251.0376.0251.0376", None),
        (None, "x.elsewhere.org/"),
        (None, "x@elsewhere"),
        (None, "x\n"),
        (None, "x" * 64),
    ],
)
def test_no_other_host_is_reached(node: NodeConfig, endpoint: str | None, region: str | None) -> None:
    with pytest.raises(UsageError):
        volume_location("s3://models/llama", endpoint, region, node)
