"""Fixtures of the CSI tests: they mount, so they need root."""

import os
from collections.abc import Iterator

import pytest

from tests.csi.support import Kubelet, NodeUnderTest


@pytest.fixture
def bare_node() -> Iterator[NodeUnderTest]:
    """Nothing runs yet."""
    if os.geteuid() != 0:
        pytest.skip("bind mounts need root")
    with NodeUnderTest() as node:
        yield node


@pytest.fixture
def node(bare_node: NodeUnderTest) -> NodeUnderTest:
    """With server and driver."""
    bare_node.start_server()
    bare_node.start_driver()
    return bare_node


@pytest.fixture
def kubelet(node: NodeUnderTest) -> Kubelet:
    """Connected to the driver."""
    return node.kubelet()
