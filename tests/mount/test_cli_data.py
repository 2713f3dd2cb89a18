"""status, warm, ls, pin, evict, verify, gc and metrics: the same with a server and without one."""

import json
import os
import signal
import socket
import urllib.request
from pathlib import Path

import pytest

from tests.mount.cli_support import Cli, cli
from tests.mount.harness import needs_fuse, wait_for
from tests.support.lying import LyingServer
from tests.support.servers import free_ports

__all__ = ["cli"]
pytestmark = needs_fuse

DATA = os.urandom(9 * 1024 * 1024 + 17)
SMALL = b"hello"
TOTAL = len(DATA) + len(SMALL)


@pytest.fixture
def bucket(origin: LyingServer) -> LyingServer:
    origin.put("models", "m/weights.bin", DATA)
    origin.put("models", "m/sub/small.txt", SMALL)
    return origin


@pytest.fixture(params=["with a server", "without a server"])
def place(request: pytest.FixtureRequest, cli: Cli, bucket: LyingServer) -> Path | None:
    if request.param == "without a server":
        return None
    cli.run("mount", "s3://models/m", cli.place(), "--endpoint-url", bucket.endpoint_url)
    return cli.place()


def blobs(cli: Cli) -> list[Path]:
    return [path for path in (cli.state_dir / "blobs").rglob("*") if path.is_file()]


def test_warm_ls_pin_evict_verify_gc(cli: Cli, bucket: LyingServer, place: Path | None) -> None:
    at = ("--endpoint-url", bucket.endpoint_url)
    (warmed,) = cli.json("warm", "s3://models/m", *at)["warmed"]
    assert (warmed["objects_total"], warmed["bytes_total"], warmed["fetched_bytes"]) == (2, TOTAL, TOTAL)
    (again,) = cli.json("warm", "s3://models/m", *at)["warmed"]
    assert again["fetched_bytes"] == 0
    objects = {item["path"]: item for item in cli.json("ls")["objects"]}
    assert {path: item["local_bytes"] for path, item in objects.items()} == {
        "m/weights.bin": len(DATA),
        "m/sub/small.txt": len(SMALL),
    }
    wait_for(lambda: all(item["sealed"] for item in cli.json("ls")["objects"]), "sealed")
    assert [item["path"] for item in cli.json("ls", "s3://models/m/sub", *at)["objects"]] == ["m/sub/small.txt"]
    checked = cli.json("verify")
    assert (checked["objects"], checked["bytes"], checked["bad"]) == (2, TOTAL, [])
    cli.run("pin", "s3://models/m/weights.bin", *at)
    evicted = cli.json("evict", "s3://models/m", *at)
    assert evicted["evicted_objects"] == 1
    assert [item["path"] for item in evicted["skipped"]] == ["m/weights.bin"]
    cli.run("unpin", "s3://models/m", *at)
    assert cli.json("evict", "s3://models/m", *at)["evicted_objects"] == 1
    assert cli.json("ls")["objects"] == []
    assert cli.json("gc")["objects"] == 0
    assert blobs(cli) == []


def test_warm_takes_one_object_and_pins(cli: Cli, bucket: LyingServer, place: Path | None) -> None:
    at = ("--endpoint-url", bucket.endpoint_url)
    (warmed,) = cli.json("warm", "s3://models/m/weights.bin", "--pin", *at)["warmed"]
    assert (warmed["objects_total"], warmed["fetched_bytes"]) == (1, len(DATA))
    assert [item["pinned"] for item in cli.json("ls")["objects"]] == [True]
    nothing = cli.run("warm", "s3://models/m/nothing", *at, code=2)
    assert nothing.stderr.startswith("cachefs: ")
    nobody = cli.run("warm", "s3://models/m", "--endpoint-url", "http://127.0.0.1:9", code=2)
    assert "cannot be reached" in nobody.stderr


def test_warm_goes_on_after_a_source_that_fails_and_tells_both(
    cli: Cli, bucket: LyingServer, place: Path | None
) -> None:
    at = ("--endpoint-url", bucket.endpoint_url)
    sources = ("s3://models/m/sub", "s3://models/nothing", "s3://models/m/weights.bin", "s3://models/none")
    done = cli.run("warm", *sources, *at, code=1)
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == [sources[0], sources[2]]
    complaints = [line for line in done.stderr.splitlines() if line.startswith("cachefs: ")]
    assert [source in line for source, line in zip(sources[1::2], complaints, strict=True)] == [True, True]
    told = cli.run("warm", *sources, *at, "--json", code=1)
    document = json.loads(told.stdout)
    assert [item["source"] for item in document["warmed"]] == [sources[0], sources[2]]
    assert [(item["source"], item["exit_code"]) for item in document["errors"]] == [(sources[1], 2), (sources[3], 2)]
    assert all(item["message"] and item["type"] == "UsageError" for item in document["errors"])
    assert len(told.stderr.splitlines()) == 2


def test_warm_fetches_nothing_when_one_argument_is_no_source(cli: Cli, bucket: LyingServer) -> None:
    done = cli.run("warm", "s3://models/m", "models/m", "--endpoint-url", bucket.endpoint_url, code=2)
    assert done.stdout == ""
    assert bucket.gets() == 0
    assert not cli.state_dir.exists()


def test_verify_finds_a_flipped_bit_and_repairs(cli: Cli, bucket: LyingServer) -> None:
    at = ("--endpoint-url", bucket.endpoint_url)
    cli.run("warm", "s3://models/m/weights.bin", *at)
    (blob,) = blobs(cli)
    with blob.open("r+b") as file:
        file.seek(5000)
        file.write(bytes([DATA[5000] ^ 1]))
    found = cli.run("verify", "--json", code=1)
    assert '"m/weights.bin"' in found.stdout
    repaired = cli.run("verify", "--repair").stdout.splitlines()
    assert repaired[0].endswith(": 1 bad")
    assert repaired[1] == "bad: s3://models/m/weights.bin chunk 0"
    # A chunk of a file that the kernel may have mapped goes with its whole file.
    assert repaired[2] in [f"{count} chunks given up: they are fetched again when they are read" for count in (1, 2)]
    cli.run("mount", "s3://models/m", cli.place(), *at)
    assert (cli.place() / "weights.bin").read_bytes() == DATA
    assert cli.json("verify")["bad"] == []


def test_unpin_and_evict_of_nothing_are_done_and_a_pin_from_above_is_named(
    cli: Cli, bucket: LyingServer, place: Path | None
) -> None:
    at = ("--endpoint-url", bucket.endpoint_url)
    cli.run("warm", "s3://models/m/weights.bin", *at)
    assert cli.json("unpin", "s3://models/m", *at)["pins"] == 0
    assert "nothing at s3://models/m was pinned" in cli.run("unpin", "s3://models/m", *at).stdout
    assert cli.json("evict", "s3://models/m/sub", *at)["evicted_objects"] == 0
    cli.run("pin", "s3://models/m", *at)
    refused = cli.run("unpin", "s3://models/m/weights.bin", *at, code=2)
    assert "s3://models/m: unpin that" in refused.stderr
    assert [item["pinned"] for item in cli.json("ls")["objects"]] == [True]
    assert cli.run("unpin", "s3://models/m", *at).stdout == "unpinned s3://models/m\n"
    assert [item["pinned"] for item in cli.json("ls")["objects"]] == [False]


def test_a_mounted_volume_lends_its_options(cli: Cli, bucket: LyingServer) -> None:
    cli.run("mount", "s3://models/m", cli.place(), "--endpoint-url", bucket.endpoint_url)
    (warmed,) = cli.json("warm", "s3://models/m/sub")["warmed"]
    assert warmed["fetched_bytes"] == len(SMALL)


def test_status_tells_what_warm_has_fetched_and_has_the_same_keys_without_a_server(
    cli: Cli, bucket: LyingServer
) -> None:
    cli.run("mount", "s3://models/m", cli.place(), "--endpoint-url", bucket.endpoint_url)
    cli.run("warm", "s3://models/m")
    served = cli.status()
    assert (served["cache"]["store_bytes"], served["cache"]["miss_bytes"]) == (TOTAL, 0)
    assert "fetched from the store in all: 9.0 MiB; evicted: 0 B" in cli.run("status").stdout.splitlines()
    cli.run("umount", cli.place())
    assert cli.status().keys() == served.keys()
    assert cli.status()["cache"] == dict.fromkeys(served["cache"], 0)
    assert "fetched" not in cli.run("status").stdout


def test_status_has_the_fields_that_scripts_rely_on(cli: Cli, bucket: LyingServer) -> None:
    place = cli.place()
    cli.run("mount", "s3://models/m", place, "--endpoint-url", bucket.endpoint_url)
    assert (place / "weights.bin").read_bytes() == DATA
    os.listdir(place / "sub")
    found = cli.status()
    assert found["server"]["pid"] > 1
    assert found["server"]["version"]
    assert found["keeper"]["pid"] > 1
    (volume,) = found["volumes"]
    assert volume["source"] == "s3://models/m"
    assert volume["mountpoint"] == str(place)
    assert volume["mode"] == "read-only"
    assert (volume["bytes_total"], volume["bytes_local"]) == (TOTAL, len(DATA))
    assert volume["objects_total"] == 2
    assert volume["listing_complete"] is True
    assert isinstance(volume["passthrough"], bool)
    assert volume["passthrough"] or volume["mode_reasons"]
    wait_for(lambda: cli.status()["volumes"][0]["objects_sealed"] == 1, "sealed")
    (tier,) = found["tiers"]
    assert tier["name"] == "local"
    assert len(DATA) <= tier["used_bytes"] <= tier["capacity_bytes"]
    assert found["cache"]["miss_bytes"] >= len(DATA)  # the kernel may ask twice for a page
    assert found["cache"]["store_bytes"] == len(DATA)
    assert found["cache"]["hit_bytes"] >= 0
    human = cli.run("status").stdout
    assert "s3://models/m" in human


def test_metrics_tell_what_status_tells(cli: Cli, bucket: LyingServer) -> None:
    (port,) = free_ports(1)
    cli.run(
        "mount", "s3://models/m", cli.place(), "--endpoint-url", bucket.endpoint_url, "--metrics", f"127.0.0.1:{port}"
    )
    assert (cli.place() / "weights.bin").read_bytes() == DATA
    wait_for(lambda: cli.status()["tiers"][0]["objects_sealed"] == 1, "sealed")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    assert float(lines['cachefs_read_bytes_total{result="miss",tier="store"}']) >= len(DATA)
    assert float(lines["cachefs_store_bytes_total"]) == len(DATA)
    assert float(lines['cachefs_used_bytes{tier="local"}']) >= len(DATA)
    assert float(lines['cachefs_store_requests_total{kind="get",result="ok"}']) == bucket.gets() == 2
    assert float(lines['cachefs_store_requests_total{kind="list",result="ok"}']) >= 1


def test_commands_wait_for_a_server_that_is_being_restarted(cli: Cli, bucket: LyingServer) -> None:
    cli.run("mount", "s3://models/m", cli.place(), "--endpoint-url", bucket.endpoint_url)
    first = cli.status()["server"]["pid"]
    os.kill(first, signal.SIGKILL)
    second = cli.status()["server"]
    assert (second["restarts"], second["pid"] != first) == (1, True)
    os.kill(second["pid"], signal.SIGKILL)
    (warmed,) = cli.json("warm", "s3://models/m")["warmed"]
    assert warmed["fetched_bytes"] == TOTAL
    assert cli.status()["cache"]["store_bytes"] == TOTAL  # the new server did it, not the command itself


def test_a_metrics_port_that_was_taken_does_not_keep_a_server_from_coming_back(cli: Cli, bucket: LyingServer) -> None:
    (port,) = free_ports(1)
    at = ("--endpoint-url", bucket.endpoint_url, "--metrics", f"127.0.0.1:{port}")
    cli.run("mount", "s3://models/m", cli.place(), *at)
    before = cli.status()
    os.kill(before["keeper"]["pid"], signal.SIGSTOP)  # it starts no server before the port is taken
    os.kill(before["server"]["pid"], signal.SIGKILL)
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wait_for(lambda: bind(thief, port), "the port is free")
        thief.listen()
        os.kill(before["keeper"]["pid"], signal.SIGCONT)
        assert (cli.place() / "weights.bin").read_bytes() == DATA
        wait_for(lambda: "no metrics for now" in cli.log(), "it is told")
    wait_for(lambda: answers(port), "metrics are back")


def bind(sock: socket.socket, port: int) -> bool:
    try:
        sock.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30):
            return True
    except OSError:
        return False


def test_ls_shows_objects_as_commands_take_them(cli: Cli, bucket: LyingServer) -> None:
    cli.run("mount", "s3://models/m", cli.place(), "--endpoint-url", bucket.endpoint_url)
    cli.run("warm", "s3://models/m")
    shown = [line.split()[-1] for line in cli.run("ls").stdout.splitlines()[1:]]
    assert sorted(shown) == ["s3://models/m/sub/small.txt", "s3://models/m/weights.bin"]
    for url in shown:
        assert cli.json("evict", url)["evicted_objects"] == 1


def test_logs_are_shown(cli: Cli, bucket: LyingServer) -> None:
    cli.run("mount", "s3://models/m", cli.place(), "--endpoint-url", bucket.endpoint_url, "--log-format", "json")
    assert '"event": "serving 1 volumes"' in cli.run("logs").stdout
    assert len(cli.json("logs", "-n", "1")["lines"]) == 1
