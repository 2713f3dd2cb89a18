"""What the cold benchmark measures: which workload on which link with which peer. Pure but for available()."""

from typing import NamedTuple

from .harness import BenchError, Target, program

MOUNTS = ("cachefs", "rclone", "s3fs", "juicefs", "mount-s3", "geesefs")
DOWNLOADS = ("s5cmd", "rclone-copy")
OBJECT_REFERENCES = ("loop", "gets", "fill")
"""They take one object. `fill` is `cachefs warm`: fetched, checked and stored, and nobody reads."""
REFERENCES = (*OBJECT_REFERENCES, "native")
PEERS = (*MOUNTS, *DOWNLOADS, *REFERENCES)

# Which prefix and file of the bucket a workload reads.
TARGETS = {
    "sequential": Target("one", "model.safetensors"),
    "last": Target("one", "model.safetensors"),
    "ordered": Target("one", "model.safetensors"),
    "shuffled": Target("one", "model.safetensors"),
    "parallel": Target("shards", ""),
    "shards": Target("shards", ""),
    "minilm": Target("minilm", ""),
    "gguf": Target("gguf", "model.gguf"),
    "gguf-large": Target("gguf-large", "model.gguf"),
}

# About 50 cells, each of 2 to 5 s with 512 MiB: five rounds end within a quarter of an hour on two cores.
SHORT: dict[str, dict[str, tuple[str, ...]]] = {
    "loopback": {
        "sequential": (*MOUNTS, *DOWNLOADS, *REFERENCES),
        "ordered": ("cachefs", "rclone", "s3fs"),
    },
    "slow": {
        "sequential": (*MOUNTS, *DOWNLOADS, "loop", "gets"),
        "last": ("cachefs", "rclone", "s3fs"),
    },
    "constrained": {
        "sequential": (*MOUNTS, *DOWNLOADS, "gets"),
        "shuffled": MOUNTS,
        "parallel": ("cachefs", "rclone", "s3fs"),
        "minilm": ("cachefs", "rclone", "s5cmd"),
        "gguf": ("cachefs", "rclone", "juicefs", "s5cmd", "rclone-copy"),
    },
    "tls": {"sequential": ("cachefs", "rclone", "s3fs", "loop", "fill")},
    "faults": {"sequential": ("cachefs", "rclone")},
}


class Cell(NamedTuple):
    link: str
    workload: str
    peer: str

    @property
    def label(self) -> str:
        """What the report calls the workload."""
        return f"{self.link} {self.workload}"


def target_of(workload: str) -> Target:
    return TARGETS[workload]


def peers_for(workload: str) -> tuple[str, ...]:
    """Those that can do it."""
    peers = (*MOUNTS, *DOWNLOADS, "native")
    return (*peers, *OBJECT_REFERENCES) if workload == "sequential" else peers


def cells(matrix: str, links: list[str], peers: str, workloads: str) -> list[Cell]:
    """`peers`, `workloads`: comma-separated names to keep, empty for all. BenchError for names that there are not."""
    kept_peers = peers.split(",") if peers else list(PEERS)
    kept_workloads = workloads.split(",") if workloads else list(TARGETS)
    for given, known, what in (
        (kept_peers, PEERS, "peer"),
        (kept_workloads, TARGETS, "workload"),
        (links, SHORT, "link"),
    ):
        for name in given:
            if name not in known:
                raise BenchError(f"no such {what}: {name} (known: {', '.join(known)})")
    full = {link: {workload: peers_for(workload) for workload in TARGETS} for link in SHORT}
    # A workload that is asked for by name is measured on all links.
    chosen = full if matrix == "full" or workloads else SHORT
    return [
        Cell(link, workload, peer)
        for link in links
        for workload, able in chosen[link].items()
        if workload in kept_workloads
        for peer in able
        if peer in kept_peers
    ]


def order_of(plan: list[Cell], number: int) -> list[Cell]:
    """The plan of one round: workload by workload, the peers of each in an order that turns from round to round."""
    ordered: list[Cell] = []
    for label in dict.fromkeys(cell.label for cell in plan):
        group = [cell for cell in plan if cell.label == label]
        shift = number % len(group)
        ordered += group[shift:] + group[:shift]
    return ordered


def available(plan: list[Cell]) -> tuple[list[Cell], list[str]]:
    """The cells whose programs are here, and a line for each peer that is not."""
    programs = {name: name for name in ("rclone", "s3fs", "juicefs", "mount-s3", "geesefs", "s5cmd")}
    programs["rclone-copy"] = "rclone"
    missing: dict[str, str] = {}
    for peer in dict.fromkeys(cell.peer for cell in plan):
        if peer in programs:
            try:
                program(programs[peer])
            except BenchError:
                missing[peer] = f"skipped: {peer} is not installed"
    return [cell for cell in plan if cell.peer not in missing], list(missing.values())
