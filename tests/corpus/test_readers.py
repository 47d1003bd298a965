"""Readers: every format gives its documents, and damage is counted and named, never silently short."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tracemalloc
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from toy_pages import page, paragraph

from pocketphi import corpus
from pocketphi.core.errors import DataError, UserError
from pocketphi.corpus import CorpusConfig, InputConfig, pipeline, readers
from pocketphi.corpus.processing import Processor

LIMIT = 1 << 20
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(level=3).compress,
    "": bytes,
}


def raws(path: Path | str, limit: int = LIMIT, **settings) -> list:
    return list(readers.records(InputConfig(str(path), **settings), limit))


def documents(path: Path | str, **settings) -> list:
    source = InputConfig(str(path), **settings)
    processor = Processor(CorpusConfig(inputs=(source,)))
    done = processor.process(processor.sources[0], raws(path, **settings))
    assert not done.failures
    return done.documents


def warc_record(kind: str, url: str, content: bytes, content_type: str, number: int = 0) -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2026-01-02T03:04:05Z\r\n"
        f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-{number:012d}>\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content + b"\r\n\r\n"


def response(number: int, body: bytes | None = None, headers: str = "", status: str = "200 OK") -> bytes:
    body = page(number).encode() if body is None else body
    http = (
        f"HTTP/1.1 {status}\r\nContent-Type: text/html; charset=utf-8\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    return warc_record(
        "response", f"https://a.org/{number}", http, "application/http; msgtype=response", number
    )


def gzip_members(records: list[bytes]) -> bytes:
    return b"".join(gzip.compress(record) for record in records)


def test_warc_gives_pages_with_their_origin(tmp_path: Path) -> None:
    info = warc_record("warcinfo", "", b"software: x\r\n", "application/warc-fields")
    records = [info, response(1), response(2, status="404 Not Found"), response(3)]
    for name, content in (
        ("a.warc.gz", gzip_members(records)),
        ("b.warc", b"".join(records)),
        ("c.warc.gz", gzip.compress(b"".join(records))),  # one member around all
        ("d.warc.zst", zstandard.compress(b"".join(records))),
    ):
        (tmp_path / name).write_bytes(content)
        found = raws(tmp_path / name)
        assert [raw.error for raw in found] == ["", "HTTP status 404", ""], name
        assert found[0].html.decode() == page(1)
        assert (found[0].url, found[0].fetched_at, found[0].charset) == (
            "https://a.org/1", "2026-01-02T03:04:05Z", "utf-8",
        )  # fmt: skip
    (tmp_path / "one.warc.gz").write_bytes(gzip_members([response(1)]))
    assert paragraph(100, 4) in documents(tmp_path / "one.warc.gz")[0].text


def chunked(content: bytes) -> bytes:
    parts = [content[i : i + 700] for i in range(0, len(content), 700)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def test_http_encodings_are_undone(tmp_path: Path) -> None:
    content = page(1).encode()
    squeeze = zlib.compressobj(wbits=-15)
    cases = [
        ("Transfer-Encoding: chunked\r\n", chunked(content), ""),
        ("Transfer-Encoding: chunked\r\n", content, ""),  # the crawler undid it and kept the header
        ("Content-Encoding: gzip\r\n", gzip.compress(content), ""),
        ("Content-Encoding: gzip\r\n", content, ""),
        ("Content-Encoding: deflate\r\n", zlib.compress(content), ""),
        ("Content-Encoding: deflate\r\n", squeeze.compress(content) + squeeze.flush(), ""),
        ("Content-Encoding: zstd\r\n", zstandard.compress(content), ""),
        ("Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n", chunked(gzip.compress(content)), ""),
        ("Content-Encoding: gzip\r\n", b"\x1f\x8bdamaged", "damaged gzip content"),
        ("Content-Encoding: pack200\r\n", content, "content encoding pack200 cannot be read"),
    ]
    records = [response(i, body, headers) for i, (headers, body, _) in enumerate(cases)]
    (tmp_path / "a.warc.gz").write_bytes(gzip_members(records))
    for raw, (headers, _, error) in zip(raws(tmp_path / "a.warc.gz"), cases, strict=True):
        assert raw.error.startswith(error) and bool(raw.error) == bool(error), headers
        assert error or raw.html == content, headers


def test_wet_gives_text(tmp_path: Path) -> None:
    records = [
        warc_record("conversion", f"https://a.org/{i}", paragraph(i).encode(), "text/plain", i)
        for i in range(3)
    ]
    (tmp_path / "a.warc.wet.gz").write_bytes(gzip_members(records))
    found = documents(tmp_path / "a.warc.wet.gz")
    assert [d.text for d in found] == [paragraph(i) for i in range(3)]
    assert found[2].url == "https://a.org/2"


@pytest.mark.parametrize("name", ["a.warc.gz", "a.warc", "whole.warc.gz", "a.warc.zst", "a.warc.xz"])
@pytest.mark.parametrize("share", [0.3, 0.55, 0.9, 0.999])
def test_a_cut_off_archive_is_never_silently_short(tmp_path: Path, name: str, share: float) -> None:
    records = [response(number) for number in range(8)]
    plain = b"".join(records)
    content = {
        "a.warc.gz": gzip_members(records),
        "a.warc": plain,
        "whole.warc.gz": gzip.compress(plain),
        "a.warc.zst": zstandard.compress(plain),
        "a.warc.xz": lzma.compress(plain),
    }[name]
    cut = content[: int(len(content) * share)]
    (tmp_path / name).write_bytes(cut)
    *whole, last = raws(tmp_path / name)
    assert all(not raw.error for raw in whole)
    assert [raw.html.decode() for raw in whole] == [page(number) for number in range(len(whole))]
    assert last.error and last.html is None and last.where.startswith(name), last
    assert len(whole) <= 8
    if name == "a.warc" and share < 0.99:
        assert last.where == f"a.warc:{len(whole)}" and "cut off" in last.error
        assert len(whole) == sum(len(b"".join(records[: i + 1])) <= len(cut) for i in range(8))


def test_a_cut_off_archive_is_counted_by_the_stage(tmp_path: Path) -> None:
    content = gzip_members([response(number) for number in range(6)])
    (tmp_path / "a.warc.gz").write_bytes(content[: len(content) * 2 // 3])
    found = corpus.run(
        CorpusConfig(inputs=(str(tmp_path / "a.warc.gz"),), workers=1), {}, out=tmp_path / "out"
    )
    assert found.counts["documents_failed"] == 1
    (failure,) = (json.loads(line) for line in (found.path / "failures.jsonl").read_text().splitlines())
    assert failure["where"].startswith("a.warc.gz") and "cut" in failure["reason"]


def test_damaged_archives_do_not_stop_the_run(tmp_path: Path) -> None:
    content = bytearray(gzip_members([response(number) for number in range(6)]))
    content[len(content) // 2 : len(content) // 2 + 60] = b"\xff" * 60
    (tmp_path / "a.warc.gz").write_bytes(content)
    (tmp_path / "b.warc").write_bytes(b"this is no archive\n" * 50)
    (tmp_path / "c.warc.gz").write_bytes(b"not gzip at all")
    (tmp_path / "d.warc").write_bytes(response(1).replace(b"Content-Length: ", b"Content-Length: x", 1))
    (tmp_path / "z.warc").write_bytes(response(7))
    found = raws(tmp_path)
    failed = {raw.where.split(":")[0] for raw in found if raw.error}
    assert {"a.warc.gz", "b.warc", "c.warc.gz"} <= failed
    assert found[-1].html.decode() == page(7)


def test_a_large_record_is_not_read_into_memory(tmp_path: Path) -> None:
    body = gzip.compress(b"<p>" + b" " * (64 << 20))
    records = [response(1, body, "Content-Encoding: gzip\r\n"), response(2, b"x" * (3 << 20)), response(3)]
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    tracemalloc.start()
    found = raws(tmp_path / "a.warc")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [bool(raw.error) for raw in found] == [True, True, False]
    assert all("max_document_bytes" in raw.error for raw in found[:2])
    assert peak < 16 << 20


@pytest.mark.parametrize("ending", list(COMPRESS))
def test_json_lines_in_every_compression(tmp_path: Path, ending: str) -> None:
    rows = [
        {"id": f"r{i}", "text": paragraph(i), "url": f"https://a.org/{i}", "license": "MIT"} for i in range(5)
    ]
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(COMPRESS[ending](b"\n".join(json.dumps(row).encode() for row in rows)))
    found = documents(file)
    assert [(d.text, d.url, d.license, d.meta["original_id"]) for d in found] == [
        (row["text"], row["url"], row["license"], row["id"]) for row in rows
    ]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_cut_off_json_lines_are_counted(tmp_path: Path, ending: str) -> None:
    content = COMPRESS[ending](
        b"".join(json.dumps({"text": paragraph(i)}).encode() + b"\n" for i in range(1500))
    )
    (tmp_path / f"a.jsonl{ending}").write_bytes(content[: len(content) * 2 // 3])
    *whole, last = raws(tmp_path / f"a.jsonl{ending}")
    assert "cannot be read past record" in last.error and last.where == f"a.jsonl{ending}"
    assert (100 if ending in (".gz", ".xz") else 0) <= len(whole) < 1500  # the others come in large blocks
    assert all(json.loads(raw.line)["text"] == paragraph(i) for i, raw in enumerate(whole))


def test_endless_lines_and_decompression_bombs_are_bounded(tmp_path: Path) -> None:
    good = json.dumps({"text": paragraph(1)}).encode() + b"\n"
    (tmp_path / "line.jsonl").write_bytes(good + b"x" * (3 << 20) + b"\n" + good)
    found = raws(tmp_path / "line.jsonl")
    assert [bool(raw.error) for raw in found] == [False, True, False]
    assert found[1].error.startswith("line of 3145728 bytes")

    # 512 MiB of spaces in well under a megabyte: given up after 64 times the limit, without holding them.
    stream = io.BytesIO()
    with zstandard.ZstdCompressor(level=1).stream_writer(stream, closefd=False) as writer:
        block = b" " * (16 << 20)
        for _ in range(32):
            writer.write(block)
    (tmp_path / "bomb.jsonl.zst").write_bytes(stream.getvalue())
    assert len(stream.getvalue()) < 1 << 20
    tracemalloc.start()
    (only,) = raws(tmp_path / "bomb.jsonl.zst", limit=1 << 18)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "cannot be read past record 0: line 1 has more than" in only.error
    assert peak < 16 << 20


def test_a_zstd_frame_that_asks_for_gigabytes_is_refused(tmp_path: Path) -> None:
    # Magic number, no content size, window of 2**(10 + 31) bytes, one raw block of one byte.
    (tmp_path / "w.jsonl.zst").write_bytes(bytes([0x28, 0xB5, 0x2F, 0xFD, 0x00, 31 << 3, 0x09, 0, 0, 65]))
    (only,) = raws(tmp_path / "w.jsonl.zst")
    assert "cannot be read past record 0" in only.error


def test_parquet_text_and_html(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "text": [paragraph(1), None, paragraph(3), "x" * (LIMIT + 1)],
            "url": ["https://a.org/1", "", "https://a.org/3", ""],
            "license": ["CC0-1.0", None, "MIT", None],
            "date": ["2026-01-01", None, None, None],
            "size": [1, 2, 3, 4],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = raws(tmp_path / "a.parquet")
    assert found[1].error == "column 'text' holds NoneType, not text"
    assert "more than max_document_bytes" in found[3].error
    assert (found[0].text, found[0].license, found[0].fetched_at) == (paragraph(1), "CC0-1.0", "2026-01-01")
    pyarrow.parquet.write_table(pyarrow.table({"html": [page(4)]}), tmp_path / "b.parquet")
    assert "## On the" in documents(tmp_path / "b.parquet")[0].text
    pyarrow.parquet.write_table(pyarrow.table({"content": [paragraph(5)]}), tmp_path / "c.parquet")
    (only,) = raws(tmp_path / "c.parquet")
    assert only.error == "no column 'text' or 'html' (has: content)"
    assert documents(tmp_path / "c.parquet", text_field="content")[0].text == paragraph(5)
    whole = (tmp_path / "a.parquet").read_bytes()
    for number, damaged in enumerate(
        (whole[: len(whole) // 2], b"PAR1", whole[:100] + b"\xff" * 200 + whole[300:])
    ):
        file = tmp_path / f"damaged{number}.parquet"
        file.write_bytes(damaged)
        assert raws(file)[-1].error.startswith("file cannot be read past record"), number


def test_plain_text_markdown_and_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.md").write_text(
        f"# Title\n\n{paragraph(1)}\r\n\r\n\r\n\r\n- point  \n", encoding="utf-8"
    )
    (tmp_path / "a.txt").write_bytes("Größe über alles: naïve café.".encode("cp1252"))
    (tmp_path / ".hidden.txt").write_text("not read")
    (tmp_path / "c.htm").write_text(page(2))
    (tmp_path / "d.exe").write_bytes(b"MZ")
    found = raws(tmp_path)
    assert [(raw.where, raw.error) for raw in found] == [
        ("a.txt", ""), ("c.htm", ""), ("d.exe", "unknown file type"), ("sub/b.md", ""),
    ]  # fmt: skip
    (tmp_path / "d.exe").unlink()
    texts = [d.text for d in documents(tmp_path)]
    assert texts[0] == "Größe über alles: naïve café."
    assert texts[2] == f"# Title\n\n{paragraph(1)}\n\n- point"


def test_local_copy_of_a_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before the import, which reads them: no network, no reports, no cache but the test's own.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("datasets", reason="the package datasets is not installed (pip install datasets)")
    folder = tmp_path / "owner-name"
    (folder / "data").mkdir(parents=True)
    columns = {"text": [paragraph(i) for i in range(7)], "url": [f"https://a.org/{i}" for i in range(7)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data/train-00000-of-00001.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [paragraph(99)], "url": [""]}), folder / "data/test-00000-of-00001.parquet"
    )
    found = documents(f"hf:{folder}")
    assert [d.text for d in found] == columns["text"] and found[3].url == "https://a.org/3"
    assert found[0].meta["where"] == "owner-name:0" and str(tmp_path) not in json.dumps(
        [d.row() for d in found]
    )
    (test,) = documents(f"hf:{folder}@test")
    assert test.text == paragraph(99)
    with pytest.raises(DataError, match="cannot be opened"):
        raws(f"hf:{tmp_path / 'missing'}")
    # A changed copy is another corpus: the earlier one is not taken for it.
    settings = CorpusConfig(inputs=(f"hf:{folder}",))
    before = pipeline.source_identity(settings)
    (folder / "data/more.txt").write_text("x")
    assert pipeline.source_identity(settings) != before


@pytest.mark.parametrize(
    ("head", "headers", "directive"),
    [
        ('<meta name="robots" content="index, NoAI">', "", "noai"),
        ('<meta name="robots" content="noindex, nofollow">', "", ""),
        ('<meta name="tdm-reservation" content="1">', "", "tdm-reservation"),
        ("", "X-Robots-Tag: noindex\r\nX-Robots-Tag: noai, noimageai\r\n", "noai"),
        ("", "TDM-Reservation: 1\r\n", "tdm-reservation"),
        ("", "TDM-Reservation: 0\r\nX-Robots-Tag: all\r\n", ""),
    ],
)
def test_owners_who_forbid_learning_are_respected(
    tmp_path: Path, head: str, headers: str, directive: str
) -> None:
    body = page(5).replace("<head>", f"<head>{head}").encode()
    (tmp_path / "a.warc").write_bytes(response(5, body, headers))
    for respect in (True, False):
        config = CorpusConfig(inputs=(str(tmp_path / "a.warc"),), respect_noai=respect)
        (answer,) = corpus.score_documents(config)
        assert answer["noai.keep"] == (not directive or not respect)
        assert ("noai" in answer["reasons"]) == bool(directive and respect)
    assert documents(tmp_path / "a.warc")[0].meta.get("noai", "") == directive


def test_licence_policy(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"text": paragraph(1), "license": "CC-BY-NC-4.0"}, {"text": paragraph(2), "license": "MIT"}]
    rows.append({"text": paragraph(3)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def denied(deny: tuple[str, ...], **source) -> list[bool]:
        config = CorpusConfig(inputs=(InputConfig(str(file), **source),), license_deny=deny)
        return ["license_denied" in answer["reasons"] for answer in corpus.score_documents(config)]

    assert denied(()) == [False, False, False]
    assert denied(("-nc",)) == [True, False, False]
    assert denied(("-nc", "")) == [True, False, True]
    assert denied(("",), license="CC0-1.0") == [False, False, False]
    assert denied(("-nc",), quality="textbook") == [True, False, False]
    html = page(1).replace(
        "</body>", '<a rel="license" href="https://creativecommons.org/licenses/by-nc/4.0/">x</a></body>'
    )
    (tmp_path / "p.html").write_text(html)
    assert "by-nc" in documents(tmp_path / "p.html")[0].license


def test_formats_of_names() -> None:
    assert readers.format_of("a.JSONL.zst") == "jsonl"
    assert readers.format_of("CC-MAIN.warc.wet.gz") == "warc"
    assert readers.format_of("a.parquet.gz") == readers.format_of("a.html.gz") == readers.format_of("a") == ""
    with pytest.raises(UserError, match="unknown file type"):
        readers.files_of(InputConfig(__file__))
