"""The mechanical rules of the house, so that nobody has to remember them."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "cachefs"
FILE_LINES_MAX = 550
FUNCTION_LINES_MAX = 75
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "SEMANTICS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE",
)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if "_pb2" not in path.name)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(tree: ast.AST) -> set[str]:
    """The top-level names of all modules that are imported anywhere in `tree`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", python_files("cachefs", "tests", "benchmarks", "scripts"), ids=relative)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES_MAX
    too_long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX
    }
    assert not too_long


# Raise meaning; map to errno once. The kernel's facts, and what gets an errno from a system call, may compare them.
ERRNO_FILES = {"cachefs/errors.py", "cachefs/fuse.py"}
# A system call that fails is understood where it is made: these translate an OSError by its number into a class.
ERRNO_AT_SYSTEM_CALLS = {
    "cachefs/keeper.py",
    "cachefs/link.py",
    "cachefs/launch.py",
    "cachefs/notifier.py",
    "cachefs/blobs.py",
    "cachefs/committer.py",
    "cachefs/sealing.py",
    "cachefs/state.py",
}


@pytest.mark.parametrize("path", python_files("cachefs"), ids=relative)
def test_errno_is_named_only_where_errors_are_translated(path: Path) -> None:
    name = relative(path)
    if name in ERRNO_FILES | ERRNO_AT_SYSTEM_CALLS or name.startswith(("cachefs/kernel/", "cachefs/tier/")):
        return
    assert "errno" not in imports_of(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", python_files("cachefs"), ids=relative)
def test_pyfuse3_is_imported_by_fuse_alone(path: Path) -> None:
    if relative(path) != "cachefs/fuse.py":
        assert "pyfuse3" not in imports_of(ast.parse(path.read_text()))


MUTABLE_CALLS = {"dict", "list", "set", "defaultdict", "deque", "Counter", "OrderedDict", "bytearray"}


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Name | ast.Attribute)
        and called(value.func) in MUTABLE_CALLS
    )


def called(function: ast.Name | ast.Attribute) -> str:
    return function.id if isinstance(function, ast.Name) else function.attr


def module_level_state(tree: ast.Module) -> list[str]:
    """Names bound to something mutable at module level, and every `global` statement.

    Names in capitals are tables that nobody changes.
    """
    bound: list[tuple[ast.expr, ast.expr | None]] = []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            bound += [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign):
            bound.append((node.target, node.value))
    names = [target.id for target, value in bound if isinstance(target, ast.Name) and is_mutable(value)]
    changed = [f"global {', '.join(node.names)}" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    return [name for name in names if not name.isupper() and name != "__all__"] + changed


@pytest.mark.parametrize("path", python_files("cachefs"), ids=relative)
def test_modules_hold_no_state(path: Path) -> None:
    assert module_level_state(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document_is_there(name: str) -> None:
    assert (ROOT / name).read_text().strip()


TEXTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("Makefile", "constraints.txt", "pyproject.toml", ".ci/run")),
    *sorted((ROOT / "scripts").glob("*.sh")),
]


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_texts_stand_on_their_own(path: Path) -> None:
    """No folder outside the repository, no package index, and no way to another project's package of our name."""
    text = path.read_text()
    outside = "/".join(("..", "shared"))
    assert outside not in text
    assert not re.search(r"(index-url|find-links|trusted-host)[ =]", text)
    assert not re.search(r"pip3? install\s+(-\S+\s+)*cachefs(?!-fuse)\b", text)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")), ids=relative)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_architecture_names_every_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in settings if contract["type"] == "layers")
    wanted = {name for layer in layers for name in re.findall(r"\w+", layer)}
    shown = set(re.findall(r"\w+", (ROOT / "ARCHITECTURE.md").read_text().split("## Layers")[1]))
    assert wanted <= shown


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.findall(r"^\.PHONY: (.+)$", makefile + (ROOT / "csi.mk").read_text(), re.MULTILINE)
    shown = set(re.findall(r"^\t@echo '(?:make| +) ?([a-z-]+)", makefile, re.MULTILINE))
    assert {name for line in phony for name in line.split()} - {"help"} <= shown


def test_version_is_said_once_and_in_the_changelog() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = {
        canonical(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert {canonical(re.split(r"[<>=!~\[; ]", name)[0]) for name in wanted} <= pinned


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
