"""Opens damaged copies of a GGUF file, in a process of its own: what crashes must not take the tests along.

    python -m tests.engine.mutations FILE BACKEND COUNT SEED FOLDER

For every copy a line of JSON: what was changed, and "loaded", or the class and message of the error. The
copy in work lies in FOLDER, so that after a crash it can be looked at.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np

HUGE = (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def header_bytes(raw: bytes) -> int:
    """Where the tensors' data begins, near enough: the header is where structure lies."""
    return max(64, raw.rfind(b".weight") + 64)


def mutate(raw: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Return what was done and a damaged copy."""
    data = bytearray(raw)
    head = min(header_bytes(raw), len(data) - 16)
    kind = ("flip", "flip many", "length", "truncate", "count", "cut out", "double", "weights", "name")[
        int(rng.integers(9))
    ]
    at = int(rng.integers(head))
    if kind == "flip":
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "flip many":
        for place in rng.integers(0, head, 1 + int(rng.integers(40))):
            data[place] = int(rng.integers(256))
    elif kind == "length":
        struct.pack_into("<Q", data, at, HUGE[int(rng.integers(len(HUGE)))])
    elif kind == "truncate":
        del data[int(rng.integers(len(data))) :]
    elif kind == "count":
        where = (4, 8, 16)[int(rng.integers(3))]  # version, tensors, keys
        struct.pack_into("<Q" if where > 4 else "<I", data, where, HUGE[int(rng.integers(6))])
    elif kind == "cut out":
        del data[at : at + 1 + int(rng.integers(64))]
    elif kind == "double":
        data[at:at] = data[at : at + 1 + int(rng.integers(64))]
    elif kind == "weights":
        for place in rng.integers(head, len(data), 64):
            data[place] = int(rng.integers(256))
    else:
        spots = [n for n in range(head - 7) if raw[n : n + 7] == b".weight"]
        place = spots[int(rng.integers(len(spots)))]
        data[place : place + 7] = rng.integers(32, 127, 7, np.uint8).tobytes()
    return f"{kind} at {at}", bytes(data)


def main() -> None:
    from pocketphi import engine
    from pocketphi.core.errors import PocketPhiError

    source, backend, count, seed, folder = sys.argv[1:]
    raw = Path(source).read_bytes()
    rng = np.random.default_rng(int(seed))
    path = Path(folder) / f"{backend}.gguf"
    for _ in range(int(count)):
        what, data = mutate(raw, rng)
        path.write_bytes(data)
        try:
            with engine.load(path, backend=backend, num_threads=1) as model:  # type: ignore[arg-type]
                ids = [3 % model.config.vocab_size, 1]
                model.generate(ids, max_new_tokens=2, stop_ids=[])
            result = {"what": what, "end": "loaded"}
        except PocketPhiError as error:
            result = {"what": what, "end": type(error).__name__, "message": error.message}
        except BaseException as error:  # a defect: reported as what it is
            result = {"what": what, "end": f"!{type(error).__name__}", "message": str(error)[:300]}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
