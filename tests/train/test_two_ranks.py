"""Two ranks on gloo: the same loss curve and weights as one process, within rounding; a rank count may
change at a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from train.toy_training import toy_phases, toy_trainer

from pocketphi.train.checkpoints import Store

TESTS = Path(__file__).resolve().parents[1]

CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from train.toy_training import toy_phases, toy_trainer
from pocketphi.train import parallel
from pocketphi.train.config import OptimizerConfig
with parallel.world("cpu") as world:
    trainer = toy_trainer(Path({shards!r}), Path({run!r}), toy_phases(), world=world,
                          evaluate_every_tokens=1024, optimizer=OptimizerConfig(kind={kind!r}),
                          checkpoint_every_tokens=512)
    stop_at = {stop_at}
    step = trainer.one_step
    def one_step(phase):
        lost = Path({run!r}).with_suffix(".lost")
        if {lose_at} == trainer.cursor.step and world.rank == 1 and not lost.exists():
            lost.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.cursor.step == stop_at:
            trainer.save(anchor=False)
            world.barrier()
            raise SystemExit(0)
        step(phase)
    trainer.one_step = one_step
    trainer.run()
    plain = trainer.plain_model()
    assert sum(p.numel() for p in plain.parameters()) == trainer.model.config.num_parameters
"""


def two_ranks(shards: Path, run: Path, kind: str, stop_at: int = -1, lose_at: int = -1) -> None:
    code = CHILD.format(
        tests=str(TESTS), shards=str(shards), run=str(run), kind=kind, stop_at=stop_at, lose_at=lose_at
    )
    script = run.with_suffix(".py")
    script.write_text(code)
    paths = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, f"--max-restarts={int(lose_at >= 0)}", str(script)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def curve(folder: Path) -> tuple[list[float], list[float], list[float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held = [row["heldout"]["heldout-web"]["nll_per_token"] for row in rows if "heldout" in row]
    return [r["loss"] for r in rows if "loss" in r], [r["grad_norm"] for r in rows if "loss" in r], held


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_two_ranks_equal_one(toy_shards: Path, tmp_path: Path, kind: str) -> None:
    from pocketphi.train.config import OptimizerConfig

    settings = {"evaluate_every_tokens": 1024, "optimizer": OptimizerConfig(kind=kind)}
    toy_trainer(toy_shards, tmp_path / "one", toy_phases(), **settings).run()
    two_ranks(toy_shards, tmp_path / "two", kind)
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two")):
        np.testing.assert_allclose(two, one, rtol=1e-4)
    ends = [Store(tmp_path / name / "checkpoints").newest() for name in ("one", "two")]
    assert ends[0] is not None and ends[1] is not None
    for name in ends[0].weights.names:
        np.testing.assert_allclose(ends[1].weights.read(name), ends[0].weights.read(name), atol=2e-4)


def test_a_checkpoint_of_two_ranks_continues_on_one(toy_shards: Path, tmp_path: Path) -> None:
    toy_trainer(toy_shards, tmp_path / "one", toy_phases(), evaluate_every_tokens=1024).run()
    two_ranks(toy_shards, tmp_path / "moved", "adamw", stop_at=7)
    assert len(curve(tmp_path / "moved")[0]) == 7
    toy_trainer(toy_shards, tmp_path / "moved", toy_phases(), evaluate_every_tokens=1024).run()
    for one, moved in zip(curve(tmp_path / "one"), curve(tmp_path / "moved")):
        np.testing.assert_allclose(moved, one, rtol=1e-4)


def test_a_lost_rank_is_restarted_from_the_last_checkpoint(toy_shards: Path, tmp_path: Path) -> None:
    """torchrun's agent starts both ranks again; the run ends with the curve of an undisturbed one."""
    toy_trainer(toy_shards, tmp_path / "one", toy_phases(), evaluate_every_tokens=1024).run()
    two_ranks(toy_shards, tmp_path / "lost", "adamw", lose_at=15)
    assert (tmp_path / "lost.lost").exists()
    for one, lost in zip(curve(tmp_path / "one"), curve(tmp_path / "lost")):
        np.testing.assert_allclose(lost, one, rtol=1e-4)


def test_starts_of_the_ranks_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's store outlives the ranks: under one name, new ones would find the addresses of dead ones."""
    from pocketphi.train.parallel import _attempt

    names = []
    for count in ("0", "1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        names.append(_attempt())
    assert len(set(names)) == 3
    # Nodes count their own restarts: a name made from it would keep them apart.
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert _attempt() not in names
