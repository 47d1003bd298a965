"""Comparing two evaluations: the statistics, what is refused, the page."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pocketphi import evals
from pocketphi.core import artifact
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import DataError
from pocketphi.evals import EvalConfig, comparability, compare, paired
from pocketphi.evals.compare import CompareConfig


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"id": i, "text": f"The {w} grows in the garden, and {i} people see it. " * 3} for i, w in enumerate(
        ("rose", "oak", "fern", "bean", "vine", "moss"))]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def two(
    tiny: Path, tiny_other: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, Artifact]:
    """The same tasks on two models of the same shape."""
    folder = tmp_path_factory.mktemp("two")
    config = EvalConfig(tasks=["house", "bits"], texts=[texts])
    return (
        evals.run(config, {"model": tiny}, out=folder / "a"),
        evals.run(config, {"model": tiny_other}, out=folder / "b"),
    )


# The statistics, against scipy.


def test_interval_and_p_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2, 300).astype(float), rng.integers(0, 2, 300).astype(float)
    found = paired.difference(a, b, resamples=20_000)
    assert found.value == pytest.approx(float((b - a).mean()))
    assert found.stderr == pytest.approx(float((b - a).std(ddof=1) / np.sqrt(300)))
    better, worse = int((b > a).sum()), int((b < a).sum())
    assert (found.better, found.worse) == (better, worse)
    assert found.p_value == pytest.approx(stats.binomtest(better, better + worse, 0.5).pvalue, rel=1e-9)
    judged = stats.bootstrap(
        ((b - a),), np.mean, method="percentile", n_resamples=4000, random_state=np.random.default_rng(1)
    ).confidence_interval
    assert found.low == pytest.approx(judged.low, abs=0.006)
    assert found.high == pytest.approx(judged.high, abs=0.006)


def test_ratio_is_resampled_by_document() -> None:
    rng = np.random.default_rng(5)
    size = rng.integers(50, 500, 40).astype(float)
    a = size * rng.normal(2.0, 0.1, 40)
    b = a + size * rng.normal(0.05, 0.02, 40)
    found = paired.difference(a, b, size, resamples=4000)
    drawn = rng.integers(0, 40, (4000, 40))
    plain = (b - a)[drawn].sum(axis=1) / size[drawn].sum(axis=1)
    low, high = np.quantile(plain, [0.025, 0.975])
    assert found.value == pytest.approx((b - a).sum() / size.sum())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.002), pytest.approx(high, abs=0.002))
    assert found.stderr == pytest.approx(plain.std(), rel=0.15)


def test_pairing_is_what_makes_the_interval_narrow() -> None:
    """Two models that agree on nearly all items: the interval must not be that of two separate samples."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, 1000).astype(float)
    b = a.copy()
    b[:20] = 1
    found = paired.difference(a, b)
    alone = float(np.sqrt(a.var() / 1000 + b.var() / 1000))
    assert found.stderr is not None and found.stderr < alone / 4
    assert found.low is not None and found.low > 0, "a change of 1 point is seen"


def test_holm_and_the_sign_test() -> None:
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.sign_test(0, 0) == 1.0 and paired.sign_test(5, 5) == 1.0
    assert paired.sign_test(0, 10) == pytest.approx(2 / 1024)
    assert paired.sign_test(9000, 9500) < 0.001, "large counts do not overflow"


# A real comparison.


def test_differences_of_two_models(two, tmp_path: Path) -> None:
    found = compare.run(CompareConfig(resamples=2000), {"a": two[0], "b": two[1]}, out=tmp_path / "c")
    tree = json.loads(found.file("comparison.json").read_text())
    rows = {r["task"]: r for r in tree["compared"]}
    assert set(rows) == {"house", "bits"} and not tree["refused"]
    for row in rows.values():
        assert row["difference"] == pytest.approx(row["b"] - row["a"], abs=2e-6)
        assert row["low"] <= row["difference"] <= row["high"]
    assert rows["bits"]["lower_is_better"] and rows["bits"]["n"] == 6
    differing = [json.loads(x) for x in found.file("differing.jsonl").read_text().splitlines()]
    assert differing and all(d["a"] != d["b"] or d["a_score"] != d["b_score"] for d in differing)
    moved = sum(d["a_score"] != d["b_score"] for d in differing)
    assert moved == rows["house"]["better"] + rows["house"]["worse"]
    again = compare.run(CompareConfig(resamples=2000), {"a": two[0], "b": two[1]}, out=tmp_path / "d")
    assert again.checksum == found.checksum
    turned = compare.compare(CompareConfig(resamples=2000), two[1], two[0])[0]["compared"][0]
    assert turned["difference"] == pytest.approx(-rows[turned["task"]]["difference"])


def test_a_model_against_itself_differs_nowhere(two, tmp_path: Path) -> None:
    tree, differing = compare.compare(CompareConfig(resamples=200), two[0], two[0])
    assert not differing
    assert all((r["difference"], r["low"], r["high"], r["p_value"]) == (0, 0, 0, 1) for r in tree["compared"])


# What is refused, and why.


def test_other_items_and_other_protocols_are_refused(two, tiny: Path, tmp_path: Path) -> None:
    fewer = evals.run(EvalConfig(tasks=["house"], limit=20), {"model": tiny}, out=tmp_path / "fewer")
    with pytest.raises(DataError, match=r"other items were scored \(n=20 against n=60, 20 in common\)"):
        compare.run(CompareConfig(), {"a": fewer, "b": two[1]}, out=tmp_path / "c")
    letters = evals.run(EvalConfig(tasks=["house:format=letters"]), {"model": tiny}, out=tmp_path / "letters")
    with pytest.raises(DataError, match=r"scored only in A \(B has house: another protocol\)"):
        compare.run(CompareConfig(), {"a": letters, "b": two[1]}, out=tmp_path / "c")
    eos = evals.run(EvalConfig(tasks=["house"], start_token="eos"), {"model": tiny}, out=tmp_path / "eos")
    with pytest.raises(DataError, match="the start-token rule differs"):
        compare.run(CompareConfig(), {"a": eos, "b": two[1]}, out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def _entry(**more):
    return {
        "name": "gsm8k", "task_version": 1, "metric": "accuracy", "kind": "generate", "shots": 8, "format": None,
        "file_sha256": "f" * 64, "shots_file_sha256": "e" * 64, "prompt_version": "p1", "chat": True,
        "max_new_tokens": 256, "num_cut_prompts": 0, **more,
    }  # fmt: skip


SIDE = {
    "tokenizer_sha256": "t" * 64,
    "template_sha256": "m" * 64,
    "start_token": "auto: bos",
    "max_context_tokens": 512,
}


@pytest.mark.parametrize(
    ("entry", "side", "words"),
    [
        ({"task_version": 2}, {}, "the task's version differs"),
        ({"prompt_version": "p2"}, {}, "the prompt's version differs"),
        ({"file_sha256": "0" * 64}, {}, "the data file differs"),
        ({"shots": 5}, {}, "the number of shots differs"),
        ({"chat": False}, {}, "chat template used or not"),
        ({"max_new_tokens": 64}, {}, "room for an answer"),
        ({"judge_sha256": "j" * 64}, {}, "the judge differs"),
        ({"metric": "accuracy_norm"}, {}, "the metric differs"),
        ({}, {"template_sha256": "n" * 64}, "the chat template differs on the same tokenizer"),
        ({}, {"start_token": "none"}, "the start-token rule differs"),
        ({"num_cut_prompts": 3}, {"max_context_tokens": 256}, "prompts were cut to contexts of different length"),
        ({"kind": "bits"}, {}, "way of answering"),
    ],
)  # fmt: skip
def test_each_difference_in_the_asking_is_refused(entry, side, words) -> None:
    items = {"1": {"id": "1"}}
    same = comparability.rule(_entry(), _entry(), SIDE, SIDE, items, items)
    assert not same.refusals and not same.notes
    found = comparability.rule(_entry(), _entry(**entry), SIDE, {**SIDE, **side}, items, items)
    assert any(words in r for r in found.refusals), found.refusals


def test_what_belongs_to_the_model_is_noted_and_not_refused() -> None:
    other = {**SIDE, "tokenizer_sha256": "u" * 64, "template_sha256": "n" * 64, "start_token": "auto: none"}
    found = comparability.rule(_entry(), _entry(), SIDE, other, {"1": {}}, {"1": {}})
    assert not found.refusals
    assert any("own chat template" in n for n in found.notes) and any(
        "own start token" in n for n in found.notes
    )
    forced = comparability.rule(
        _entry(), _entry(), SIDE, {**other, "start_token": "bos"}, {"1": {}}, {"1": {}}
    )
    assert any("start-token" in r for r in forced.refusals)


def test_bits_in_other_windows_or_texts_are_refused() -> None:
    bits = {"kind": "bits", "name": "bits", "metric": "bits_per_byte"}
    items = {"1": {"text_sha256": "a"}}
    found = comparability.rule(
        _entry(**bits),
        _entry(**bits),
        SIDE,
        {**SIDE, "max_context_tokens": 64},
        items,
        {"1": {"text_sha256": "b"}},
    )
    assert any("the windows differ" in r for r in found.refusals)
    assert any("1 of the 1 texts differ" in r for r in found.refusals)


# The page.


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text.append(data)


def test_page_is_offline_whole_and_escaped(two, tmp_path: Path) -> None:
    evil = '<script>alert("x")</script><img src=http://x.test/a onerror=1>'
    sides = []
    for number, found in enumerate(two):
        # The same evaluation with hostile texts in its records, published anew.
        with artifact.create(tmp_path / f"evil{number}", kind="eval", config={"n": number}) as draft:
            tree = json.loads(found.file("results.json").read_text())
            tree["model"] = f"model {evil}"
            (draft.path / "results.json").write_text(json.dumps(tree))
            with open(draft.path / "items.jsonl", "w") as file:
                for line in found.file("items.jsonl").read_text().splitlines():
                    record = json.loads(line)
                    if "options" in record:
                        record["question"] += evil
                        record["options"] = [o + evil for o in record["options"]]
                    file.write(json.dumps(record) + "\n")
        sides.append(draft.artifact)
    made = compare.run(CompareConfig(resamples=200), {"a": sides[0], "b": sides[1]}, out=tmp_path / "c")
    page = _Page()
    source = made.file("index.html").read_text()
    page.feed(source)
    page.close()
    assert page.open == [], "every tag is closed"
    assert "script" not in page.tags and "img" not in page.tags
    assert not page.links, "the page loads nothing"
    assert "default-src 'none'" in source
    assert "svg" in page.tags and "details" in page.tags
    assert any('<script>alert("x")</script>' in t for t in page.text), "the text is shown as text"


def test_the_verb_prints_the_table_and_refuses_with_exit_1(two, tiny: Path, tmp_path: Path) -> None:
    def phi(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pocketphi", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    a, b = (t.path for t in two)
    done = phi("eval", "compare", a, b, "--json", "--out", tmp_path / "c", "--set", "resamples=500")
    assert done.returncode == 0, done.stderr
    rows = {r["task"]: r for r in json.loads(done.stdout)}
    assert (
        rows["house"]["comparable"] and {"difference", "low", "high", "p_value", "n"} <= rows["house"].keys()
    )
    fewer = evals.run(EvalConfig(tasks=["house"], limit=20), {"model": tiny}, out=tmp_path / "fewer")
    refused = phi("eval", "compare", fewer.path, b, "--out", tmp_path / "d")
    assert refused.returncode == 1 and "other items were scored" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_note_on_every_task_is_said_once() -> None:
    from pocketphi.evals import compare_page

    rows = [{"notes": ["tokenizers differ", "own"]}, {"notes": ["tokenizers differ"]}]
    assert compare_page.common_notes(rows) == ["tokenizers differ"]
    assert compare_page.common_notes(rows[:1]) == compare_page.common_notes([]) == []
