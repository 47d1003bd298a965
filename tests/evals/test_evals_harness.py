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
    with rows.Supply(EvalConfig(data_dir=folder), name, shots).installed():
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
    flat = tables.flat(
        evals.run(EvalConfig(tasks=["lm-eval/mmlu"], data_dir=data), {"model": tiny}, out=tmp_path / "e")
    )
    assert flat[0]["group.mmlu_stem"] == groups["mmlu_stem"]["value"]
    assert not any(isinstance(v, dict) for k, v in flat[0].items() if not k.startswith("model."))


def test_a_limit_draws_by_hash_and_asks_as_lm_eval_asks_those(
    tiny: Path, judge, data: Path, tmp_path: Path
) -> None:
    config = EvalConfig(tasks=["lm-eval/arc_easy:shots=2"], data_dir=data, limit=5)
    _, mine = ours(config, tiny, tmp_path / "e")
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
    with pytest.raises(UserError, match=r"gives no such figure.*metric=acc_norm"):
        evals.run(
            EvalConfig(tasks=["lm-eval/arc_easy:metric=f1"], data_dir=data),
            {"model": tiny},
            out=tmp_path / "f",
        )


def test_engine_and_torch_answer_alike(tiny: Path, data: Path, tmp_path: Path) -> None:
    from pocketphi import quant

    gguf = quant.run(
        quant.QuantConfig(type="f32", fidelity_tokens=0), {"checkpoint": tiny}, out=tmp_path / "gguf"
    )
    tasks = ["lm-eval/arc_easy:shots=1", "lm-eval/wikitext", "lm-eval/gsm8k_cot:shots=0"]
    config = EvalConfig(tasks=tasks, data_dir=data, max_new_tokens=16)
    _, torch_items = ours(config, tiny, tmp_path / "torch")
    _, engine_items = ours(config, gguf.file("model.gguf"), tmp_path / "engine")
    assert [(r["task"], r["id"]) for r in torch_items] == [(r["task"], r["id"]) for r in engine_items]
    for a, b in zip(torch_items, engine_items):
        assert a.get("pred") == b.get("pred") and a["prompt_sha256"] == b["prompt_sha256"]
        if "logprobs" in a:
            assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-2)
        if "loglikelihood" in a:
            assert a["loglikelihood"] == pytest.approx(b["loglikelihood"], rel=1e-4)
        # Half precision in the engine's cache may turn a late token of a random model's text.
        assert a.get("text", "")[:6] == b.get("text", "")[:6]


def test_a_killed_run_ends_in_the_same_bytes(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketphi.evals.journal import Journal

    config = EvalConfig(
        tasks=["lm-eval/arc_easy:shots=2", "lm-eval/gsm8k_cot", "lm-eval/mmlu_stem"], data_dir=data, limit=3, max_new_tokens=8,
    )  # fmt: skip
    calm = evals.run(config, {"model": tiny}, out=tmp_path / "calm")
    add, counted = Journal.add, {"n": 0}

    def dying(self, record):
        counted["n"] += 1
        if counted["n"] in (2, 6, 20):
            raise KeyboardInterrupt
        add(self, record)

    monkeypatch.setattr(Journal, "add", dying)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            evals.run(config, {"model": tiny}, out=tmp_path / "killed")
    killed = evals.run(config, {"model": tiny}, out=tmp_path / "killed")
    assert killed.checksum == calm.checksum
    items = (tmp_path / "calm/items.jsonl").read_text(encoding="utf-8").count("\n")
    assert counted["n"] == items + 3, "finished items must not be asked again"


def test_two_models_are_compared_item_by_item(
    tiny: Path, tiny_other: Path, data: Path, tmp_path: Path
) -> None:
    tasks = ["lm-eval/arc_easy", "lm-eval/mmlu_stem", "lm-eval/wikitext", "lm-eval/wikitext:metric=bits_per_byte", "lm-eval/lambada_openai:metric=perplexity"]  # fmt: skip
    sides = [
        evals.run(EvalConfig(tasks=tasks, data_dir=data), {"model": m}, out=tmp_path / m.name)
        for m in (tiny, tiny_other)
    ]
    tree, differing = compare.compare(compare.CompareConfig(resamples=200), *sides)
    rows_ = {r["task"]: r for r in tree["compared"]}
    assert set(rows_) == {"lm-eval/arc_easy", "lm-eval/mmlu_stem", "lm-eval/wikitext[bits_per_byte]"}
    assert rows_["lm-eval/wikitext[bits_per_byte]"]["lower_is_better"]
    assert not rows_["lm-eval/arc_easy"]["lower_is_better"]
    refused = {r["task"]: r["reasons"] for r in tree["refused"]}
    assert refused["lm-eval/wikitext"] == [
        "word_perplexity is no mean over items, so there is nothing to pair"
    ]
    assert any(d["task"] == "lm-eval/arc_easy" and d["options"] for d in differing)
    page = compare.run(
        compare.CompareConfig(resamples=200), {"a": sides[0], "b": sides[1]}, out=tmp_path / "c"
    )
    assert "lm-eval/mmlu_stem" in page.file("index.html").read_text(encoding="utf-8")
    from pocketphi import report

    shown = report.run(report.ReportConfig(), {"eval": sides[0].path}, out=tmp_path / "r")
    words_ = shown.file("index.html").read_text(encoding="utf-8")
    perplexity = tables.results(sides[0])["tasks"][2]["value"]
    assert f"{perplexity:.4f}" in words_ and f"{100 * perplexity:.1f}%" not in words_
    fewer = evals.run(
        EvalConfig(tasks=["lm-eval/arc_easy:shots=1"], data_dir=data), {"model": tiny}, out=tmp_path / "f"
    )
    with pytest.raises(DataError, match="another protocol"):
        compare.run(compare.CompareConfig(), {"a": fewer, "b": sides[1]}, out=tmp_path / "d")


def test_items_are_looked_for_in_the_training_text(tiny: Path, data: Path, tmp_path: Path) -> None:
    from test_evals_contamination import _corpus

    first = "What the cat did then is told in the book that she gave him because he asked"
    write(tmp_path / "rows/lm-eval/arc_easy.test.jsonl", [
        {"id": str(i), "question": q, "choices": {"text": ["up", "down"], "label": ["A", "B"]}, "answerKey": "A"}
        for i, q in enumerate([first, "Which of the two ways does a stone go when nobody holds it any more?"])
    ])  # fmt: skip
    corpus = _corpus(tmp_path / "corpus", [f"Some words. {first} up, and more."], [True], [False])
    config = EvalConfig(tasks=["lm-eval/arc_easy"], data_dir=tmp_path / "rows")
    found = evals.run(config, {"model": tiny, "corpus": corpus}, out=tmp_path / "e")
    (entry,) = tables.results(found)["tasks"]
    assert (entry["num_judged_for_contamination"], entry["num_seen_in_corpus"]) == (2, 1)
    assert entry["contaminated_share"] == 0.5 and entry["value_unseen"] in (0.0, 1.0)


def test_a_plan_counts_requests_and_what_they_share(data: Path) -> None:
    config = EvalConfig(
        tasks=["lm-eval/mmlu_stem:shots=5", "lm-eval/gsm8k_cot", "lm-eval/triviaqa"], data_dir=data
    )
    mmlu, gsm8k, absent = forecast.by_task(config, {"parameters": 1e8}, (1e11, 1e10))
    assert mmlu["items"] > 19 and mmlu["tokens_saved_by_sharing"] > mmlu["tokens_read"]
    assert gsm8k["items"] == 4 and gsm8k["tokens_written"] == 4 * 128
    assert gsm8k["tokens_saved_by_sharing"] > 2 * 900, "the eight shots are read once"
    assert absent["items"] == 0 and "--hub" in absent["reason"]


def test_rows_of_the_users_own_come_first(tiny: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    write(folder / "piqa.validation.jsonl", [{"goal": "ours", "sol1": "a", "sol2": "b", "label": 0}])
    mine = [
        {"goal": "own", "sol1": "a", "sol2": "b c", "label": 1},
        {"goal": "own 2", "sol1": "a", "sol2": "b", "label": 1},
    ]
    write(folder / "lm-eval/piqa.validation.jsonl", mine)
    tree, items = ours(EvalConfig(tasks=["lm-eval/piqa"], data_dir=folder), tiny, tmp_path / "e")
    assert {r["question"] for r in items} == {"Question: own\nAnswer:", "Question: own 2\nAnswer:"}
    write(folder / "piqa.train.jsonl", [{"goal": "shown", "sol1": "a", "sol2": "b", "label": 0}] * 3)
    shot = EvalConfig(tasks=["lm-eval/piqa:shots=1"], data_dir=folder)
    shot_tree, _ = ours(shot, tiny, tmp_path / "s")
    assert shot_tree["tasks"][0]["shots"] == 1, "our own file has the split that the user's does not"
    assert tree["tasks"][0]["file"] == "piqa.validation.jsonl" and tree["tasks"][0]["num_in_file"] == 2


# What cannot be done, said before anything is scored.


@pytest.mark.parametrize(
    ("task", "words_", "hint"),
    [("lm-eval/arc_eazy", "no task 'arc_eazy' .did you mean lm-eval/arc_easy", "lm_eval ls tasks"),
     ("lm-eval/humaneval", "run programs that the model wrote", "-t humaneval runs them in a sandbox"),
     ("lm-eval/mbpp:shots=3", "run programs that the model wrote", "-t mbpp runs them in a sandbox"),
     ("lm-eval/mmmu_val_art", "shows images to the model", None),
     ("lm-eval/arc_easy:format=letters", "unknown setting 'format'", None),
     ("lm-eval/arc_easy:shots=many", "shots must be a number", None),
     ("lm-eval/openllm", "no score of its own", "lm-eval/arc_challenge:shots=25, lm-eval/hellaswag:shots=10")],
)  # fmt: skip
def test_names_that_cannot_run_are_refused(task: str, words_: str, hint: str | None) -> None:
    with pytest.raises(ConfigError, match=words_) as error:
        suites.select(EvalConfig(tasks=[task]))
    assert hint is None or hint in (error.value.hint or "")


def test_tags_and_plain_groups_are_their_tasks() -> None:
    chosen = suites.select(EvalConfig(tasks=["lm-eval/ai2_arc:shots=2", "arc_easy"]))
    assert [t.label for t in chosen.tasks] == [
        "lm-eval/arc_challenge[2-shot]", "lm-eval/arc_easy[2-shot]", "arc_easy",
    ]  # fmt: skip
    assert len(suites.select(EvalConfig(tasks=["lm-eval/pythia"])).tasks) == 11
    with pytest.raises(ConfigError, match="named twice"):
        suites.select(EvalConfig(tasks=["lm-eval/ai2_arc", "lm-eval/arc_easy"]))


def test_without_the_package_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    index.manager.cache_clear()

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(index.importlib.metadata, "version", absent)
    with pytest.raises(UserError, match="not installed") as error:
        suites.select(EvalConfig(tasks=["lm-eval/arc_easy"]))
    assert error.value.hint == "pip install 'pocketphi[lm-eval]'"
    monkeypatch.setattr(index.importlib.metadata, "version", lambda name: "0.4.9.1")
    with pytest.raises(UserError, match=r"0\.4\.9\.1 is installed, 0\.4\.13 or a newer 0\.4 is needed"):
        suites.select(EvalConfig(tasks=["lm-eval/arc_easy"]))


def test_rows_that_are_nowhere(tiny: Path, data: Path, tmp_path: Path) -> None:
    def run(task: str, folder: Path | None = data, **more):
        return evals.run(
            EvalConfig(tasks=[task], data_dir=folder, **more), {"model": tiny}, out=tmp_path / "e"
        )

    with pytest.raises(MissingData, match=r"lm-eval/sciq needs rows of allenai/sciq \(split test\)") as error:
        run("lm-eval/sciq")
    assert "--hub fetches them" in error.value.hint and "lm-eval/sciq.test.jsonl" in error.value.hint
    with pytest.raises(MissingData, match="no data folder is set"):
        run("lm-eval/piqa", None)
    with pytest.raises(MissingData, match=r"baber/piqa \(split train\)"):
        run("lm-eval/piqa:shots=2")
    write(tmp_path / "changed/arc_easy.test.jsonl", [{"prompt": "x"}])
    with pytest.raises(DataError, match=r"arc_easy.test.jsonl: its rows are not what was expected: KeyError"):
        run("lm-eval/arc_easy", tmp_path / "changed")
    write(tmp_path / "changed/lm-eval/piqa.validation.jsonl", [{"goal": "x"}])
    with pytest.raises(DataError, match=r"lm-eval/piqa: lm-eval fails on it: "):
        run("lm-eval/piqa", tmp_path / "changed")
    with pytest.raises(ConfigError, match="log-likelihoods; choices_by=writing is for our own"):
        run("lm-eval/piqa", choices_by="writing")
    with pytest.raises(ConfigError, match="draws its answers at random"):
        run("lm-eval/gsm8k_cot_self_consistency")


def test_a_definition_that_fixes_its_shots_keeps_them(tiny: Path, tmp_path: Path) -> None:
    row = {"question": "Q?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]}, "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]}}  # fmt: skip
    write(tmp_path / "lm-eval/truthfulqa_mc2.validation.jsonl", [row, {**row, "question": "R?"}])
    config = EvalConfig(tasks=["lm-eval/truthfulqa_mc2:shots=3"], data_dir=tmp_path)
    with pytest.raises(ConfigError, match="definition says 0 shots"):
        evals.run(config, {"model": tiny}, out=tmp_path / "e")
    config = EvalConfig(tasks=["lm-eval/truthfulqa_mc2"], data_dir=tmp_path)
    assert tables.results(evals.run(config, {"model": tiny}, out=tmp_path / "e"))["tasks"][0]["n"] == 2


def test_lm_eval_opens_no_connection_unasked(tiny: Path, tmp_path: Path) -> None:
    """SQuAD 2 asks for text and log-likelihoods at once, and its metric comes from the Hub."""
    squad = {"id": "1", "title": "T", "context": "Ann has a cat.", "question": "Who has a cat?", "answers": {"text": ["Ann"], "answer_start": [0]}}  # fmt: skip
    write(tmp_path / "lm-eval/squadv2.validation.jsonl", [squad])
    write(tmp_path / "lm-eval/squadv2.train.jsonl", [squad])
    config = EvalConfig(tasks=["lm-eval/squadv2"], data_dir=tmp_path, max_new_tokens=4)
    with pytest.raises((MissingData, DataError)) as error:
        evals.run(config, {"model": tiny}, out=tmp_path / "e")
    assert "wants to reach" in error.value.message and error.value.hint == "--hub lets it"
    with (
        rows.offline("x", hub=False),
        pytest.raises(MissingData, match=r"x: lm-eval wants to reach example\.org"),
    ):
        socket.create_connection(("example.org", 80), timeout=1)
    with rows.offline("x", hub=True), socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        socket.create_connection(listening.getsockname(), timeout=1).close()


# Endpoints.


def echo(path: str, body: dict) -> tuple[int, dict]:
    """A server that likes long words: the log-probability of a word is minus its letters."""
    text, offset, offsets, logprobs = body["prompt"], 0, [], []
    while offset < len(text):
        end = text.find(" ", offset + 1)
        end = len(text) if end < 0 else end
        offsets.append(offset)
        logprobs.append(-float(end - offset))
        offset = end
    found = {"text_offset": offsets, "token_logprobs": logprobs, "top_logprobs": None}
    return 200, {"choices": [{"text": text, "logprobs": found}]}


def test_an_endpoint_with_log_probabilities(data: Path, tmp_path: Path, scripted) -> None:
    server = scripted(echo)
    config = EvalConfig(tasks=["lm-eval/arc_easy"], data_dir=data, limit=4)
    _, items = ours(config, f"{server.url}#m", tmp_path / "e")
    for item in items:
        sizes = [len(o) + 1 for o in item["options"]]
        assert item["logprobs"] == [-float(s) for s in sizes] and item["pred"] == sizes.index(min(sizes))


def test_an_endpoint_that_only_chats(data: Path, tmp_path: Path, scripted) -> None:
    def chat(path: str, body: dict) -> tuple[int, dict]:
        if not path.endswith("/chat/completions"):
            return 404, {"error": "no such route"}
        last = body["messages"][-1]
        assert last["role"] == "user" and "apples" in last["content"]
        number = last["content"].split(" apples")[0].rsplit(" ", 1)[1]
        text = f"The answer is {2 * int(number) + 2}."
        return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    server = scripted(chat)
    config = EvalConfig(tasks=["lm-eval/gsm8k_cot"], data_dir=data, chat=True)
    tree, items = ours(config, f"{server.url}#m", tmp_path / "e")
    assert tree["tasks"][0]["value"] == 1.0 and tree["tasks"][0]["chat"] is True
    assert all(i["answer"] == i["target"].split("#### ")[-1] for i in items)
    roles = [m["role"] for m in server.calls[0][1]["messages"]]
    assert roles == ["user", "assistant"] * 8 + ["user"], "eight shots as turns, as lm-eval gives them"
    for task, words_ in (("arc_easy", "asks for log-likelihoods: .*404"), ("wikitext", "of a whole text")):
        config = EvalConfig(tasks=[f"lm-eval/{task}"], data_dir=data)
        with pytest.raises(EngineError, match=words_) as error:
            evals.run(config, {"model": f"{server.url}#m"}, out=tmp_path / task)
        assert error.value.hint
