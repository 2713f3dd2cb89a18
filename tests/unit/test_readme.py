"""The tables of the README tell what the program has, no more and no less."""

import re
from pathlib import Path

import click

from cachefs.cli import group
from cachefs.metrics import Metrics

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def table_rows(section: str) -> list[tuple[str, ...]]:
    """The cells of the table under `## section`, without its two head lines and without backquotes."""
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [tuple(cell.strip().replace("`", "") for cell in line.strip("|").split("|")) for line in lines]


def test_metrics_table_is_the_list_of_metrics() -> None:
    built = [(row.name, row.kind, ", ".join(row.labels), row.help) for row in Metrics().table()]
    assert table_rows("Metrics") == built


def command_names(commands: click.Group, before: str = "") -> set[str]:
    names: set[str] = set()
    for name, command in commands.commands.items():
        if isinstance(command, click.Group):
            names |= command_names(command, f"{before}{name} ")
        else:
            names.add(before + name)
    return names


def test_command_table_is_the_list_of_commands() -> None:
    shown = {" ".join(re.findall(r"\b[a-z]+\b", row[0])[1:]) for row in table_rows("Commands")}
    assert shown == command_names(group)


def test_flags_that_the_readme_names_exist() -> None:
    parameters = [parameter for command in every_command(group) for parameter in command.params]
    options = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    named = set(re.findall(r"`?(--[a-z][a-z-]*)", README.replace("mypy --strict", "")))
    assert named <= options


def every_command(command: click.Command) -> list[click.Command]:
    inside = command.commands.values() if isinstance(command, click.Group) else ()
    return [command, *(deeper for one in inside for deeper in every_command(one))]
