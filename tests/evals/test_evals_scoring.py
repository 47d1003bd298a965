"""Scores: what they are, and what they must not depend on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketphi import evals
from pocketphi import model as models
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import ConfigError, DataError, EngineError
from pocketphi.evals import backends, bits, metrics, prompts
from pocketphi.evals.backends import base
from pocketphi.evals.backends.torch_model import TorchScorer
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.prompts import Request
from pocketphi.evals.task import Question, draw_shots, parse_task, pick


def items(found: Artifact) -> list[dict]:
    return [json.loads(line) for line in found.file("items.jsonl").read_text().splitlines()]


def entries(found: Artifact) -> dict[str, dict]:
    return {e["task"]: e for e in json.loads(found.file("results.json").read_text())["tasks"]}


def score(model: Path, out: Path, **settings) -> Artifact:
    return evals.run(EvalConfig(**{"tasks": ["house"], **settings}), {"model": model}, out=out)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Benchmark files of our own making, in the columns of the real ones."""
    folder = tmp_path_factory.mktemp("data")
    colors = ["red", "green", "blue", "a rather long and winding yellow"]
    for split, count in (("train", 12), ("test", 9)):
        with open(folder / f"arc_easy.{split}.jsonl", "w") as file:
            for i in range(count):
                row = {
                    "id": f"{split}{i}",
                    "query": f"Question: Which colour has number {i} of {split}?\nAnswer:",
                    "choices": colors,
                    "gold": i % 4,
                }
                file.write(json.dumps(row) + "\n")
    with open(folder / "winogrande_xl.validation.jsonl", "w") as file:
        for i in range(6):
            row = {
                "sentence": f"Ann met Bob because _ was {i} miles away.",
                "option1": "Ann",
                "option2": "Bob",
            }
            file.write(json.dumps({**row, "answer": str(1 + i % 2)}) + "\n")
    with open(folder / "lambada_openai.test.jsonl", "w") as file:
        for i in range(4):
            file.write(
                json.dumps(
                    {"id": i, "query": f"This is sentence {i} and it ends with", "answers_text": ["it"]}
                )
                + "\n"
            )
    return folder


# The numbers themselves, against the model's own logits in float64.


def test_logprobs_are_those_of_the_model(tiny: Path, data: Path, tmp_path: Path) -> None:
    found = score(tiny, tmp_path / "e", tasks=["arc_easy"], data_dir=data)
    scorer = TorchScorer(tiny, EvalConfig())
    record = items(found)[0]
    context = f"Question: {record['question']}\nAnswer:"
    model = models.load(tiny, dtype=torch.float32).eval()
    for option, logprob in zip(record["options"], record["logprobs"]):
        ids = [*scorer.start_ids, *scorer.tokenizer.encode(f"{context} {option}")]
        border = len(scorer.start_ids) + len(scorer.tokenizer.encode(context))
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([ids])).double(), dim=-1)[0]
        expected = sum(float(rows[i - 1, ids[i]]) for i in range(border, len(ids)))
        assert logprob == pytest.approx(expected, abs=1e-4)


def test_log_probabilities_against_float64() -> None:
    rows = np.random.default_rng(0).normal(0, 8, (5, 300)).astype(np.float32)
    targets = [3, 0, 299, 7, int(rows[4].argmax())]
    found, top = base.log_probabilities(rows, targets)
    exact = rows.astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1, keepdims=True)) + exact.max(
        1, keepdims=True
    )
    np.testing.assert_allclose(found, exact[np.arange(5), targets], atol=2e-5)
    assert top.tolist() == [False, False, False, False, True]
    with pytest.raises(EngineError, match="not finite"):
        base.log_probabilities(np.array([[np.nan, 1.0]], dtype=np.float32), [1])


# Independence of batch, of chunking, of the back end, of a kill.


@pytest.mark.parametrize("batch", [3, 16])
def test_scores_do_not_depend_on_the_batch(tiny: Path, data: Path, tmp_path: Path, batch: int) -> None:
    tasks = ["house", "arc_easy:shots=3", "winogrande"]
    one = items(score(tiny, tmp_path / "one", tasks=tasks, data_dir=data, batch_size=1))
    many = items(score(tiny, tmp_path / "many", tasks=tasks, data_dir=data, batch_size=batch))
    assert [(i["task"], i["id"]) for i in one] == [(i["task"], i["id"]) for i in many]
    for a, b in zip(one, many):
        assert (a["pred"], a.get("pred_norm")) == (b["pred"], b.get("pred_norm"))
        np.testing.assert_allclose(a["logprobs"], b["logprobs"], atol=2e-4)


def test_a_long_neighbour_does_not_change_the_rotation(tiny_longrope: Path) -> None:
    scorer = TorchScorer(tiny_longrope, EvalConfig(batch_size=4))
    rng = np.random.default_rng(0)
    short = Request(tuple(rng.integers(300, 700, 20).tolist()), ((310, 320), (330,)), (0, 1))
    long = Request(tuple(rng.integers(300, 700, 90).tolist()), ((310, 320), (330,)), (0, 1))
    alone = [next(scorer.score([r])) for r in (short, long)]
    together = list(scorer.score([short, long]))
    for a, b in zip(alone, together):
        for x, y in zip(a, b):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-4)


@pytest.mark.parametrize("which", ["tiny", "tiny_longrope"])
def test_engine_and_torch_agree(
    which: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from pocketphi.evals.backends.engine import EngineScorer

    folder = request.getfixturevalue(which)
    config = EvalConfig(backend="numpy")
    torch_scorer, engine_scorer = TorchScorer(folder, config), EngineScorer(folder, config)
    wanted = _requests(torch_scorer, data, shots=2)
    lengths = {len(r.context) > 64 for r in wanted}
    assert which == "tiny" or True in lengths
    for a, b in zip(torch_scorer.score(wanted), engine_scorer.score(wanted)):
        assert [s.greedy for s in a] == [s.greedy for s in b]
        np.testing.assert_allclose([s.logprob for s in a], [s.logprob for s in b], atol=2e-3)
    ids = [5, *range(300, 340)]
    np.testing.assert_allclose(torch_scorer.rolling(ids), engine_scorer.rolling(ids), atol=2e-3)
    engine_scorer.close()


def test_what_was_computed_before_changes_nothing(
    tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketphi.evals.backends.engine import EngineScorer

    scorer = EngineScorer(tiny, EvalConfig(backend="numpy"))
    wanted = _requests(scorer, data, shots=3)
    # Options that begin alike, one that is the beginning of another, one of a single token, and a
    # question that goes on where the last one's option ended.
    context, words = wanted[-1].context, tuple(range(310, 316))
    wanted.append(Request(context, (words, words[:3], (*words[:2], 320, 321), words[:1], (400,)), (0,) * 5))
    wanted.append(Request((*context, 400), ((310,), words), (0, 1)))
    wanted.append(Request(context[:5], (words, words), (0, 1)))
    computed = []
    original = scorer._engine.backend.forward

    def counting(session, ids, want="last"):
        computed.append(len(ids))
        return original(session, ids, want)

    monkeypatch.setattr(scorer._engine.backend, "forward", counting)

    def scores(requests) -> list[list[float]]:
        return [[s.logprob for s in found] for found in scorer.score(requests)]

    with_sharing, tokens = scores(wanted), sum(computed)
    backwards = scores(reversed(wanted))[::-1]
    computed.clear()
    alone = []
    for request in wanted:
        parts = []
        for option in request.options:
            scorer._session, scorer._cached = None, ()
            parts += scores([Request(request.context, (option,), (0,))])[0]
        alone.append(parts)
    for shared, back, single in zip(with_sharing, backwards, alone):
        np.testing.assert_allclose(shared, single, atol=1e-4)
        np.testing.assert_allclose(back, single, atol=1e-4)
    assert tokens < 0.3 * sum(computed), "what is shared must be computed once"
    scorer.close()


def _requests(scorer, data: Path, shots: int) -> list[Request]:
    from pocketphi.evals.loading import load_task

    each = load_task(EvalConfig(data_dir=data), parse_task(f"arc_easy:shots={shots}"), None)
    text = prompts.shots_text(each.task, each.shots[""], "")
    found = []
    for question in each.items:
        shape = prompts.render(each.task, question)
        found += prompts.requests(scorer.tokenizer, shape, text, scorer.start_ids, scorer.max_tokens)
    return found


def test_killed_run_ends_in_the_same_bytes(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["house", "arc_easy:shots=2", "lambada"]
    calm = score(tiny, tmp_path / "calm", tasks=tasks, data_dir=data, batch_size=3)
    original = metrics.choice_record
    counted = {"n": 0}

    def dying(*arguments):
        counted["n"] += 1
        if counted["n"] in (7, 70):
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(metrics, "choice_record", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            score(tiny, tmp_path / "killed", tasks=tasks, data_dir=data, batch_size=3)
        with open(tmp_path / "killed.partial" / "items.partial.jsonl", "a") as file:
            file.write('{"task": "house", "id": "h')  # a line cut by the kill
    before = counted["n"]
    killed = score(tiny, tmp_path / "killed", tasks=tasks, data_dir=data, batch_size=3)
    assert killed.checksum == calm.checksum
    assert counted["n"] - before < 10, "finished items must not be scored again"
    again = score(tiny, tmp_path / "killed", tasks=tasks, data_dir=data, batch_size=3)
    assert again.checksum == calm.checksum and counted["n"] - before < 10


# Prompts.


def test_pair_moves_the_space_and_keeps_the_whole(tokenizer) -> None:
    whole, border = prompts.encode_pair(tokenizer, "The answer is ", "blue")
    assert whole == tokenizer.encode("The answer is blue")
    assert border == len(tokenizer.encode("The answer is"))


def test_phi3_form_is_that_of_the_report() -> None:
    question = Question("q", "What is 1 + 1?", ("1", "2"), 1, passage="")
    shape = prompts.render(parse_task("arc_easy:format=phi3"), question)
    assert shape.contexts[0] == "Question:\n\nWhat is 1 + 1?\n\nOptions:\n\nA. 1\nB. 2\n\nAnswer:"
    assert shape.continuations == (" A", " B")


def test_mmlu_prompt_is_that_of_lm_eval() -> None:
    question = Question("q", "What?", ("w", "x", "y", "z"), 2, group="high_school_biology")
    task = parse_task("mmlu:shots=1")
    text = prompts.shots_text(task, [question], question.group) + prompts.render(task, question).contexts[0]
    assert text == (
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        "What?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\nWhat?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )


def test_long_prompt_is_cut_on_the_left_and_counted(tiny: Path, data: Path, tmp_path: Path) -> None:
    found = score(tiny, tmp_path / "e", tasks=["arc_easy:shots=8"], data_dir=data, max_context_tokens=60)
    entry = entries(found)["arc_easy[8-shot]"]
    assert entry["num_cut_prompts"] == entry["n"] == 9
    assert all(i["cut_tokens"] > 0 for i in items(found))


def test_cut_keeps_the_start_token(tokenizer) -> None:
    shape = prompts.Rendered(("word " * 50,), ("end",), (3,))
    (request,) = prompts.requests(tokenizer, shape, "", [1], 20)
    assert request.context[0] == 1 and len(request.context) + len(request.options[0]) - 1 == 20
    assert request.cut_tokens > 0


def test_start_token_rule(tokenizer) -> None:
    assert base.start_tokens(tokenizer, "bos") == ((tokenizer.bos_id,), "bos")
    assert base.start_tokens(tokenizer, "eos") == ((tokenizer.eos_id,), "eos")
    assert base.start_tokens(tokenizer, "none") == ((), "none")
    expected = (tokenizer.bos_id,) if tokenizer.add_bos else ()
    assert base.start_tokens(tokenizer, "auto")[0] == expected


# Figures.


def test_ties_go_to_the_first_and_are_counted() -> None:
    task = parse_task("arc_easy")
    question = Question("q", "?", ("a", "bb"), 1)
    same = [base.OptionScore(-2.0, False), base.OptionScore(-2.0, False)]
    record = metrics.choice_record(task, question, same, (1, 2), (1, 1))
    assert (record["pred"], record["pred_norm"], record["correct"], record["correct_norm"]) == (0, 1, 0, 1)
    figures = metrics.choice_figures(task, [{**record, "group": ""}] * 2)
    assert figures["num_ties"] == 2 and figures["value"] == 1.0


def test_standard_error_is_that_of_a_mean() -> None:
    values = [1, 0, 0, 1, 1, 0, 1, 1]
    mean, stderr = metrics.mean_and_stderr(values)
    assert mean == 0.625
    assert stderr == pytest.approx(math.sqrt(0.625 * 0.375 / 7))
    assert metrics.mean_and_stderr([1])[1] is None


def test_mc2_is_the_share_of_probability_on_right_answers() -> None:
    question = Question("q", "?", ("a", "b", "c"), 0, true=(True, False, True))
    scores = [base.OptionScore(math.log(p), False) for p in (0.2, 0.1, 0.1)]
    record = metrics.choice_record(parse_task("truthfulqa_mc2"), question, scores, (1, 1, 1), (1, 1, 1))
    assert record["mc2"] == pytest.approx(0.75)


def test_bits_per_byte_ratio_and_error() -> None:
    records = [
        {"nll": 8 * math.log(2), "num_bytes": 4, "num_tokens": 2},
        {"nll": 2 * math.log(2), "num_bytes": 6, "num_tokens": 3},
    ]
    figures = metrics.bits_figures(records)
    assert figures["value"] == pytest.approx(1.0)
    # Residuals 4 and -4 bits: sqrt(2 / 1 * 32) / 10.
    assert figures["stderr"] == pytest.approx(0.8)


def test_windows_predict_every_token_once() -> None:
    ids = list(range(23))
    predicted = [t for w in bits.windows(ids, 5) for t in w[1:]]
    assert predicted == ids[1:]
    assert all(len(w) - 1 <= 5 for w in bits.windows(ids, 5))


def test_bits_of_a_text(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A plant is a living thing. " * 80)
    found = evals.run(EvalConfig(tasks=["bits"], texts=[text]), {"model": tiny}, out=tmp_path / "e")
    entry = entries(found)["bits"]
    assert entry["num_bytes"] == 27 * 80 and entry["stderr"] is None
    scorer = TorchScorer(tiny, EvalConfig())
    ids = scorer.tokenizer.encode(text.read_text())
    assert entry["num_tokens"] == len(ids), "every token of the text is predicted once"
    model = models.load(tiny, dtype=torch.float32).eval()
    lead = list(scorer.start_ids) or [scorer.tokenizer.eos_id]
    total = 0.0
    whole = [*lead, *ids]
    for start in range(0, len(whole) - 1, 512):
        window = torch.tensor([whole[start : start + 513]])
        with torch.no_grad():
            total += float(
                torch.nn.functional.cross_entropy(model(window[:, :-1])[0], window[0, 1:], reduction="sum")
            )
    assert entry["value"] == pytest.approx(total / math.log(2) / entry["num_bytes"], rel=1e-5)


# What a result carries, and what it refuses.


def test_a_result_names_what_it_depends_on(tiny: Path, data: Path, tmp_path: Path) -> None:
    found = score(tiny, tmp_path / "e", tasks=["arc_easy"], data_dir=data)
    tree = json.loads(found.file("results.json").read_text())
    assert {"engine", "file_sha256", "tokenizer_sha256", "template_sha256", "start_token"} <= set(
        tree["identity"]
    )
    entry = tree["tasks"][0]
    for key in ("task_version", "prompt_version", "file_sha256", "n", "stderr", "chance", "source"):
        assert entry[key] is not None, key
    text = found.file("results.json").read_text()
    assert str(tmp_path) not in text and str(tiny) not in text, "no path of this machine"


def test_prompt_version_changes_with_the_prompt(tiny: Path, data: Path, tmp_path: Path) -> None:
    found = score(
        tiny, tmp_path / "e", tasks=["arc_easy", "arc_easy:shots=1", "arc_easy:format=phi3"], data_dir=data
    )
    versions = {e["prompt_version"] for e in entries(found).values()}
    assert len(versions) == 3


def test_suite_without_data_scores_what_needs_none(tiny: Path, tmp_path: Path) -> None:
    found = evals.run(EvalConfig(suite="quick"), {"model": tiny}, out=tmp_path / "e")
    tree = json.loads(found.file("results.json").read_text())
    assert [e["task"] for e in tree["tasks"]] == ["house"]
    assert {s["task"] for s in tree["skipped"]} >= {"arc_easy", "piqa", "bits"}


def test_errors_say_what_is_wrong(tiny: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'arc_easy'"):
        score(tiny, tmp_path / "e", tasks=["arc_esy"])
    with pytest.raises(ConfigError, match="did you mean 'quick'"):
        evals.run(EvalConfig(suite="quikc"), {"model": tiny}, out=tmp_path / "e")
    with pytest.raises(DataError, match=r"hellaswag\.validation"):
        score(tiny, tmp_path / "e", tasks=["hellaswag"], data_dir=data)
    with pytest.raises(ConfigError, match="named twice"):
        score(tiny, tmp_path / "e", tasks=["house", "house"])
    with pytest.raises(DataError, match="no 'model'"):
        evals.run(EvalConfig(), {})
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "arc_easy.test.jsonl").write_text('{"id": 1, "question": "?", "choices": [], "gold": 0}\n')
    with pytest.raises(DataError, match="lacks the column 'query'"):
        score(tiny, tmp_path / "e", tasks=["arc_easy"], data_dir=changed)
    with pytest.raises(DataError, match="lacks the column 'query'"):
        evals.run(EvalConfig(suite="quick", data_dir=changed), {"model": tiny}, out=tmp_path / "e")


def test_draw_is_even_and_independent_of_order() -> None:
    ids = [f"id{i}" for i in range(1000)]
    chosen = pick(ids, 100, "task")
    assert len(chosen) == 100 and chosen == sorted(chosen)
    assert max(chosen) > 900 and min(chosen) < 100
    turned = pick(ids[::-1], 100, "task")
    assert {ids[i] for i in chosen} == {ids[::-1][i] for i in turned}
    assert not {ids[i] for i in draw_shots(ids, 5, "a")} & {ids[i] for i in draw_shots(ids, 5, "b")}


def test_house_items_are_sound() -> None:
    from pocketphi.evals.tasks.choice import house_items

    found = house_items()
    assert len(found) == 60 and len({q.id for q in found}) == 60
    assert all(len(set(q.options)) == 4 for q in found)
    counts = [sum(q.gold == g for q in found) for g in range(4)]
    assert min(counts) >= 8, "the right answer must not sit in one place"


def test_model_that_is_none_of_the_known_kinds(tmp_path: Path) -> None:
    from pocketphi.core.errors import UserError

    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a GGUF file"):
        backends.load(tmp_path / "empty", EvalConfig())
    with pytest.raises(UserError, match="no such model"):
        backends.load(tmp_path / "nothing.gguf", EvalConfig())
