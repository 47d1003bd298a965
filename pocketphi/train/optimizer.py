"""AdamW and Muon over stated groups of parameters.

Group            AdamW          Muon           decays
matrices         AdamW          Muon           yes      2-D weights of the blocks
head (untied)    AdamW          AdamW          yes
table            AdamW          AdamW          no       embeddings, and the head tied to them
norms            AdamW          AdamW          no
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pocketphi.model.attention import Attention
from pocketphi.model.layers import GatedMLP
from pocketphi.train.config import OptimizerConfig

# Coefficients of the quintic iteration of Muon (K. Jordan, 2024): they maximise the slope at zero,
# which leaves singular values near 1 (0.7 to 1.2), close enough for an update.
_QUINTIC = (3.4445, -4.7750, 2.0315)
# RMS of an AdamW update in mid training; Muon's is scaled to it (Moonlight, arXiv 2502.16982).
_ADAMW_RMS = 0.2


def orthogonalized(g_MN: Tensor, iterations: int) -> Tensor:
    """The nearest matrix with all singular values about 1, by a Newton-Schulz iteration."""
    x = g_MN / (g_MN.norm() + 1e-7)
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    a, b, c = _QUINTIC
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flip else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, matrix by matrix; decoupled weight decay.

    A fused weight (qkv_proj, gate_up_proj) is split into the matrices it holds: `parts` of a group
    maps a parameter to its rows. Sharded parameters are gathered for the iteration.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        iterations: int,
        parts: dict[Tensor, list[int]],
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        )
        self._parts = parts

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum, beta = state["momentum"], group["momentum"]
                momentum.lerp_(parameter.grad, 1 - beta)
                nesterov = parameter.grad.lerp(momentum, beta)
                whole = nesterov.full_tensor() if hasattr(nesterov, "full_tensor") else nesterov
                pieces = [
                    orthogonalized(p, group["iterations"]) * (_ADAMW_RMS * max(p.shape) ** 0.5)
                    for p in whole.split(self._parts.get(parameter, [whole.shape[0]]))
                ]
                update = torch.cat(pieces)
                if hasattr(nesterov, "full_tensor"):
                    from torch.distributed.tensor import distribute_tensor

                    update = distribute_tensor(update, nesterov.device_mesh, nesterov.placements)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])


class Optimizers:
    """The optimizers of a run behind one face: rate, step, and state by parameter name."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        rate_factor: Callable[[str, str], float] = lambda group, kind: 1.0,
    ) -> None:
        """`rate_factor(group, kind)` multiplies the rate of a group under `kind` (adamw or muon); the
        group's weight decay is divided by it, so that rate times decay stays."""
        self.names = {id(p): name for name, p in model.named_parameters()}
        groups = parameter_groups(model)
        decay = config.weight_decay
        factor = rate_factor("head", "adamw")
        adamw: list[dict[str, Any]] = [
            {"params": groups["head"], "weight_decay": decay / factor, "factor": factor},
            {"params": groups["table"], "weight_decay": 0.0, "factor": rate_factor("table", "adamw")},
            {"params": groups["norms"], "weight_decay": 0.0, "factor": rate_factor("norms", "adamw")},
        ]
        factor = rate_factor("matrices", config.kind)
        self.optimizers: list[torch.optim.Optimizer] = []
        if config.kind == "muon":
            self.optimizers.append(
                Muon(
                    [{"params": groups["matrices"], "factor": factor}],
                    lr=0.0,
                    momentum=config.muon_momentum,
                    weight_decay=decay / factor,
                    iterations=config.muon_iterations,
                    parts=_parts(model),
                )
            )
        else:
            adamw.insert(0, {"params": groups["matrices"], "weight_decay": decay / factor, "factor": factor})
        self.optimizers.append(
            torch.optim.AdamW(
                [g for g in adamw if g["params"]],
                lr=0.0,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                fused=True,
            )
        )
        self.description = ", ".join(
            f"{name} {sum(p.numel() for p in members)}" for name, members in groups.items() if members
        )

    def step(self, learning_rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["factor"]
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All state tensors by "<parameter>.<what>" (sharded ones as they are)."""
        found: dict[str, Tensor] = {}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        found[f"{self.names[id(parameter)]}:{key}"] = value
        return found

    def load_state(self, read: Callable[[str, Tensor], Tensor], keys: Iterable[str]) -> None:
        """Set the state: `read(key, like)` gives each tensor, sharded like `like` where it has its shape."""
        by_name = {
            self.names[id(p)]: (optimizer, p)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for key in keys:
            name, _, what = key.rpartition(":")
            optimizer, parameter = by_name[name]
            optimizer.state[parameter][what] = read(key, parameter)


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort the parameters into the groups named at the head of this module."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "head": [], "table": [], "norms": []}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            groups["norms"].append(parameter)
        elif name.endswith("embed_tokens.weight"):
            groups["table"].append(parameter)
        elif name.endswith("lm_head.weight"):
            groups["head"].append(parameter)
        else:
            groups["matrices"].append(parameter)
    return groups


def _parts(model: nn.Module) -> dict[Tensor, list[int]]:
    """Rows of the separate matrices inside each fused weight."""
    parts: dict[Tensor, list[int]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            kv_rows = module.num_kv_heads * module.head_dim
            parts[module.qkv_proj.weight] = [module.num_heads * module.head_dim, kv_rows, kv_rows]
        if isinstance(module, GatedMLP):
            half = module.gate_up_proj.weight.shape[0] // 2
            parts[module.gate_up_proj.weight] = [half, half]
    return parts
