"""Settings as users read of them, in docs/settings.md and in --help, are those of the code."""

import re
from pathlib import Path

import click
import click.testing
import pytest

from cachefs import cli, settings

DOCUMENT = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| (?:`(--[a-z-]+)` )?\| (?:(.*?) )?\| (.+) \|$", re.MULTILINE)


def flags_of(name: str) -> dict[str, str]:
    """The settings that a command has flags for, and the flags."""
    params = cli.group.commands[name].params
    return {str(each.name): each.opts[0] for each in params if each.name in settings.PARSERS}


def test_the_document_lists_every_setting_with_flag_and_default() -> None:
    flags = flags_of("mount")
    wanted = [(name, flags.get(name, ""), settings.default_text(name)) for name in settings.PARSERS]
    assert [(row[1], row[2] or "", row[3] or "") for row in ROW.finditer(DOCUMENT)] == wanted


def test_the_documents_names_of_kernel_features_are_those_that_are_known() -> None:
    meaning = next(row[4] for row in ROW.finditer(DOCUMENT) if row[1] == "kernel_disable")
    assert tuple(re.findall(r"`(\w+)`", meaning)) == settings.KERNEL_FEATURES


def test_the_documents_example_is_a_file_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)[0])
    found = settings.resolve({"state_dir": str(tmp_path)}, {}, uid=0, gid=0, config=path)
    assert {item.origin for item in found.items.values()} == {str(path), "--state-dir", "default"}
    assert found["exclude"] == ("*.bin", "original/*")


def test_the_document_names_the_usual_files() -> None:
    assert f"`{settings.ROOT_CONFIG}`" in DOCUMENT
    assert f"`~/.config/{settings.USER_CONFIG}`" in DOCUMENT


@pytest.mark.parametrize("name", sorted(settings.DEFAULTS.keys() - settings.DEFAULTS_IN_WORDS))
def test_a_default_as_it_is_shown_is_the_one_that_counts(name: str) -> None:
    shown, counts = settings.default_text(name), settings.resolve({}, {}, uid=1, gid=1)[name]
    assert settings.PARSERS[name](shown) == counts if shown else counts in (None, ())


@pytest.mark.parametrize("command", ["mount", "serve", "warm"])
def test_help_shows_the_default_of_every_setting_that_has_one(command: str) -> None:
    found = cli.group.commands[command]
    for option in found.params:
        if not isinstance(option, click.Option) or option.name not in settings.PARSERS or option.is_flag:
            continue
        own = command == "serve" and option.name == "state_dir"
        default = "NODE_DIR/cache" if own else settings.default_text(option.name)
        assert (option.help or "").endswith(f"[default: {default}]") == bool(default), option.name
    shown = " ".join(click.testing.CliRunner().invoke(cli.group, [command, "--help"]).output.split())
    assert "[default: /etc/cachefs/config.toml as root" in shown
