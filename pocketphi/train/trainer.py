"""The training loop: pre-training and fine-tuning run through the same one.

Shapes: B rows, T tokens of a row.

A step takes the next rows of its phase's feed (the same rows for any number of ranks), adds up the
gradients of micro-batches, divides by the number of targets of the *whole* batch, asks the guard, and
updates. Everything a step depends on is in the checkpoint: weights, optimizer state, cursor, guard,
generator states, lengths of the logs. So a run that was killed ends in the same bits.

`metrics.jsonl` holds what the arithmetic gives (loss, rate, norms, monitors, held-out figures), never
times; times and speeds go to the log of the run (`progress.event`) and into the artifact's timings.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketphi.core import progress
from pocketphi.core.errors import ConfigError, UserError
from pocketphi.model.parametrization import MaximalUpdate
from pocketphi.model.transformer import PhiForCausalLM
from pocketphi.train import checkpoints, journal, sharded
from pocketphi.train.acceleration import AccelerationConfig, accelerate, unaccelerated
from pocketphi.train.checkpoints import Saved, Store
from pocketphi.train.config import LoopConfig, PhaseConfig
from pocketphi.train.data import Ahead, Batch, Feed
from pocketphi.train.forecast import peak_flops_of
from pocketphi.train.guard import Guard
from pocketphi.train.journal import METRICS, SAMPLES, Clock, Journal
from pocketphi.train.loss import TokenLoss
from pocketphi.train.monitors import UpdateRatio, attention_logit_max
from pocketphi.train.optimizer import Optimizers
from pocketphi.train.parallel import World, sharded_like, whole
from pocketphi.train.schedule import learning_rate


@dataclass(frozen=True)
class Phase:
    """A phase and the rows it reads."""

    config: PhaseConfig
    feed: Feed


@dataclass(frozen=True)
class HeldOut:
    """Rows whose loss is measured while training. `num_bytes` are the UTF-8 bytes of the text behind
    the counted targets (0: none known, no bits per byte)."""

    name: str
    feed: Feed
    num_rows: int
    num_bytes: int


@dataclass
class Cursor:
    """Where a run stands. `row` counts the rows read of the phase; a roll-back leaves rows out, so it
    is kept beside the steps."""

    step: int = 0
    tokens: int = 0
    phase: int = 0
    phase_step: int = 0
    row: int = 0


@dataclass
class Result:
    """What a run ended with, and how fast this process went."""

    cursor: Cursor
    guard: Guard
    last_loss: float
    heldout: dict[str, dict[str, float]]
    timings: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Runs phases on a model; continues from the newest checkpoint in `store`.

    `logs` is the folder of metrics.jsonl and samples.jsonl. `sample` makes the sample texts of a model,
    one dictionary each. `maximal_update` trains under that parametrisation (the model comes with standard
    initial weights, or with `redraw` False with a plain checkpoint's). Raises UserError when the guard stops the run or a checkpoint cannot be
    written, ConfigError when a batch does not divide over the ranks.
    """

    def __init__(
        self,
        model: PhiForCausalLM,
        phases: Sequence[Phase],
        config: LoopConfig,
        *,
        world: World,
        store: Store,
        logs: Path,
        heldout: Sequence[HeldOut] = (),
        sample: Callable[[PhiForCausalLM], list[dict[str, Any]]] | None = None,
        maximal_update: MaximalUpdate | None = None,
        redraw: bool = True,
    ) -> None:
        self.config, self.phases, self.world, self.store = config, list(phases), world, store
        self.heldout, self.sample = list(heldout), sample
        for phase in self.phases:
            rows = phase.config.rows_per_step
            if rows % world.size:
                raise ConfigError(
                    f"phase '{phase.config.name}': {rows} rows a step do not divide over {world.size} ranks",
                    hint=f"choose batch_tokens as a multiple of {world.size * phase.config.sequence_length}",
                )
        forget_peak_memory(world.device)
        self.model = model.to(world.device)
        self.model.train()
        self.loss_model = TokenLoss(self.model, z_weight=config.z_loss, chunk=config.loss_chunk_tokens)
        low = config.dtype == "bfloat16"
        if maximal_update is not None:
            maximal_update.start(self.model, redraw=redraw)
        world.shard(
            self.loss_model, self.model.model.layers, low_precision=low, shard_ranks=config.shard_ranks
        )
        accelerate(
            self.model,
            AccelerationConfig(
                compile=config.compile,
                attention=config.attention,
                float8=config.float8,
                checkpoint_layers=config.checkpoint_layers,
            ),
        )
        self._autocast = low and world.size == 1
        factors = {} if maximal_update is None else {"rate_factor": maximal_update.rate_factor}
        self.optimizers = Optimizers(self.model, config.optimizer, **factors)
        self._update_ratio = UpdateRatio(self.model)
        self.guard = Guard(config.guard)
        self.cursor = Cursor()
        self._ahead: Ahead | None = None  # reads the feed of the phase that runs
        self.last_loss = math.nan
        self.last_heldout: dict[str, dict[str, float]] = {}
        kept = journal.trackers(list(config.trackers), logs, asdict(config)) if world.is_main else []
        self.journal = Journal(logs, writes=world.is_main, trackers=kept)
        self._background = sharded.Background(world)
        self._clock = Clock()
        self._evaluated_at = -1
        self._last_checkpoint = time.monotonic()
        self.peak_flops = config.peak_flops or _known_peak(world.device)

    # The run

    def run(self) -> Result:
        """Train through all phases and return how it ended."""
        self._run_phases()
        self._background.wait()
        self.world.barrier()
        self.journal.close()
        timings = self._clock.figures()
        flops = self.model.config.train_flops_per_token(self.phases[-1].config.sequence_length)
        if self.peak_flops and timings["tokens_per_s"]:
            timings["mfu"] = timings["tokens_per_s"] * flops / self.peak_flops / self.world.size
        timings["peak_memory_bytes"] = peak_memory_bytes(self.world.device)
        return Result(self.cursor, self.guard, self.last_loss, self.last_heldout, timings)

    def _run_phases(self) -> None:
        self.start()
        while self.cursor.phase < len(self.phases):
            phase = self.phases[self.cursor.phase]
            self._announce(phase)
            done = self.cursor.phase_step * phase.config.batch_tokens
            total = phase.config.num_steps * phase.config.batch_tokens
            self._ahead = Ahead(phase.feed, phase.config.rows_per_step)
            with (
                contextlib.closing(self._ahead),
                _main_bar(self.world, phase.config.name, total, done) as bar,
            ):
                while self.cursor.phase_step < phase.config.num_steps:
                    before = self.cursor.phase_step
                    self.one_step(phase)
                    moved = self.cursor.phase_step - before
                    bar.advance(moved * phase.config.batch_tokens, loss=self.last_loss)
                    if self.cursor.phase_step < phase.config.num_steps:
                        self._between_steps(phase)
            self._end_phase(phase)

    def plain_model(self) -> PhiForCausalLM:
        """The model with whole weights on this device (a collective call where it is sharded)."""
        if self.world.size == 1:
            return self.model
        weights = {name: whole(p) for name, p in self.model.named_parameters()}
        plain = PhiForCausalLM(self.model.config).to(self.world.device)
        plain.load_state_dict(weights, strict=False)
        plain.output_factor = self.model.output_factor
        for mine, theirs in zip(self.model.model.layers, plain.model.layers):
            theirs.self_attn.scale = mine.self_attn.scale  # type: ignore[union-attr]
        plain.stop_ids = self.model.stop_ids
        return plain

    # One step

    def one_step(self, phase: Phase) -> None:
        """Take the next step of `phase`: accepted, skipped, rolled back or stopped, as the guard judges."""
        settings, cursor = phase.config, self.cursor
        started = time.monotonic()
        rate = learning_rate(settings, cursor.phase_step * settings.batch_tokens, settings.batch_tokens)
        local_rows = settings.rows_per_step // self.world.size
        batch = (self._ahead or phase.feed).batch(cursor.row + self.world.rank * local_rows, local_rows)
        num_targets = int(self.world.total(batch.num_targets)[0])
        if num_targets == 0:
            raise UserError(
                f"phase '{settings.name}': a batch at row {cursor.row} has no target to learn from"
            )
        monitored = (cursor.step + 1) % self.config.monitor_every_steps == 0
        logit_max = self._attention_logit_max(batch) if monitored else 0.0
        loss_sum, z_sum = self._gradients(batch, settings, num_targets)
        loss_sum, z_sum = self.world.total(loss_sum, z_sum)
        loss = loss_sum / num_targets
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        grad_norm = float(whole(norm))
        verdict, reason = self.guard.judge(loss, grad_norm)
        line: dict[str, Any] = {
            "step": cursor.step + 1,
            "phase": settings.name,
            "tokens": cursor.tokens + settings.batch_tokens,
            "targets": num_targets,
            "loss": _json_number(loss),
            "learning_rate": rate,
            "grad_norm": _json_number(grad_norm),
        }
        if self.config.z_loss or monitored:
            line["z_loss"] = _json_number(z_sum / num_targets)
        if verdict == "accept":
            if monitored:
                line["attention_logit_max"] = _json_number(logit_max)
                self._update_ratio.before()
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad_norm, norm)
            self.optimizers.step(rate)
            if monitored:
                ratios = self._update_ratio.after(self.world)
                line["update_ratio"] = ratios.pop("all")
                line["update_ratios"] = ratios
            self.last_loss = loss
        else:
            line[verdict] = reason
        self.optimizers.zero_grad()
        if verdict == "roll_back":
            self.journal.write(METRICS, line)
            self._roll_back(phase, reason)
            return
        cursor.step += 1
        cursor.tokens += settings.batch_tokens
        cursor.phase_step += 1
        cursor.row += settings.rows_per_step
        self.journal.write(METRICS, line)
        if verdict != "accept":
            self._say(f"step {cursor.step}: {reason}; the step is skipped ({self.guard.num_skipped} so far)")
        if verdict == "stop":
            raise UserError(
                f"training stopped at step {cursor.step}: {reason}, after {self.guard.num_skipped} skipped steps "
                f"and {self.guard.num_roll_backs} roll-backs",
                hint="lower the learning rate, or look at the data of the last steps in metrics.jsonl",
            )
        self._clock.step(settings.batch_tokens, time.monotonic() - started)
        self._event(settings, line)

    def _gradients(self, batch: Batch, settings: PhaseConfig, num_targets: int) -> tuple[float, float]:
        """Add up the gradients of the loss per target over micro-batches; return the summed losses."""
        rows = settings.micro_batch_tokens // settings.sequence_length
        # FSDP averages gradients over ranks; the loss is a sum over ranks.
        scale = self.world.size / num_targets
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for first in range(0, len(batch.ids_BT), rows):
            loss, z_loss = self._losses(batch.rows(first, first + rows), settings.document_mask)
            (loss * scale).backward()
            sums[0] += loss.detach()
            sums[1] += z_loss
        values = sums.tolist()
        return values[0], values[1]

    def _attention_logit_max(self, batch: Batch) -> float:
        ids_BT = torch.from_numpy(batch.ids_BT[:1]).to(self.world.device)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self._autocast):
            return attention_logit_max(self.loss_model, ids_BT, self.world)

    def _losses(self, batch: Batch, document_mask: bool) -> tuple[Tensor, Tensor]:
        device = self.world.device
        ids_BT = torch.from_numpy(batch.ids_BT).to(device, non_blocking=True)
        targets_BT = torch.from_numpy(batch.targets_BT).to(device, non_blocking=True)
        documents_BT = torch.from_numpy(batch.documents_BT).to(device) if document_mask else None
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            return self.loss_model(ids_BT, targets_BT, documents_BT)

    # Between steps

    def _between_steps(self, phase: Phase) -> None:
        every = self.config.evaluate_every_tokens
        if every and _crossed(self.cursor.tokens, phase.config.batch_tokens, every):
            self.evaluate()
        every = self.config.checkpoint_every_tokens or max(1, phase.config.tokens // 10)
        anchor = _crossed(self.cursor.tokens, phase.config.batch_tokens, every)
        late = time.monotonic() - self._last_checkpoint > self.config.checkpoint_every_s
        if anchor or self.world.tell(late):
            self.save(anchor=anchor)

    def _end_phase(self, phase: Phase) -> None:
        self.evaluate()
        if self.sample is not None:
            plain = self.plain_model()
            if self.world.is_main:
                plain.eval()
                with unaccelerated(plain):
                    texts = self.sample(plain)
                for text in texts:
                    self.journal.write(
                        SAMPLES, {"phase": phase.config.name, "step": self.cursor.step, **text}
                    )
                plain.train()
        self.cursor.phase += 1
        self.cursor.phase_step = self.cursor.row = 0
        self.guard.new_phase()
        self.save(anchor=True)

    def evaluate(self) -> None:
        """Measure the held-out sets and log them; text bytes make it bits per byte."""
        if not self.heldout or self._evaluated_at == self.cursor.step:
            return
        self._evaluated_at = self.cursor.step
        found: dict[str, dict[str, float]] = {}
        self.model.eval()
        with torch.no_grad(), unaccelerated(self.model):
            for entry in self.heldout:
                found[entry.name] = self._measure(entry)
        self.model.train()
        self.last_heldout = found
        line = {"event": "heldout", "step": self.cursor.step, "tokens": self.cursor.tokens, "heldout": found}
        self.journal.write(METRICS, line)
        progress.event("heldout", **{k: v for k, v in line.items() if k != "event"})

    def _measure(self, entry: HeldOut) -> dict[str, float]:
        length = entry.feed.sequence_length
        rows_at_once = max(1, self.phases[0].config.micro_batch_tokens // length)
        sums = [0.0, 0.0]
        # Every rank takes a share of the rows; all ranks make the same number of forward passes.
        per_rank = -(-entry.num_rows // self.world.size)
        for first in range(0, per_rank, rows_at_once):
            begin = self.world.rank * per_rank + first
            end = min(begin + rows_at_once, (self.world.rank + 1) * per_rank, entry.num_rows)
            batch = entry.feed.batch(min(begin, entry.num_rows - 1), max(end - begin, 1))
            loss, _ = self._losses(batch, document_mask=True)
            if end > begin:
                sums[0] += float(loss)
                sums[1] += batch.num_targets
        nll, targets = self.world.total(*sums)
        figures = {"nll_per_token": nll / max(targets, 1), "num_tokens": int(targets)}
        if entry.num_bytes:
            figures["bits_per_byte"] = nll / math.log(2) / entry.num_bytes
        return figures

    # Checkpoints

    def start(self) -> None:
        """Continue from the newest checkpoint, or write the first one."""
        # The main rank decides: all ranks must mean the same folder.
        found = self.store.newest() if self.world.is_main else None
        path = self.world.tell(None if found is None else str(found.path))
        saved = found if found is not None or path is None else self.store.at(Path(path))
        if saved is not None and not self.world.tell(self.journal.holds(saved.state["logs"])):
            self._say("the logs of the checkpoint are gone; starting again")
            saved = None
        if saved is None:
            if self.world.is_main:
                self.store.clear()
            self.world.barrier()
            torch.manual_seed(self.config.seed)
            self.journal.truncate({METRICS: 0, SAMPLES: 0})
            self.save(anchor=True)
            return
        self._restore(saved)
        self.guard.load_state(saved.state["guard"])
        self.cursor = Cursor(**saved.state["cursor"])
        self.journal.truncate(saved.state["logs"])
        self._say(f"continuing at step {self.cursor.step} ({progress.quantity(self.cursor.tokens)} tokens)")

    def save(self, *, anchor: bool) -> None:
        """Write a checkpoint of now (a collective call); in the background where it is sharded."""
        generators = checkpoints.rng_state(self.world.device)
        note = {
            "step": self.cursor.step,
            "cursor": asdict(self.cursor),
            "guard": self.guard.state(),
            "logs": dict(self.journal.lengths),
            "last_loss": _json_number(self.last_loss),
            "heldout": self.last_heldout,
        }
        if self.config.sharded_checkpoints:
            self._background.wait()
            tensors = {f"weight:{n}": p.detach() for n, p in self.model.named_parameters()}
            tensors |= {f"optimizer:{n}": t for n, t in self.optimizers.state().items()} | generators
            folder = self.store.prepare(self.cursor.step) if self.world.is_main else None
            folder = Path(self.world.tell(str(folder)))
            self._background.begin(
                folder / sharded.SHARDS, tensors, lambda: self.store.publish(note, anchor=anchor)
            )
        else:
            weights = {name: whole(p) for name, p in self.model.named_parameters()}
            state = {key: whole(value) for key, value in self.optimizers.state().items()}
            self.world.barrier()
            if self.world.is_main:
                self.store.write(
                    note, lambda: _on_cpu(weights), lambda: _on_cpu({**state, **generators}), anchor=anchor
                )
            self.world.barrier()
        self._last_checkpoint = time.monotonic()
        progress.event("checkpoint", step=self.cursor.step, tokens=self.cursor.tokens)

    def _restore(self, saved: Saved) -> None:
        parameters = dict(self.model.named_parameters())
        if saved.is_sharded:
            generators = self._restore_sharded(saved, parameters)
        else:
            weights, optimizer = saved.weights, saved.optimizer
            if set(parameters) != set(weights.names):
                raise UserError(f"{saved.path}: the checkpoint is of another model")
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(sharded_like(weights.read(name), parameter))
            generators = {n: optimizer.read(n) for n in optimizer.names if n.startswith("rng:")}
            keys = [n for n in optimizer.names if n not in generators]
            self.optimizers.load_state(lambda key, like: sharded_like(optimizer.read(key), like), keys)
        checkpoints.load_rng_state(generators, self.world.device)
        last = saved.state["last_loss"]
        self.last_loss = math.nan if last is None else last
        self.last_heldout = saved.state["heldout"]

    def _restore_sharded(self, saved: Saved, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read a sharded checkpoint onto this run's ranks, however many wrote it."""
        folder = saved.path / sharded.SHARDS
        shapes = sharded.stored_shapes(folder)
        if {f"weight:{name}" for name in parameters} != {n for n in shapes if n.startswith("weight:")}:
            raise UserError(f"{saved.path}: the checkpoint is of another model")
        tensors = {f"weight:{name}": p.detach() for name, p in parameters.items()}
        generators = {n: torch.empty(s, dtype=torch.uint8) for n, s in shapes.items() if n.startswith("rng:")}
        keys = [n.removeprefix("optimizer:") for n in shapes if n.startswith("optimizer:")]
        for key in keys:
            like, shape = parameters[key.rpartition(":")[0]], shapes[f"optimizer:{key}"]
            same = tuple(like.shape) == shape
            tensors[f"optimizer:{key}"] = torch.zeros_like(like.detach()) if same else torch.zeros(shape)
        sharded.read(folder, {**tensors, **generators}, self.world)
        self.optimizers.load_state(lambda key, like: tensors[f"optimizer:{key}"], keys)
        return generators

    def _roll_back(self, phase: Phase, reason: str) -> None:
        """Return to the last anchor of this phase, and leave out the rows read since."""
        self._background.wait()
        self.world.barrier()
        saved = self.store.newest(anchor=True)
        if saved is None:
            raise UserError(
                f"step {self.cursor.step + 1}: {reason}, and there is no checkpoint to go back to"
            )
        next_row = self.cursor.row + phase.config.rows_per_step
        self._restore(saved)
        self.guard.rolled_back(saved.state["guard"])
        step = self.cursor.step + 1
        self.cursor = Cursor(**saved.state["cursor"])
        self.cursor.row = next_row
        if self.world.is_main:
            self.store.delete_after(self.cursor.step)
        self.world.barrier()
        self._say(
            f"step {step}: {reason}; back to step {self.cursor.step}, data up to row {next_row} of "
            f"'{phase.config.name}' is left out (roll-back {self.guard.num_roll_backs})"
        )
        self.journal.write(
            METRICS,
            {"event": "roll_back", "from_step": step, "to_step": self.cursor.step, "next_row": next_row},
        )

    # Logs

    def _event(self, settings: PhaseConfig, line: dict[str, Any]) -> None:
        if not (self.world.is_main and self._clock.event_due()):
            return
        speed = self._clock.recent_tokens_per_s()
        flops = self.model.config.train_flops_per_token(settings.sequence_length)
        extra = {"mfu": speed * flops / self.peak_flops / self.world.size} if self.peak_flops else {}
        progress.event(
            "train_step",
            **line,
            tokens_per_s=round(speed, 1),
            memory_bytes=peak_memory_bytes(self.world.device),
            **extra,
        )

    def _announce(self, phase: Phase) -> None:
        settings = phase.config
        num_rows = settings.num_steps * settings.rows_per_step
        self._say(
            f"{settings.name}: {settings.num_steps} steps of {settings.batch_tokens} tokens, rows of "
            f"{settings.sequence_length}, peak rate {settings.learning_rate:g} ({settings.schedule})"
        )
        for text in phase.feed.describe(num_rows):
            self._say(f"  {text}")

    def _say(self, message: str) -> None:
        if self.world.is_main:
            progress.say(message)


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak_memory(device: torch.device) -> None:
    """Count the peak from now on, where the system lets one (stages of a recipe share a process)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: of the GPU where it trains on one, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(_STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _known_peak(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    return peak_flops_of(torch.cuda.get_device_name(device))


def _crossed(tokens: int, step_tokens: int, every: int) -> bool:
    return tokens // every > (tokens - step_tokens) // every


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _json_number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _main_bar(world: World, title: str, total: float, done: float) -> Any:
    if world.is_main:
        return progress.bar(title, total, unit="tokens", done=done)
    return _Silent()


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, *_: Any, **__: Any) -> None:
        pass
