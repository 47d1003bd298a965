"""Sharded checkpoints, written in the background: exact resume, other numbers of ranks, a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from train.toy_training import toy_trainer

from pocketphi.core.errors import CheckpointError, UserError
from pocketphi.train import sharded
from pocketphi.train.checkpoints import Store
from pocketphi.train.config import OptimizerConfig

TESTS = Path(__file__).resolve().parents[1]
SETTINGS = {
    "sharded_checkpoints": True,
    "checkpoint_every_tokens": 512,
    "evaluate_every_tokens": 1024,
    "optimizer": OptimizerConfig(kind="muon"),
}
WHOLE = {**SETTINGS, "sharded_checkpoints": False}


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def cut(trainer, at: int) -> None:
    """Run, and stop without a word before step `at`, as a kill would."""
    step = trainer.one_step

    def one_step(phase) -> None:
        if trainer.cursor.step == at:
            raise KeyboardInterrupt
        step(phase)

    trainer.one_step = one_step
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    trainer._background.wait()


def test_resume_is_bit_exact_although_training_goes_on_while_it_is_written(
    toy_shards: Path, tmp_path: Path
) -> None:
    toy_trainer(toy_shards, tmp_path / "whole", **WHOLE).run()
    for at in (5, 14):
        cut(toy_trainer(toy_shards, tmp_path / "cut", **SETTINGS), at)
    saved = Store(tmp_path / "cut" / "checkpoints").newest()
    assert saved is not None and saved.is_sharded and saved.state["step"] in (12, 14)
    files = [p.name for p in saved.path.rglob("*") if p.is_file()]
    assert all(name.endswith((".safetensors", ".json")) for name in files)  # no pickle
    toy_trainer(toy_shards, tmp_path / "cut", **SETTINGS).run()
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()


CHILD = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from train.toy_training import toy_phases, toy_trainer
from pocketphi.train import parallel
from pocketphi.train.config import OptimizerConfig
with parallel.world("cpu") as world:
    trainer = toy_trainer(Path({shards!r}), Path({run!r}), toy_phases(), world=world,
                          sharded_checkpoints=True, checkpoint_every_tokens=512, shard_ranks={shard_ranks},
                          evaluate_every_tokens=1024, optimizer=OptimizerConfig(kind="muon"))
    step = trainer.one_step
    def one_step(phase):
        lost = Path({run!r}).with_suffix(".lost")
        if trainer.cursor.step == 9 and not lost.exists():
            trainer._background.wait()
            world.barrier()
            if {kill} and world.rank == 1:
                lost.touch()
                os.kill(os.getpid(), 9)
            if not {kill}:
                raise SystemExit(0)
        step(phase)
    trainer.one_step = one_step
    trainer.run()
"""


def two_ranks(shards: Path, run: Path, *, kill: bool, shard_ranks: int = 0) -> None:
    script = run.with_suffix(".py")
    script.write_text(
        CHILD.format(tests=str(TESTS), shards=str(shards), run=str(run), kill=kill, shard_ranks=shard_ranks)
    )
    paths = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, f"--max-restarts={int(kill)}", str(script)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_written_by_two_ranks_read_by_one(toy_shards: Path, tmp_path: Path) -> None:
    """The pieces of two ranks, read whole; the run then ends with the losses of one that was left alone."""
    two_ranks(toy_shards, tmp_path / "moved", kill=False)
    saved = Store(tmp_path / "moved" / "checkpoints").newest()
    assert saved is not None and saved.is_sharded
    assert len([name for name in saved.state["files"] if name.endswith(".safetensors")]) == 2
    toy_trainer(toy_shards, tmp_path / "moved", **SETTINGS).run()
    toy_trainer(toy_shards, tmp_path / "one", **WHOLE).run()
    np.testing.assert_allclose(losses(tmp_path / "moved"), losses(tmp_path / "one"), rtol=1e-4)


@pytest.mark.slow
def test_a_lost_rank_is_restarted_and_ends_at_the_same_loss(toy_shards: Path, tmp_path: Path) -> None:
    """One of two ranks is killed; torchrun's agent starts both again; replicas instead of shards (HSDP)."""
    two_ranks(toy_shards, tmp_path / "lost", kill=True, shard_ranks=1)
    assert (tmp_path / "lost.lost").exists()
    toy_trainer(toy_shards, tmp_path / "one", **WHOLE).run()
    np.testing.assert_allclose(losses(tmp_path / "lost"), losses(tmp_path / "one"), rtol=1e-4)


def test_a_write_that_fails_is_said_and_the_last_good_one_stays(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy_trainer(toy_shards, tmp_path / "run", **SETTINGS)
    step = trainer.one_step

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def one_step(phase) -> None:
        if trainer.cursor.step == 7:
            trainer._background.wait()
            monkeypatch.setattr(trainer.store, "publish", full)
        step(phase)

    trainer.one_step = one_step
    with pytest.raises(UserError, match="No space left on device"):
        trainer.run()
    saved = Store(tmp_path / "run" / "checkpoints").newest()
    assert saved is not None and saved.state["step"] == 6
    monkeypatch.undo()
    toy_trainer(toy_shards, tmp_path / "run", **SETTINGS).run()  # continues
    assert len(losses(tmp_path / "run")) == 18


def test_another_model_and_damage_are_refused(toy_shards: Path, tmp_path: Path) -> None:
    cut(toy_trainer(toy_shards, tmp_path / "run", **SETTINGS), 5)
    from train.toy_training import toy_model

    with pytest.raises(UserError, match="of another model"):
        toy_trainer(toy_shards, tmp_path / "run", model=toy_model(num_hidden_layers=3), **SETTINGS).run()
    saved = Store(tmp_path / "run" / "checkpoints").newest()
    assert saved is not None
    for path in (saved.path / sharded.SHARDS).iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="sharded"):
        sharded.stored_shapes(saved.path / sharded.SHARDS)
    older = Store(tmp_path / "run" / "checkpoints").newest()
    assert older is None or older.path != saved.path
