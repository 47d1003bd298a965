"""A bad step is skipped, rolled back or stopped, each said; a full disk leaves the last good checkpoint."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from train.toy_training import toy_phases, toy_trainer

from pocketphi.core.errors import CheckpointError, ConfigError, UserError
from pocketphi.train.checkpoints import Store
from pocketphi.train.config import GuardConfig
from pocketphi.train.guard import Guard
from pocketphi.train.parallel import World


def poison(trainer, phase: int, first: int, last: int) -> None:
    """Make the loss of the phase's rows from `first` to `last` not finite."""
    plain = trainer.loss_model.forward

    def forward(*arguments):
        loss, z = plain(*arguments)
        at = trainer.cursor
        bad = trainer.model.training and at.phase == phase and first <= at.row < last
        return (loss * float("nan") if bad else loss), z

    trainer.loss_model.forward = forward


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_bad_batch_is_skipped_and_the_run_ends_well(toy_shards: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_shards, tmp_path)
    poison(trainer, 0, 16, 24)  # the third step: 8 rows a step
    result = trainer.run()
    assert (result.guard.num_skipped, result.guard.num_not_finite, result.guard.num_roll_backs) == (1, 1, 0)
    skipped = [line for line in lines(tmp_path) if "skip" in line]
    assert [line["step"] for line in skipped] == [3]
    assert skipped[0]["loss"] is None
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_many_bad_batches_roll_back_past_the_data(toy_shards: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_shards, tmp_path, checkpoint_every_tokens=512, guard=GuardConfig(max_skips=1))
    poison(trainer, 0, 40, 56)  # steps 6 and 7
    result = trainer.run()
    assert (result.guard.num_skipped, result.guard.num_roll_backs) == (2, 1)
    roll_back = next(line for line in lines(tmp_path) if line.get("event") == "roll_back")
    assert roll_back["next_row"] == 56
    steps = [line["step"] for line in lines(tmp_path) if "learning_rate" in line and line["phase"] == "one"]
    assert steps[-1] == 12
    assert len(steps) > 12


def test_endless_bad_batches_stop_the_run(toy_shards: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_shards, tmp_path, guard=GuardConfig(max_skips=1, max_roll_backs=2))
    poison(trainer, 0, 0, 10**9)
    with pytest.raises(UserError, match="2 roll-backs"):
        trainer.run()


def test_a_jump_of_the_loss_is_a_spike() -> None:
    guard = Guard(GuardConfig(window=10, spike_deviations=5))
    for i in range(10):
        assert guard.judge(3.0 + 0.01 * (i % 2), 1.0)[0] == "accept"
    assert guard.judge(9.0, 1.0)[0] == "skip"
    assert guard.judge(3.0, float("inf"))[0] == "skip"
    assert guard.judge(3.01, 1.0)[0] == "accept"
    assert (guard.num_spikes, guard.num_not_finite, guard.skips_in_a_row) == (1, 1, 0)


def test_full_disk_keeps_the_last_good_checkpoint(toy_shards: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_shards, tmp_path, checkpoint_every_tokens=512)
    stop_at = trainer.store.write
    writes = []

    def write(state, weights, optimizer, *, anchor):
        writes.append(state["step"])
        if len(writes) < 3:
            return stop_at(state, weights, optimizer, anchor=anchor)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            return stop_at(state, weights, optimizer, anchor=anchor)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    trainer.store.write = write
    with pytest.raises(UserError, match=r"could not be written.*last good checkpoint stays.*step-00000002"):
        trainer.run()
    store = Store(tmp_path / "checkpoints")
    newest = store.newest()
    assert newest is not None and newest.state["step"] == writes[1] == 2
    assert not list((tmp_path / "checkpoints").glob(".*"))
    # With room again the same command continues, and ends as an undisturbed run does.
    again = toy_trainer(toy_shards, tmp_path, checkpoint_every_tokens=512)
    again.run()
    whole = toy_trainer(toy_shards, tmp_path / "whole", checkpoint_every_tokens=512)
    whole.run()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_damaged_checkpoint_is_passed_over(toy_shards: Path, tmp_path: Path, capsys) -> None:
    trainer = toy_trainer(toy_shards, tmp_path)
    trainer.run()
    store = Store(tmp_path / "checkpoints")
    newest = store.newest()
    assert newest is not None
    trainer.cursor.step += 5
    trainer.save(anchor=False)
    file = tmp_path / "checkpoints" / f"step-{trainer.cursor.step:08d}" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    found = store.newest()
    assert found is not None and found.path == newest.path
    assert "model.safetensors: missing or changed" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        from pocketphi.train.checkpoints import Tensors

        Tensors(file)


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(toy_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 rows a step do not divide over 3 ranks"):
        toy_trainer(toy_shards, tmp_path, toy_phases(), world=World(0, 3, torch.device("cpu")))
