"""What the benchmarks' networks are made of, without making one."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.harness import BenchError
from benchmarks.links import PLANS, LinkPlan, bytes_served, links, lua_for, nginx_config, shaping_command
from benchmarks.origin import NAMESPACE, etag_of, listing


def config_of(plan: LinkPlan) -> str:
    where = {"root": Path("/buckets"), "origin": Path("/o.sock"), "work": Path("/w")}
    return nginx_config(plan, listen="127.0.0.1:1", **where)


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda plan: plan.name)
def test_every_configuration_is_balanced_and_names_its_files(plan: LinkPlan) -> None:
    text = config_of(plan)
    assert text.count("{") == text.count("}")
    for part in ("root /buckets;", "http://unix:/o.sock:", "access_log /w/access.log bytes;", "master_process off;"):
        assert part in text


def test_a_plain_link_has_no_delay_no_limit_and_no_faults() -> None:
    text = config_of(PLANS["loopback"])
    assert lua_for(PLANS["loopback"]) == ""
    for part in ("ngx.sleep", "limit_rate ", "ssl_certificate", "dice"):
        assert part not in text


def test_a_slow_link_waits_before_lists_and_objects_and_limits_each_connection() -> None:
    text = config_of(PLANS["slow"])
    assert text.count("ngx.sleep(0.030)") == 2
    assert "limit_rate 90m;" in text


def test_faults_are_a_share_of_all_and_keep_the_delay() -> None:
    lua = lua_for(LinkPlan("x", first_byte_ms=30, unavailable_share=0.25, cut_share=0.5))
    assert "dice < 0.25 then return ngx.exit(503)" in lua
    assert 'dice < 0.75 then return ngx.exec("@cut")' in lua
    assert "ngx.sleep(0.030)" in lua


def test_the_slow_link_with_faults_is_the_slow_link_but_for_them() -> None:
    slow, faults = PLANS["slow"], PLANS["faults"]
    assert (slow.first_byte_ms, slow.connection_mb_per_s) == (faults.first_byte_ms, faults.connection_mb_per_s)
    assert faults.unavailable_share + faults.cut_share == pytest.approx(0.2)


def test_tls_is_served_with_a_certificate_of_the_run() -> None:
    text = config_of(PLANS["tls"])
    assert "listen 127.0.0.1:1 ssl" in text
    assert "ssl_certificate /w/server.pem;" in text


def test_a_burst_holds_a_whole_segment_of_the_kernels() -> None:
    """TBF drops what is larger than its burst, and the kernel sends up to 64 KiB at once."""
    for plan in (PLANS["constrained"], LinkPlan("thin", total_mbit_per_s=10)):
        words = shaping_command(plan, "veth9")
        given = dict(zip(words[7::2], words[8::2], strict=True))
        assert given["rate"] == f"{plan.total_mbit_per_s}mbit"
        assert int(given["burst"]) >= 2 * 64 * 1024
        assert int(given["limit"]) >= int(given["burst"])


def test_only_bodies_of_good_answers_under_the_prefix_are_counted() -> None:
    log = (
        "GET 206 100 /bench/one/a b.bin\nGET 200 20 /bench/one/c\nGET 503 190 /bench/one/c\nHEAD 200 0 /bench/one/c\n"
        "GET 200 900 /bench\nGET 206 5 /juicefs/x\nhalf a line"
    )
    assert bytes_served(log, "/bench/one/") == 120
    assert bytes_served("", "/bench/one/") == 0


def test_an_unknown_link_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no such link: moon"), links(["moon"], tmp_path, tmp_path):
        pass


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    for name in ("one/model.bin", "one/sub/a", "one/sub/b", "two & three"):
        path = tmp_path / "bench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "bench"


def texts(xml: str, path: str) -> list[str | None]:
    return [one.text for one in ElementTree.fromstring(xml).findall(path, {"s3": NAMESPACE})]


def test_a_list_groups_by_the_delimiter_and_has_nginxs_etags(bucket: Path) -> None:
    xml = listing(bucket, {"prefix": "one/", "delimiter": "/", "list-type": "2"})
    assert texts(xml, "s3:Contents/s3:Key") == ["one/model.bin"]
    assert texts(xml, "s3:CommonPrefixes/s3:Prefix") == ["one/sub/"]
    status = (bucket / "one/model.bin").stat()
    assert texts(xml, "s3:Contents/s3:ETag") == [etag_of(status)] == [f'"{int(status.st_mtime):x}-{status.st_size:x}"']


def test_a_list_without_delimiter_has_all_keys_and_escapes_them(bucket: Path) -> None:
    xml = listing(bucket, {})
    assert texts(xml, "s3:Contents/s3:Key") == ["one/model.bin", "one/sub/a", "one/sub/b", "two & three"]
    assert texts(xml, "s3:IsTruncated") == ["false"]


def test_a_list_that_is_cut_says_so(bucket: Path) -> None:
    xml = listing(bucket, {"max-keys": "1"})
    assert texts(xml, "s3:Contents/s3:Key") == ["one/model.bin"]
    assert texts(xml, "s3:IsTruncated") == ["true"]
