"""Has the machine find memory for the next turn: `python -m benchmarks.memory BYTES` takes it and lets it go.

The host of a virtual machine may have it to find: that took 19 ms for 8 MiB where 0.4 are usual, and whom it befell
was chance. In a process of its own: the peak of a benchmark's memory would be that of every program that it starts.
"""

import mmap
import os
import sys

from cachefs.buffers import Buffer


def find(size: int) -> None:
    """`size` bytes, or half of what is free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    Buffer(max(mmap.PAGESIZE, min(size, free // 2))).populate()


if __name__ == "__main__":
    find(int(sys.argv[1]))
