"""Items found in the corpus that made the model, and published scores beside ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketphi import evals
from pocketphi.core import artifact
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import UserError
from pocketphi.evals import EvalConfig, contamination, published, tables
from pocketphi.evals.tasks.choice import house_items

FILLER = "The river runs past the old mill and down to the town where boats are kept for the summer. "


def _corpus(folder: Path, texts: list[str], keep: list[bool], heldout: list[bool]) -> Artifact:
    """A corpus artifact with the columns that the reading side asks for."""
    import pyarrow
    import pyarrow.parquet

    from pocketphi.corpus.document import COLUMNS

    count = len(texts)
    with artifact.create(folder, kind="corpus", config={"texts": len(texts)}) as draft:
        for name in ("documents", "verdicts"):
            (draft.path / name).mkdir()
        columns = {c: pyarrow.array([""] * count) for c in COLUMNS}
        columns["id"] = pyarrow.array([f"{i:02x}" for i in range(count)])
        columns["text"] = pyarrow.array(texts)
        pyarrow.parquet.write_table(pyarrow.table(columns), draft.path / "documents/part-00000.parquet")
        verdicts = {"id": columns["id"], "keep": keep, "heldout": heldout, "phase1": keep, "phase2": keep}
        pyarrow.parquet.write_table(pyarrow.table(verdicts), draft.path / "verdicts/part-00000.parquet")
    return draft.artifact


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[str]]:
    """Three house questions with their answers in three kinds of documents; only the first is training text."""
    long = [q for q in house_items() if len(q.text.split()) >= 8][:3]
    texts = [f"{FILLER}{q.text.upper()} -- {q.options[q.gold]}!\n{FILLER}" for q in long] + [FILLER * 20]
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    return _corpus(folder, texts, [True, False, True, True], [False, False, True, False]), [
        q.id for q in long
    ]


def test_planted_item_is_found_in_training_text_only(planted, tiny: Path, tmp_path: Path) -> None:
    corpus, (seen, *unseen) = planted
    found = evals.run(EvalConfig(tasks=["house"]), {"model": tiny, "corpus": corpus}, out=tmp_path / "e")
    records = {r["id"]: r for r in map(json.loads, found.file("items.jsonl").read_text().splitlines())}
    assert [i for i, r in records.items() if r["seen_in_corpus"]] == [seen]
    assert not any(records[i]["seen_in_corpus"] for i in unseen), (
        "rejected and held-out texts were not trained on"
    )
    tree = json.loads(found.file("results.json").read_text())
    entry = tree["tasks"][0]
    judged = sum(len(contamination._WORD.findall(contamination.item_text(q))) >= 8 for q in house_items())
    assert entry["num_judged_for_contamination"] == judged
    assert entry["contaminated_share"] == pytest.approx(1 / judged, abs=1e-6)
    others = [r["correct_norm"] for i, r in records.items() if i != seen]
    assert entry["value_unseen"] == pytest.approx(sum(others) / len(others), abs=1e-6)
    assert tree["contamination"]["checked"] and tree["contamination"]["corpora"] == [corpus.checksum]
    assert f"% of {judged} items occur in the corpus" in tables.text(found)


def test_corpus_is_found_through_the_lineage(planted, tiny: Path, tmp_path: Path) -> None:
    corpus, _ = planted
    with artifact.create(tmp_path / "shards", kind="shards", config={}, parents=[corpus]) as draft:
        (draft.path / "x.txt").write_text("x")
    with artifact.create(tmp_path / "model", kind="checkpoint", config={}, parents=[draft.artifact]) as draft:
        for file in tiny.iterdir():
            (draft.path / file.name).write_bytes(file.read_bytes())
    found = evals.run(EvalConfig(tasks=["house"]), {"model": tmp_path / "model"}, out=tmp_path / "e")
    assert json.loads(found.file("results.json").read_text())["tasks"][0]["num_seen_in_corpus"] == 1
    inside = contamination.corpora_of(tmp_path / "model" / "config.json", None)
    assert [c.checksum for c in inside] == [corpus.checksum], "a file inside an artifact has its lineage"
    off = evals.run(
        EvalConfig(tasks=["house"], contamination=False), {"model": tmp_path / "model"}, out=tmp_path / "o"
    )
    tree = json.loads(off.file("results.json").read_text())
    assert "contaminated_share" not in tree["tasks"][0] and not tree["contamination"]["checked"]


def test_without_a_corpus_the_table_says_that_nothing_was_checked(tiny: Path, tmp_path: Path) -> None:
    found = evals.run(EvalConfig(tasks=["house"]), {"model": tiny}, out=tmp_path / "e")
    assert "items not checked against the training text" in tables.text(found)


def test_half_of_an_item_is_not_enough_when_it_is_less_than_half() -> None:
    words = [f"w{i}" for i in range(40)]
    index = contamination._Index([("t\0a", " ".join(words))])
    grams = 40 - contamination.NGRAM_WORDS + 1
    assert list(index.found(" ".join(words))) == [0]
    assert list(index.found("x " + " ".join(words[: 13 + grams // 2 - 1]) + " y")) == [0], "exactly half"
    assert list(index.found(" ".join(words[: 13 + grams // 2 - 2]) + " y")) == []
    assert list(index.found(" ".join(reversed(words)))) == []


# Published columns.


def test_published_columns_add_up() -> None:
    """The averages that the report prints over its twenty benchmarks follow from the cells typed here."""
    twenty = [t for t in published.tree()["shots"]["phi3-report"] if t not in ("gpqa", "mt_bench")]
    assert len(twenty) == 20
    # The report prints these two otherwise than its own cells say; both are kept as printed.
    as_printed = {"phi-3-medium": 77.19, "GPT-3.5-1106": 73.78}
    averages = {c["model"]: c["average"] for c in published.tree()["columns"] if "average" in c}
    assert len(averages) == 8
    for column in published.tree()["columns"]:
        if column["model"] in averages:
            mean = sum(column["tasks"][t] for t in twenty) / 20
            expected = as_printed.get(column["model"], averages[column["model"]])
            assert mean == pytest.approx(expected, abs=0.11), column["model"]


def test_every_published_task_is_one_of_ours() -> None:
    from pocketphi.evals import tasks as _tasks  # noqa: F401
    from pocketphi.evals.task import TASKS

    known = {name for name, _ in TASKS.items()}
    for column in published.tree()["columns"]:
        assert column["source"] in published.tree()["sources"]
        for name in column["tasks"]:
            parts = published.tree()["means"].get(name, [name])
            assert set(parts) <= known, name


def test_cells_say_what_sets_their_protocol_apart() -> None:
    entry = {
        "task": "arc_easy",
        "name": "arc_easy",
        "shots": 0,
        "format": "cloze",
        "value": 0.5,
        "metric": "accuracy",
    }
    cells = {c.model: c for c in published.cells(entry)}
    assert (cells["phi-3-mini"].score, cells["phi-3-mini"].remark) == (94.6, "10-shot")
    assert cells["SmolLM2-135M-Instruct"].remark == "mean of arc_easy, arc_challenge"
    shown = published.table([entry])
    assert "94.6[1]" in shown and "arXiv 2404.14219" in shown and "10-shot" in shown
    assert published.table([{**entry, "name": "house"}]) == ""
    with pytest.raises(UserError, match="did you mean 'phi-3-mini'"):
        published.cells(entry, ["phi3-mini"])
