"""The GGUF container: the same as the `gguf` package reads, and no damage gets through."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from pocketphi.core.errors import DataError, EngineError, PocketPhiError
from pocketphi.core.gguf import TENSOR_TYPES, GgufFile


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name: str, sizes: list[int], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<{len(sizes)}Q", *sizes)
    return text(name) + struct.pack("<I", len(sizes)) + shape + struct.pack("<IQ", kind, offset)


ENTRIES = [
    entry("general.architecture", 8, text("phi3")),
    entry("a.uint8", 0, b"\x07"),
    entry("a.float", 6, struct.pack("<f", 0.5)),
    entry("a.bool", 7, b"\x01"),
    entry("a.strings", 9, struct.pack("<IQ", 8, 2) + text("x") + text("é")),
    entry("a.ints", 9, struct.pack("<IQ3i", 5, 3, -1, 2, 3)),
]
TENSORS = [tensor("w", [32, 2], 2, 0), tensor("b", [4], 0, 64)]


def build(entries=ENTRIES, tensors=TENSORS, data: bytes = bytes(range(80)), version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    head += b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def opened(tmp_path: Path, raw: bytes) -> GgufFile:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    return GgufFile(path)


def test_reads(tmp_path: Path) -> None:
    file = opened(tmp_path, build())
    assert file.metadata == {
        "general.architecture": "phi3",
        "a.uint8": 7,
        "a.float": 0.5,
        "a.bool": True,
        "a.strings": ["x", "é"],
        "a.ints": [-1, 2, 3],
    }
    assert file.tensors["w"].shape == (2, 32) and file.tensors["w"].type.name == "Q4_0"
    assert bytes(file.raw("w")) == bytes(range(36)) and bytes(file.raw("b")) == bytes(range(64, 80))
    with pytest.raises(EngineError, match="no tensor 'nothing'"):
        file.raw("nothing")


def test_same_as_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(str(tmp_path / "w.gguf"), "llama")
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.25])
    writer.add_array("some.flags", [True, False])
    writer.add_uint64("a.large", 2**40)
    rng = np.random.default_rng(0)
    for name, shape in (("x", (3, 5)), ("y", (7,)), ("z", (2, 3, 4))):
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    blocks = gguf.quantize(rng.normal(size=(4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, judge = GgufFile(tmp_path / "w.gguf"), gguf.GGUFReader(str(tmp_path / "w.gguf"))
    expected = {k: f.contents() for k, f in judge.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == expected
    for found in judge.tensors:
        info = ours.tensors[found.name]
        assert info.shape == tuple(int(n) for n in reversed(found.shape))
        assert (info.offset, info.num_bytes) == (found.data_offset, found.n_bytes)
        assert bytes(ours.raw(found.name)) == found.data.tobytes()


def test_block_sizes_are_ggmls() -> None:
    gguf = pytest.importorskip("gguf")
    for known in gguf.GGMLQuantizationType:
        if known.value in TENSOR_TYPES:
            mine = TENSOR_TYPES[known.value]
            assert (mine.name, mine.block_size, mine.block_bytes) == (
                known.name,
                *gguf.GGML_QUANT_SIZES[known],
            )


BROKEN = [
    (b"", "empty"),
    (b"GGUF\x03", "too few"),
    (b"GGML" + build()[4:], "not a GGUF file"),
    (build(data=b"\0" * 79), "cut short"),
    (build(entries=[*ENTRIES, ENTRIES[0]]), "occurs twice"),
    (build(tensors=[TENSORS[0], TENSORS[0]]), "occurs twice"),
    (build(tensors=[TENSORS[0], tensor("b", [4], 0, 32)]), "overlap"),
    (build(tensors=[tensor("b", [4], 0, 4)]), "multiple of 32"),
    (build(tensors=[tensor("b", [4], 0, 2**63)]), "cut short"),
    (build(tensors=[tensor("b", [2**33, 2**33], 0, 0)]), "impossible shape"),
    (build(tensors=[tensor("b", [0, 4], 0, 0)]), "impossible shape"),
    (build(tensors=[tensor("b", [1] * 5, 0, 0)]), "5 dimensions"),
    (build(tensors=[tensor("b", [33], 2, 0)]), "block of 32"),
    (build(entries=[entry("general.alignment", 4, struct.pack("<I", 24))]), "power of two"),
    (build(entries=[entry("x", 9, struct.pack("<IQ", 8, 2**60))]), "limit"),
    (build(entries=[entry("x", 9, struct.pack("<IQ", 4, 10**6))]), "the file ends inside"),
    (build(entries=[entry("x", 9, struct.pack("<IQ", 9, 1))]), "arrays inside arrays"),
    (build(entries=[entry("x", 7, b"\x02")]), "neither true nor false"),
    (build(entries=[entry("x", 99, b"")]), "unknown value type"),
    (build(entries=[entry("x", 8, struct.pack("<Q", 3) + b"\xff\xff\xff")]), "not UTF-8"),
    (build()[:8] + struct.pack("<Q", 2**40) + build()[16:], "limit"),
]


@pytest.mark.parametrize(("raw", "message"), BROKEN)
def test_refuses(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path, raw)
    assert "x.gguf" in caught.value.message


def test_refuses_the_unknown(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="version 1 "):
        opened(tmp_path, build(version=1))
    with pytest.raises(EngineError, match="big-endian"):
        opened(tmp_path, build(version=3 << 24))
    with pytest.raises(EngineError, match="unknown type 77"):
        opened(tmp_path, build(tensors=[tensor("b", [4], 77, 0)]))
    with pytest.raises(DataError, match="cannot read"):
        GgufFile(tmp_path / "none.gguf")


def test_mutations_end_in_errors_only(tmp_path: Path) -> None:
    """Flipped, cut and inflated files: either read whole or refused by our own error."""
    good, random_ = build(), random.Random(5)
    refused = 0
    for _ in range(1500):
        raw = bytearray(good)
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(len(raw))
            raw[at] = random_.choice([0, 1, 127, 128, 255, random_.randrange(256)])
        if random_.random() < 0.3:
            del raw[random_.randrange(len(raw)) :]
        try:
            with opened(tmp_path, bytes(raw)) as file:
                for name, info in file.tensors.items():
                    assert len(file.raw(name)) == info.num_bytes
        except PocketPhiError:
            refused += 1
    assert refused > 500
