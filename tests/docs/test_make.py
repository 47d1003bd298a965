"""The Makefile: the two commands, and nothing installed twice."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def dry_run(*arguments: str) -> str:
    done = subprocess.run(["make", "-n", "-B", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_chat_installs_the_base_only() -> None:
    shown = dry_run("chat", "PROMPT=What is a plant?")
    assert "torch" not in shown and "[make" not in shown
    assert re.search(r"phi chat .*What is a plant\?", shown)


def test_a_prompt_with_quotes_stays_one_argument() -> None:
    shown = dry_run("chat", 'PROMPT=Say "hi" to $$USER')
    assert '\\"hi\\"' in shown


def test_test_installs_everything_and_runs_pytest() -> None:
    shown = dry_run("test")
    assert "torch" in shown and "[make,dev]" in shown and "-m pytest" in shown


def test_constraints_cover_what_is_asked_for() -> None:
    """Every requirement of pyproject.toml has its tested version."""
    try:
        import tomllib
    except ModuleNotFoundError:
        pytest.skip("tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]

    def plain(requirement: str) -> str:
        return re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("-", "_")

    pinned = {plain(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {plain(r) for r in wanted} <= pinned


def test_continuous_integration_calls_the_readmes_command() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()


def test_recipes_are_commented_yaml() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert isinstance(yaml.safe_load(path.read_text()), dict)
        assert path.read_text().startswith("#"), (
            f"{path}: begin with a comment that says what the recipe makes"
        )
