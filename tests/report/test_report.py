"""The page: complete, offline, safe against hostile text, and repeatable where it can be."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_run import build_run

from pocketphi import report
from pocketphi.core import artifact
from pocketphi.core.errors import DataError, UserError
from pocketphi.report import gather, lineage, page, plots, stage

HOSTILE = '</script><img src="https://evil.example/x.png" onerror=alert(1)> & "quoted" \ud800'


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return build_run(tmp_path / "runs" / "tiny")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, artifact.Artifact, str]:
    """A run, its report and the page; the model's answers are made up (the engine has its own tests)."""
    folder = build_run(tmp_path_factory.mktemp("drawn") / "tiny")
    replies = [
        {
            "prompt": "What is a plant?",
            "text": "A plant is a living thing that makes its own food.",
            "ended": "stop",
        },
        {"prompt": HOSTILE, "text": HOSTILE, "ended": "length"},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_answers", lambda config, model: (replies, None))
        return folder, *draw(folder)


def draw(run_folder: Path) -> tuple[artifact.Artifact, str]:
    found = report.run(report.ReportConfig(), report.inputs_of(run_folder), out=run_folder / "report")
    return found, found.file("index.html").read_text(encoding="utf-8")


class Resources(HTMLParser):
    """Collects whatever a browser could fetch, and the ids of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href", "background"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(value or "")


def test_page_loads_nothing_and_runs_nothing(drawn: tuple[Path, artifact.Artifact, str]) -> None:
    _, _, text = drawn
    parser = Resources()
    parser.feed(text)
    assert [a for a in parser.addresses if not a.startswith("#")] == []
    assert not {"script", "iframe", "object", "embed", "link", "img", "form"} & set(parser.tags)
    assert parser.handlers == []
    assert "@import" not in text
    assert [u for u in re.findall(r"url\(([^)]*)\)", text) if not u.startswith("#")] == []
    assert "default-src 'none'" in text
    assert len(parser.ids) == len(set(parser.ids)), "ids must be unique in one page"


def test_page_shows_every_section(drawn: tuple[Path, artifact.Artifact, str]) -> None:
    _, _, text = drawn
    for section in ("data", "training", "scores", "answers", "lineage", "forecast"):
        assert f'<section id="{section}">' in text
    assert "5,300 documents were read and 3,200 kept" in text
    assert "ARC-Easy" in text and "± 9.4" in text  # 1.96 * sqrt(.36 * .64 / 100)
    assert "6m08s" in text  # 43 + 12 + 6.5 + 282 + 25 seconds
    assert text.count('<svg class="plot"') == 7
    assert "#0102" not in text, "a marker colour was not replaced"
    assert "from pages to chat" in text and "published scores of other models" in text
    assert "arXiv 2404.14219" in text and "not for subtraction" in text


def test_hostile_text_stays_text(drawn: tuple[Path, artifact.Artifact, str]) -> None:
    _, _, text = drawn
    assert "evil.example" in text  # it is shown
    assert "<img" not in text and "</script>" not in text


def test_lineage_finds_the_document_behind_an_answer(drawn: tuple[Path, artifact.Artifact, str]) -> None:
    _, found, _ = drawn
    figures = json.loads(found.file("figures.json").read_text(encoding="utf-8"))
    assert [n["kind"] for n in figures["chain"]] == ["checkpoint", "shards", "tokenizer", "corpus"]
    first = figures["nearest"]["nearest"][0]
    assert [d["id"] for d in first] == ["d0"]
    assert first[0]["rules_passed"] == ["length", "spam"]
    assert first[0]["phases"] == ["phase1", "phase2"]
    assert figures["nearest"]["searched_documents"] == 3, "rejected documents are not searched"
    assert figures["nearest"]["nearest"][1] == []


def test_checksum_ignores_times(run_folder: Path) -> None:
    first, _ = draw(run_folder)
    (run_folder / "forecast.json").write_text(json.dumps({"train": {"wall_s": 99999}}))
    second = report.run(report.ReportConfig(), report.inputs_of(run_folder), out=run_folder / "again")
    assert second.checksum == first.checksum
    assert second.file("index.html").read_text() != first.file("index.html").read_text()


def test_a_part_of_a_run_is_enough(run_folder: Path) -> None:
    found = report.run(report.ReportConfig(), {"corpus": run_folder / "corpus"}, out=run_folder / "part")
    text = found.file("index.html").read_text()
    assert '<section id="data">' in text and '<section id="training">' not in text
    scored = report.run(report.ReportConfig(), {"eval": run_folder / "eval"}, out=run_folder / "scored")
    text = scored.file("index.html").read_text()
    assert '<section id="scores">' in text and "from pages to chat" not in text


def test_wrong_inputs_are_named(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a corpus artifact, found eval"):
        report.run(report.ReportConfig(), {"corpus": run_folder / "eval"})
    with pytest.raises(UserError, match="no input 'model'"):
        report.run(report.ReportConfig(), {"corpus": run_folder / "corpus", "model": "x"})
    with pytest.raises(DataError, match="nothing to report on"):
        report.run(report.ReportConfig(), {})
    with pytest.raises(UserError, match="no artifact of a run here"):
        report.inputs_of(tmp_path)


def test_model_that_cannot_be_opened_is_said_not_hidden(run_folder: Path) -> None:
    found, text = draw(run_folder)  # the made-up checkpoint holds no weights
    figures = json.loads(found.file("figures.json").read_text())
    assert figures["answers"] == []
    assert "no sample answers" in figures["answers_note"] and "no sample answers" in text


def test_log_cut_by_a_kill_is_read(run_folder: Path) -> None:
    with open(run_folder / "log.jsonl", "a") as file:
        file.write('{"event": "train_step", "tok')
    events = gather.run_events(run_folder)
    assert events[-1]["event"] == "stage_end"
    assert gather.speed_figures("train", events)["tokens"] == [step * 16384.0 for step in range(0, 60, 5)]


def test_speed_is_of_one_stage_and_of_its_last_attempt() -> None:
    def start(stage: str) -> dict:
        return {"event": "stage_start", "path": f"runs/x/{stage}"}

    def step(tokens: int, speed: int) -> dict:
        return {"event": "train_step", "tokens": tokens, "tokens_per_s": speed}

    events = [
        start("train"), step(10, 1), step(20, 1), step(30, 1),
        start("train"), step(20, 2), step(30, 2), step(40, 2),
        start("sft"), step(5, 7),
    ]  # fmt: skip
    assert gather.speed_figures("train", events) == {"tokens": [10, 20, 30, 40], "tokens_per_s": [1, 2, 2, 2]}
    assert gather.speed_figures("sft", events) == {"tokens": [5], "tokens_per_s": [7]}
    assert gather.speed_figures("eval", events) is None


def test_plots_are_the_same_twice() -> None:
    curves = {"tokens": [1, 2, 3], "loss": [3.0, 2.0, 1.5], "phase": ["a", "a", "b"]}
    assert plots.loss(curves) == plots.loss(curves)


def test_stretches_and_running_mean() -> None:
    assert plots.stretches(["a", "a", "b", "a"]) == [("a", 0, 2), ("b", 2, 3), ("a", 3, 4)]
    assert plots.running_mean([1, 2, 6], 1) == [1.5, 3, 4]


def test_triples() -> None:
    assert lineage.triples("The cat, sat. DOWN") == {("the", "cat", "sat"), ("cat", "sat", "down")}


def test_escape() -> None:
    assert page._e('<a href="x">\x00\ud800') == "&lt;a href=&quot;x&quot;&gt;\ufffd?"
