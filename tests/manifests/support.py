"""Rendering and reading of manifests."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MANIFESTS = REPOSITORY / "manifests"
Document = dict[str, Any]


def package(name: str) -> Any:
    """A Python package of `make setup-csi`; skips visibly, fails where CI says that it must be there."""
    if os.environ.get("CSI_TOOLS_REQUIRED") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is missing: make setup-csi")


def tool(name: str) -> str:
    """Path of kubectl or hadolint; skips visibly, fails where CI says that it must be there."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is not None:
        return found
    if os.environ.get("CSI_TOOLS_REQUIRED") == "1":
        pytest.fail(f"{name} is missing: make setup-csi")
    pytest.skip(f"{name} is missing: make setup-csi")


def render(directory: Path) -> list[Document]:
    """`kubectl kustomize`, parsed. Nothing is fetched: all resources are local."""
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(directory)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    # A deprecated field would be a warning here.
    assert done.stderr == ""
    return load(done.stdout)


def load(text: str) -> list[Document]:
    """All documents."""
    return [document for document in package("yaml").safe_load_all(text) if document]


def kind(documents: list[Document], name: str) -> list[Document]:
    """Those of a kind."""
    return [document for document in documents if document["kind"] == name]


def pods(documents: list[Document]) -> list[tuple[str, Document]]:
    """(component, pod spec) of every workload."""
    found = []
    for document in documents:
        if document["kind"] in ("DaemonSet", "Deployment"):
            template = document["spec"]["template"]
            found.append((template["metadata"]["labels"].get("app.kubernetes.io/component", ""), template["spec"]))
    return found
