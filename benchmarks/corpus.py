"""HTML to scored documents per second and core, against a datatrove pipeline on the same pages.

    python benchmarks/corpus.py --peer-python ENV/bin/python [--pages 400] [--rounds 2]

ENV holds datatrove with its extractors and filters (`pip install 'datatrove[processing]' spacy orjson lxml_html_clean`). Both
sides read the same JSON lines of raw pages and run one after the other on one core, A B A B:

- ours: reading, extraction, every rule (language, Gopher, C4, FineWeb, repetition, boilerplate, personal data,
  unsafe text, addresses), the educational score;
- datatrove: JsonlReader, its default extractor (Trafilatura), URLFilter, GopherRepetitionFilter,
  GopherQualityFilter, C4QualityFilter, FineWebQualityFilter, PIIFormatter. Its language filter needs a model
  from the net and is left out, and it has no educational score: it does less. Its filters drop documents early.

Loading of models is not timed. Prints one JSON object. The scorer alone is timed on the extracted texts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETS = ("trafilatura-eval", "mozilla-readability", "scrapinghub-articles", "fundus-news")
WARM = 8


def cpu_s() -> float:
    """CPU time of this process and of the children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def ours(pages: Path) -> dict:
    from pocketphi.corpus import CorpusConfig, InputConfig, readers
    from pocketphi.corpus.processing import Processor

    source = InputConfig(str(pages), name="pages", text_field="absent", html_field="text")
    config = CorpusConfig(inputs=(source,))
    processor = Processor(config)

    def batches(limit: int | None = None):  # type: ignore[no-untyped-def]
        waiting = []
        for number, raw in enumerate(readers.records(source, config.max_document_bytes)):
            if limit is not None and number >= limit:
                break
            waiting.append(raw)
            if len(waiting) == 64:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    for batch in batches(WARM):
        processor.process(source, batch)
    wall, cpu = time.monotonic(), cpu_s()
    documents = failed = 0
    texts: list[str] = []
    for batch in batches():
        done = processor.process(source, batch)
        documents += len(batch)
        failed += len(done.failures)
        texts += [document.text for document in done.documents]
    figures = {
        "documents": documents,
        "wall_s": time.monotonic() - wall,
        "cpu_s": cpu_s() - cpu,
        "failed": failed,
    }
    started, times = time.process_time(), 0
    while time.process_time() - started < 2:
        processor.scorer.score(texts)
        times += 1
    figures["scorer_documents_per_s"] = times * len(texts) / (time.process_time() - started)
    figures["mean_chars"] = statistics.fmean(map(len, texts))
    return figures


def datatrove(pages: Path) -> dict:
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        URLFilter,
    )
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader

    def run(limit: int) -> int:
        steps = [
            URLFilter(),
            Trafilatura(),
            GopherRepetitionFilter(),
            GopherQualityFilter(),
            C4QualityFilter(filter_no_terminal_punct=False),
            FineWebQualityFilter(),
            PIIFormatter(),
        ]
        data = JsonlReader(str(pages.parent), glob_pattern=pages.name, limit=limit)(None, 0, 1)
        for step in steps:
            data = step(data, 0, 1)
            if isinstance(step, Trafilatura):
                data = counted(data)
        return sum(1 for _ in data)

    extracted = 0

    def counted(data):  # type: ignore[no-untyped-def]
        nonlocal extracted
        for document in data:
            extracted += 1
            yield document

    run(WARM)
    # Its extractor starts a process in every run: the second short run measures that, and it is taken off.
    times = []
    for limit in (WARM, -1):
        extracted = 0
        wall, cpu = time.monotonic(), cpu_s()
        kept = run(limit)
        times.append((time.monotonic() - wall, cpu_s() - cpu))
    with open(pages) as file:
        documents = sum(1 for _ in file)
    figures = {"documents": documents - WARM, "kept": kept}
    figures |= {"wall_s": times[1][0] - times[0][0], "cpu_s": times[1][1] - times[0][1]}
    if extracted < 0.8 * documents:  # a broken environment fails fast on every page, and looks quick
        sys.exit(
            f"datatrove's extractor gave text for {extracted} of {documents} pages only: nothing to compare"
        )
    return {**figures, "extracted": extracted}


def write_pages(data: Path, out: Path, wanted: int) -> int:
    sys.path.insert(0, str(ROOT))
    from pocketphi.corpus.readers.files import bounded_lines, open_compressed

    rows = []
    for name in SETS:
        with open_compressed(data / "webpages" / f"{name}.jsonl.zst") as stream:
            rows += [json.loads(line) for _, line, _ in bounded_lines(stream, 1 << 26) if line]
    step = max(1, len(rows) // wanted)
    with open(out, "w", encoding="utf-8") as file:
        for number, row in enumerate(rows[::step][:wanted]):
            url = row.get("url") or f"https://page{number}.example.org/"  # datatrove's URLFilter wants one
            file.write(json.dumps({"id": str(number), "url": url, "text": row["html"]}) + "\n")
    return len(rows[::step][:wanted])


def child(python: str, side: str, pages: Path) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LOGURU_LEVEL": "ERROR"}
    environment["PYTHONPATH"] = str(ROOT) if side == "ours" else ""
    command = [python, __file__, "--child", side, str(pages)]
    ended = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", help="interpreter of the environment with datatrove")
    parser.add_argument("--pages", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "PAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, pages = options.child
        print(json.dumps((ours if side == "ours" else datatrove)(Path(pages))))
        return
    data = Path(os.environ.get("POCKETPHI_DATA", ROOT.parent / "shared" / "data"))
    if not data.is_dir():
        sys.exit(f"real data not present at {data} (set POCKETPHI_DATA)")
    if not options.peer_python:
        sys.exit("--peer-python names the interpreter of an environment with datatrove")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, children included
    found: dict[str, list[dict]] = {"ours": [], "datatrove": []}
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder) / "pages.jsonl"
        number = write_pages(data, pages, options.pages)
        for _ in range(options.rounds):
            for side, python in (("ours", sys.executable), ("datatrove", options.peer_python)):
                found[side].append(child(python, side, pages))
    figures: dict = {"pages": number, "rounds": options.rounds}
    for side, rounds in found.items():
        for clock in ("wall", "cpu"):
            speeds = [entry["documents"] / entry[f"{clock}_s"] for entry in rounds]
            figures[f"{side}_documents_per_{clock}_s"] = [round(speed, 1) for speed in speeds]
            figures[f"{side}_documents_per_{clock}_s_median"] = round(statistics.median(speeds), 1)
    for clock in ("wall", "cpu"):
        mine, theirs = (figures[f"{side}_documents_per_{clock}_s_median"] for side in found)
        figures[f"ratio_{clock}"] = round(mine / theirs, 2)
    figures["datatrove_kept"] = found["datatrove"][-1]["kept"]
    figures["datatrove_extracted"] = found["datatrove"][-1]["extracted"]
    figures["ours_failed"] = found["ours"][-1]["failed"]
    figures["scorer_documents_per_s"] = round(max(entry["scorer_documents_per_s"] for entry in found["ours"]))
    figures["scorer_mean_chars"] = round(found["ours"][-1]["mean_chars"])
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
