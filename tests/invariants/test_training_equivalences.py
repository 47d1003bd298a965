"""What must not change the training: how a batch is split, how documents are packed, a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from train.toy_training import toy_documents, toy_model, toy_phases, toy_trainer, write_shards

from pocketphi.train.checkpoints import Store
from pocketphi.train.config import OptimizerConfig
from pocketphi.train.data import IGNORE, PackedFeed
from pocketphi.train.loss import TokenLoss
from pocketphi.train.shards import open_split

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shards_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, toy_documents())
    return folder


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_accumulation_split_equals_one_batch(shards_folder: Path, tmp_path: Path) -> None:
    found = {}
    for micro in (32, 96, 256):
        trainer = toy_trainer(shards_folder, tmp_path / f"{micro}", toy_phases(micro_batch_tokens=micro))
        trainer.run()
        found[micro] = losses(tmp_path / f"{micro}")
    np.testing.assert_allclose(found[32], found[256], rtol=2e-5)
    np.testing.assert_allclose(found[96], found[256], rtol=2e-5)
    # The first step against autograd on the mean over all tokens of the batch.
    model = toy_model()
    batch = PackedFeed(open_split(shards_folder, "phase1"), 32, seed=0).batch(0, 8)
    ids, targets, documents = _tensors(batch)
    logits = model(ids, document_ids_BT=documents)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    first = json.loads((tmp_path / "32" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_unequal_micro_batches_weigh_tokens_not_batches(shards_folder: Path) -> None:
    """Rows with few targets count by their targets: the mean over micro-batches would differ."""
    feed = PackedFeed(open_split(shards_folder, "phase1"), 32, seed=0)
    batch = feed.batch(0, 4)
    batch.targets_BT[0, 3:] = IGNORE
    model = TokenLoss(toy_model()).requires_grad_(False)
    whole, _ = model(*_tensors(batch))
    parts = [model(*_tensors(batch.rows(i, i + 1)))[0] for i in range(4)]
    total = sum(parts)
    assert float(total / batch.num_targets) == pytest.approx(float(whole / batch.num_targets), rel=1e-6)
    mean_of_means = sum(float(p) / batch.rows(i, i + 1).num_targets for i, p in enumerate(parts)) / 4
    assert abs(mean_of_means - float(whole / batch.num_targets)) > 1e-3


def test_packed_documents_equal_separate_ones(shards_folder: Path) -> None:
    """Loss and gradients of packed rows equal the sum over their documents, run one by one."""
    feed = PackedFeed(open_split(shards_folder, "phase1"), 64, seed=0)
    batch = feed.batch(0, 6)
    assert max(len(np.unique(row)) for row in batch.documents_BT) > 1
    packed = TokenLoss(toy_model())
    loss, _ = packed(*_tensors(batch))
    loss.backward()
    separate = TokenLoss(toy_model())
    total = 0.0
    for ids, targets, documents in zip(batch.ids_BT, batch.targets_BT, batch.documents_BT):
        for mark in np.unique(documents):
            inside = documents == mark
            part, _ = separate(
                torch.from_numpy(ids[inside])[None], torch.from_numpy(targets[inside])[None], None
            )
            part.backward()
            total += float(part)
    assert float(loss) == pytest.approx(total, rel=1e-5)
    for (name, a), (_, b) in zip(packed.named_parameters(), separate.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from train.toy_training import toy_trainer, toy_phases
trainer = toy_trainer(Path({shards!r}), Path({run!r}), toy_phases(), checkpoint_every_s=0.05,
                      evaluate_every_tokens=1024)
step = trainer.one_step
def slow(phase):
    step(phase)
    print(trainer.cursor.step, flush=True)
    import time; time.sleep(0.02)
trainer.one_step = slow
trainer.run()
"""


def test_killed_run_ends_in_the_same_bits(shards_folder: Path, tmp_path: Path) -> None:
    """A process killed with SIGKILL, continued here, against one that was left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code = CHILD.format(tests=str(TESTS), shards=str(shards_folder), run=str(killed))
    paths = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 14:  # in the second phase, between two checkpoints
            break
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    assert len(losses(killed)) < 18
    for folder in (killed, whole):
        toy_trainer(shards_folder, folder, evaluate_every_tokens=1024).run()
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    ends = [Store(folder / "checkpoints").newest() for folder in (killed, whole)]
    assert ends[0] is not None and ends[1] is not None
    assert ends[0].state["files"] == ends[1].state["files"]  # sha256 of weights and optimizer state


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_interrupted_run_ends_in_the_same_bits(shards_folder: Path, tmp_path: Path, kind: str) -> None:
    """The same inside one process, for both optimizers, again and again."""
    settings = {
        "optimizer": OptimizerConfig(kind=kind),
        "checkpoint_every_tokens": 512,
        "evaluate_every_tokens": 768,
    }
    toy_trainer(shards_folder, tmp_path / "whole", **settings).run()
    for stop_at in (3, 7, 11, 15):  # each one step after a checkpoint
        trainer = toy_trainer(shards_folder, tmp_path / "cut", **settings)
        step = trainer.one_step

        def one_step(phase, trainer=trainer, step=step, stop_at=stop_at) -> None:
            if trainer.cursor.step == stop_at:
                raise KeyboardInterrupt
            step(phase)

        trainer.one_step = one_step
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    toy_trainer(shards_folder, tmp_path / "cut", **settings).run()
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()
    ends = [Store(tmp_path / name / "checkpoints").newest() for name in ("cut", "whole")]
    assert ends[0] is not None and ends[1] is not None
    assert ends[0].state["files"] == ends[1].state["files"]


def _tensors(batch):
    return (
        torch.from_numpy(batch.ids_BT),
        torch.from_numpy(batch.targets_BT),
        torch.from_numpy(batch.documents_BT),
    )
