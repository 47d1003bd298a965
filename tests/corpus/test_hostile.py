"""Hostile input costs bounded time and memory per document, measured in a process of its own."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

MAX_CPU_S = 10.0  # the default document_timeout_s
MAX_MIB = 500  # of a page of some megabytes, its tree included

# Each expression makes one page of some megabytes at most.
PAGES = {
    "nested div": "'<div>' * 100_000 + 'deep'",
    "nested inline": "'<b>' * 100_000 + 'deep'",
    "nested tables": "'<table><tr><td>' * 100_000 + 'deep'",
    "nested lists": "'<ul><li>' * 100_000 + 'deep'",
    "nested quotes": "'<blockquote><p>' * 100_000 + 'deep'",
    "nested formulas": "'<math>' + '<msup><mrow>' * 100_000 + '<mi>x</mi>'",
    "end tags without start": "'</div></p></table>' * 100_000",
    "misnested": "'<b><p><i></b></p><table></i>' * 20_000",
    "many siblings": "'<p>a few words in it, and a comma</p>' * 20_000",
    "many containers": "'<div class=\"a sidebar-x\"><p>some words, some more of them</p></div>' * 10_000",
    "one endless line": "'<p>' + 'word ' * 300_000",
    "one endless word": "'<p>' + 'w' * 3_000_000",
    "one endless attribute": "'<p class=\"' + '-side__bar--x ' * 200_000 + '\">text'",
    "many attributes": "'<p ' + ' '.join(f'a{i}=1' for i in range(200_000)) + '>text'",
    "unclosed comments": "'<!--' * 500_000",
    "open angle brackets": "'<' * 2_000_000",
    "entities": "'&amp;&#x41;&nosuch;' * 100_000",
    "huge table": "'<table>' + ('<tr>' + '<td>1</td>' * 100 + '</tr>') * 300",
    "one wide row": "'<table><tr>' + '<td>1</td>' * 50_000 + '</tr><tr><td>2</td></tr>'",
    "links only": "'<a href=/x>link, or so</a> ' * 100_000",
    "headings": "'<h2>Title</h2>' * 50_000",
    "code": "'<pre><code>' + '<span>x = 1</span>\\n' * 20_000",
    "breaks": "'<p>' + '<br>' * 100_000",
    "white space": "'<p>' + ' \\n\\t' * 1_000_000 + 'x'",
    "json in the head": "'<script type=\"application/ld+json\">{\"articleBody\":' + '[' * 500_000 + '</script>'",
    "null bytes": "'<p>' + 'a\\0' * 1_000_000",
    "combining marks": "'<p>' + 'e' + '\\u0301' * 1_000_000",
    "style attributes": "('<p style=\"' + 'display ' * 50 + '\">x</p>') * 8_000",
}

# Each page in a process forked for it: its own peak of memory, and a crash costs one page only.
_MEASURE = """
import json, os, resource, sys, time
from pocketphi.corpus.extraction import TooManyNodes, extract
extract("<p>warm</p>")
for name, source in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        if status:
            print(json.dumps([name, None, status]))
        continue
    resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    page = eval(source)
    began = time.process_time()
    try:
        extract(page)
    except TooManyNodes:
        pass
    used = time.process_time() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps([name, used, peak]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[float | None, float]]:
    command = [sys.executable, "-c", _MEASURE, json.dumps(PAGES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    return {name: (used, peak) for name, used, peak in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", PAGES)
def test_a_hostile_page_is_bounded(name: str, measured: dict[str, tuple[float | None, float]]) -> None:
    seconds, mebibytes = measured[name]
    assert seconds is not None, f"the process ended with status {mebibytes}"
    assert seconds < MAX_CPU_S, f"{seconds:.1f} s of processor time"
    assert mebibytes < MAX_MIB, f"{mebibytes:.0f} MiB"


@pytest.mark.parametrize(
    ("content", "charset", "wanted"),
    [
        ("Größe und Höhe".encode("latin-1"), "utf-8", "Größe und Höhe"),  # the header is wrong
        ("<meta charset=ascii>naïve café".encode(), "", "naïve café"),  # the page is wrong
        ("Ελληνικά γράμματα και λέξεις".encode("iso-8859-7"), "iso-8859-7", "Ελληνικά γράμματα και λέξεις"),
        (b"\xef\xbb\xbf" + "mark é".encode(), "latin-1", "mark é"),  # the mark is believed, not the header
        ("<?xml encoding='shift_jis'?>日本語の文章".encode("shift_jis"), "", "日本語の文章"),
        ("text".encode("utf-16"), "", "text"),
        (b"plain", "no-such-charset", "plain"),
    ],
)
def test_wrong_charsets(content: bytes, charset: str, wanted: str) -> None:
    from pocketphi.corpus.extraction import decode

    assert decode(content, charset)[0].endswith(wanted)


_BUILD = """
import json, resource, sys
from pathlib import Path
from pocketphi import corpus
from pocketphi.core.config import parse
config = parse(corpus.CorpusConfig, json.loads(sys.argv[1]), where="test")
built = corpus.run(config, {}, out=Path(sys.argv[2]))
peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps([dict(built.counts), peak / 1024, built.file("failures.jsonl").read_text()]))
"""


def _build(inputs: Path, out: Path) -> tuple[dict[str, int], float, str]:
    settings = {"inputs": [str(inputs)], "workers": 1, "max_document_bytes": 1 << 20}
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, json.dumps(settings), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-800:]
    counts, peak, failures = json.loads(done.stdout)
    return counts, peak, failures


def _good_line(number: int) -> bytes:
    text = f"Water boils at a lower temperature on mountain {number}, because the pressure is lower. " * 20
    return json.dumps({"id": f"g{number}", "text": text}).encode() + b"\n"


def test_decompression_bombs_are_cut_off_counted_and_named(tmp_path: Path) -> None:
    """A line and a web page of 256 MB each, some kilobytes when compressed, among two good documents."""
    import zstandard

    plain, bombs = tmp_path / "plain", tmp_path / "bombs"
    for folder in (plain, bombs):
        folder.mkdir()
        (folder / "good.jsonl").write_bytes(_good_line(0) + _good_line(1))
    huge = 256 << 20
    with zstandard.ZstdCompressor(level=1).stream_writer(open(bombs / "line.jsonl.zst", "wb")) as file:
        file.write(b'{"text": "')
        for _ in range(huge >> 20):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n' + _good_line(2))
    piece = gzip.compress(b"<p>" + b"a" * (8 << 20), 1)
    body = piece * (huge // (8 << 20))  # members one after the other: one stream to a browser
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
    payload = head.encode() + body
    record = (
        "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://bomb.org/\r\n"
        "WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000001>\r\nWARC-Date: 2020-01-01T00:00:00Z\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    (bombs / "page.warc.gz").write_bytes(gzip.compress(record.encode() + payload + b"\r\n\r\n", 1))

    counts, calm, _ = _build(plain, tmp_path / "a")
    assert counts["documents_in"] == 2 and counts["documents_failed"] == 0
    counts, peak, failures = _build(bombs, tmp_path / "b")
    assert (
        counts["documents_in"]
        == counts["documents_kept"] + counts["documents_rejected"] + counts["documents_failed"]
    )
    cut_off = {
        row["where"] for row in map(json.loads, failures.splitlines()) if "max_document" in row["reason"]
    }
    assert cut_off == {"page.warc.gz:0"}, failures
    # A line of 64 times the limit and more is not read to its end to see what follows: the file ends there.
    (line,) = [r for r in map(json.loads, failures.splitlines()) if r["where"] == "line.jsonl.zst"]
    assert "line 1 has more than" in line["reason"]
    assert counts["documents_kept"] + counts["documents_rejected"] == 2  # what stands beside them
    assert peak < calm + 200, f"{peak:.0f} MiB, without bombs {calm:.0f} MiB"
