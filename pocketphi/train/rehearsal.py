"""A rehearsal: a few real steps of a run on random tokens, timed, in a process of their own.

`phi recipe plan` asks it how fast this machine trains this very shape, and how much memory the process
takes: the trainer, optimizer, loss, evaluation, sampling and checkpoints are the real ones, only the
tokens are random. It costs a few seconds and is left out where the run itself is not longer than that.

`measured` is torch-free; the child process (`python -m pocketphi.train.rehearsal`) imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.core import config as configuration
from pocketphi.core import progress
from pocketphi.model.config import ModelConfig
from pocketphi.train.config import LoopConfig, PhaseConfig

_SECONDS = 3.0  # of timed steps per phase
_LONGEST_S = 90.0
_SAMPLE_TOKENS = 8
_BUSY = 1.3
_DOCUMENT_TOKENS = 300  # of the random documents: they only decide the mask


@dataclass(frozen=True)
class Measured:
    """What a rehearsal found: `step_s` of each phase, and the costs beside the steps.

    All in seconds of a free machine: what its threads waited for a core that other programs held is taken
    out (Linux tells it). `busy` is how much longer the steps took with it.
    """

    step_s: tuple[float, ...]
    busy: float
    start_s: float
    evaluate_token_s: float
    sample_token_s: float
    checkpoint_s: float
    peak_memory_bytes: int


def measured(config: LoopConfig, shape: ModelConfig, phases: Sequence[PhaseConfig]) -> Measured | None:
    """Rehearse `phases` of a run with `shape`; None (said, with the reason) when it does not work."""
    loop = {f.name for f in fields(LoopConfig)}
    # Phases that differ only in data, length or rate take the same time: one of each kind is run.
    kinds = [(p.sequence_length, p.batch_tokens, p.micro_batch_tokens, p.document_mask) for p in phases]
    firsts = {kind: phases[kinds.index(kind)] for kind in kinds}
    question = {
        "config": {k: v for k, v in configuration.to_tree(config).items() if k in loop},
        "shape": configuration.to_tree(shape),
        "phases": [
            {**configuration.to_tree(phase), "name": f"rehearsal{i}", "mixture": {}}
            for i, phase in enumerate(firsts.values())
        ],
    }
    found = _ask(json.dumps(question, sort_keys=True))
    if found is None:
        return None
    return replace(found, step_s=tuple(found.step_s[list(firsts).index(kind)] for kind in kinds))


@lru_cache(maxsize=16)
def _ask(question: str) -> Measured | None:
    # The timing must not be that of a launcher's environment: one rank, and no log of its own.
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in launcher}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, environment.get("PYTHONPATH")) if p)
    progress.say("plan: a few steps are rehearsed to time this machine")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pocketphi.train.rehearsal"],
            input=question,
            capture_output=True,
            text=True,
            timeout=_LONGEST_S,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError) as error:
        progress.say(f"plan: the rehearsal did not work ({error}); the forecast is counted instead")
        return None
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        progress.say(f"plan: the rehearsal did not work ({last}); the forecast is counted instead")
        return None
    tree = json.loads(done.stdout.splitlines()[-1])
    found = Measured(**{**tree, "step_s": tuple(tree["step_s"])})
    if found.busy > _BUSY:
        progress.say(
            f"plan: this machine is busy with other work (steps take {found.busy:.1f} times as long); the "
            "forecast is for the machine left alone"
        )
    return found


def rehearse(question: dict[str, Any], started: float) -> Measured:
    """The child's work. `started` is when its process began, by `free_clock`."""
    import torch

    from pocketphi.model import PhiForCausalLM, generate
    from pocketphi.train import parallel
    from pocketphi.train.checkpoints import Store
    from pocketphi.train.pretrain import determinism
    from pocketphi.train.trainer import HeldOut, Phase, Trainer, peak_memory_bytes

    config = configuration.parse(LoopConfig, question["config"])
    shape = ModelConfig(**question["shape"])
    settings = [configuration.parse(PhaseConfig, tree) for tree in question["phases"]]
    with (
        tempfile.TemporaryDirectory() as folder,
        determinism(config),
        parallel.world(config.device) as world,
    ):
        model = PhiForCausalLM(shape)
        phases = [Phase(s, RandomFeed(shape.vocab_size, s.sequence_length)) for s in settings]
        held_rows = max(1, 4 * settings[0].micro_batch_tokens // settings[-1].sequence_length)
        held = HeldOut("random", RandomFeed(shape.vocab_size, settings[-1].sequence_length), held_rows, 0)
        store = Store(Path(folder) / "checkpoints")
        trainer = Trainer(model, phases, config, world=world, store=store, logs=Path(folder), heldout=[held])
        trainer.start()
        start_s = free_clock() - started
        before, began = free_clock(), time.monotonic()
        steps = [_time_steps(trainer, index) for index in range(len(phases))]
        busy = (time.monotonic() - began) / max(free_clock() - before, 1e-6)
        before = free_clock()
        trainer.evaluate()
        evaluate_s = free_clock() - before
        before = free_clock()
        trainer.save(anchor=True)
        checkpoint_s = free_clock() - before
        num_new = min(_SAMPLE_TOKENS, shape.max_position_embeddings - 1)
        model.eval()
        before = free_clock()
        generate(model, [1], max_new_tokens=num_new, stop_ids=[])
        sample_s = free_clock() - before
        return Measured(
            step_s=tuple(steps),
            busy=round(busy, 3),
            start_s=round(start_s, 3),
            evaluate_token_s=evaluate_s / (held_rows * settings[-1].sequence_length),
            sample_token_s=sample_s / num_new,
            checkpoint_s=checkpoint_s,
            peak_memory_bytes=peak_memory_bytes(torch.device(world.device)),
        )


def free_clock() -> float:
    """Seconds that passed, less those the main thread waited for a core (it works like the others, and
    waits for them). Where the system does not tell, seconds that passed."""
    waited = 0.0
    with contextlib.suppress(OSError, ValueError, IndexError):
        waited = int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return time.monotonic() - waited


def _time_steps(trainer: Any, index: int) -> float:
    """Median seconds of a step of phase `index`, after one that warms up."""
    trainer.cursor.phase, trainer.cursor.phase_step, trainer.cursor.row = index, 0, 0
    phase = trainer.phases[index]
    trainer.one_step(phase)
    taken: list[float] = []
    begin = time.monotonic()
    # Three seconds of steps, three steps where these are longer; a slow or busy machine gets one.
    while (
        not taken
        or (passed := time.monotonic() - begin) < _SECONDS
        or (len(taken) < 3 and passed < 5 * _SECONDS)
    ):
        before = free_clock()
        trainer.one_step(phase)
        taken.append(free_clock() - before)
    return float(np.median(taken))


class RandomFeed:
    """Rows of random tokens in documents of one length."""

    def __init__(self, vocab_size: int, sequence_length: int) -> None:
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.rows_per_epoch = 1 << 30

    def batch(self, first_row: int, num_rows: int) -> Any:
        from pocketphi.train.data import Batch

        shape = (num_rows, self.sequence_length)
        rng = np.random.default_rng(first_row)
        ids = rng.integers(0, self.vocab_size, shape)
        targets = rng.integers(0, self.vocab_size, shape)
        documents = (np.arange(self.sequence_length) // _DOCUMENT_TOKENS).astype(np.int32)
        return Batch(ids, targets, np.broadcast_to(documents, shape).copy())

    def describe(self, num_rows: int) -> list[str]:
        return []


def main() -> None:
    started = free_clock()
    # A guard that meets random data for a few steps has nothing to judge; bars and logs are for people.
    answer = rehearse(json.load(sys.stdin), started)
    print(json.dumps(answer.__dict__))


if __name__ == "__main__":
    main()
