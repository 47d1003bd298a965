"""Long-context tasks: an oracle that reads the context gets all, one that sees only the question nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from pocketphi import evals
from pocketphi.core.errors import ConfigError
from pocketphi.evals import EvalConfig, longcontext
from pocketphi.evals.task import parse_task

NAMES = tuple(longcontext.MAKERS)


def oracle(prompt: str) -> str:
    """Solve a prompt by reading it: written against the prompts alone, not against their making."""
    context, _, question = prompt.rpartition("Question:")
    if "secret number" in question:
        asked = re.search(r"secret numbers? of (.+?)\?", question)
        assert asked is not None
        keys = re.split(r", | and ", asked.group(1))
        hidden = re.findall(r"The secret number of (\w+) is (\d+)\.", context)
        return " ".join(v for k, v in hidden if k in keys)
    if "Which variables" in question:
        (value,) = set(re.findall(r"value (\d+)", question))
        holds: dict[str, str] = {}
        for name, right in re.findall(r"Let (\w+) = (\w+)\.", context):
            holds[name] = holds.get(right, right)
        return ", ".join(k for k, v in holds.items() if v == value)
    (count,) = re.findall(r"Which (ten|three) words", question)
    words = Counter(re.findall(r"(\w+),", context.partition("\n\n")[2]))
    return ", ".join(w for w, _ in words.most_common({"ten": 10, "three": 3}[count]))


def blind(prompt: str) -> str:
    """Answer from the question alone, as well as one can: its own words, and numbers of the right length."""
    _, _, question = prompt.rpartition("Question:")
    return question + " 1234567 7654321 " + " ".join(str(1_000_000 + 7919 * i) for i in range(20))


@pytest.mark.parametrize("length", [512, 1500])
@pytest.mark.parametrize("name", NAMES)
def test_oracle_gets_all_and_the_blind_nothing(name: str, length: int, tokenizer) -> None:
    task = parse_task(f"{name}:length={length}")
    prompts = longcontext.build(task, tokenizer, 1, 6)
    assert len({p.id for p in prompts}) == 6
    for prompt in prompts:
        size = len(tokenizer.encode(prompt.prompt)) + 1
        assert 0.85 * length <= size + 64 <= length, (
            "the prompt fills its length and leaves room for the answer"
        )
        verdict = longcontext.score(oracle(prompt.prompt), prompt)
        assert verdict.correct and longcontext.share(verdict) == 1.0, (verdict.note, prompt.meta["wanted"])
    guesses = [longcontext.share(longcontext.score(blind(p.prompt), p)) for p in prompts]
    assert sum(guesses) / len(guesses) <= 0.05
    silent = longcontext.score("", prompts[0])
    assert silent.answer is None and not silent.correct


def test_items_follow_from_task_length_and_number_alone(tokenizer) -> None:
    task = parse_task("needle_keys:length=600")
    one = longcontext.build(task, tokenizer, 0, 5)
    assert one == longcontext.build(task, tokenizer, 0, 8)[:5]
    other = longcontext.build(parse_task("needle_keys:length=700"), tokenizer, 0, 5)
    assert [p.target for p in one] != [p.target for p in other]
    assert len({p.target for p in one}) == 5


def test_needles_stand_at_their_depth(tokenizer) -> None:
    prompts = longcontext.build(parse_task("needle:length=2000"), tokenizer, 0, 10)
    assert Counter(p.group for p in prompts) == {f"depth {d}%": 2 for d in longcontext.DEPTHS}
    for prompt in prompts:
        body = prompt.prompt.split("\n\n")[1]
        place = body.index("The secret number") / len(body)
        assert place == pytest.approx(int(prompt.group.split()[1][:-1]) / 100, abs=0.06)


def test_part_of_what_is_wanted_counts_in_part(tokenizer) -> None:
    (prompt,) = longcontext.build(parse_task("needle_values:length=600"), tokenizer, 0, 1)
    wanted = prompt.meta["wanted"]
    verdict = longcontext.score(f"They are {int(wanted[0]):,} and {wanted[2]}.", prompt)
    assert not verdict.correct and longcontext.share(verdict) == 0.5


def test_too_short_a_length_is_refused(tokenizer) -> None:
    with pytest.raises(ConfigError, match="at least 512"):
        longcontext.build(parse_task("needle:length=100"), tokenizer, 0, 1)
    with pytest.raises(ConfigError, match="only for long-context"):
        parse_task("arc_easy:length=100")


def test_through_an_endpoint_and_the_whole_stage(tmp_path: Path, scripted) -> None:
    """The oracle as a served model: recall 1 in results.json, by depth, with a standard error."""

    def answering(solve):
        return scripted(lambda path, body: (200, {"choices": [{"text": " " + solve(body["prompt"])}]}))

    tasks = ["needle:length=1024", "variables:length=512", "common_words:length=512"]
    values = {}
    for name, solve in (("oracle", oracle), ("blind", blind)):
        server = answering(solve)
        found = evals.run(
            EvalConfig(tasks=tasks, num_long_items=5), {"model": f"{server.url}#{name}"}, out=tmp_path / name
        )
        tree = json.loads(found.file("results.json").read_text())
        values[name] = [e["value"] for e in tree["tasks"]]
        needle = tree["tasks"][0]
        assert needle["metric"] == "recall" and needle["length"] == 1024 and needle["stderr"] is not None
        assert set(needle["groups"]) == {f"depth {d}%" for d in longcontext.DEPTHS}
        assert len(server.calls) == 15
    assert values["oracle"] == [1.0, 1.0, 1.0]
    assert max(values["blind"]) <= 0.05


def test_length_beyond_the_model_is_left_out_and_named(tiny: Path, tmp_path: Path) -> None:
    tasks = ["needle:length=512", "needle:length=4096"]
    found = evals.run(
        EvalConfig(tasks=tasks, num_long_items=2, max_new_tokens=4), {"model": tiny}, out=tmp_path / "e"
    )
    tree = json.loads(found.file("results.json").read_text())
    assert [e["task"] for e in tree["tasks"]] == ["needle[512 tokens]"]
    assert tree["tasks"][0]["num_cut_prompts"] == 0
    assert tree["skipped"] == [
        {"task": "needle[4096 tokens]", "reason": "4096 tokens are more than the model's 512"}
    ]
