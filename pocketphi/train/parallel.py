"""One process or many: ranks from torchrun, sums over ranks, FSDP2 sharding, whole tensors.

Everything that differs between one rank and many is in this file; with one rank nothing of
torch.distributed is touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocketphi.core.errors import ConfigError, UserError


@dataclass(frozen=True)
class World:
    """This process among the `size` of a run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sum each value over all ranks, in float64."""
        if self.size == 1:
            return [float(v) for v in values]
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        if self.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return float(found)

    def tell(self, value: Any) -> Any:
        """Give every rank what the main rank has (JSON-like values)."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def shard(
        self, module: nn.Module, layers: nn.ModuleList, *, low_precision: bool, shard_ranks: int = 0
    ) -> None:
        """Shard weights, gradients and optimizer state over ranks (FSDP2), block by block.

        `shard_ranks` ranks hold one copy of the model, and the copies are replicas (HSDP: on many nodes
        the weights then travel inside a node only). 0 means the ranks of one node. Raises ConfigError
        when the ranks do not divide by it.
        """
        if self.size == 1:
            return
        shard_ranks = shard_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        if self.size % shard_ranks:
            raise ConfigError(f"{self.size} ranks do not divide into groups of shard_ranks {shard_ranks}")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if shard_ranks == self.size:
            mesh = init_device_mesh(self.device.type, (self.size,))
        else:
            mesh = init_device_mesh(
                self.device.type,
                (self.size // shard_ranks, shard_ranks),
                mesh_dim_names=("replicate", "shard"),
            )
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low_precision else None, reduce_dtype=torch.float32
        )
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)


@contextmanager
def world(device: str) -> Iterator[World]:
    """Join the run that torchrun describes in the environment, or be alone.

    `device` is auto, cpu or cuda. Raises UserError when CUDA is asked for and there is none.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, torch finds no GPU", hint="use --set device=cpu")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = torch.device("cpu")
    if on_gpu:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    store, _, _ = next(torch.distributed.rendezvous("env://"))
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=torch.distributed.PrefixStore(_attempt(), store),
        rank=rank,
        world_size=size,
    )
    try:
        yield World(rank, size, place)
        # A rank that left early would close connections that others still read from.
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def _attempt() -> str:
    """A name for this start of the ranks, the same on all of them.

    torchrun (PyTorch 2.13) keeps its store when it starts ranks again, and a rank that is quick finds the
    addresses of those that died: it is refused, or waits for ever. On one node the count of restarts
    tells the starts apart. Nodes count theirs differently: there the launcher must make a new store
    (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, see docs/guides/training.md).
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return "start"
    return f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a possibly sharded one (a collective call: every rank must make it)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """Place a full tensor as `like` is placed; tensors of another shape (step counters) stay whole."""
    if value.shape != like.shape:
        return value
    value = value.to(like.device)
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)  # type: ignore[attr-defined]
