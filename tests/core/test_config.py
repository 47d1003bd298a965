"""Configuration: three sources, exact types, and a nearest name for every misspelt key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from pocketphi.core import config
from pocketphi.core.errors import ConfigError


@dataclass
class Phase:
    max_tokens: int = 10
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class Example:
    name: str
    learning_rate: float = 1e-3
    kind: Literal["adamw", "muon"] = "adamw"
    window: int | None = None
    phases: list[Phase] = field(default_factory=list)
    compile: bool = False


def test_defaults_then_values() -> None:
    made = config.parse(
        Example, {"name": "a", "phases": [{"max_tokens": "1e3"}, {}], "learning_rate": "3e-4"}
    )
    assert made == Example("a", learning_rate=3e-4, phases=[Phase(1000), Phase()])


def test_to_tree_is_the_inverse_of_parse() -> None:
    made = Example("a", phases=[Phase(3, {"web": 0.5})], window=7)
    assert config.parse(Example, config.to_tree(made)) == made


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"name": "a", "learning_rat": 1}, ["learning_rat", "did you mean 'learning_rate'"]),
        ({"name": "a", "phases": [{"max_token": 1}]}, ["phases[0]", "did you mean 'max_tokens'"]),
        ({}, ["'name' is missing"]),
        ({"name": "a", "kind": "adam"}, ["'adam'", "did you mean 'adamw'"]),
        ({"name": "a", "window": "wide"}, ["window", "'wide'"]),
        ({"name": "a", "compile": 1}, ["compile", "expected bool"]),
        ({"name": "a", "phases": {"max_tokens": 1}}, ["phases", "expected a list"]),
        ({"name": "a", "learning_rate": [1]}, ["learning_rate", "expected float"]),
    ],
)
def test_wrong_values_name_the_place(tree: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(Example, tree, where="recipe.yaml: x")
    for word in ["recipe.yaml: x", *words]:
        assert word in str(caught.value)


def test_override_reaches_into_lists_and_new_sections() -> None:
    tree = {"train": {"phases": [{"max_tokens": 1}]}}
    changed = config.override(
        tree, ["train.phases.0.max_tokens=5", "corpus.inputs=[a, b]", "train.optimizer.name=muon", "name="]
    )
    assert changed == {
        "train": {"phases": [{"max_tokens": 5}], "optimizer": {"name": "muon"}},
        "corpus": {"inputs": ["a", "b"]},
        "name": "",
    }
    assert tree == {"train": {"phases": [{"max_tokens": 1}]}}, "the original must stay as it was"


@pytest.mark.parametrize("assignment", ["train", "=3", "train.phases.x=1", "a=[1"])
def test_override_refuses_nonsense(assignment: str) -> None:
    with pytest.raises(ConfigError):
        config.override({"train": {"phases": [1]}}, [assignment])


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "\xff"])
def test_yaml_that_is_no_mapping(tmp_path, content: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"r\.yaml"):
        config.load_yaml(path)


def test_yaml_missing(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        config.load_yaml(tmp_path / "none.yaml")


def test_yaml_cannot_make_objects(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load_yaml(path)
