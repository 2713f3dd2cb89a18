"""Fixtures for all tests: a quiet environment that never leaves loopback, and S3 servers."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lying import LyingServer
from tests.support.s3 import LOUD_VARIABLES, QUIET_ENVIRONMENT, HadroServer, SeaweedServer


@pytest.fixture(scope="session", autouse=True)
def quiet_environment() -> Iterator[None]:
    """Dummy keys and metadata endpoints on loopback, before any test or fixture starts a process."""
    patch = pytest.MonkeyPatch()
    for name in LOUD_VARIABLES:
        patch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("CACHEFS_")]:
        patch.delenv(name)
    for name, value in QUIET_ENVIRONMENT.items():
        patch.setenv(name, value)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """A real, writable S3 server, shared by the whole run: use a bucket of your own."""
    with SeaweedServer(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def hadro(tmp_path: Path) -> Iterator[HadroServer]:
    """A read-only S3 server over `hadro.buckets` that checks signatures."""
    with HadroServer(tmp_path / "hadro") as server:
        yield server


@pytest.fixture
def origin() -> Iterator[LyingServer]:
    """A counting S3 server that behaves until it is told to lie."""
    with LyingServer() as server:
        yield server
