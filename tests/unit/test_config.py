"""Where settings come from, what values make sense, and that a configuration survives its way to the server."""

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs import settings
from cachefs.config import GIB, MIB, MountConfig, ServerConfig, VolumeConfig, decode, encode
from cachefs.errors import UsageError

HOME = {"HOME": "/home/u"}


def resolve(environ: dict[str, str] | None = None, config: Path | None = None, **flags: object) -> settings.Settings:
    return settings.resolve(flags, {**HOME, **(environ or {})}, uid=1000, gid=1000, config=config)


def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('region = "file"\nstore = "fsspec"\nprofile = "file"\n')
    found = resolve({"CACHEFS_REGION": "env", "CACHEFS_PROFILE": "env"}, path, region="flag")
    assert (found["region"], found.items["region"].origin) == ("flag", "--region")
    assert (found["profile"], found.items["profile"].origin) == ("env", "CACHEFS_PROFILE")
    assert (found["store"], found.items["store"].origin) == ("fsspec", str(path))
    assert (found["log_level"], found.items["log_level"].origin) == ("info", "default")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("50GiB", 50 * GIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("512M", 512 * MIB),
        ("7mib", 7 * MIB),
        ("1048576", MIB),
        ("1B", 1),
    ],
)
def test_sizes_are_binary(text: str, count: int) -> None:
    assert settings.parse_size(text) == count


@given(st.integers(0, 2**60))
def test_a_plain_number_is_bytes(count: int) -> None:
    assert settings.parse_size(str(count)) == count


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert settings.parse_size(text) >= 0


@pytest.mark.parametrize("text", ["", "GiB", "5 GB", "1e9", "-1", "5 bananas", "80%", "0x10", "１GiB!"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        settings.parse_size(text)


def test_percentages_are_of_the_file_system(tmp_path: Path) -> None:
    usage = os.statvfs(tmp_path)
    found = resolve(state_dir=str(tmp_path), cache_size="10%")
    assert settings.cache_bytes(found, 1000) == int(usage.f_blocks * usage.f_frsize / 10)


def test_the_default_size_is_bounded_for_users_and_80_percent_for_root(tmp_path: Path) -> None:
    usage = os.statvfs(tmp_path)
    found = resolve(state_dir=str(tmp_path))
    assert settings.cache_bytes(found, 1000) <= 50 * GIB
    assert settings.cache_bytes(found, 0) == int(usage.f_blocks * usage.f_frsize * 0.8)


@pytest.mark.parametrize(
    "text",
    [
        "cache_sizes = 5",
        "cache_size = [1]",
        'cache_size = "much',
        "offline = 3.5",
        'kernel_disable = ["warp"]',
        "free_fraction_min = 2",
        "include = [1, 2]",
        "\xff",
        "[server]\nstate_dir = 'x'",
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=str(path)):
        settings.server_config(resolve(config=path, state_dir=str(tmp_path)), HOME, 1000)


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(UsageError, match="CACHEFS_OFFLINE"):
        resolve({"CACHEFS_OFFLINE": "maybe"})


def test_the_usual_file_is_read_if_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "cachefs").mkdir()
    (tmp_path / "cachefs" / "config.toml").write_text("offline = true\n")
    assert resolve({"XDG_CONFIG_HOME": str(tmp_path)})["offline"] is True
    assert resolve({"XDG_CONFIG_HOME": str(tmp_path / "none")})["offline"] is False


def test_root_and_users_have_their_own_places() -> None:
    user, root = resolve(), settings.resolve({}, HOME, uid=0, gid=0)
    assert user["state_dir"] == Path("/home/u/.cache/cachefs")
    assert root["state_dir"] == Path("/var/lib/cachefs")
    assert root["allow_other"] is True
    assert user["allow_other"] is False
    runtime = settings.runtime_dir(user, {"XDG_RUNTIME_DIR": "/run/user/1000"}, 1000)
    assert runtime.parent == Path("/run/user/1000/cachefs")
    assert settings.runtime_dir(root, {}, 0).parent == Path("/run/cachefs")


def test_a_socket_path_that_is_too_long_is_refused() -> None:
    with pytest.raises(UsageError, match="107 bytes"):
        settings.runtime_dir(resolve(), {"XDG_RUNTIME_DIR": "/" + "x" * 90}, 1000)


def test_only_what_was_chosen_must_agree_with_a_running_server(tmp_path: Path) -> None:
    found = resolve(state_dir=str(tmp_path), cache_size="64MiB", log_level="debug")
    config = settings.server_config(found, {"XDG_RUNTIME_DIR": "/run/u"}, 1000)
    assert settings.chosen_server_options(found, config) == {"cache_bytes_max": 64 * MIB, "log_level": "debug"}


def test_the_same_source_and_options_have_the_same_volume_name() -> None:
    one = settings.volume_config(resolve(), "s3://b/some/Model v1")
    assert settings.volume_config(resolve(), "s3://b/some/Model v1").name == one.name
    assert one.name.startswith("Model-v1-")
    for other in (
        settings.volume_config(resolve(), "s3://b/other/Model v1"),
        settings.volume_config(resolve(uid="7"), "s3://b/some/Model v1"),
        settings.volume_config(resolve(include=("*.bin",)), "s3://b/some/Model v1"),
    ):
        assert other.name != one.name


@given(st.text(min_size=1, max_size=80))
def test_any_source_gives_a_name_that_a_directory_can_have(source: str) -> None:
    name = settings.volume_name(VolumeConfig(name="", source=source))
    assert name not in (".", "..")
    assert name.isascii()
    assert "/" not in name
    assert len(name) < 64


def test_a_configuration_survives_its_way_to_the_server(tmp_path: Path) -> None:
    server = ServerConfig(
        state_dir=tmp_path, runtime_dir=tmp_path / "r", cache_bytes_max=5, kernel_disable=("resend",), metrics="h:1"
    )
    volume = VolumeConfig(name="n", source="s3://b/ü p", include=("*.x", "y"), uid=5)
    config = MountConfig(server=server, volumes=(volume,), mountpoint=tmp_path / "m", as_root=False, session="s")
    assert decode(encode(config)) == config


def test_prefetch_is_an_option_of_the_volume_and_its_default_changes_no_name() -> None:
    environ = {"CACHEFS_PREFETCH": "none"}
    assert settings.volume_config(resolve(environ, prefetch="all"), "s3://b/p").prefetch == "all"
    assert settings.volume_config(resolve(environ), "s3://b/p").prefetch == "none"
    assert settings.volume_config(resolve(), "s3://b/p").prefetch == "auto"
    with pytest.raises(UsageError, match="CACHEFS_PREFETCH"):
        resolve({"CACHEFS_PREFETCH": "some"})
    volume = VolumeConfig(name="", source="s3://b/p")
    old = msgspec.to_builtins(volume)
    del old["prefetch"]
    assert msgspec.convert(old, VolumeConfig).prefetch == "auto"
    digest = hashlib.blake2b(msgspec.json.encode(old), digest_size=5).hexdigest()
    assert settings.volume_name(volume) == f"p-{digest}"
    assert settings.volume_name(msgspec.structs.replace(volume, prefetch="all")) != f"p-{digest}"


def test_a_default_endpoint_is_for_s3_sources_only() -> None:
    found = settings.resolve({}, {"CACHEFS_ENDPOINT_URL": "http://127.0.0.1:1"}, uid=1, gid=1)
    assert settings.volume_config(found, "s3://bucket/x").endpoint_url == "http://127.0.0.1:1"
    assert settings.volume_config(found, "file:///x").endpoint_url is None
    chosen = settings.resolve({"endpoint_url": "http://127.0.0.1:1"}, {}, uid=1, gid=1)
    assert settings.volume_config(chosen, "file:///x").endpoint_url is not None  # refused later, with the reason
