"""What every command has: its resolved settings, who runs it, and where the server of its state directory is."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from cachefs import client, settings
from cachefs.client import ServerGone
from cachefs.config import ServerConfig, VolumeConfig
from cachefs.errors import StateBusy, UsageError
from cachefs.kernel.locks import KEEPER_LOCK, is_locked, owner_of
from cachefs.settings import Settings


class Command(msgspec.Struct, frozen=True):
    """One run of the command line."""

    settings: Settings
    uid: int
    as_json: bool
    environ: Mapping[str, str]

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> "Command":
        """From click's parameters. Raises UsageError for values that make no sense."""
        chosen = dict(flags)
        as_json, config = bool(chosen.pop("as_json")), chosen.pop("config")
        uid = os.geteuid()
        if unknown := settings.unknown_variables(os.environ):
            # No error: unlike a file that was written for cachefs, the environment is everybody's.
            click.echo(
                f"cachefs: no such setting, left out: {', '.join(unknown)} (see `cachefs config show`)", err=True
            )
        resolved = settings.resolve(chosen, os.environ, uid=uid, gid=os.getegid(), config=config)
        return cls(resolved, uid, as_json, os.environ)

    @property
    def state_dir(self) -> Path:
        return Path(self.settings["state_dir"])

    @property
    def runtime_dir(self) -> Path:
        return settings.runtime_dir(self.settings, self.environ, self.uid)

    def check_owner(self) -> None:
        """Raises StateBusy when a live session of another state directory has this one's runtime directory.

        By default that is named after the state directory; CACHEFS_RUNTIME_DIR may say the same for several.
        """
        owner, ours = owner_of(self.runtime_dir), os.path.realpath(self.state_dir)
        if owner in ("", ours) or not (is_locked(self.runtime_dir / KEEPER_LOCK) or self._answers()):
            return
        raise StateBusy(
            f"the runtime directory {self.runtime_dir} is in use by the state directory {owner}, not by {ours}: "
            "give each a runtime directory of its own (CACHEFS_RUNTIME_DIR), or none"
        )

    def _answers(self) -> bool:
        """Whether there is a server, maybe one whose keeper has just died."""
        try:
            client.call(self.runtime_dir, "ping", timeout_s=5.0)
        except ServerGone:
            return False
        return True

    def server_config(self) -> ServerConfig:
        return settings.server_config(self.settings, self.environ, self.uid)

    def volume_config(self, source: str) -> VolumeConfig:
        return settings.volume_config(self.settings, check_source(source))

    def source_config(self, source: str) -> VolumeConfig:
        """SOURCE[/PATH] of a data command: only what finds it counts."""
        config = self.volume_config(source)
        return msgspec.structs.replace(config, name="", uid=0, gid=0, prefetch="auto")


def check_source(source: str) -> str:
    """The source without slashes at its end. Raises UsageError for what cannot be one."""
    from cachefs.store.open import SCHEMES

    scheme, separator, rest = source.partition("://")
    known = ", ".join(f"{name}://" for name in SCHEMES)
    if not separator:
        raise UsageError(f"{source!r} is no source: write it like s3://bucket/prefix (known: {known})")
    if scheme not in SCHEMES:
        raise UsageError(f"the scheme of {source!r} is unknown: the known ones are {known}")
    if re.search(r"[\0-\x1f]", source):
        raise UsageError(f"{source!r} has control characters")
    if not rest.strip("/") and scheme != "file":
        raise UsageError(f"{source!r} names no bucket: write it like s3://bucket/prefix")
    if scheme == "file":
        return f"file://{os.path.abspath(rest)}" if rest.startswith("/") else source
    return f"{scheme}://{rest.rstrip('/')}"
