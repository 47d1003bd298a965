"""lm-eval's tasks through our back ends: what lm_eval.simple_evaluate says of the same model and rows."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch

from pocketphi import evals
from pocketphi.core.errors import ConfigError, DataError, EngineError, UserError
from pocketphi.evals import EvalConfig, compare, forecast, suites, tables
from pocketphi.evals.data import MissingData

# lm-eval would fork a process per core for a bootstrap.
os.environ.setdefault("DISABLE_MULTIPROC", "1")
lm_eval = pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")

from pocketphi.evals.harness import index, rows  # noqa: E402

SENTENCES = [
    "The cat sat on the mat and looked at the door.", "Water boils when it is heated for long enough.",
    "A list holds objects of any type, in order.", "The moon goes around the earth once a month.",
    "Names that start with an underscore are private.", "Snow falls in winter where it is cold.",
    "The statement is executed before anything else.", "Birds fly south when the days grow short.",
    "An empty string is false, any other is true.", "Iron rusts where water and air meet it.",
    "The value of an expression may be None.", "She gave him the book because he asked.",
]  # fmt: skip


def words(number: int, count: int = 3) -> str:
    return " ".join(SENTENCES[number % len(SENTENCES)].rstrip(".").split()[-count:])


def write(path: Path, found: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found), encoding="utf-8")


def arc_rows(count: int, shift: int = 0) -> list[dict]:
    return [
        {
            "id": f"Q{i + shift}",
            "query": f"Question: {SENTENCES[(i + shift) % 12]} What is number {i + shift}?\nAnswer:",
            "choices": [words(i + shift + k, k + 1) for k in range(3 + i % 3)],
            "gold": i % 3,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hand-made rows: of our own files, and of lm-eval's tasks in their origin's columns."""
    folder = tmp_path_factory.mktemp("rows")
    write(folder / "arc_easy.test.jsonl", arc_rows(12))
    write(folder / "arc_easy.train.jsonl", arc_rows(9, 20))
    piqa = [
        {"goal": SENTENCES[i], "sol1": words(i), "sol2": words(i + 5, 2 + i % 3), "label": i % 2}
        for i in range(8)
    ]
    write(folder / "piqa.validation.jsonl", piqa)
    blanks = [
        {"sentence": f"{words(i)} saw _ by the {words(i + 1, 2)}.", "option1": "Ann", "option2": "the old Bob", "answer": str(1 + i % 2)}
        for i in range(8)
    ]  # fmt: skip
    write(folder / "winogrande_xl.validation.jsonl", blanks)
    last = [{"id": i, "query": s.rpartition(" ")[0], "answers_text": [s.rpartition(" ")[2]]}
            for i, s in enumerate(SENTENCES)]  # fmt: skip
    write(folder / "lambada_openai.test.jsonl", last)
    sums = [{"question": f"Ann has {i} apples and buys {i + 2}. How many are there?",
             "answer": f"{i}+{i + 2}={2 * i + 2}\n#### {2 * i + 2}"} for i in range(4)]  # fmt: skip
    write(folder / "gsm8k.test.jsonl", sums)
    subjects = [n.removeprefix("mmlu_") for n, _ in index.leaves("mmlu")]
    assert len(subjects) == 57
    for split, least in (("test", 1), ("dev", 5)):
        found = [
            {"question": f"{SENTENCES[(i + n) % 12]} ({split} {i})", "subject": s, "choices": [words(i + n + k, 2) for k in range(4)], "answer": (i + n) % 4}
            for n, s in enumerate(subjects)
            for i in range(least + n % 3)
        ]  # fmt: skip
        write(folder / f"mmlu.{split}.jsonl", found)
    # Two documents, one of more than the tiny model's 512 tokens.
    pages = [{"page": " ".join(SENTENCES)}, {"page": " ".join(SENTENCES[i % 12] for i in range(60))}]
    write(folder / "lm-eval/wikitext.test.jsonl", pages)
    return folder


@pytest.fixture(scope="module")
def judge(tiny: Path):
    """lm-eval's own back end on the tiny model."""
    pytest.importorskip("accelerate", reason="lm-eval's Hugging Face back end needs accelerate")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=512)


def theirs(judge, name: str, folder: Path, shots: int | None, samples: dict | None = None) -> dict:
    """What lm_eval.simple_evaluate says, on rows from the same folder."""
    with rows.Supply(EvalConfig(data_dir=folder), shots).installed():
        return lm_eval.simple_evaluate(
            model=judge, tasks=[name], num_fewshot=shots, samples=samples, bootstrap_iters=100,
            task_manager=index.manager(),
        )  # fmt: skip


def ours(config: EvalConfig, model: Path | str, out: Path) -> tuple[dict, list[dict]]:
    found = evals.run(config, {"model": model}, out=out)
    records = [json.loads(x) for x in found.file("items.jsonl").read_text(encoding="utf-8").splitlines()]
    return json.loads(found.file("results.json").read_text(encoding="utf-8")), records


@pytest.mark.parametrize(
    ("name", "shots"),
    [("arc_easy", None), ("arc_easy", 3), ("piqa", None), ("winogrande", None), ("lambada_openai", None),
     ("wikitext", None), ("gsm8k_cot", None), ("gsm8k_cot", 1), ("mmlu", None), ("mmlu_stem", 2)],
)  # fmt: skip
def test_items_and_figures_are_lm_evals_own(
    name: str, shots: int | None, tiny: Path, judge, data: Path, tmp_path: Path
) -> None:
    asked = f"lm-eval/{name}" + ("" if shots is None else f":shots={shots}")
    tree, mine = ours(EvalConfig(tasks=[asked], data_dir=data), tiny, tmp_path / "e")
    (entry,) = tree["tasks"]
    said = theirs(judge, name, data, shots)
    seen = 0
    for part, samples in said["samples"].items():
        by_number = {r["number"]: r for r in mine if r["part"] == part}
        for sample in samples:
            seen += 1
            record = by_number[sample["doc_id"]]
            for metric in sample["metrics"]:
                key = f"{metric},{sample['filter']}"
                if key in record["metrics"]:
                    assert record["metrics"][key] == pytest.approx(float(sample[metric]), abs=1e-3), key
            if "logprobs" in record:
                expected = [float(r[0]) for r in sample["filtered_resps"]]
                assert record["logprobs"] == pytest.approx(expected, abs=2e-3)
                assert record["greedy"] == [bool(r[1]) for r in sample["filtered_resps"]]
            if "loglikelihood" in record:
                assert record["loglikelihood"] == pytest.approx(sample["resps"][0][0], abs=2e-2)
            if "text" in record:
                # Bytes that are no UTF-8, which a random model writes, are shown in other ways.
                assert record["text"].startswith(sample["resps"][0][0].partition("\ufffd")[0])
    assert seen == len(mine) * len({s["filter"] for found in said["samples"].values() for s in found})
    results = said["results"][name]
    for key, figure in entry["metrics"].items():
        assert figure["value"] == pytest.approx(results[key], rel=1e-4), key
        stderr = results.get(key.replace(",", "_stderr,"))
        mean = key.startswith(("acc", "exact_match"))
        if mean and stderr not in (None, "N/A"):
            assert figure["stderr"] == pytest.approx(float(stderr), rel=1e-4), key
    assert {k for k in results if "," in k and "_stderr" not in k} == set(entry["metrics"])
    assert entry["value"] == entry["metrics"][f"{entry['metric']},{entry['filter']}"]["value"]
    assert entry["lm_eval"] == lm_eval.__version__ and len(entry["definition_sha256"]) == 64


def test_a_group_keeps_its_parts_and_their_groups(tiny: Path, judge, data: Path, tmp_path: Path) -> None:
    tree, _ = ours(EvalConfig(tasks=["lm-eval/mmlu"], data_dir=data), tiny, tmp_path / "e")
    said = theirs(judge, "mmlu", data, None)["results"]
    groups = tree["tasks"][0]["groups"]
    assert len(groups) == 57 + 4
    for name, figures in groups.items():
        assert figures["value"] == pytest.approx(said[name]["acc,none"], abs=1e-6), name
        assert figures["n"] == said[name]["sample_len"]
    flat = tables.flat(evals.run(EvalConfig(tasks=["lm-eval/mmlu"], data_dir=data), {"model": tiny}, out=tmp_path / "e"))
    assert flat[0]["group.mmlu_stem"] == groups["mmlu_stem"]["value"]
    assert not any(isinstance(v, dict) for k, v in flat[0].items() if not k.startswith("model."))


def test_a_limit_draws_by_hash_and_asks_as_lm_eval_asks_those(
    tiny: Path, judge, data: Path, tmp_path: Path
) -> None:
    config = EvalConfig(tasks=["lm-eval/arc_easy:shots=2"], data_dir=data, limit=5)
    tree, mine = ours(config, tiny, tmp_path / "e")
    numbers = [r["number"] for r in mine]
    assert len(numbers) == 5 and numbers == sorted(numbers) and numbers != [0, 1, 2, 3, 4]
    samples = theirs(judge, "arc_easy", data, 2, {"arc_easy": numbers})["samples"]["arc_easy"]
    for record, sample in zip(mine, samples):
        assert record["number"] == sample["doc_id"]
        assert record["logprobs"] == pytest.approx([float(r[0]) for r in sample["filtered_resps"]], abs=2e-3)


def test_settings_choose_the_value_among_lm_evals_figures(tiny: Path, data: Path, tmp_path: Path) -> None:
    config = EvalConfig(
        tasks=["lm-eval/arc_easy", "lm-eval/arc_easy:metric=acc_norm", "lm-eval/gsm8k_cot:shots=0,filter=flexible-extract", "arc_easy"],
        data_dir=data, limit=3, max_new_tokens=8,
    )  # fmt: skip
    found = evals.run(config, {"model": tiny}, out=tmp_path / "e")
    entries = {e["task"]: e for e in tables.results(found)["tasks"]}
    assert list(entries) == [
        "lm-eval/arc_easy", "lm-eval/arc_easy[acc_norm]", "lm-eval/gsm8k_cot[flexible-extract]", "arc_easy",
    ]  # fmt: skip
    assert [e["metric"] for e in entries.values()] == ["acc", "acc_norm", "exact_match", "accuracy_norm"]
    assert entries["lm-eval/gsm8k_cot[flexible-extract]"]["filter"] == "flexible-extract"
    assert entries["lm-eval/gsm8k_cot[flexible-extract]"]["max_new_tokens"] == 8
    shown = tables.text(found)
    assert "acc_norm:" in shown and "exact_match (strict-match):" in shown
    with pytest.raises(UserError, match="gives no such figure.*metric=acc_norm"):
        evals.run(EvalConfig(tasks=["lm-eval/arc_easy:metric=f1"], data_dir=data), {"model": tiny}, out=tmp_path / "f")
