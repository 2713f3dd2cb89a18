"""`cachefs mount`, `umount` and what ends a mount, as a user meets them."""

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from cachefs import client
from tests.mount.cli_support import Cli, cli
from tests.mount.harness import alive, needs_fuse, wait_for
from tests.support.lying import LyingServer
from tests.support.s3 import SeaweedServer

__all__ = ["cli"]
pytestmark = needs_fuse

DATA = os.urandom(9 * 1024 * 1024 + 17)


@pytest.fixture
def bucket(origin: LyingServer) -> LyingServer:
    origin.put("models", "m/weights.bin", DATA)
    origin.put("models", "m/sub dir/ü.txt", b"hello")
    origin.put("models", "n/other.txt", b"other")
    return origin


def at(origin: LyingServer) -> tuple[str, str]:
    return "--endpoint-url", origin.endpoint_url


def test_mount_read_unmount_and_nothing_is_left(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    done = cli.json("mount", "s3://models/m", place, *at(bucket))
    assert (place / "weights.bin").read_bytes() == DATA
    assert (place / "sub dir" / "ü.txt").read_bytes() == b"hello"
    assert os.stat(place / "weights.bin").st_uid == os.getuid()
    with pytest.raises(OSError, match="Read-only"):
        (place / "new").write_bytes(b"x")
    assert cli.json("umount", place) == {"unmounted": [str(place)], "in_use": False}
    assert not alive(done["server_pid"])
    assert not alive(done["keeper_pid"])
    assert cli.mounts() == []
    assert os.listdir(place) == []
    assert not (cli.runtime_dir / "control.sock").exists()


def test_a_second_mount_starts_warm_also_without_the_store(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    cli.run("mount", "s3://models/m", place, *at(bucket))
    assert (place / "weights.bin").read_bytes() == DATA
    cli.run("umount", place)
    gets = bucket.gets()
    cli.run("mount", "s3://models/m", place, *at(bucket))
    assert (place / "weights.bin").read_bytes() == DATA
    assert bucket.gets() == gets
    cli.run("umount", place)
    requests = len(bucket.requests)
    cli.run("mount", "s3://models/m", place, *at(bucket), "--offline")
    assert (place / "weights.bin").read_bytes() == DATA
    assert len(bucket.requests) == requests


def test_offline_shows_only_what_was_seen_and_is_proposed_for_that(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    never = cli.run("mount", "s3://models/m", place, *at(bucket), "--offline", code=2)
    assert "without --offline" in never.stderr
    cli.run("mount", "s3://models/m", place, *at(bucket))
    os.listdir(place)
    cli.run("umount", place)
    bucket.stop()
    gone = cli.run("mount", "s3://models/m", place, *at(bucket), code=2)
    assert "--offline" in gone.stderr
    cli.run("mount", "s3://models/m", place, *at(bucket), "--offline")
    assert "weights.bin" in os.listdir(place)


def test_an_outage_of_the_store_is_logged_once(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    cli.run("mount", "s3://models/m", place, *at(bucket))
    os.listdir(place)
    bucket.stop()
    reader = threading.Thread(target=(place / "weights.bin").read_bytes)
    reader.start()
    wait_for(lambda: "does not answer" in cli.log(), "the outage is logged")
    bucket.start()
    reader.join(60)
    wait_for(lambda: "answers again" in cli.log(), "the end of the outage is logged")
    assert cli.log().count("does not answer") == 1


def test_the_same_mount_again_is_fine_and_another_one_there_is_not(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    first = cli.json("mount", "s3://models/m", place, *at(bucket), "--cache-size", "64MiB")
    assert first["already"] is False
    again = cli.json("mount", "s3://models/m/", place, *at(bucket), "--cache-size", "64MiB")
    assert (again["already"], again["server_pid"]) == (True, first["server_pid"])
    assert cli.json("mount", "s3://models/m", place, *at(bucket))["already"] is True
    other = cli.run("mount", "s3://models/n", place, *at(bucket), code=2)
    assert "s3://models/m" in other.stderr
    assert "s3://models/n" in other.stderr
    differs = cli.run("mount", "s3://models/m", place, *at(bucket), "--cache-size", "128MiB", code=2)
    assert str(64 * 2**20) in differs.stderr
    assert str(128 * 2**20) in differs.stderr
    assert len(cli.mounts()) == 2  # the FUSE root and one bind


def test_volumes_come_and_go_on_one_server(cli: Cli, bucket: LyingServer) -> None:
    one, two, three = cli.place("one"), cli.place("two"), cli.place("three")
    pid = cli.json("mount", "s3://models/m", one, *at(bucket))["server_pid"]
    assert cli.json("mount", "s3://models/n", two, *at(bucket))["server_pid"] == pid
    assert cli.json("mount", "s3://models/m", three, *at(bucket))["server_pid"] == pid
    assert (two / "other.txt").read_bytes() == b"other"
    volumes = cli.status()["volumes"]
    assert sorted((volume["source"], len(volume["mountpoints"])) for volume in volumes) == [
        ("s3://models/m", 2),
        ("s3://models/n", 1),
    ]
    cli.run("umount", one)
    assert (three / "weights.bin").read_bytes() == DATA
    cli.run("umount", two)
    assert [volume["source"] for volume in cli.status()["volumes"]] == ["s3://models/m"]
    cli.run("umount", three)
    assert not alive(pid)


def test_volumes_that_came_later_survive_a_killed_server(cli: Cli, bucket: LyingServer) -> None:
    one, two = cli.place("one"), cli.place("two")
    cli.run("mount", "s3://models/m", one, *at(bucket))
    cli.run("mount", "s3://models/n", two, *at(bucket))
    assert (one / "weights.bin").read_bytes() == DATA
    before = cli.status()
    os.kill(before["server"]["pid"], signal.SIGKILL)
    assert (two / "other.txt").read_bytes() == b"other"
    wait_for(cli.answers, "a new server answers", 90)
    after = cli.status()
    assert after["server"]["pid"] != before["server"]["pid"]
    assert after["server"]["restarts"] == 1
    # At least: the kernel may ask twice for a page (a read beside its own readahead).
    assert after["cache"]["miss_bytes"] >= before["cache"]["miss_bytes"] >= len(DATA)
    assert sorted(volume["source"] for volume in after["volumes"]) == ["s3://models/m", "s3://models/n"]
    assert after["volumes"][0]["mountpoint"] is not None
    assert after["tiers"][0]["used_bytes"] >= len(DATA)


def test_two_mounts_at_the_same_time_make_one_server(cli: Cli, bucket: LyingServer) -> None:
    places = [cli.place(f"p{number}") for number in range(3)]
    pids: list[int] = []

    def mount(place: Path) -> None:
        pids.append(cli.json("mount", "s3://models/m", place, *at(bucket))["server_pid"])

    threads = [threading.Thread(target=mount, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 3
    assert len(set(pids)) == 1
    assert cli.json("umount", "--all")["in_use"] is False
    assert cli.mounts() == []
    assert not alive(pids[0])


def test_a_busy_mount_is_told_and_lazy_lets_readers_finish(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    pids = cli.json("mount", "s3://models/m", place, *at(bucket))
    with (place / "weights.bin").open("rb") as file:
        assert file.read(10) == DATA[:10]
        busy = cli.run("umount", place, code=2)
        assert "busy" in busy.stderr
        assert "--lazy" in busy.stderr
        assert cli.json("umount", place, "--lazy")["unmounted"] == [str(place)]
        assert os.listdir(place) == []
        file.seek(0)
        assert file.read() == DATA
    cli.wait_gone(pids["server_pid"], pids["keeper_pid"])


@pytest.mark.parametrize("who", ["keeper_pid", "server_pid"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_either_process_ends_the_mount(
    cli: Cli, bucket: LyingServer, who: str, number: signal.Signals
) -> None:
    pids = cli.json("mount", "s3://models/m", cli.place(), *at(bucket))
    os.kill(pids[who], number)
    cli.wait_gone(pids["server_pid"], pids["keeper_pid"])
    wait_for(lambda: not any("root" in place for place in cli.mounts()), "the FUSE root is unmounted")
    cli.run("mount", "s3://models/m", cli.place(), *at(bucket))  # whatever is left of the bind is cleared
    assert (cli.place() / "weights.bin").read_bytes() == DATA


@pytest.mark.parametrize("command", ["umount", "fusermount3 -u"])
def test_other_programs_may_unmount_and_the_server_ends(cli: Cli, bucket: LyingServer, command: str) -> None:
    place = cli.place()
    pids = cli.json("mount", "s3://models/m", place, *at(bucket))
    subprocess.run([*command.split(), str(place)], check=True, timeout=60)
    cli.wait_gone(pids["server_pid"], pids["keeper_pid"])


def test_a_server_comes_back_though_its_log_directory_is_gone(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    pids = cli.json("mount", "s3://models/m", place, *at(bucket))
    shutil.rmtree(cli.state_dir / "log")
    os.kill(pids["server_pid"], signal.SIGKILL)
    assert (place / "weights.bin").read_bytes() == DATA
    assert cli.status()["keeper"]["pid"] == pids["keeper_pid"]


def test_a_dead_mount_of_ours_is_recovered_at_the_next_mount(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    pids = cli.json("mount", "s3://models/m", place, *at(bucket))
    for pid in (pids["keeper_pid"], pids["server_pid"]):  # the keeper first: it would start another server
        os.kill(pid, signal.SIGSTOP)
    for pid in (pids["keeper_pid"], pids["server_pid"]):
        os.kill(pid, signal.SIGKILL)
    cli.wait_gone(pids["server_pid"], pids["keeper_pid"])
    assert len(cli.mounts()) == 2
    cli.run("mount", "s3://models/m", place, *at(bucket))
    assert (place / "weights.bin").read_bytes() == DATA
    assert len(cli.mounts()) == 2


def test_umount_removes_a_dead_mount(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    pids = cli.json("mount", "s3://models/m", place, *at(bucket))
    for number in (signal.SIGSTOP, signal.SIGKILL):
        os.kill(pids["keeper_pid"], number)
        os.kill(pids["server_pid"], number)
    cli.wait_gone(pids["server_pid"], pids["keeper_pid"])
    cli.run("umount", place)
    assert cli.mounts() == []


def test_foreground_stays_and_logs_to_the_terminal(cli: Cli, bucket: LyingServer) -> None:
    import sys

    place = cli.place()
    command = [
        sys.executable,
        "-P",
        "-m",
        "cachefs.cli",
        "mount",
        "s3://models/m",
        str(place),
        *at(bucket),
        "--foreground",
    ]
    with subprocess.Popen(
        command, env=cli.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: os.path.ismount(place) or process.poll() is not None, "mounted")
        assert (place / "weights.bin").read_bytes() == DATA
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "is mounted on" in out
    assert "serving 1 volumes" in err
    wait_for(lambda: not any("root" in mounted for mounted in cli.mounts()), "unmounted")


def test_a_volume_that_nobody_binds_goes_again(cli: Cli, bucket: LyingServer) -> None:
    cli.environ["CACHEFS_BIND_TIMEOUT_S"] = "1"
    cli.run("mount", "s3://models/m", cli.place(), *at(bucket))
    volume = {"name": "orphan", "source": "s3://models/n", "endpoint_url": bucket.endpoint_url}
    assert client.call(cli.runtime_dir, "volume_add", {"volume": volume})["name"] == "orphan"
    assert len(cli.status()["volumes"]) == 2
    wait_for(lambda: len(cli.status()["volumes"]) == 1, "the orphan goes")


BAD_SOURCES = [
    ("missing bucket", "s3://nobody-has-this/x", [], "bucket"),
    ("unreachable endpoint", "s3://models/m", ["--endpoint-url", "http://127.0.0.1:9"], "--endpoint-url"),
    ("missing directory", "file:///nowhere/at/all", [], "/nowhere/at/all"),
    ("bad pattern", "s3://models/m", ["--include", "a//b"], "pattern"),
    ("metrics address", "s3://models/m", ["--metrics", "203.0.113.1:9464"], "--metrics"),
]


@pytest.mark.parametrize(
    ("source", "flags", "says"), [bad[1:] for bad in BAD_SOURCES], ids=[bad[0] for bad in BAD_SOURCES]
)
def test_a_source_that_cannot_be_mounted_leaves_nothing(
    cli: Cli, seaweed: SeaweedServer, source: str, flags: list[str], says: str
) -> None:
    seaweed.make_bucket("models")
    seaweed.put("models", "m/x", b"x")
    place = cli.place()
    endpoint = (
        [] if source.startswith("file") or "--endpoint-url" in flags else ["--endpoint-url", seaweed.endpoint_url]
    )
    done = cli.run("mount", source, place, *endpoint, *flags, code=2)
    assert says in done.stderr
    assert done.stderr.startswith("cachefs: ")
    assert done.stderr.count("\n") == 1
    assert cli.mounts() == []
    assert not (cli.runtime_dir / "control.sock").exists()
    cli.run("mount", "s3://models/m", place, "--endpoint-url", seaweed.endpoint_url)  # and the state is fine
    assert (place / "x").read_bytes() == b"x"


def test_denied_credentials_are_told(cli: Cli, seaweed: SeaweedServer) -> None:
    seaweed.make_bucket("denied")
    cli.environ["AWS_SECRET_ACCESS_KEY"] = "wrong"
    done = cli.run("mount", "s3://denied/m", cli.place(), "--endpoint-url", seaweed.endpoint_url, code=2)
    assert "s3://denied/m" in done.stderr
    assert cli.mounts() == []


def test_a_bucket_in_another_region_is_told(cli: Cli, bucket: LyingServer) -> None:
    bucket.lie("301", operation="LIST")
    done = cli.run("mount", "s3://models/m", cli.place(), *at(bucket), code=2)
    assert "--region" in done.stderr
    assert cli.mounts() == []


def test_a_bad_second_volume_leaves_the_first_alone(cli: Cli, bucket: LyingServer) -> None:
    one, two = cli.place("one"), cli.place("two")
    cli.run("mount", "s3://models/m", one, *at(bucket))
    done = cli.run("mount", "s3://nothing/x", two, "--endpoint-url", "http://127.0.0.1:9", code=2)
    assert done.stderr.count("\n") == 1
    assert os.listdir(two) == []
    assert [volume["source"] for volume in cli.status()["volumes"]] == ["s3://models/m"]
    assert (one / "weights.bin").read_bytes() == DATA


def test_upgrade_hands_over_to_a_new_server(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    before = cli.json("mount", "s3://models/m", place, *at(bucket))
    with (place / "weights.bin").open("rb") as file:
        assert file.read(100) == DATA[:100]
        done = cli.json("upgrade", place)
        assert done["pid"] != before["server_pid"]
        assert done["keeper_pid"] == cli.status()["keeper"]["pid"]
        assert file.read() == DATA[100:]
    assert not alive(before["server_pid"])


def test_an_upgrade_to_nothing_is_refused_and_the_mount_lives(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    cli.run("mount", "s3://models/m", place, *at(bucket))
    done = cli.run("upgrade", place, "--python", "/nowhere/python", code=None)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("cachefs: ")
    assert (place / "weights.bin").read_bytes() == DATA


def test_what_a_reader_is_refused_is_in_the_log(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    cli.run("mount", "s3://models/m", place, *at(bucket))
    bucket.lie("403")
    with pytest.raises(PermissionError):
        (place / "weights.bin").read_bytes()
    lines = [line for line in cli.json("logs")["lines"] if "EACCES" in line]
    assert len(lines) == 1
    assert "weights.bin" in lines[0]
