"""From a source to its store: what is refused, and what is loaded."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cachefs.errors import UsageError
from tests.store.conftest import open_with


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "s3://"),
        ("bucket/prefix", "s3://"),
        ("S3://bucket", "s3://"),
        ("ftp://host/x", "file://"),
        ("s3:/bucket", "s3://"),
        ("s3://", "no bucket"),
        ("s3:///prefix", "no bucket"),
        ("s3://-bad/x", "bucket"),
        ("s3://with space/x", "bucket"),
        ("s3://bucket:80/x", "bucket"),
        ("s3://user@bucket/x", "bucket"),
        ("s3://x/x", "bucket"),
        ("s3://bucket/a\x00b", "NUL"),
        ("file://", "ABSOLUTE"),
        ("file://relative", "ABSOLUTE"),
        ("file:///a\x00b", "NUL"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused_with_one_line(source: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        open_with(source)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "options",
    [
        {"endpoint_url": "127.0.0.1:9000"},
        {"endpoint_url": "ftp://127.0.0.1"},
        {"endpoint_url": "http://"},
        {"endpoint_url": "http://127.0.0.1:port"},
        {"endpoint_url": "http://127.0.0.1:99999"},
        {"endpoint_url": "http://user:hunter2@127.0.0.1:9000"},
        {"endpoint_url": "http://127.0.0.1:9000?x=y"},
        {"anonymous": True, "profile": "x"},
        {"timeout_s": 0},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        open_with("s3://bucket", **options)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("options", [{"store": "obstore"}, {"endpoint_url": "http://127.0.0.1:9"}], ids=str)
def test_a_directory_takes_no_options_of_s3(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="s3://"):
        open_with("file:///tmp", **options)


@pytest.mark.parametrize("library", ["auto", "obstore", "fsspec"])
@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket//a", "s3://bucket//a"),
        ("s3://bucket/a//", "s3://bucket/a/"),
        ("s3://bucket/a%20b#c?d", "s3://bucket/a%20b#c?d"),
    ],
)
def test_url_and_identity(library: str, source: str, url: str) -> None:
    store = open_with(source, endpoint_url="http://127.0.0.1:9/", store=library)
    assert (store.url, store.identity) == (url, "s3://bucket@http://127.0.0.1:9")
    store.close()
    aws = open_with(source, store=library)
    assert (aws.url, aws.identity) == (url, "s3://bucket")
    aws.close()


@pytest.mark.parametrize("library", ["auto", "obstore", "fsspec"])
@pytest.mark.parametrize("content", [None, "", "no certificate"])
def test_a_file_of_certificates_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, content: str | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(path))
    with pytest.raises(UsageError, match="AWS_CA_BUNDLE"):
        open_with("s3://bucket", endpoint_url="https://127.0.0.1:9", store=library)


def test_a_region_is_found_without_asking_anyone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    store = open_with("s3://bucket")
    assert store.identity == "s3://bucket"
    store.close()


def test_only_what_a_source_needs_is_loaded() -> None:
    program = """
import sys
from cachefs.config import VolumeConfig
from cachefs.store.open import open_store
def loaded():
    return sorted({"obstore", "s3fs", "fsspec", "botocore", "aiobotocore"} & set(sys.modules))
assert loaded() == [], loaded()
open_store(VolumeConfig(name="x", source="file:///tmp"), get_timeout_s=1, list_timeout_s=1)
assert loaded() == [], loaded()
open_store(VolumeConfig(name="x", source="s3://bucket"), get_timeout_s=1, list_timeout_s=1)
assert loaded() == [], loaded()
open_store(VolumeConfig(name="x", source="s3://bucket", store="obstore"), get_timeout_s=1, list_timeout_s=1)
assert loaded() == ["obstore"], loaded()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
