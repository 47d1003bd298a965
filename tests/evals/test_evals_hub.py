"""Benchmark rows by name from a local server that speaks the Hub's interface: the scores of local files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import Hub, commit_of

from pocketphi import evals
from pocketphi.core.errors import DataError
from pocketphi.evals import compare
from pocketphi.evals import data as benchmark_data
from pocketphi.evals import hub as evals_hub
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.data import MissingData
from pocketphi.evals.loading import load_task
from pocketphi.evals.task import TASKS, parse_task

COLOURS = ["red", "green", "blue", "a rather long and winding yellow"]
MAIN, CONVERTED = "main", "refs/convert/parquet"

# Stems that no data set gives in a form known here: exemplars, judge's texts, sets of several repositories.
ONLY_LOCAL = {"agieval_v1.test", "medqa_us_4to5_options.test", "mt_bench_questions"}


def parquet(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def local(folder: Path, stem: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def arc_rows(split: str, count: int) -> tuple[list[dict], list[dict]]:
    """Rows in the columns of our files, and the same as the Hub has them, labels A-D or 1-4."""
    ours, theirs = [], []
    for i in range(count):
        id_, question, gold = f"{split}{i}", f"Which colour has number {i} of {split}?", i % 4
        query = f"Question: {question}\nAnswer:"
        ours.append({"id": id_, "query": query, "choices": COLOURS, "gold": gold})
        labels = list("ABCD" if i % 2 else "1234")
        choices = {"text": COLOURS, "label": labels}
        theirs.append({"id": id_, "question": question, "choices": choices, "answerKey": labels[gold]})
    return ours, theirs


def serve_everything(hub: type[Hub], folder: Path) -> None:
    """Put the same rows into local files and onto the server, in the data sets' own columns and layouts."""
    arc: dict[str, bytes] = {"README.md": b"words"}
    for split, count in (("train", 12), ("test", 9)):
        ours, theirs = arc_rows(split, count)
        local(folder, f"arc_easy.{split}", ours)
        # Two files of one split, listed in the wrong order.
        arc[f"ARC-Easy/{split}-00001-of-00002.parquet"] = parquet(theirs[5:])
        arc[f"ARC-Easy/{split}-00000-of-00002.parquet"] = parquet(theirs[:5])
        arc[f"ARC-Challenge/{split}-00000-of-00001.parquet"] = parquet(theirs[:2])
    hub.datasets["allenai/ai2_arc", MAIN] = arc

    passages = [("A fox is an animal. It barks.", "does a fox bark", 1), ("Ice is cold.", "is ice hot", 0)]
    local(
        folder,
        "boolq.validation",
        [
            {"idx": i, "query": f"{p}\nQuestion: {q}?\nAnswer:", "choices": ["yes", "no"], "gold": 1 - label}
            for i, (p, q, label) in enumerate(passages)
        ],
    )
    rows = [{"question": q, "passage": p, "idx": i, "label": y} for i, (p, q, y) in enumerate(passages)]
    hub.datasets["aps/super_glue", MAIN] = {"boolq/validation-00000-of-00001.parquet": parquet(rows)}

    texts = ["She looked at the red", "No one had told him about the old house"]
    heads = [t.rpartition(" ") for t in texts]
    local(
        folder,
        "lambada_openai.test",
        [{"id": i, "query": a, "answers_text": [b]} for i, (a, _, b) in enumerate(heads)],
    )
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    hub.datasets["EleutherAI/lambada_openai", MAIN] = {"data/test.jsonl": b"", "default/test.jsonl": lines}

    # A data set that is a script: its rows are where the Hub converts them.
    goals = [{"goal": f"Goal {i}", "sol1": "take it away", "sol2": "leave", "label": i % 2} for i in range(4)]
    local(folder, "piqa.validation", goals)
    hub.datasets["ybisk/piqa", MAIN] = {"piqa.py": b"print()", "README.md": b""}
    hub.datasets["ybisk/piqa", CONVERTED] = {
        "plain_text/validation/0000.parquet": parquet(goals),
        "plain_text/train/0000.parquet": parquet(goals[:1]),
    }

    questions = [
        {"question": f"What is {i}?", "subject": s, "choices": ["0", "1", "2", "3"], "answer": i % 4}
        for s in ("anatomy", "virology")
        for i in range(6)
    ]
    local(folder, "mmlu.test", questions)
    local(folder, "mmlu.dev", questions[::-1])
    hub.datasets["cais/mmlu", MAIN] = {
        "all/test-00000-of-00001.parquet": parquet(questions),
        "all/dev-00000-of-00001.parquet": parquet(questions[::-1]),
        "anatomy/test-00000-of-00001.parquet": parquet(questions[:6]),
    }


def results(found) -> dict[str, dict]:
    return {e["task"]: e for e in json.loads(found.file("results.json").read_text())["tasks"]}


def test_the_hub_gives_what_local_files_give(hub: type[Hub], tiny: Path, tmp_path: Path) -> None:
    folder, fetched = tmp_path / "local", tmp_path / "fetched"
    serve_everything(hub, folder)
    tasks = ["arc_easy:shots=2", "boolq", "lambada", "piqa", "mmlu:shots=3"]
    ours = evals.run(EvalConfig(tasks=tasks, data_dir=folder), {"model": tiny}, out=tmp_path / "a")
    assert not hub.log, "local files need no network"
    config = EvalConfig(tasks=tasks, data_dir=fetched, hub=True)
    theirs = evals.run(config, {"model": tiny}, out=tmp_path / "b")
    assert ours.file("items.jsonl").read_text() == theirs.file("items.jsonl").read_text()
    for label, entry in results(ours).items():
        other = results(theirs)[label]
        for key in ("value", "stderr", "n", "prompt_version", "num_in_file", "rows_sha256", "shots_sha256"):
            assert entry[key] == other[key], (label, key)
        assert entry["rows_sha256"] and entry["hub"] is None
        revision = CONVERTED if label == "piqa" else MAIN
        assert other["hub"]["commit"] == commit_of(revision) and len(other["file_sha256"]) == 64
        assert other["hub"]["repository"] == TASKS[other["name"]].hub.partition(":")[0]
    # The same rows in other files may be subtracted; the differences are none.
    difference = compare.run(compare.CompareConfig(), {"a": ours, "b": theirs}, out=tmp_path / "c")
    rows = compare.flat(difference)
    assert [r["task"] for r in rows if r["comparable"]] == list(results(ours)), rows
    assert all(r["difference"] == 0.0 for r in rows)
    hub.log.clear()
    again = evals.run(config, {"model": tiny}, out=tmp_path / "d")
    assert again.checksum == theirs.checksum and not hub.log, "what was fetched is used again"
    kept = sorted(p.name for p in fetched.iterdir() if "arc" in p.name)
    assert kept == [
        "arc_easy.test.jsonl", "arc_easy.test.source.json", "arc_easy.train.jsonl", "arc_easy.train.source.json",
    ]  # fmt: skip


def test_without_a_folder_rows_go_to_the_cache(hub: type[Hub], tmp_path: Path) -> None:
    serve_everything(hub, tmp_path / "local")
    each = load_task(EvalConfig(hub=True), parse_task("piqa"), None)
    assert len(each.items) == 4
    assert (tmp_path / "benchmarks" / "piqa.validation.jsonl").is_file()


def test_a_local_file_goes_before_the_hub(hub: type[Hub], tmp_path: Path) -> None:
    serve_everything(hub, tmp_path / "local")
    config = EvalConfig(data_dir=tmp_path / "local", hub=True)
    assert load_task(config, parse_task("arc_easy"), None).file.origin is None
    assert not hub.log


def test_a_file_changed_since_is_not_the_hubs(hub: type[Hub], tmp_path: Path) -> None:
    serve_everything(hub, tmp_path / "local")
    folder = tmp_path / "fetched"
    assert benchmark_data.require(folder, "arc_easy.test", from_hub=True).origin is not None
    path = folder / "arc_easy.test.jsonl"
    path.write_text(path.read_text().replace("colour", "color"))
    assert benchmark_data.require(folder, "arc_easy.test", from_hub=True).origin is None


def test_what_cannot_be_fetched_is_said(hub: type[Hub], tiny: Path, tmp_path: Path) -> None:
    serve_everything(hub, tmp_path / "local")
    folder = tmp_path / "fetched"

    def fetch(task: str):
        return load_task(EvalConfig(data_dir=folder, hub=True), parse_task(task), None)

    with pytest.raises(MissingData, match="answers 404"):
        fetch("hellaswag")
    with pytest.raises(MissingData, match="no data set on the Hub is known"):
        fetch("agieval")
    hub.datasets["Rowan/hellaswag", MAIN] = {"data/test-00000-of-00001.parquet": parquet([{"ind": 1}])}
    with pytest.raises(DataError, match=r"no file of validation is there \(it has data/test"):
        fetch("hellaswag")
    hub.datasets["allenai/ai2_arc", MAIN] = {"ARC-Easy/test-00000-of-00001.parquet": parquet([{"id": "a"}])}
    with pytest.raises(DataError, match=r"row 0 of arc_easy.* is not what was expected"):
        fetch("arc_easy")
    hub.datasets["allenai/ai2_arc", MAIN] = {"ARC-Easy/test-00000-of-00001.parquet": b"no parquet"}
    with pytest.raises(DataError, match="cannot be read"):
        fetch("arc_easy")
    hub.datasets["Rowan/hellaswag", MAIN] = {"data/validation-00000-of-00001.parquet": parquet([{"ind": 1}])}
    with pytest.raises(DataError, match="lacks the column"):
        fetch("hellaswag")
    assert not [p for p in folder.iterdir() if p.name.startswith("arc")], "no rows under a whole file's name"


def test_gated_rows_are_named_with_what_to_do(hub: type[Hub], tiny: Path, tmp_path: Path) -> None:
    question = {"Question": "Why?", "Correct Answer": "because", "Explanation": "It is so."}
    row = {**question, **{f"Incorrect Answer {i}": f"not {i}" for i in (1, 2, 3)}}
    lines = [",".join(row), *(",".join([f"Why {i}?", *list(row.values())[1:]]) for i in range(5))]
    hub.datasets["Idavidrein/gpqa", MAIN] = {"gpqa_main.csv": "\n".join(lines).encode(), "README.md": b""}
    config = EvalConfig(tasks=["gpqa"], data_dir=tmp_path / "data", hub=True)
    hub.gated = True
    with pytest.raises(MissingData) as caught:
        load_task(config, parse_task("gpqa"), None)
    assert "401" in caught.value.message and "accept their terms" in (caught.value.hint or "")
    (tmp_path / "data").mkdir(exist_ok=True)
    for asked in (True, False):
        report = EvalConfig(suite="phi3-report", data_dir=tmp_path / "data", hub=asked, tasks=["gpqa"])
        with pytest.raises(MissingData) as caught:
            evals.run(report, {"model": tiny}, out=tmp_path / "e")
        assert "accept their terms" in (caught.value.hint or "")
    whole = EvalConfig(suite="phi3-report", data_dir=tmp_path / "data")
    with pytest.raises(DataError, match=r"gpqa.*no data: gpqa_main.*accept their terms"):
        evals.run(whole, {"model": tiny}, out=tmp_path / "e")
    hub.gated = False
    each = load_task(config, parse_task("gpqa"), None)
    assert len(each.items) == 3 and len(each.shots[""]) == 2
    assert "Why" in each.prefix[""] and "It is so." in each.prefix[""]


def test_every_data_set_is_the_one_its_task_names() -> None:
    parse_task("house")  # fills the registry
    for _, task in TASKS.items():
        for stem in filter(None, (task.file, task.shots_file)):
            if stem in ONLY_LOCAL:
                assert stem not in evals_hub.SOURCES
                continue
            source = evals_hub.SOURCES[stem]
            assert task.hub.partition(":")[0] == source.repository, task.name
