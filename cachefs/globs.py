"""PURE. Which paths of a source a volume shows: `--include` and `--exclude`.

A path is relative to the source's prefix, without a leading slash. A pattern without a slash matches a name at
any depth (`*.safetensors`); one with a slash is anchored at the prefix (`onnx/*.onnx`, `/config.json`); `**`
stands for any number of directories, none included (`**/x`, `a/**/b`, `logs/**`); a slash at the end matches
directories only. `*` and `?` do not match a slash, `[a-z]` and `[!a-z]` are character classes. A pattern that
matches a directory matches all that is under it.

Without include patterns everything is included. Exclude wins. A directory that may lead to an included path is
shown, even if it turns out to have none: whether it has is known only after listing all that is under it.

Whoever may start a pod writes patterns, and names, for a server that others share. So nothing here ever goes back:
all patterns are one automaton over the parts of a path, all segments that need it one over the characters of a part.
A state is a bit of an integer, and a step of all of them is a shift and two masks, whatever the patterns are.
"""

import bisect
from collections.abc import Iterable, Sequence

import msgspec

from cachefs.errors import UsageError

CODE_POINTS = 0x110000
NAME_COST = 64
"""What a name costs with the shortest patterns: 0.5 to 2 us."""

_Ranges = list[tuple[int, int]]
"""The characters that one element of a segment matches: code points from the first to before the second."""


class _Segment(msgspec.Struct, frozen=True):
    """One part of a pattern: elements of one character each. A star stands before element `n` for n in `stars`."""

    elements: tuple[tuple[tuple[int, int], ...], ...]
    stars: frozenset[int]


def _parse_segment(segment: str) -> _Segment:
    """Raises UsageError for a class such as [z-a]."""
    elements: list[_Ranges] = []
    stars: set[int] = set()
    position = 0
    while position < len(segment):
        char = segment[position]
        position += 1
        if char == "*":
            stars.add(len(elements))
        elif char == "?":
            elements.append([(0, CODE_POINTS)])
        # A class is closed by the first "]" that is not its first member.
        elif char == "[" and (close := segment.find("]", position + 1 + segment.startswith("!", position))) >= 0:
            negated = segment[position] == "!"
            ranges = _parse_class(segment[position + negated : close])
            elements.append(_complement(ranges) if negated else ranges)
            position = close + 1
        else:
            elements.append([(ord(char), ord(char) + 1)])
    return _Segment(tuple(tuple(ranges) for ranges in elements), frozenset(stars))


def _parse_class(members: str) -> _Ranges:
    """Sorted, none touching another."""
    found = []
    position = 0
    while position < len(members):
        first = last = members[position]
        position += 1
        if members.startswith("-", position) and position + 1 < len(members):
            last = members[position + 1]
            position += 2
        if last < first:
            raise UsageError(f"bad character range {first}-{last}")
        found.append((ord(first), ord(last) + 1))
    merged: _Ranges = []
    for start, end in sorted(found):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _complement(ranges: _Ranges) -> _Ranges:
    edges = [0, *(edge for pair in ranges for edge in pair), CODE_POINTS]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


class _Characters:
    """The automaton of several segments: bit `base + n` says that the first n elements of a segment have matched."""

    def __init__(self, segments: Iterable[tuple[_Segment, int]]) -> None:
        """Each with its mask: what match() gives for it."""
        self._starts = self._stays = self._accepts = 0
        self._masks: dict[int, int] = {}  # accepting bit -> mask
        edges: dict[int, int] = {0: 0}  # code point -> bits of the elements whose ranges begin or end there
        base = 0
        for segment, mask in segments:
            self._starts |= 1 << base
            for star in segment.stars:
                self._stays |= 1 << (base + star)
            for number, ranges in enumerate(segment.elements, 1):
                for edge in (edge for pair in ranges for edge in pair):
                    edges[edge] = edges.get(edge, 0) ^ (1 << (base + number))
            base += len(segment.elements)
            self._accepts |= 1 << base
            self._masks[base] = mask
            base += 1
        self._edges = sorted(edges)
        self._steps: list[int] = []  # from that edge to the next: the elements that match
        bits = 0
        same: dict[int, int] = {}  # between two letters there is mostly the same as elsewhere: kept once
        for edge in self._edges:
            bits ^= edges[edge]
            self._steps.append(same.setdefault(bits, bits))
        self._ascii = [self._step(code) for code in range(128)]

    def _step(self, code: int) -> int:
        return self._steps[bisect.bisect_right(self._edges, code) - 1]

    def match(self, text: str) -> int:
        """The masks of all segments that match, together."""
        live, stays, steps = self._starts, self._stays, self._ascii
        for code in map(ord, text):
            step = steps[code] if code < 128 else self._step(code)
            live = ((live << 1) & step) | (live & stays)
            if not live:
                return 0
        live &= self._accepts
        found = 0
        while live:
            found |= self._masks[live.bit_length() - 1]
            live ^= 1 << (live.bit_length() - 1)
        return found


class _Parts:
    """Which of many segments match a part of a path; a segment is known by the mask that stands for it.

    Most are literal, or literal but for one star: those are compared by themselves, without looking at each character.
    """

    def __init__(self, masks: dict[str, int], parsed: dict[str, _Segment]) -> None:
        """Of each segment the mask that stands for it, and its parts."""
        self._equal: dict[str, int] = {}
        self._ends: list[tuple[str, str, int, int]] = []  # start, end, length of both, mask
        others = []
        for segment, mask in masks.items():
            head, star, tail = segment.partition("*")
            tail = tail.lstrip("*")
            if any(char in head + tail for char in "*?["):
                others.append((parsed[segment], mask))
            elif star:
                self._ends.append((head, tail, len(head) + len(tail), mask))
            else:
                self._equal[segment] = mask
        self._characters = _Characters(others)
        self._others = 0
        for _, mask in others:
            self._others |= mask

    def match(self, part: str, wanted: int) -> int:
        """The masks of the segments that match `part`; those that are not in `wanted` may be left out."""
        found = self._equal.get(part, 0)
        length = len(part)
        for head, tail, least, mask in self._ends:
            if mask & wanted and length >= least and part.startswith(head) and part.endswith(tail):
                found |= mask
        if self._others & wanted:
            found |= self._characters.match(part)
        return found


class Place(msgspec.Struct, frozen=True):
    """What the patterns have matched of a directory's path: `live` are the states of those that may go on."""

    live: int
    included: bool
    excluded: bool


def _segments(pattern: str) -> list[str]:
    body = pattern.strip("/")
    if not body or "" in body.split("/"):
        raise UsageError(f"the pattern {pattern!r} is empty or has an empty part: use one such as *.safetensors")
    segments = body.split("/")
    if len(segments) == 1 and not pattern.startswith("/"):
        segments.insert(0, "**")  # a name at any depth
    return segments


class Globs:
    """The compiled patterns of one volume. Raises UsageError for a pattern that makes no sense.

    Of `Place.live` bit `base + n` says that the first n segments of a pattern have matched. A `**` is no segment: its
    state stays; at the end of a pattern, where it stands for at least one part, it is a segment that always matches.
    """

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self._starts = self._stays = self._any = 0
        self._includes = self._excludes = self._directories_only = 0  # accepting states
        masks: dict[str, int] = {}
        parsed: dict[str, _Segment] = {}
        base = 0
        self._include_states = 0
        # Patterns that stand there twice are one.
        for is_include, pattern in dict.fromkeys([(True, one) for one in include] + [(False, one) for one in exclude]):
            self._starts |= 1 << base
            segments = _segments(pattern)
            try:
                parsed |= {segment: _parse_segment(segment) for segment in segments if segment not in parsed}
            except UsageError as exc:
                raise UsageError(f"the pattern {pattern!r} is not valid ({exc})") from exc
            for number, segment in enumerate(segments, 1):
                if segment != "**":
                    base += 1
                    masks[segment] = masks.get(segment, 0) | 1 << base
                elif number < len(segments):
                    self._stays |= 1 << base
                else:
                    base += 1
                    self._any |= 1 << base
            if is_include:
                self._includes |= 1 << base
                self._include_states = (2 << base) - 1  # they come first
            else:
                self._excludes |= 1 << base
            if pattern.endswith("/"):
                self._directories_only |= 1 << base
            base += 1
        self._parts = _Parts(masks, parsed)
        self.shows_all = base == 0
        self.cost = NAME_COST + base + sum(map(len, masks))
        """How long a name of 255 characters takes at most, in about 25 ns."""

    def inside(self, directory: str) -> Place:
        """Where shows() looks for the names of a directory (`""` is the root)."""
        place = Place(self._starts, False, False)
        for part in directory.split("/") if directory else ():
            live = self._next(place.live, part)
            included = place.included or bool(live & self._includes)
            place = Place(live, included, place.excluded or bool(live & self._excludes))
        return place

    def _next(self, live: int, part: str) -> int:
        wanted = live << 1
        return (self._parts.match(part, wanted) | self._any) & wanted | live & self._stays

    def shows(self, place: Place, name: str, *, is_directory: bool) -> bool:
        """Whether a name of the directory that inside() was asked about is shown."""
        if place.excluded:
            return False
        live = self._next(place.live, name)
        done = live if is_directory else live & ~self._directories_only
        if done & self._excludes:
            return False
        if not self._includes or place.included or done & self._includes:
            return True
        return is_directory and bool(live & self._include_states)

    def shows_file(self, path: str) -> bool:
        """Whether the file at `path` is shown."""
        directory, _, name = path.rpartition("/")
        return self.shows(self.inside(directory), name, is_directory=False)

    def shows_directory(self, path: str) -> bool:
        """Whether the directory at `path` is shown."""
        directory, _, name = path.rpartition("/")
        return self.shows(self.inside(directory), name, is_directory=True)
