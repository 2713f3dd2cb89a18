"""Loads a model directory as an engine does, in a process of its own, and prints what it saw as JSON.

`python -m benchmarks.load DIRECTORY`: every *.safetensors through mmap, every tensor copied out and digested; every
other file read and digested.
"""

import hashlib
import json
import sys
import time
from pathlib import Path


def load(directory: Path) -> dict[str, object]:
    """Digests by `file` and `file:tensor`, seconds to the first byte and to the last tensor, bytes looked at.

    The first-byte time covers open and the first 4 KiB of the first weights file. Digesting is not in `load_seconds`.
    """
    # Imported before the clock starts: loading libraries is no part of loading a model.
    import numpy as np
    from safetensors import safe_open

    files = sorted(path for path in directory.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    started = time.perf_counter()
    with weights[0].open("rb", buffering=0) as file:
        file.read(4096)
    first_byte_seconds = time.perf_counter() - started

    tensors: dict[str, np.ndarray] = {}
    first_tensor_seconds: float | None = None
    for path in weights:
        with safe_open(path, framework="numpy") as model:
            for name in model.keys():  # noqa: SIM118 -- not a dict, cannot be iterated
                tensors[f"{path.relative_to(directory)}:{name}"] = np.array(model.get_tensor(name))
                if first_tensor_seconds is None:
                    first_tensor_seconds = time.perf_counter() - started
    load_seconds = time.perf_counter() - started

    digests = {name: hashlib.sha256(tensor.tobytes()).hexdigest() for name, tensor in tensors.items()}
    digests |= {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {
        "first_byte_seconds": first_byte_seconds,
        "first_tensor_seconds": first_tensor_seconds,
        "load_seconds": load_seconds,
        "bytes": sum(path.stat().st_size for path in files),
        "tensors": len(tensors),
        "digests": digests,
    }


if __name__ == "__main__":
    json.dump(load(Path(sys.argv[1])), sys.stdout)
