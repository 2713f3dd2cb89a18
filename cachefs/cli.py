"""The command line: parse arguments, call one function, print. Loads nothing heavy before a command needs it."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from cachefs import __version__, cli_csi, cli_data, cli_mount, cli_node, output, settings
from cachefs.cli_context import Command
from cachefs.errors import CachefsError

F = TypeVar("F", bound=Callable[..., Any])
HELP = {"help_option_names": ["-h", "--help"]}


def _stack(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _setting(*names: str, help: str, **more: Any) -> Callable[[F], F]:
    """An option that sets a setting; its help ends with the setting's default."""
    name = names[-1].lstrip("-").partition("/")[0].replace("-", "_")
    default = "" if more.get("is_flag") else settings.default_text(name)
    return click.option(*names, help=f"{help} [default: {default}]" if default else help, **more)


state_dir_option = _setting("--state-dir", metavar="DIR", help="Where the cache is kept.")
config_option = click.option(
    "--config",
    metavar="FILE",
    help="Settings as TOML. "
    f"[default: {settings.ROOT_CONFIG} as root, else ~/.config/{settings.USER_CONFIG}; none if it is not there]",
)
common = _stack(
    state_dir_option,
    config_option,
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
)
source_options = _stack(
    _setting("--endpoint-url", metavar="URL", help="Where the S3 service is, if it is not AWS."),
    _setting("--region", metavar="R", help="The bucket's region."),
    _setting("--profile", metavar="P", help="The profile of the AWS configuration to use."),
    _setting("--anonymous", is_flag=True, default=None, help="Send requests without credentials."),
    _setting("--store", type=click.Choice(["auto", "obstore", "fsspec"]), help="The library that fetches."),
)
volume_options = _stack(
    source_options,
    _setting("--mode", type=click.Choice(["read-only"]), help="What may be done with the tree."),
    _setting("--include", metavar="GLOB", multiple=True, help="Show only matching paths (repeatable)."),
    _setting("--exclude", metavar="GLOB", multiple=True, help="Hide matching paths (repeatable)."),
    _setting("--uid", metavar="N", help="The owner that files show."),
    _setting("--gid", metavar="N", help="The group that files show."),
    _setting(
        "--prefetch",
        type=click.Choice(["auto", "none", "all"]),
        help="What is fetched before it is read: a model's small files, nothing, everything.",
    ),
)
server_options = _stack(
    _setting("--cache-size", metavar="SIZE", help="Most bytes to keep: 50GiB, or 80% of the file system."),
    _setting("--prefetch-bytes", metavar="SIZE", help="Most bytes that background fetches have in flight; 0: none."),
    _setting("--offline", is_flag=True, default=None, help="Never ask the store."),
    _setting("--on-unreachable", type=click.Choice(["wait", "error"]), help="When the store does not answer."),
    _setting(
        "--read-timeout",
        "read_timeout_s",
        metavar="SECONDS",
        help="How long a read waits for the store; 0: for ever.",
    ),
    _setting("--metrics", metavar="HOST:PORT", help="Serve Prometheus metrics there."),
    _setting("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="What is logged."),
    _setting("--log-format", type=click.Choice(["text", "json"]), help="How lines of the log look."),
)
allow_other_option = _setting("--allow-other/--no-allow-other", default=None, help="Let other users read the mount.")


@click.group(context_settings=HELP)
@click.version_option(__version__, message="cachefs %(version)s")
def group() -> None:
    """A read-through cache file system for model files in object stores."""


group.add_command(cli_csi.csi)


@group.command()
@click.argument("source")
@click.argument("mountpoint")
@volume_options
@server_options
@allow_other_option
@click.option("-o", "options", metavar="OPTS", multiple=True, help="Settings as mount options: uid=1000,offline.")
@click.option("--foreground", is_flag=True, help="Stay until unmounted, log to the terminal.")
@common
def mount(source: str, mountpoint: str, foreground: bool, options: tuple[str, ...], **flags: Any) -> None:
    """Show SOURCE (s3://bucket/prefix, file:///directory) at MOUNTPOINT, a directory that is there and empty.

    Returns when the mount answers.
    """
    command = Command.of(cli_mount.with_mount_options(flags, options))
    done = cli_mount.mount(command, source, mountpoint, foreground=foreground)
    if command.as_json:
        output.document(done)
    elif done["already"]:
        click.echo(f"{source} is mounted on {done['mountpoint']} already")
    else:
        click.echo(f"{source} is mounted on {done['mountpoint']}")
    if foreground:
        cli_mount.wait_in_foreground(done)


@group.command()
@click.argument("mountpoint", required=False)
@click.option("--all", "everything", is_flag=True, help="Unmount everything of this state directory.")
@click.option("--lazy", is_flag=True, help="Unmount now what is busy; open files can be read to their end.")
@common
def umount(mountpoint: str | None, everything: bool, lazy: bool, **flags: Any) -> None:
    """Unmount MOUNTPOINT. Returns when it is gone, and the server too if it was its last mount."""
    command = Command.of(flags)
    done = cli_mount.umount(command, mountpoint, everything=everything, lazy=lazy)
    if command.as_json:
        output.document(done)
    else:
        for place in done["unmounted"]:
            click.echo(f"unmounted {place}")
        if done["in_use"]:
            click.echo("files are still open: the server ends when they are closed")


@group.command()
@click.argument("mountpoint")
@click.option("--python", metavar="PATH", help="The interpreter whose cachefs takes over (default: this one).")
@common
def upgrade(mountpoint: str, python: str | None, **flags: Any) -> None:
    """Hand MOUNTPOINT over to a server of the cachefs that is installed now; readers notice nothing."""
    command = Command.of(flags)
    done = cli_mount.upgrade(command, mountpoint, python or sys.executable)
    if command.as_json:
        output.document(done)
    else:
        click.echo(f"{mountpoint} is served by version {done['version']} (process {done['pid']})")


@group.command()
@common
def status(**flags: Any) -> None:
    """What is mounted, how much of it is local, what the cache did."""
    command = Command.of(flags)
    found = cli_data.status(command)
    if command.as_json:
        output.document(found)
    else:
        cli_data.print_status(found)


@group.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--pin", is_flag=True, help="Also exempt it from eviction.")
@source_options
@click.option("--include", metavar="GLOB", multiple=True, help="Only matching paths (repeatable).")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Not the matching paths (repeatable).")
@common
def warm(sources: tuple[str, ...], pin: bool, **flags: Any) -> None:
    """Fetch all of SOURCE into the cache: a prefix, or one object of it.

    A SOURCE that fails does not keep the others from being fetched; the exit code is then 1, or 2 when nothing was
    fetched and every request was wrong.
    """
    command = Command.of(flags)
    warmed: list[dict[str, Any]] = []
    errors: list[CachefsError] = []
    failed: list[dict[str, Any]] = []
    for source, outcome in cli_data.warm(command, sources, pin=pin):
        if isinstance(outcome, CachefsError):
            errors.append(outcome)
            failed.append({"source": source, **cli_data.describe(outcome)})
            output.complain(outcome)
            continue
        warmed.append(outcome)
        if not command.as_json:
            size, fetched = output.human_bytes(outcome["bytes_total"]), output.human_bytes(outcome["fetched_bytes"])
            click.echo(f"{outcome['source']}: {outcome['objects_total']} objects, {size}, {fetched} of it fetched now")
    if command.as_json:
        output.document({"warmed": warmed, "errors": failed})
    if errors:
        raise SystemExit(1 if warmed else min(error.exit_code for error in errors))


@group.command()
@click.argument("source", required=False)
@source_options
@common
def ls(source: str | None, **flags: Any) -> None:
    """The objects that are cached, wholly or in part: all, or those of SOURCE."""
    command = Command.of(flags)
    found = cli_data.work(command, "ls", source, {})
    if command.as_json:
        output.document(found)
        return
    rows = [
        (
            output.human_bytes(item["size_bytes"]),
            f"{100 * item['local_bytes'] // max(item['size_bytes'], 1)}%" if item["size_bytes"] else "100%",
            ",".join(word for word in ("sealed", "pinned", "open") if item[word]) or "-",
            item["url"],
        )
        for item in found["objects"]
    ]
    output.table(("SIZE", "LOCAL", "STATE", "OBJECT"), rows)


def _simple(name: str, help: str, say: Callable[[dict[str, Any]], str]) -> None:
    """A command that takes SOURCE[/PATH] and does one thing."""

    @group.command(name, help=help)
    @click.argument("source", metavar="SOURCE[/PATH]")
    @source_options
    @common
    def run(source: str, **flags: Any) -> None:
        command = Command.of(flags)
        result = cli_data.work(command, name, source, {})
        if command.as_json:
            output.document(result)
        else:
            click.echo(say(result))


def _say_evicted(result: dict[str, Any]) -> str:
    lines = [f"evicted {result['evicted_objects']} objects, {output.human_bytes(result['evicted_bytes'])}"]
    lines += [f"stays ({item['reason']}): {output.printable(item['path'])}" for item in result["skipped"]]
    return "\n".join(lines)


def _say_unpinned(result: dict[str, Any]) -> str:
    return f"unpinned {result['source']}" if result["pins"] else f"nothing at {result['source']} was pinned"


def _say_verified(result: dict[str, Any], *, repair: bool, rebuild: bool) -> str:
    size = output.human_bytes(result["bytes"])
    lines = [f"{result['objects']} objects, {result['chunks']} chunks, {size}: {len(result['bad'])} bad"]
    lines += [f"bad: {output.printable(item['url'])} chunk {item['chunk']}" for item in result["bad"]]
    if repair or rebuild:
        lines.append(f"{result['dropped_chunks']} chunks given up: they are fetched again when they are read")
    if rebuild:
        lines.append(f"{result['dropped_records']} records dropped, {result['deleted_blobs']} blobs deleted")
    return "\n".join(lines)


_simple("pin", "Exempt SOURCE[/PATH] from eviction.", lambda result: f"pinned {result['source']}")
_simple("unpin", "Take the pins of SOURCE[/PATH] back. Exit code 0 also when there were none.", _say_unpinned)
_simple(
    "evict",
    "Drop what is local of SOURCE[/PATH] and neither open nor pinned. Exit code 0 also when nothing was local.",
    _say_evicted,
)


@group.command()
@click.argument("source", required=False)
@click.option("--repair", is_flag=True, help="Give bad chunks up, so that they are fetched again.")
@click.option("--rebuild", is_flag=True, help="Also make records and blobs agree.")
@source_options
@common
def verify(source: str | None, repair: bool, rebuild: bool, **flags: Any) -> None:
    """Compare every local byte with its digest. Exit code 1 when something was bad and is not repaired."""
    command = Command.of(flags)
    with output.progress("verify", quiet=command.as_json) as show:
        result = cli_data.work(command, "verify", source, {"repair": repair, "rebuild": rebuild}, show)
    if command.as_json:
        output.document(result)
    else:
        click.echo(_say_verified(result, repair=repair, rebuild=rebuild))
    if result["bad"] and not (repair or rebuild):
        raise SystemExit(1)


@group.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@common
def gc(dry_run: bool, **flags: Any) -> None:
    """Delete blobs and records that nothing refers to."""
    command = Command.of(flags)
    result = cli_data.work(command, "gc", None, {"dry_run": dry_run})
    if command.as_json:
        output.document(result)
    else:
        word = "would be deleted" if dry_run else "deleted"
        freed = output.human_bytes(result["freed_bytes"])
        click.echo(f"{result['blobs']} blobs and {result['objects']} records {word}, {freed}")


@group.command()
@click.option("-n", "--lines", default=50, show_default=True, type=click.IntRange(0, 1_000_000))
@common
def logs(lines: int, **flags: Any) -> None:
    """The last lines of the server's log."""
    command = Command.of(flags)
    found = cli_data.log_lines(command, lines)
    if command.as_json:
        output.document({"lines": found})
    else:
        for line in found:
            click.echo(line)


@group.command()
@click.option("--node-dir", metavar="DIR", required=True, help="The keeper's: root, run and cache are in it.")
@click.option("--allow-endpoint", metavar="URL", multiple=True, help="An endpoint that volumes may name (repeatable).")
@click.option("--allow-node-credentials", is_flag=True, help="Volumes without credentials may use this server's own.")
@click.option("--sts-endpoint", metavar="URL", help="Where service account tokens are changed into keys.")
@server_options
@click.option("--state-dir", metavar="DIR", help="Where the cache is kept. [default: NODE_DIR/cache]")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Log JSON lines, as --log-format json.")
def serve(as_json: bool, **flags: Any) -> None:
    """Serve a node's volumes to the CSI driver (in a Kubernetes pod, as an unprivileged user). Runs until SIGTERM."""
    cli_node.serve({**flags, "log_format": "json"} if as_json else flags)


group.add_command(cli_node.keeper)


@group.group()
def config() -> None:
    """The settings."""


@config.command("show")
@click.option("--origin", is_flag=True, help="Also say where each value comes from.")
@volume_options
@server_options
@allow_other_option
@common
def config_show(origin: bool, **flags: Any) -> None:
    """Every setting as a command with the same flags would have it."""
    command = Command.of(flags)
    found = cli_data.settings(command, origin=origin)
    if command.as_json:
        output.document(found)
    elif origin:
        rows = [(name, str(item["value"]), item["origin"]) for name, item in found.items()]
        output.table(("SETTING", "VALUE", "ORIGIN"), rows)
    else:
        output.table(("SETTING", "VALUE"), [(name, str(value)) for name, value in found.items()])


def main() -> None:
    """Exit codes: 0 done, 1 the work failed, 2 the request was wrong or cannot be met."""
    # A parent may have left it ignored: then the exit status of a keeper in the foreground and of fusermount3 is lost.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        group.main(prog_name="cachefs", standalone_mode=False)
    except click.UsageError as exc:
        if isinstance(exc, click.exceptions.NoArgsIsHelpError):
            exc.show()
        else:
            command = exc.ctx.command_path if exc.ctx is not None else "cachefs"
            click.echo(f"cachefs: {exc.format_message().rstrip('.')}: see `{command} --help`", err=True)
        sys.exit(exc.exit_code)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except click.Abort:
        sys.exit(130)
    except CachefsError as exc:
        output.complain(exc)
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains at its end
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as exc:
        click.echo(f"cachefs: {exc.strerror or exc}" + (f": {exc.filename}" if exc.filename else ""), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
