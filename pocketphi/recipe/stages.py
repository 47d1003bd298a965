"""The stages a recipe may name, and the recipe file itself.

The table is the whole wiring: which module a section configures, and which earlier stages feed it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pocketphi.core import config as configuration
from pocketphi.core.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Stage:
    """One link of the chain. `inputs` maps an input's name to the stages that may provide it, the
    preferred one first; an input none of whose stages is in the recipe is left out."""

    name: str
    module: str
    config_class: str
    inputs: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


_ALL = [
    Stage("synth", "pocketphi.synth", "SynthConfig"),
    Stage("corpus", "pocketphi.corpus", "CorpusConfig", {"synth": ("synth",)}),
    Stage("tokenizer", "pocketphi.tokenizer", "TokenizerConfig", {"corpus": ("corpus",)}),
    Stage(
        "shards",
        "pocketphi.train.shards",
        "ShardsConfig",
        {"corpus": ("corpus",), "tokenizer": ("tokenizer",)},
    ),
    Stage("train", "pocketphi.train", "TrainConfig", {"shards": ("shards",), "tokenizer": ("tokenizer",)}),
    Stage(
        "sft",
        "pocketphi.train.sft",
        "SftConfig",
        {"checkpoint": ("train",), "corpus": ("corpus",), "synth": ("synth",)},
    ),
    Stage("quantize", "pocketphi.quant", "QuantConfig", {"checkpoint": ("sft", "train")}),
    Stage(
        "eval",
        "pocketphi.evals",
        "EvalConfig",
        {"model": ("quantize", "sft", "train"), "shards": ("shards",), "corpus": ("corpus",)},
    ),
    Stage(
        "report",
        "pocketphi.report",
        "ReportConfig",
        {
            name: (name,)
            for name in ("synth", "corpus", "tokenizer", "shards", "train", "sft", "quantize", "eval")
        },
    ),
]
STAGES: dict[str, Stage] = {stage.name: stage for stage in _ALL}
_SETTINGS = ("name", "description", "seed")

# What recipes call `${data}`: the first of these that exists. It is a folder of real pages, texts,
# chats and benchmarks; without one, a recipe works on what every Python installation carries.
DATA_VARIABLE = "POCKETPHI_DATA"
_DATA_FOLDERS = ("data", "../shared/data")
_DATA_MARK = "${data}"


@dataclass(frozen=True)
class Recipe:
    """A recipe read from a file: `sections` holds the raw mapping of every stage it names."""

    path: Path
    name: str
    description: str
    seed: int
    sections: dict[str, dict[str, Any]]
    left_out: tuple[str, ...] = ()
    """Entries that name `${data}`, left out because there is no data folder here."""

    def stages(self) -> list[Stage]:
        return [stage for stage in _ALL if stage.name in self.sections]

    def config(self, stage: Stage) -> Any:
        """Parse the stage's section; the recipe's seed is the default of a stage's `seed`."""
        cls = getattr(stage.load(), stage.config_class)
        tree = dict(self.sections[stage.name])
        if "seed" in getattr(cls, "__dataclass_fields__", {}):
            tree.setdefault("seed", self.seed)
        return configuration.parse(cls, tree, where=f"{self.path}: {stage.name}")

    def providers(self, stage: Stage) -> dict[str, str]:
        """Map each input of `stage` to the stage of this recipe that provides it."""
        found = {}
        for name, candidates in stage.inputs.items():
            for candidate in candidates:
                if candidate in self.sections:
                    found[name] = candidate
                    break
        return found


def read(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply `--set section.key=value` overrides, and fill in `${data}`.

    Raises ConfigError for a missing or unreadable file, an unknown section, or no stage at all.
    """
    path = Path(path)
    tree = configuration.override(configuration.load_yaml(path), overrides)
    left_out: list[str] = []
    tree = _fill(tree, data_folder(), left_out)
    known = [*_SETTINGS, *STAGES]
    for key in tree:
        if key not in known:
            raise ConfigError(f"{path}: unknown section '{key}'{did_you_mean(str(key), known)}")
    sections: dict[str, dict[str, Any]] = {}
    for name in STAGES:
        if name not in tree:
            continue
        section = tree[name] if tree[name] is not None else {}
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: section '{name}' must be a mapping, found {section!r}")
        sections[name] = section
    if not sections:
        raise ConfigError(f"{path}: the recipe names no stage (known: {', '.join(STAGES)})")
    seed = tree.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"{path}: seed must be an integer, found {seed!r}")
    return Recipe(
        path=path,
        name=str(tree.get("name") or path.stem),
        description=str(tree.get("description") or ""),
        seed=seed,
        sections=sections,
        left_out=tuple(left_out),
    )


def data_folder() -> Path | None:
    """Return the folder that `${data}` stands for, or None when this machine has none.

    Raises ConfigError when the environment names a folder that is not there.
    """
    named = os.environ.get(DATA_VARIABLE)
    if named:
        if not Path(named).is_dir():
            raise ConfigError(f"{DATA_VARIABLE}={named}: no such folder")
        return Path(named)
    return next((Path(folder) for folder in _DATA_FOLDERS if Path(folder).is_dir()), None)


def _fill(node: Any, folder: Path | None, left_out: list[str]) -> Any:
    """Replace `${data}`; without a folder, leave out the list entries and values that need it."""
    if isinstance(node, str):
        return node.replace(_DATA_MARK, str(folder)) if folder else node
    if isinstance(node, dict):
        filled = {}
        for key, value in node.items():
            if folder is None and isinstance(value, str) and _DATA_MARK in value:
                left_out.append(value)
                continue
            filled[key] = _fill(value, folder, left_out)
        return filled
    if isinstance(node, list):
        kept = []
        for value in node:
            needs = isinstance(value, str) and _DATA_MARK in value
            needs = needs or (isinstance(value, dict) and _DATA_MARK in str(value.get("path", "")))
            if folder is None and needs:
                left_out.append(str(value if isinstance(value, str) else value["path"]))
                continue
            kept.append(_fill(value, folder, left_out))
        return kept
    return node
