"""Run a recipe: every stage in turn, skipping what is done, forecast beside actual at the end."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketphi import __version__
from pocketphi.core import artifact, machine, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import DataError
from pocketphi.recipe.plan import Forecast, plan
from pocketphi.recipe.stages import DATA_VARIABLE, Recipe, Stage

_STATE = "state.json"


@dataclass(frozen=True)
class RunResult:
    """What a run did: `artifacts` by stage, and which stages had to work (`made`)."""

    folder: Path
    artifacts: dict[str, Artifact]
    made: tuple[str, ...]
    wall_s: float


def run(recipe: Recipe, *, out: Path | None = None) -> RunResult:
    """Run the recipe into `out` (default `runs/<name>`); every stage's artifact is `<out>/<stage>`.

    The whole recipe is parsed and planned first, so a misspelt key or a machine too small stops it
    before any work. Killed at any point and run again it continues; run once more it does nothing.
    """
    started = time.monotonic()
    folder = out or Path("runs") / recipe.name
    state = _read_state(folder / _STATE)
    artifacts: dict[str, Artifact] = {}
    made: list[str] = []
    forecast: Forecast | None = None
    with progress.run_log(folder / "log.jsonl"):
        for stage in recipe.stages():
            inputs = {name: artifacts[by] for name, by in recipe.providers(stage).items()}
            key = _key(recipe, stage, inputs)
            place = folder / stage.name
            if state.get(stage.name) == key and (ready := _ready(place)):
                artifacts[stage.name] = ready
                progress.say(f"{stage.name}: up to date ({place})")
                continue
            if forecast is None:
                forecast = _announce(recipe, folder)
            before = time.monotonic()
            progress.say(f"{stage.name}: running")
            made_now: Artifact = stage.load().run(recipe.config(stage), inputs, out=place)
            artifacts[stage.name] = made_now
            machine.give_back_memory()
            made.append(stage.name)
            state[stage.name] = key
            artifact.write_atomic(folder / _STATE, json.dumps(state, indent=1, sort_keys=True))
            spent = time.monotonic() - before
            progress.say(f"{stage.name}: done in {progress.duration(spent)}  {_summary(made_now)}")
            progress.event("stage_done", stage=stage.name, wall_s=round(spent, 3), checksum=made_now.checksum)
    result = RunResult(folder, artifacts, tuple(made), time.monotonic() - started)
    if made:
        _compare(result)
    else:
        count = len(artifacts)
        progress.say(
            f"nothing to do: all {count} stages of '{recipe.name}' are up to date ({result.wall_s:.1f} s)"
        )
    return result


def _announce(recipe: Recipe, folder: Path) -> Forecast:
    """Forecast the run, refuse what cannot fit, and keep the first forecast for the comparison."""
    if recipe.left_out:
        progress.say(
            f"no data folder here (set {DATA_VARIABLE}): leaving out {len(recipe.left_out)} entries "
            f"of the recipe, from {recipe.left_out[0]} on"
        )
        progress.event("left_out", entries=recipe.left_out)
    forecast = plan(recipe, folder)
    forecast.check()
    forecast.check_gpu(folder)
    kept = folder / "forecast.json"
    if not kept.exists():
        artifact.write_atomic(kept, json.dumps(forecast.stages, indent=1))
    progress.say(
        f"forecast for '{recipe.name}': {progress.duration(forecast.wall_s)}, "
        f"{forecast.peak_memory_bytes / 1e9:.1f} GB of memory, {forecast.disk_bytes / 1e6:.0f} MB of disk"
    )
    return forecast


def _compare(result: RunResult) -> None:
    """Say forecast against actual for the stages of this run."""
    try:
        forecast = json.loads((result.folder / "forecast.json").read_text())
    except (OSError, ValueError):
        return
    progress.say("stage        forecast     actual    memory forecast     actual")
    for name, found in result.artifacts.items():
        timings = found.manifest["timings"]
        guess, memory = forecast.get(name, {}).get("wall_s"), forecast.get(name, {}).get("peak_memory_bytes")
        shown = progress.duration(guess) if guess is not None else "-"
        held = timings.get("peak_memory_bytes")
        line = f"{name:<12} {shown:>8} {progress.duration(timings.get('wall_s', 0.0)):>10}"
        if held and memory:
            line += f" {memory / 1e6:>15.0f} MB {held / 1e6:>7.0f} MB"
        progress.say(line)
    progress.say(f"recipe finished in {progress.duration(result.wall_s)}: {result.folder}")


def _ready(place: Path) -> Artifact | None:
    """Return the artifact at `place` if it is whole and its outside sources are unchanged."""
    if not (place / artifact.MANIFEST).exists():
        return None
    try:
        found = artifact.load(place)
    except DataError as error:
        progress.say(f"{error.message}; making it again")
        return None
    return found if artifact.sources_unchanged(found) else None


def _key(recipe: Recipe, stage: Stage, inputs: dict[str, Artifact]) -> str:
    """Identify a stage's question without importing its module (so that a no-op run is quick)."""
    question = {
        "stage": stage.name,
        "section": recipe.sections[stage.name],
        "seed": recipe.seed,
        "inputs": {name: found.checksum for name, found in inputs.items()},
        "code": __version__,
    }
    return hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()


def _read_state(path: Path) -> dict[str, str]:
    try:
        state: Any = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _summary(found: Artifact) -> str:
    counts = [f"{k} {progress.quantity(v)}" for k, v in found.counts.items() if isinstance(v, (int, float))]
    return ", ".join(counts[:6])
