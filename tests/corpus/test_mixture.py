"""The plan of a mixture: epochs per source and phase, and a warning past four."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_pages import paragraph

from pocketphi import corpus
from pocketphi.core.errors import ConfigError
from pocketphi.corpus import CorpusConfig, InputConfig
from pocketphi.corpus.mixture import corpus_plan, phase_plan

ROOT = Path(__file__).resolve().parents[2]
CHARS = {"web": 4_000_000, "textbooks-math": 400_000, "textbooks-physics": 1_200_000, "empty": 0}


def test_without_weights_sources_are_read_in_proportion() -> None:
    rows = phase_plan(CHARS, 2_800_000)
    assert {row.source: row.epochs for row in rows} == pytest.approx(
        {"web": 2.0, "textbooks-math": 2.0, "textbooks-physics": 2.0}
    )
    assert sum(row.tokens_read for row in rows) == 2_800_000
    assert [row.epochs for row in phase_plan(CHARS)] == pytest.approx([1, 1, 1])


def test_weights_are_shares_and_four_epochs_are_the_limit() -> None:
    rows = {row.source: row for row in phase_plan(CHARS, 4_000_000, {"textbooks-*": 3, "web": 1})}
    assert rows["web"].share == pytest.approx(0.25) and rows["web"].epochs == pytest.approx(1.0)
    # 3,000,000 tokens of 400,000: the two are read equally often.
    assert rows["textbooks-math"].epochs == rows["textbooks-physics"].epochs == pytest.approx(7.5)
    assert rows["textbooks-math"].tokens_read == 750_000
    assert not rows["web"].warning
    assert (
        "read 7.5 times" in rows["textbooks-math"].warning
        and "87500 more tokens" in rows["textbooks-math"].warning
    )
    # The weights given back are a mixture in which every source stands alone, and plan the same.
    again = phase_plan(CHARS, 4_000_000, {name: row.weight for name, row in rows.items()})
    assert {row.source: row.tokens_read for row in again} == {n: row.tokens_read for n, row in rows.items()}
    exactly = phase_plan({"a": 4_000_000}, 4_000_000)
    assert exactly[0].epochs == 4 and not exactly[0].warning


@pytest.mark.parametrize("weights", [{"books": 1}, {"web": 0}, {"web": -1, "*": 1}])
def test_wrong_weights_are_errors(weights: dict) -> None:
    with pytest.raises(ConfigError):
        phase_plan(CHARS, 1000, weights)


def test_plan_of_a_corpus_on_the_command_line(tmp_path: Path) -> None:
    for name, first in (("web", 0), ("book[1]", 100)):
        lines = [json.dumps({"text": paragraph(first + i, 8)}) + "\n" for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    inputs = (
        InputConfig(str(tmp_path / "web.jsonl"), phases=(1,)),
        InputConfig(str(tmp_path / "book[1].jsonl"), quality="textbook", epochs={"1": 2.0, "2": 5.0}),
    )
    found = corpus.run(
        CorpusConfig(inputs=inputs, workers=1, heldout_fraction=0), {}, out=tmp_path / "corpus"
    )
    plans = corpus_plan(found)
    assert [(row.source, round(row.epochs, 3)) for row in plans[1]] == [("web", 1.0), ("book[1]", 2.0)]
    assert [(row.source, round(row.epochs, 3)) for row in plans[2]] == [("book[1]", 5.0)]
    assert "5.0 times" in plans[2][0].warning

    def phi(*arguments: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-c",
            "from pocketphi.cli import main; main()",
            "corpus",
            "plan",
            str(found.path),
        ]
        return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)

    shown = phi()
    assert shown.returncode == 0 and "book[1]" in shown.stdout
    assert "warning: phase 2: book[1] is read 5.0 times" in shown.stderr
    recipe = tmp_path / "recipe.yaml"
    tokens = 3 * plans[1][0].tokens
    recipe.write_text(f"train:\n  phases:\n  - {{name: first, tokens: {tokens}, mixture: {{web: 1}}}}\n")
    planned = json.loads(phi("--recipe", str(recipe), "--json").stdout)
    assert [(row["source"], row["epochs"]) for row in planned["phase1"]] == [("web", 3.0)]
    assert phi("--weight", "3:web=1").returncode == 2
