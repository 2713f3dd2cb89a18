"""What each process of a mount loads before it works: a mount waits for all of it, one after the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {
    "aiohttp",
    "asyncio",
    "botocore",
    "concurrent.futures",
    "fsspec",
    "grpc",
    "http.server",
    "obstore",
    "prometheus_client",
    "rich",
    "s3fs",
    "structlog",
}
SERVERS = {"pyfuse3", "trio", "lmdb", "http.client", "ssl", "xml"}
NODES = {"cachefs.node_link", "cachefs.publications", "cachefs.store.given"}
KEEPERS_NEITHER = {"click", "argparse", "shutil", "tomllib", "logging"}
FIRST_STARTS_NEITHER = {"cachefs.config", "cachefs.keeper", "json", "msgspec", "re", "socket", "subprocess"}


def loaded(*modules: str) -> set[str]:
    """Every module that a new interpreter has after it imported these.

    What site loads for an editable installation (re) is no part of it.
    """
    imports = ", ".join(("sys", *modules))
    script = f"import sys; before = set(sys.modules); import {imports}; print('\\n'.join({{*sys.modules}} - before))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-P", "-c", script], env=env, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (("cachefs.cli", "cachefs.launch", "cachefs.kernel.bind"), HEAVY | SERVERS | NODES | {"shutil", "tomllib"}),
        (("cachefs.first_start",), HEAVY | SERVERS | NODES | KEEPERS_NEITHER | FIRST_STARTS_NEITHER),
        (("cachefs.keeper",), HEAVY | SERVERS | NODES | KEEPERS_NEITHER),
        (("cachefs.daemon", "cachefs.store.direct"), HEAVY | NODES | {"click", "argparse"}),
    ],
    ids=["command", "first start", "keeper", "server"],
)
def test_a_process_of_a_mount_loads_only_what_it_needs(modules: tuple[str, ...], unwanted: set[str]) -> None:
    found = loaded(*modules)
    assert found >= set(modules)
    assert found & unwanted == set()


def test_the_servers_collector_is_on_again() -> None:
    script = "import gc, cachefs.daemon; assert gc.isenabled()"
    subprocess.run([sys.executable, "-P", "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
