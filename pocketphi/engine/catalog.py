"""Which models this machine has, and what their names mean.

A model is named by a path, or by the name of an embedded or downloaded one. Downloads lie under
`$POCKETPHI_HOME/models`, by default in the user's cache folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pocketphi.core.errors import UserError, did_you_mean

EMBEDDED = "pocket"


@dataclass(frozen=True)
class Found:
    """A model on this machine. `where` is "embedded", "downloaded" or "made here"."""

    name: str
    path: Path
    where: str
    file_bytes: int


def models_folder() -> Path:
    """Where downloaded models are kept; the folder may not exist yet."""
    home = os.environ.get("POCKETPHI_HOME")
    if home:
        return Path(home) / "models"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pocketphi" / "models"


def embedded_path(name: str = EMBEDDED) -> Path:
    """Return the model file inside the package. Raises UserError when there is none of that name."""
    folder = Path(__file__).resolve().parents[1] / "models"
    path = folder / f"{name}.gguf"
    if not path.is_file():
        have = sorted(p.stem for p in folder.glob("*.gguf"))
        raise UserError(
            f"this installation has no embedded model '{name}'{did_you_mean(name, have)}",
            hint="name a model file: --model PATH; `phi recipe run recipes/nano.yaml` makes one, "
            "`phi pull` downloads one",
        )
    return path


def find_models(runs: Path | str = "runs") -> Iterator[Found]:
    """List the models on this machine: embedded, downloaded, and those made under `runs`."""
    package = Path(__file__).resolve().parents[1] / "models"
    for path in sorted(package.glob("*.gguf")):
        yield Found(path.stem, path, "embedded", path.stat().st_size)
    folder = models_folder()
    for path in sorted(folder.rglob("*.gguf")) if folder.is_dir() else ():
        yield Found(path.relative_to(folder).as_posix(), path, "downloaded", path.stat().st_size)
    runs = Path(runs)
    for path in sorted(runs.glob("**/*.gguf")) if runs.is_dir() else ():
        if ".partial" not in str(path):
            yield Found(str(path), path, "made here", path.stat().st_size)
    for path in sorted(runs.glob("**/config.json")) if runs.is_dir() else ():
        weights = list(path.parent.glob("*.safetensors"))
        if weights and ".partial" not in str(path):
            size = sum(w.stat().st_size for w in weights)
            yield Found(str(path.parent), path.parent, "made here", size)


def resolve(model: str | Path | None) -> Path:
    """Return the path of a model given by path or name; None is the embedded one.

    Raises UserError that names the nearest known model.
    """
    if model is None:
        return embedded_path()
    path = Path(model)
    if path.exists():
        return path
    known = {found.name: found.path for found in find_models()}
    for name, place in known.items():
        if str(model) in (name, Path(name).name, Path(name).stem):
            return place
    raise UserError(
        f"no model '{model}': neither a file here nor a known name{did_you_mean(str(model), known)}",
        hint="`phi models` lists the models on this machine, `phi pull` downloads one",
    )
