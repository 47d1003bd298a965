"""Write GGUF files: version 3, little-endian, tensors streamed one at a time.

The layout is read back by `pocketphi.core.gguf`, where it is described. Order, padding and types depend
on the arguments alone, so equal models give equal bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.core.errors import EngineError, UserError
from pocketphi.core.gguf import DEFAULT_ALIGNMENT, TYPE_BY_NAME

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _INT64 = 4, 5, 6, 7, 8, 9, 10, 11


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to write: `shape` is row-major (rows first), `type` a GGUF type name such as "Q4_K"."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def num_bytes(self) -> int:
        kind = TYPE_BY_NAME[self.type]
        if self.shape[-1] % kind.block_size:
            raise EngineError(
                f"{self.name}: rows of {self.shape[-1]} weights do not fill {self.type} blocks "
                f"of {kind.block_size}"
            )
        total = 1
        for size in self.shape:
            total *= size
        return total // kind.block_size * kind.block_bytes


def write_gguf(
    path: Path | str,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorPlan],
    data: Callable[[TensorPlan], Any],
) -> int:
    """Write a GGUF file under a temporary name and rename it; return its size in bytes.

    `data` is asked for the bytes of each tensor in the order of `tensors`. Raises EngineError when it
    gives another number of bytes than the plan says, UserError when a metadata value has no GGUF type.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _string(key) + _value(key, value)
    offset = 0
    for plan in tensors:
        header += _string(plan.name) + struct.pack("<I", len(plan.shape))
        header += struct.pack(f"<{len(plan.shape)}Q", *reversed(plan.shape))
        header += struct.pack("<IQ", TYPE_BY_NAME[plan.type].id, offset)
        offset = _aligned(offset + plan.num_bytes)
    with open(temporary, "wb") as file:
        file.write(header)
        file.write(bytes(_aligned(len(header)) - len(header)))
        for plan in tensors:
            raw = memoryview(data(plan)).cast("B")
            if raw.nbytes != plan.num_bytes:
                raise EngineError(f"{plan.name}: {raw.nbytes} bytes to write, the plan says {plan.num_bytes}")
            file.write(raw)
            file.write(bytes(_aligned(raw.nbytes) - raw.nbytes))
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return size


def _aligned(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    """Return type and value: whole numbers as uint32 where they fit, floats as float32, arrays by their
    items (int32 for whole numbers, as the vocabulary's token types are)."""
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        if 0 <= value < 2**32:
            return struct.pack("<II", _UINT32, value)
        return struct.pack("<Iq", _INT64, value) if value < 0 else struct.pack("<IQ", _UINT64, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, (list, tuple)) and value:
        head = struct.pack("<I", _ARRAY)
        if all(isinstance(v, str) for v in value):
            return head + struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_string, value))
        if all(isinstance(v, bool) for v in value):
            return head + struct.pack("<IQ", _BOOL, len(value)) + bytes(value)
        if all(isinstance(v, int) for v in value):
            return head + struct.pack("<IQ", _INT32, len(value)) + np.array(value, "<i4").tobytes()
        if all(isinstance(v, (int, float)) for v in value):
            return head + struct.pack("<IQ", _FLOAT32, len(value)) + np.array(value, "<f4").tobytes()
    raise UserError(f"metadata '{key}': {type(value).__name__} {value!r:.60} has no GGUF type")
