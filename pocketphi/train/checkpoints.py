"""Checkpoints of a run in progress: safetensors and JSON in a folder of their own.

`<folder>/step-00001200/` holds `model.safetensors`, `optimizer.safetensors` and `state.json` (cursor,
counts, sha256 of the other two, lengths of the logs). It is written under a temporary name, synced and
renamed, so that a folder of this name is whole; when writing fails (a full disk), the earlier ones
stay. A sharded checkpoint has a folder `shards/` instead of the two files (see sharded.py). Two are kept: the newest, and the newest *anchor*, which lies at a fixed number of tokens and is
where a roll-back returns to (the clock must not decide where).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pocketphi.core import artifact, progress
from pocketphi.core.errors import CheckpointError, UserError

_STATE = "state.json"
_WEIGHTS = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on disk; `state` is what was given to `write`."""

    path: Path
    state: dict[str, Any]

    def tensors(self, file: str) -> Tensors:
        return Tensors(self.path / file)

    @property
    def is_sharded(self) -> bool:
        return _WEIGHTS not in self.state["files"]

    @property
    def weights(self) -> Tensors:
        return self.tensors(_WEIGHTS)

    @property
    def optimizer(self) -> Tensors:
        return self.tensors(_OPTIMIZER)


class Tensors:
    """A safetensors file, read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None
        self.path = path
        self.names: list[str] = list(self._file.keys())

    def read(self, name: str) -> Tensor:
        try:
            return self._file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: cannot read '{name}': {error}") from None


class Store:
    """The checkpoints of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self,
        state: dict[str, Any],
        weights: Callable[[], dict[str, Tensor]],
        optimizer: Callable[[], dict[str, Tensor]],
        *,
        anchor: bool,
    ) -> Path:
        """Write a checkpoint for `state["step"]`. Raises UserError when the disk is full or cannot be
        written; the checkpoints before it stay."""
        try:
            work = self.prepare(state["step"])
            # One after the other, so that at most one full copy is in memory.
            for name, tensors in ((_WEIGHTS, weights), (_OPTIMIZER, optimizer)):
                save_file(tensors(), work / name)
            return self.publish(state, anchor=anchor)
        except (OSError, SafetensorError) as error:
            final = self._final(state["step"])
            shutil.rmtree(self._work(state["step"]), ignore_errors=True)
            last = self.newest()
            kept = (
                f"the last good checkpoint stays: {last.path}" if last else "there is no earlier checkpoint"
            )
            raise UserError(
                f"{final}: the checkpoint could not be written ({error}); {kept}",
                hint="free some space and run the same command again: it continues from there",
            ) from error

    def prepare(self, step: int) -> Path:
        """An empty folder under a temporary name, for the files of a checkpoint. Raises OSError."""
        work = self._work(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        return work

    def publish(self, state: dict[str, Any], *, anchor: bool) -> Path:
        """Sync and hash the files of the prepared folder, add the note, rename it. Raises OSError."""
        final, work = self._final(state["step"]), self._work(state["step"])
        files = sorted(p for p in work.rglob("*") if p.is_file())
        for file in files:
            _sync(file)
        sums = {file.relative_to(work).as_posix(): artifact.file_sha256(file) for file in files}
        note = {**state, "anchor": anchor, "files": sums}
        artifact.write_atomic(work / _STATE, json.dumps(note, indent=1))
        if final.exists():
            old = self.folder / f".{final.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
            os.replace(work, final)
            shutil.rmtree(old)
        else:
            os.replace(work, final)
        _sync(self.folder)
        self._forget_old()
        return final

    def _final(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _work(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.tmp"

    def newest(self, *, anchor: bool = False) -> Saved | None:
        """The newest whole checkpoint (or anchor); damaged ones are said and passed over."""
        for path in self._paths(newest_first=True):
            try:
                saved = _open(path)
            except CheckpointError as error:
                progress.say(f"{error.message}; using an earlier checkpoint")
                continue
            if saved.state["anchor"] or not anchor:
                return saved
        return None

    def at(self, path: Path) -> Saved:
        """The checkpoint at `path`, whose files another rank has checked. Raises CheckpointError."""
        return _open(path, verify=False)

    def delete_after(self, step: int) -> None:
        """Remove checkpoints later than `step` (after a roll-back they are of another history)."""
        for path in self._paths(newest_first=True):
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self, *, newest_first: bool) -> Iterable[Path]:
        return sorted(self.folder.glob("step-*"), reverse=newest_first)

    def _forget_old(self) -> None:
        paths = list(self._paths(newest_first=True))
        anchors = [p for p in paths if _is_anchor(p)]
        for path in paths:
            if path not in (paths[0], *anchors[:1]):
                shutil.rmtree(path)


def _open(path: Path, *, verify: bool = True) -> Saved:
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        sums = state["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error!r}") from None
    for name, expected in sums.items() if verify else ():
        file = path / name
        if not file.is_file() or artifact.file_sha256(file) != expected:
            raise CheckpointError(f"{file}: missing or changed since it was written")
    return Saved(path, state)


def _is_anchor(path: Path) -> bool:
    try:
        return bool(json.loads((path / _STATE).read_text(encoding="utf-8"))["anchor"])
    except (OSError, ValueError, KeyError):
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators, as tensors."""
    states = {"rng:cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng:cuda"] = torch.cuda.get_rng_state(device)
    return states


def load_rng_state(states: dict[str, Tensor], device: torch.device) -> None:
    if "rng:cpu" in states:
        torch.set_rng_state(states["rng:cpu"])
    if device.type == "cuda" and "rng:cuda" in states:
        torch.cuda.set_rng_state(states["rng:cuda"], device)
