"""Sharded checkpoints: every rank writes what it holds, in the background, and any number of ranks reads it.

torch.distributed.checkpoint does the planning and the resharding; its files are safetensors (each with
the offsets of its pieces in the header), never pickles. `begin` copies the tensors to host memory and
returns; training goes on while they are written. When all ranks are done, the main rank hashes the
files, writes the note and renames the folder: what has its final name is whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketphi.core.errors import CheckpointError, UserError
from pocketphi.train.parallel import World

SHARDS = "shards"


class Background:
    """At most one checkpoint is being written at a time; errors come up at `wait`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._pending: Future[Any] | None = None
        self._where = Path()
        self._group: Any = None

    def begin(self, folder: Path, tensors: dict[str, Tensor], publish: Callable[[], object]) -> None:
        """Start writing `tensors` (a collective call). `publish` runs once on the main rank, after
        every rank's files are written. Raises UserError when an earlier write failed."""
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

        self.wait()
        self._where = folder
        # What lies in host memory is not copied by the stager, and the next step would change it.
        tensors = {n: t.clone() if t.device.type == "cpu" else t for n, t in tensors.items()}
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        if self.world.size > 1 and self._group is None:
            # Its own group: a collective of the writing thread may not meet one of the training.
            self._group = torch.distributed.new_group(backend="gloo")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saving: Any = async_save(
                tensors, storage_writer=writer, process_group=self._group, no_dist=self.world.size == 1
            )
        self._pending = Future()
        outcome, is_main = self._pending, self.world.is_main

        def done(finished: Any) -> None:
            try:
                finished.result()
                if is_main:
                    publish()
            except BaseException as error:  # handed to `wait`, in the thread that trains
                outcome.set_exception(error)
            else:
                outcome.set_result(None)

        saving.add_done_callback(done)

    def wait(self) -> None:
        """Return when nothing is being written. Raises UserError when the last write failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:
            raise UserError(
                f"{self._where.parent}: the sharded checkpoint could not be written ({error}); "
                "earlier checkpoints stay",
                hint="free some space and run the same command again: it continues from the last good one",
            ) from error


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a sharded checkpoint."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:
        raise CheckpointError(f"{folder}: not a readable sharded checkpoint: {error}") from None
    return {name: tuple(entry.size) for name, entry in found.items() if hasattr(entry, "size")}


def read(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fill `tensors` in place, each as it is placed over the ranks (a collective call)."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=world.size == 1)
