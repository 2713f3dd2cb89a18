"""The README's table of metrics is the list in metrics.py."""

import re
from pathlib import Path

from cachefs.metrics import Metrics

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_lists_every_metric_with_kind_labels_and_help() -> None:
    lines = re.findall(r"^\| `(cachefs_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", README.read_text(), re.MULTILINE)
    listed = [(name, kind, tuple(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in lines]
    assert listed == [(row.name, row.kind, row.labels, row.help) for row in Metrics().table()]
