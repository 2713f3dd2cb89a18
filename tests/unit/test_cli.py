"""The command line without a mount: what it imports, how it reads arguments, what it says about bad ones."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click.testing
import pytest

from cachefs import cli, cli_node, output

HEAVY = {"pyfuse3", "trio", "lmdb", "obstore", "s3fs", "grpc", "fsspec", "prometheus_client", "rich", "structlog"}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `cachefs ...` as a process of its own; a state directory of the test's unless one is given."""

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path)}
        env |= {"CACHEFS_STATE_DIR": str(tmp_path / "state"), "CACHEFS_RUNTIME_DIR": str(tmp_path / "run"), **environ}
        command = [sys.executable, "-P", "-m", "cachefs.cli", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)

    return run


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    script = "import sys, cachefs.cli; print('\\n'.join(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert HEAVY & {name.partition(".")[0] for name in done.stdout.split()} == set()


def test_every_command_has_help() -> None:
    runner = click.testing.CliRunner()
    for name in cli.group.commands:
        result = runner.invoke(cli.group, [name, "--help"])
        assert result.exit_code == 0, name
    assert {
        "mount",
        "umount",
        "upgrade",
        "status",
        "warm",
        "ls",
        "pin",
        "unpin",
        "evict",
        "verify",
        "gc",
        "logs",
    } <= set(cli.group.commands)


def test_every_command_takes_json_state_dir_and_config() -> None:
    for name, command in cli.group.commands.items():
        if name in ("csi", "keeper"):
            continue  # programs of their own, with flags of their own
        inner = command.commands.values() if isinstance(command, click.Group) else [command]
        for each in inner:
            options = {option for parameter in each.params for option in parameter.opts}
            assert {"--state-dir", "--config"} <= options, name
            assert "--json" in options, name


BAD = [
    (["mount", "bucket/prefix", "MNT"], "s3://bucket/prefix"),
    (["mount", "ftp://host/x", "MNT"], "unknown"),
    (["mount", "s3://", "MNT"], "no bucket"),
    (["mount", "s3://b/p", "MISSING"], "does not exist"),
    (["mount", "s3://b/p", "FILE"], "not a directory"),
    (["mount", "s3://b/p", "FULL"], "not empty"),
    (["mount", "s3://b/p", "MNT", "--cache-size", "10 bananas"], "--cache-size"),
    (["mount", "s3://b/p", "MNT", "--cache-size", "50GB"], "GiB"),
    (["mount", "s3://b/p", "MNT", "--cache-size", "120%"], "--cache-size"),
    (["mount", "s3://b/p", "MNT", "--cache-size", "0"], "8MiB"),
    (["mount", "s3://b/p", "MNT", "--cache-size", "900000TiB"], "file system"),
    (["mount", "s3://b/p", "MNT", "--cache-size", "-5"], "--cache-size"),
    (["mount", "s3://b/p", "MNT", "--prefetch-bytes", "1KiB"], "--prefetch-bytes"),
    (["mount", "s3://b/p", "MNT", "--read-timeout", "soon"], "--read-timeout"),
    (["mount", "s3://b/p", "MNT", "--read-timeout", "-1"], "--read-timeout"),
    (["mount", "s3://b/p", "MNT", "--metrics", "9464"], "HOST:PORT"),
    (["mount", "s3://b/p", "MNT", "--metrics", "host:99999"], "HOST:PORT"),
    (["mount", "s3://b/p", "MNT", "--uid", "root"], "--uid"),
    (["mount", "s3://b/p", "MNT", "--endpoint-url", "127.0.0.1:80"], "--endpoint-url"),
    (["mount", "s3://b/p", "MNT", "--endpoint-url", "http://key:secret@host"], "credentials"),
    (["mount", "s3://b/p", "MNT", "--endpoint-url", "http://a..b:9000"], "no name of a host"),
    (["mount", "s3://b/p", "MNT", "--anonymous", "--profile", "x"], "--anonymous"),
    (["mount", "s3://b/p", "MNT", "-o", "rw"], "-o rw"),
    (["mount", "s3://b/p", "MNT", "-o", "uid=1", "--uid", "2"], "twice"),
    (["mount", "s3://b/p", "MNT", "--mode", "read-write"], "--mode"),
    (["mount", "s3://b/p", "MNT", "--store", "curl"], "--store"),
    (["mount", "s3://b/p"], "MOUNTPOINT"),
    (["mount", "s3://b/p", ""], "no mount point"),
    (["mount", "s3://b/p", "MNT", "--include", ""], "--include"),
    (["mount", "s3://b/p", "MNT", "--nonsense"], "--nonsense"),
    (["mount", "s3://b/p", "MNT", "--config", "MISSING"], "cannot be read"),
    (["mount", "s3://b/p", "MNT", "--config", "FILE"], "not valid TOML"),
    (["mount", "s3://b/p", "MNT", "--state-dir", "FILE"], "state directory"),
    (["mount", "s3://b/p", "MNT", "--state-dir", "MNT/state"], "lie in each other"),
    (["mount", "s3://b/p", "MNT", "--state-dir", "/proc/nothing"], "state directory"),
    (["mount", "file:///", "MNT"], "lies in the source"),
    (["umount", "MNT"], "not a cachefs mount"),
    (["umount"], "--all"),
    (["umount", "MNT", "--all"], "--all"),
    (["upgrade", "MNT"], "not a cachefs mount"),
    (["ls"], "no cache"),
    (["evict", "s3://b/p"], "no cache"),
    (["evict", "nothing"], "s3://bucket/prefix"),
    (["verify"], "no cache"),
    (["gc"], "no cache"),
    (["logs"], "no log"),
    (["nonsense"], "nonsense"),
]


@pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs /dev/fuse")
@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_a_bad_request_is_one_clear_line_and_exit_code_2(
    run: Run, tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").write_text("this is [no TOML")
    names = {"MNT": "mnt", "MISSING": "missing", "FILE": "file", "FULL": "full", "MNT/state": "mnt/state"}
    done = run(*(str(tmp_path / names[word]) if word in names else word for word in arguments))
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("cachefs: ")
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert not (tmp_path / "state").exists()  # nothing half made


@pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs /dev/fuse")
def test_a_proxy_that_cannot_be_used_is_one_line_of_the_mount_without_its_password(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    proxy = "socks5://me:hunter2@127.0.0.1:1080"
    done = run(
        "mount", "s3://bkt/p", str(tmp_path / "mnt"), "--endpoint-url", "https://a.test", HTTPS_PROXY=proxy, NO_PROXY=""
    )
    assert done.returncode == 2, done.stderr
    assert "HTTPS_PROXY" in done.stderr
    assert "hunter2" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_complaint_has_nothing_in_it_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    output.complain(ValueError("\x1b[2Jof a\nstore"))
    assert capsys.readouterr().err == "cachefs: \\x1b[2Jof a store\n"


def test_without_a_fuse_device_mounting_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cachefs import cli_mount
    from cachefs.config import ServerConfig
    from cachefs.errors import UsageError

    server = ServerConfig(state_dir=tmp_path / "s", runtime_dir=tmp_path / "r", cache_bytes_max=1 << 30)
    with pytest.raises(UsageError, match="modprobe fuse"):
        cli_mount.check_places(server, tmp_path / "mnt", device=str(tmp_path / "fuse"))


def test_a_state_directory_that_is_in_use_is_named_with_its_holder(run: Run, tmp_path: Path) -> None:
    from cachefs.state import state_lock

    (tmp_path / "mnt").mkdir()
    with state_lock(tmp_path / "state"):
        done = run("mount", "s3://b/p", str(tmp_path / "mnt"))
    assert done.returncode == 2
    assert f"process {os.getpid()}" in done.stderr
    assert "--state-dir" in done.stderr


def test_a_runtime_directory_that_others_use_is_left_as_it_is(run: Run, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (tmp_path / "mnt").mkdir()
    (shared / "of-others").mkdir(parents=True)
    shared.chmod(0o755)
    done = run("mount", "s3://b/p", str(tmp_path / "mnt"), CACHEFS_RUNTIME_DIR=str(shared))
    assert done.returncode == 2
    assert "open to other users" in done.stderr
    assert shared.stat().st_mode & 0o777 == 0o755


def test_config_show_says_where_values_come_from(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('cache_size = "1GiB"\nlog_level = "debug"\nregion = "a"\n')
    done = run(
        "config",
        "show",
        "--origin",
        "--json",
        "--config",
        str(tmp_path / "c.toml"),
        "--region",
        "c",
        CACHEFS_REGION="b",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["region"] == {"value": "c", "origin": "--region"}
    assert found["cache_size"] == {"value": "1GiB", "origin": str(tmp_path / "c.toml")}
    assert found["state_dir"]["origin"] == "CACHEFS_STATE_DIR"
    assert found["store"] == {"value": "auto", "origin": "default"}


def test_a_variable_that_is_no_setting_is_told_of_in_one_line(run: Run) -> None:
    others = {"CACHEFS_TEST_X": "1", "CACHEFS_SERVICE_HOST": "10.0.0.1", "CACHEFS_A_PORT_80_TCP": "tcp://10.0.0.1:80"}
    done = run("status", CACHEFS_CACHE_SIZES="1GiB", CACHEFS_REGIO="x", CACHEFS_REGION="x", **others)
    assert done.returncode == 0
    assert done.stderr == (
        "cachefs: no such setting, left out: CACHEFS_CACHE_SIZES, CACHEFS_REGIO (see `cachefs config show`)\n"
    )
    assert run("status", CACHEFS_REGION="x", CACHEFS_EMPTY="", **others).stderr == ""


def test_an_error_with_json_is_a_line_on_stderr_and_no_document(run: Run) -> None:
    done = run("ls", "--json")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_status_without_a_server_is_no_error(run: Run) -> None:
    done = run("status", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["server"] is None


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("warm x", quiet=False) as show:
        show({"done_bytes": 1, "total_bytes": 2})
    with output.progress("warm x", quiet=True) as show:
        show({"done_bytes": 1, "total_bytes": 2})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\x1b" not in captured.err


def test_names_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("OBJECT",), [("s3://b/two\nlines\x1b[2J é",)])
    assert capsys.readouterr().out.splitlines()[1] == "s3://b/two\\nlines\\x1b[2J é"


def test_tables_cut_nothing_off(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("A", "LONG HEADER"), [("x" * 300, 1), ("y", 22)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("x" * 300)
    assert lines[2].endswith("22")


@pytest.mark.skipif(os.getuid() != 0, reason="makes a directory of another user")
def test_a_runtime_base_of_another_user_is_refused(tmp_path: Path) -> None:
    from cachefs import cli_mount
    from cachefs.cli_context import Command
    from cachefs.errors import UsageError
    from cachefs.settings import Settings

    base = tmp_path / "cachefs"
    base.mkdir()
    os.chown(base, 0, 0)
    command = Command(Settings({}), 65534, False, {"XDG_RUNTIME_DIR": str(tmp_path)})
    with pytest.raises(UsageError, match="belongs to user 0"):
        cli_mount._make_runtime_dir(base / "0123456789ab", command)
    assert list(base.iterdir()) == []


def test_serve_with_json_logs_json(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Mapping[str, Any]] = []
    monkeypatch.setattr(cli_node, "serve", given.append)
    for arguments in (["--json"], ["--json", "--log-format", "text"], []):
        assert click.testing.CliRunner().invoke(cli.group, ["serve", "--node-dir", "/n", *arguments]).exit_code == 0
    assert [flags["log_format"] for flags in given] == ["json", "json", None]
