"""Errors name the nearest choice; progress writes whole lines and keeps the log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketphi.core import progress
from pocketphi.core.errors import ConfigError, did_you_mean
from pocketphi.core.registry import Registry


def test_did_you_mean() -> None:
    assert did_you_mean("q4-0", ["q4_0", "q8_0"]) == " (did you mean 'q4_0'?)"
    assert did_you_mean("zebra", ["q4_0", "q8_0"]) == " (known: q4_0, q8_0)"


def test_registry() -> None:
    rules: Registry[int] = Registry("rule")
    rules.add("short")(1)
    assert rules["short"] == 1 and "short" in rules and list(rules) == ["short"]
    with pytest.raises(ConfigError, match=r"unknown rule 'shrt' .did you mean 'short'"):
        rules["shrt"]
    with pytest.raises(ValueError):
        rules.add("short")(2)


def test_events_reach_the_log_of_the_run_only(tmp_path: Path) -> None:
    progress.event("before", a=1)
    with progress.run_log(tmp_path / "log.jsonl"):
        progress.event("loss", step=1, value=2.5, path=tmp_path)
    progress.event("after")
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert event["event"] == "loss" and event["value"] == 2.5 and event["path"] == str(tmp_path)


def test_a_bar_in_a_pipe_ends_with_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("work", 10, unit="tokens", done=4) as bar:
        for _ in range(6):
            bar.advance(1, loss=2.0)
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("work: 10/10 tokens (100%)") and "loss 2" in line and "\x1b" not in line


@pytest.mark.parametrize(("value", "text"), [(5, "5"), (1500, "1.5k"), (2_500_000, "2.5M"), (0.25, "0.25")])
def test_quantity(value: float, text: str) -> None:
    assert progress.quantity(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(3, "3s"), (75, "1m15s"), (3700, "1h01m"), (-1, "0s")])
def test_duration(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
