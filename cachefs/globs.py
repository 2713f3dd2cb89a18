"""PURE. Which paths of a source a volume shows: `--include` and `--exclude`.

A path is relative to the source's prefix, without a leading slash. A pattern without a slash matches a name at
any depth (`*.safetensors`); one with a slash is anchored at the prefix (`onnx/*.onnx`, `/config.json`); `**`
stands for any number of directories, none included (`**/x`, `a/**/b`, `logs/**`); a slash at the end matches
directories only. `*` and `?` do not match a slash, `[a-z]` and `[!a-z]` are character classes. A pattern that
matches a directory matches all that is under it.

Without include patterns everything is included. Exclude wins. A directory that may lead to an included path is
shown, even if it turns out to have none: whether it has is known only after listing all that is under it.
"""

import re
from collections.abc import Sequence

from cachefs.errors import UsageError


def _segment_regex(segment: str) -> str:
    """The regular expression of one pattern segment: it never matches a slash."""
    out: list[str] = []
    position = 0
    while position < len(segment):
        char = segment[position]
        position += 1
        if char == "*":
            while segment[position : position + 1] == "*":  # a run of stars is one: no backtracking blow-up
                position += 1
            out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif char == "[":
            # A class is closed by the first "]" that is not its first member.
            close = segment.find("]", position + (2 if segment[position : position + 1] == "!" else 1))
            if close < 0:
                out.append(r"\[")
                continue
            negated = segment[position] == "!"
            members = segment[position + negated : close].replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
            out.append(f"(?!/)[{'^' if negated else ''}{members}]")
            position = close + 1
        else:
            out.append(re.escape(char))
    return "".join(out)


class _Pattern:
    """One compiled pattern."""

    def __init__(self, pattern: str) -> None:
        directories_only = pattern.endswith("/")
        body = pattern.strip("/")
        if not body or "" in body.split("/"):
            raise UsageError(f"the pattern {pattern!r} is empty or has an empty part: use one such as *.safetensors")
        self._floating = "/" not in pattern.rstrip("/") and body != "**"
        segments = body.split("/")
        try:
            self._segments = [None if segment == "**" else re.compile(_segment_regex(segment)) for segment in segments]
            regex = self._path_regex(segments)
            self._file = re.compile(regex + ("/.+" if directories_only else "(?:/.+)?"), re.DOTALL)
            self._directory = re.compile(regex + "(?:/.+)?", re.DOTALL)
        except re.error as exc:
            raise UsageError(f"the pattern {pattern!r} is not valid ({exc})") from exc

    def _path_regex(self, segments: Sequence[str]) -> str:
        """Matches the paths that the pattern names, without those under them."""
        regex = "(?:[^/]+/)*" if self._floating else ""
        last = len(segments) - 1
        for number, segment in enumerate(segments):
            if segment != "**":
                regex += _segment_regex(segment) + ("/" if number < last else "")
            elif number < last:
                regex += "(?:[^/]+/)*"
            else:
                regex += "[^/]+"  # all that is under it follows by itself
        return regex

    def matches(self, path: str, *, is_directory: bool) -> bool:
        return (self._directory if is_directory else self._file).fullmatch(path) is not None

    def may_lead_to(self, directory: str) -> bool:
        """Whether something under `directory` may match, though it does not itself."""
        if self._floating:
            return True
        for number, name in enumerate(directory.split("/")):
            if number >= len(self._segments):
                return False
            segment = self._segments[number]
            if segment is None:
                return True
            if segment.fullmatch(name) is None:
                return False
        return True


class Globs:
    """The compiled patterns of one volume. Raises UsageError for a pattern that makes no sense."""

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self._include = [_Pattern(pattern) for pattern in include]
        self._exclude = [_Pattern(pattern) for pattern in exclude]

    @property
    def shows_all(self) -> bool:
        return not self._include and not self._exclude

    def shows_file(self, path: str) -> bool:
        if any(pattern.matches(path, is_directory=False) for pattern in self._exclude):
            return False
        return not self._include or any(pattern.matches(path, is_directory=False) for pattern in self._include)

    def shows_directory(self, path: str) -> bool:
        if any(pattern.matches(path, is_directory=True) for pattern in self._exclude):
            return False
        return not self._include or any(
            pattern.matches(path, is_directory=True) or pattern.may_lead_to(path) for pattern in self._include
        )
