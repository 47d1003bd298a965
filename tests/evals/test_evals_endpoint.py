"""Endpoints that misbehave, data that is wrong, runs that are killed; and what scores must not depend on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pocketphi import evals
from pocketphi.core.errors import DataError, EngineError, UserError
from pocketphi.evals import EvalConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Benchmark files of our own making, in the columns of the real ones."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"question": f"Tom has {i} pens and buys 3. How many?", "answer": f"#### {i + 3}"} for i in range(6)
    ]
    (folder / "gsm8k.test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shots = [{"question": "Two and two?", "target": "2 + 2 = 4. The answer is 4."}] * 8
    (folder / "gsm8k_cot_fewshot8.jsonl").write_text("".join(json.dumps(r) + "\n" for r in shots))
    choices = ["red", "green", "blue", "a rather long and winding yellow"]
    for split, count in (("train", 12), ("test", 9)):
        rows = [
            {"id": f"{split}{i}", "query": f"Question: Colour {i} of {split}?\nAnswer:", "choices": choices, "gold": i % 4}
            for i in range(count)
        ]  # fmt: skip
        (folder / f"arc_easy.{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def kept(folder: Path) -> int:
    """Items in the journal of an unfinished evaluation."""
    return (folder.with_name(folder.name + ".partial") / "items.partial.jsonl").read_text().count("\n")


# Identical weights, identical choices: batch, cutting, back end.


def test_choices_are_the_same_by_batch_chunk_and_back_end(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketphi import engine
    from pocketphi.evals import backends
    from pocketphi.evals.backends.engine import EngineScorer

    def choices(name: str, **settings) -> list[tuple]:
        config = EvalConfig(
            tasks=["house", "arc_easy:shots=4", "arc_easy:shots=2,format=phi3"],
            data_dir=data,
            limit=24,
            **settings,
        )
        evals.run(config, {"model": tiny}, out=tmp_path / name)
        return [(r["task"], r["id"], r["pred"], r["pred_norm"]) for r in records(tmp_path / name)]

    torch_1 = choices("torch-1", batch_size=1)
    assert len(torch_1) == 24 + 9 + 9
    assert choices("torch-16", batch_size=16) == torch_1
    monkeypatch.setattr(backends, "load", lambda model, config: EngineScorer(tiny, config))
    assert choices("engine", backend="numpy") == torch_1
    whole, pieces = engine.load, []

    def in_small_pieces(*arguments, **more):
        loaded = whole(*arguments, **more)
        forward = loaded.backend.forward

        def cut(session, ids, want):
            # The same tokens, sixteen at a time; logits of the last piece or of all, as asked for.
            import numpy as np

            rows = [forward(session, ids[i : i + 16], want) for i in range(0, len(ids), 16)]
            pieces.append(len(rows))
            if want == "none":
                return None
            return rows[-1] if want == "last" else np.concatenate(rows)

        monkeypatch.setattr(loaded.backend, "forward", cut)
        return loaded

    monkeypatch.setattr(engine, "load", in_small_pieces)
    assert choices("engine-pieces", backend="numpy", num_threads=1) == torch_1
    assert max(pieces) > 3, "contexts must have been cut for this to mean something"


def test_the_same_text_through_an_endpoint(tiny: Path, data: Path, tmp_path: Path, scripted) -> None:
    """A model behind HTTP answers as it does in this process: the adapter adds and loses nothing."""
    from pocketphi.evals.backends.torch_model import TorchScorer

    scorer, lock = TorchScorer(tiny, EvalConfig()), threading.Lock()

    def answer(path: str, body: dict):
        with lock:
            (reply,) = scorer.complete(
                [body["prompt"]], chat=False, max_new_tokens=body["max_tokens"], stop=body.get("stop", ())
            )
        finish = "length" if reply.ended == "length" else "stop"
        return 200, {"choices": [{"text": reply.text, "finish_reason": finish}]}

    config = {"tasks": ["gsm8k"], "data_dir": data, "max_new_tokens": 8}
    evals.run(EvalConfig(**config), {"model": tiny}, out=tmp_path / "here")
    evals.run(EvalConfig(**config), {"model": f"{scripted(answer).url}#tiny"}, out=tmp_path / "there")
    assert [r["text"] for r in records(tmp_path / "there")] == [r["text"] for r in records(tmp_path / "here")]


# Endpoints.


def written(text: str) -> tuple[int, dict]:
    return 200, {"choices": [{"text": text, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((200, b"<html>maintenance</html>"), "the reply is not a JSON object: '<html>"),
        ((200, b"[1, 2]"), "the reply is not a JSON object"),
        ((200, {"error": {"message": "no such model"}}), "the reply holds no answer"),
        ((200, {"choices": []}), "the reply holds no answer"),
        ((200, {"choices": [{"text": 7}]}), "the reply holds no answer"),
        ((200, {"choices": "none"}), "the reply holds no answer"),
        ((404, b"model not found"), "HTTP 404: model not found"),
        ((500, b"out of memory"), "HTTP 500: out of memory"),
        ((429, b"slow down"), "HTTP 429: slow down"),
    ],
)
def test_nonsense_is_a_clear_error_and_finished_items_stay(
    data: Path, tmp_path: Path, scripted, reply, words: str
) -> None:
    state = {"broken": True}
    server = scripted(
        lambda path, body: (
            reply if state["broken"] and "Tom has 4" in body["prompt"] else written(" The answer is 5.")
        )
    )
    config = EvalConfig(tasks=["gsm8k"], data_dir=data, batch_size=1)
    with pytest.raises(EngineError) as caught:
        evals.run(config, {"model": f"{server.url}#m"}, out=tmp_path / "e")
    assert words in caught.value.message and "are kept" in (caught.value.hint or "")
    assert kept(tmp_path / "e") == 4
    tries = sum("Tom has 4" in b["prompt"] for _, b in server.calls)
    # A refusal is final; what may pass is tried again.
    assert tries == (4 if reply[0] in (429, 500) or (isinstance(reply[1], bytes) and reply[0] == 200) else 1)
    state["broken"], before = False, len(server.calls)
    evals.run(config, {"model": f"{server.url}#m"}, out=tmp_path / "e")
    assert len(server.calls) - before == 2, "only the items that were missing are asked for"
    assert [r["correct"] for r in records(tmp_path / "e")] == [0, 0, 1, 0, 0, 0]


def test_a_timeout_is_tried_again_and_then_said(data: Path, tmp_path: Path, scripted) -> None:
    slow = {"calls": 0}

    def answer(path: str, body: dict):
        slow["calls"] += 1
        if slow["calls"] in (2, 3):
            time.sleep(0.6)
        return written("5")

    server = scripted(answer)
    config = EvalConfig(tasks=["gsm8k"], data_dir=data, batch_size=1, timeout_s=0.3)
    evals.run(config, {"model": f"{server.url}#m"}, out=tmp_path / "e")
    assert len(records(tmp_path / "e")) == 6 and slow["calls"] == 8, (
        "two replies came too late and were asked for again"
    )
    stuck = scripted(lambda path, body: (time.sleep(0.6), written("5"))[1])
    with pytest.raises(EngineError, match="timed out"):
        evals.run(config, {"model": f"{stuck.url}#m"}, out=tmp_path / "f")
    assert len(stuck.calls) == 4
    with pytest.raises(EngineError, match="refused"):
        evals.run(config, {"model": "http://127.0.0.1:9/v1#m"}, out=tmp_path / "g")


def test_choice_tasks_need_prompt_logprobs_or_writing(tmp_path: Path, scripted) -> None:
    server = scripted(lambda path, body: written(" B. because"))
    with pytest.raises(EngineError, match="does not return the log-probabilities") as caught:
        evals.run(EvalConfig(tasks=["house"]), {"model": f"{server.url}#m"}, out=tmp_path / "e")
    assert "choices_by=writing" in (caught.value.hint or "")
    found = evals.run(
        EvalConfig(tasks=["house"], choices_by="writing"), {"model": f"{server.url}#m"}, out=tmp_path / "w"
    )
    rows = records(found.path)
    assert len(rows) == 60 and all(r["answer"] == "B" for r in rows)
    assert sum(r["correct"] for r in rows) == sum(r["target"] == "B" for r in rows)
    with pytest.raises(UserError, match="the model's name is missing"):
        evals.run(EvalConfig(tasks=["house"]), {"model": server.url}, out=tmp_path / "x")


def test_log_probabilities_of_a_prompt_from_an_endpoint(
    tiny: Path, data: Path, tmp_path: Path, scripted
) -> None:
    """An endpoint with `echo` gives the scores that the model gives in this process."""
    import numpy as np

    from pocketphi.evals.backends.torch_model import TorchScorer

    scorer, lock = TorchScorer(tiny, EvalConfig()), threading.Lock()

    def answer(path: str, body: dict):
        ids = scorer.tokenizer.encode(body["prompt"])
        with lock:
            logprobs = scorer.rolling([*scorer.start_ids, *ids]).tolist()
        pieces, offsets = [scorer.tokenizer.decode(ids[: i + 1]) for i in range(len(ids))], [0]
        offsets += [len(p) for p in pieces[:-1]]
        values = logprobs if scorer.start_ids else [None, *logprobs]
        return 200, {
            "choices": [{"text": "", "logprobs": {"text_offset": offsets, "token_logprobs": values}}]
        }

    config = {"tasks": ["arc_easy"], "data_dir": data}
    evals.run(EvalConfig(**config), {"model": tiny}, out=tmp_path / "here")
    evals.run(EvalConfig(**config), {"model": f"{scripted(answer).url}#tiny"}, out=tmp_path / "there")
    for a, b in zip(records(tmp_path / "here"), records(tmp_path / "there")):
        assert a["pred"] == b["pred"]
        np.testing.assert_allclose(a["logprobs"], b["logprobs"], atol=1e-3)


# Data, templates, kills.


def test_wrong_data_is_named(tiny: Path, data: Path, tmp_path: Path) -> None:
    def gsm8k(text: str, name: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "gsm8k.test.jsonl").write_text(text)
        (folder / "gsm8k_cot_fewshot8.jsonl").write_bytes((data / "gsm8k_cot_fewshot8.jsonl").read_bytes())
        with pytest.raises(DataError) as caught:
            evals.run(EvalConfig(tasks=["gsm8k"], data_dir=folder), {"model": tiny}, out=tmp_path / "e")
        return caught.value.message

    assert "lacks the column 'question' (did you mean 'questions'?)" in gsm8k(
        '{"questions": "?", "answer": "1"}\n', "a"
    )
    assert "line 2 is not JSON" in gsm8k('{"question": "?", "answer": "#### 1"}\n{"question": \n', "b")
    assert "row 0 is not what task 'gsm8k' expects" in gsm8k('{"question": "?", "answer": "none"}\n', "c")
    assert "holds no usable row" in gsm8k("", "d")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "gsm8k.test.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04\x58\x99")
    with pytest.raises(DataError, match=r"gsm8k\.test\.jsonl\.zst"):
        evals.run(EvalConfig(tasks=["gsm8k"], data_dir=tmp_path / "cut"), {"model": tiny}, out=tmp_path / "e")
    with pytest.raises(DataError, match="no such folder"):
        evals.run(
            EvalConfig(tasks=["gsm8k"], data_dir=tmp_path / "none"), {"model": tiny}, out=tmp_path / "e"
        )


def test_a_program_in_a_conversation_is_not_cut(tmp_path: Path, scripted) -> None:
    """In a conversation the program comes after a fence or an explanation, where plain text would stop."""
    row = {
        "task_id": "t/0", "prompt": "def total(xs):\n    \"\"\"Sum.\"\"\"\n", "entry_point": "total",
        "test": "def check(f):\n    assert f([1, 2]) == 3\n", "canonical_solution": "    return sum(xs)\n",
    }  # fmt: skip
    (tmp_path / "humaneval.test.jsonl").write_text(json.dumps(row) + "\n")
    whole = "Sure:\n```python\nimport math\n\ndef total(xs):\n    return sum(xs)\n```\nIt adds."

    def answer(path, body):
        text = (
            whole
            if path.endswith("/chat/completions")
            else "    return sum(xs)\n\ndef other():\n    return 1 +"
        )
        places = [text.find(s) for s in body.get("stop", []) if s in text]
        text = text[: min(places)] if places else text
        key = {"message": {"content": text}} if path.endswith("/chat/completions") else {"text": text}
        return 200, {"choices": [{**key, "finish_reason": "stop"}]}

    server = scripted(answer)
    for chat in (True, False):
        config = EvalConfig(tasks=["humaneval"], data_dir=tmp_path, chat=chat)
        evals.run(config, {"model": f"{server.url}#m"}, out=tmp_path / f"e{chat}")
        (record,) = records(tmp_path / f"e{chat}")
        assert record["correct"] == 1, (chat, record["note"], record["answer"])


def test_chat_without_a_template_is_refused(tiny: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    from pocketphi.tokenizer import Tokenizer

    def refuse(self, *arguments, **more):
        raise UserError("this vocabulary has no template")

    monkeypatch.setattr(Tokenizer, "chat", refuse)
    config = EvalConfig(tasks=["gsm8k"], data_dir=data, chat=True, max_new_tokens=4)
    with pytest.raises(UserError, match="chat was asked for and the model has no chat template") as caught:
        evals.run(config, {"model": tiny}, out=tmp_path / "e")
    assert "chat=false" in (caught.value.hint or "")


def test_killed_process_goes_on_where_it_was(data: Path, tmp_path: Path, scripted) -> None:
    """SIGKILL while an endpoint is being asked; the next run asks for the rest only."""
    gate = threading.Event()
    lock, answered = threading.Lock(), {"n": 0}

    def answer(path: str, body: dict):
        with lock:
            answered["n"] += 1
            waits = answered["n"] == 4
        if waits:
            gate.wait(30)
        return written(" The answer is 5.")

    server = scripted(answer)
    command = [
        sys.executable, "-m", "pocketphi", "eval", "run", f"{server.url}#m", "-t", "gsm8k", "--data", str(data),
        "--out", str(tmp_path / "e"), "--set", "batch_size=1", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(evals.__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + 60
        while answered["n"] < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert answered["n"] == 4
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kept(tmp_path / "e") == 3
    gate.set()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert answered["n"] == 4 + 3
    (row,) = json.loads(done.stdout)
    assert row["n"] == 6 and row["metric"] == "accuracy"
