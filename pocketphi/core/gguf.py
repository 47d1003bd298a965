"""The GGUF container: metadata and the places of the tensors, without reading the weights.

A GGUF file is a header (magic, version, two counts), metadata (key, type, value), one description per
tensor, and the tensors' bytes, each at a multiple of `general.alignment`. The format is described at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; versions 2 and 3, little-endian, are read.

The file is untrusted. Every count, length, type, shape and offset is checked against the size of the
file before it is used, so that a damaged or hostile file ends in an error that names the place, never
in a read outside the file or in memory out of proportion to the file. Limits are the constants below.

    with GgufFile("model.gguf") as file:
        file.metadata["general.architecture"]      # "phi3"
        file.tensors["output_norm.weight"].shape   # (3072,)
        file.raw("output_norm.weight")             # memoryview over the mapped file

Nothing here needs numpy; `pocketphi.engine` turns raw blocks into numbers.
"""

from __future__ import annotations

import mmap
import struct
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pocketphi.core.errors import DataError, EngineError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Limits: far above any real file, far below what could exhaust memory.
MAX_METADATA = 65_536
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 1_024
MAX_STRING_BYTES = 16 << 20
MAX_ARRAY_ITEMS = 16 << 20
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
MAX_ELEMENTS = 1 << 40


@dataclass(frozen=True)
class TensorType:
    """A storage type: `block_bytes` bytes hold `block_size` numbers of one row."""

    id: int
    name: str
    block_size: int
    block_bytes: int


# id -> type, as in ggml.h. All that files may hold are named, so that a refusal can say what was found;
# which of them can be computed with is the engine's matter.
TENSOR_TYPES: dict[int, TensorType] = {
    id_: TensorType(id_, name, size, bytes_)
    for id_, name, size, bytes_ in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
    )
}
TYPE_BY_NAME: dict[str, TensorType] = {t.name: t for t in TENSOR_TYPES.values()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is in row-major order (rows first, the contiguous axis last: the
    reverse of how GGUF writes it); `offset` counts from the start of the file; `num_bytes` is exact."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


# Metadata value types.
_UINT8, _INT8, _UINT16, _INT16, _UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = range(10)
_UINT64, _INT64, _FLOAT64 = 10, 11, 12
_SCALARS = {
    _UINT8: ("B", 1),
    _INT8: ("b", 1),
    _UINT16: ("H", 2),
    _INT16: ("h", 2),
    _UINT32: ("I", 4),
    _INT32: ("i", 4),
    _FLOAT32: ("f", 4),
    _UINT64: ("Q", 8),
    _INT64: ("q", 8),
    _FLOAT64: ("d", 8),
}


class GgufFile:
    """A GGUF file, memory-mapped read-only.

    `metadata` maps keys to Python values (arrays are lists); `tensors` maps names to TensorInfo.
    Raises DataError when the file is missing, truncated or contradicts itself (with the offset), and
    EngineError when it is well formed but of a version, byte order or tensor type unknown here.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        try:
            with open(self.path, "rb") as file:
                self.num_bytes = file.seek(0, 2)
                if self.num_bytes:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot read the model file: {error}") from None
        if self._map is None:
            raise DataError(f"{self.path}: the file is empty")
        self._data = memoryview(self._map)
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor, a view into the mapped file (no copy).

        Raises EngineError when the file holds no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise EngineError(f"{self.path}: the file holds no tensor '{name}'")
        return self._data[info.offset : info.offset + info.num_bytes]

    def close(self) -> None:
        """Unmap the file, unless views of it are still in use (then they keep it alive)."""
        try:
            self._data.release()
            if self._map is not None:
                self._map.close()
        except BufferError:
            pass

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Parsing. `_at` is the next byte to read; `_take` is the only way forward.

    def _fail(self, problem: str, at: int | None = None) -> DataError:
        place = self._at if at is None else at
        return DataError(
            f"{self.path}: at byte {place}: {problem}", hint="the file is damaged or not a GGUF file"
        )

    def _take(self, count: int, what: str) -> int:
        """Return the offset of the next `count` bytes and step over them."""
        at = self._at
        if count > self.num_bytes - at:
            raise self._fail(
                f"the file ends inside {what} ({count} bytes needed, {self.num_bytes - at} left)"
            )
        self._at = at + count
        return at

    def _u32(self, what: str) -> int:
        return struct.unpack_from("<I", self._data, self._take(4, what))[0]

    def _u64(self, what: str) -> int:
        return struct.unpack_from("<Q", self._data, self._take(8, what))[0]

    def _string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        start = self._at
        length = self._u64(what)
        if length > limit:
            raise self._fail(f"{what} claims {length} bytes, the limit is {limit}", start)
        at = self._take(length, what)
        try:
            return str(self._data[at : at + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self._fail(f"{what} is not UTF-8: {error.reason}", start) from None

    def _read(self) -> None:
        if self.num_bytes < 24:
            raise DataError(f"{self.path}: {self.num_bytes} bytes are too few for a GGUF header")
        if self._data[:4] != MAGIC:
            raise DataError(
                f"{self.path}: not a GGUF file (it begins with {bytes(self._data[:4])!r}, not {MAGIC!r})"
            )
        self._at = 4
        self.version = self._u32("the version")
        if self.version not in VERSIONS:
            swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big")
            order = " in big-endian byte order" if swapped in VERSIONS else ""
            raise EngineError(
                f"{self.path}: GGUF version {swapped if order else self.version}{order} is not supported",
                hint=f"versions {VERSIONS} in little-endian order are read; convert the file again",
            )
        num_tensors = self._u64("the number of tensors")
        num_metadata = self._u64("the number of metadata entries")
        if num_tensors > MAX_TENSORS:
            raise self._fail(f"{num_tensors} tensors, the limit is {MAX_TENSORS}", 8)
        if num_metadata > MAX_METADATA:
            raise self._fail(f"{num_metadata} metadata entries, the limit is {MAX_METADATA}", 16)
        for _ in range(num_metadata):
            start = self._at
            key = self._string("a metadata key", MAX_NAME_BYTES)
            if key in self.metadata:
                raise self._fail(f"metadata key '{key}' occurs twice", start)
            self.metadata[key] = self._value(self._u32(f"the type of '{key}'"), key)
        self._read_tensors(num_tensors)

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            code, size = _SCALARS[kind]
            return struct.unpack_from("<" + code, self._data, self._take(size, f"the value of '{key}'"))[0]
        if kind == _STRING:
            return self._string(f"the value of '{key}'")
        if kind == _BOOL:
            at = self._take(1, f"the value of '{key}'")
            if self._data[at] > 1:
                raise self._fail(f"'{key}' is neither true nor false ({self._data[at]})", at)
            return bool(self._data[at])
        if kind == _ARRAY:
            return self._array(key)
        raise self._fail(f"'{key}' has the unknown value type {kind}")

    def _array(self, key: str) -> list[Any]:
        start = self._at
        kind = self._u32(f"the item type of '{key}'")
        count = self._u64(f"the length of '{key}'")
        if count > MAX_ARRAY_ITEMS:
            raise self._fail(f"'{key}' claims {count} items, the limit is {MAX_ARRAY_ITEMS}", start)
        if kind == _STRING:
            if count * 8 > self.num_bytes - self._at:
                raise self._fail(f"'{key}' claims {count} strings, more than the file can hold", start)
            return [self._string(f"an item of '{key}'") for _ in range(count)]
        if kind == _BOOL or kind in _SCALARS:
            code, size = _SCALARS.get(kind, ("B", 1))
            at = self._take(count * size, f"the items of '{key}'")
            items = array(_native_code(code, size))
            items.frombytes(self._data[at : at + count * size])
            if sys.byteorder == "big":
                items.byteswap()
            values = items.tolist()
            if kind == _BOOL:
                if any(v > 1 for v in values):
                    raise self._fail(f"'{key}' holds items that are neither true nor false", start)
                return [bool(v) for v in values]
            return values
        nested = " (arrays inside arrays are not read)" if kind == _ARRAY else ""
        raise self._fail(f"'{key}' has items of the unsupported type {kind}{nested}", start)

    def _read_tensors(self, count: int) -> None:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if (
            not isinstance(alignment, int)
            or not 1 <= alignment <= MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise self._fail(f"general.alignment is {alignment!r}, not a power of two up to {MAX_ALIGNMENT}")
        self.alignment = alignment
        found: list[tuple[str, tuple[int, ...], TensorType, int, int]] = []
        seen: set[str] = set()
        for _ in range(count):
            start = self._at
            name = self._string("a tensor name", MAX_NAME_BYTES)
            if name in seen:
                raise self._fail(f"tensor '{name}' occurs twice", start)
            seen.add(name)
            num_dimensions = self._u32(f"the rank of '{name}'")
            if not 1 <= num_dimensions <= MAX_DIMENSIONS:
                raise self._fail(
                    f"tensor '{name}' has {num_dimensions} dimensions (1 to {MAX_DIMENSIONS})", start
                )
            sizes = [self._u64(f"the shape of '{name}'") for _ in range(num_dimensions)]
            elements = 1
            for size in sizes:
                elements *= size
                if not 1 <= elements <= MAX_ELEMENTS:
                    raise self._fail(f"tensor '{name}' has the impossible shape {sizes}", start)
            type_id = self._u32(f"the type of '{name}'")
            kind = TENSOR_TYPES.get(type_id)
            if kind is None:
                raise EngineError(
                    f"{self.path}: tensor '{name}' has the unknown type {type_id} (at byte {self._at - 4})",
                    hint="the file may be of a newer llama.cpp: convert it to Q4_0, Q4_K, Q6_K or Q8_0",
                )
            if sizes[0] % kind.block_size:
                raise self._fail(
                    f"rows of tensor '{name}' have {sizes[0]} numbers, not a multiple of {kind.name}'s "
                    f"block of {kind.block_size}",
                    start,
                )
            offset = self._u64(f"the offset of '{name}'")
            if offset % alignment:
                raise self._fail(f"tensor '{name}' lies at {offset}, not a multiple of {alignment}", start)
            num_bytes = elements // kind.block_size * kind.block_bytes
            found.append((name, tuple(reversed(sizes)), kind, offset, num_bytes))
        base = -(-self._at // alignment) * alignment
        end, previous = base, ""
        for name, _, _, offset, num_bytes in sorted(found, key=lambda f: (f[3], f[0])):
            at = base + offset
            if at < end and previous:
                raise self._fail(f"tensors '{previous}' and '{name}' overlap", at)
            if num_bytes > self.num_bytes - at:
                raise self._fail(
                    f"tensor '{name}' needs {num_bytes} bytes, {max(0, self.num_bytes - at)} are left: "
                    "the file is cut short",
                    min(at, self.num_bytes),
                )
            end, previous = at + num_bytes, name
        for name, shape, kind, offset, num_bytes in found:
            self.tensors[name] = TensorInfo(name, shape, kind, base + offset, num_bytes)


def _native_code(code: str, size: int) -> str:
    """The `array` type code of this platform whose items have exactly `size` bytes."""
    for candidate in (code, "L" if code.isupper() else "l"):
        if array(candidate).itemsize == size:
            return candidate
    raise EngineError(f"this platform has no {size}-byte number of kind '{code}'")
