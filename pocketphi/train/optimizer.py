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


# Elements of equal matrices that are iterated together: many small products leave a GPU idle.
_TOGETHER = 1 << 26


def orthogonalized(g_KMN: Tensor, iterations: int) -> Tensor:
    """The nearest matrices with all singular values about 1, by a Newton-Schulz iteration.

    The iteration corrects its own errors, so a GPU runs it in bfloat16 (K. Jordan, 2024).
    """
    x = g_KMN / (torch.linalg.matrix_norm(g_KMN, keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT if flip else x
    a, b, c = _QUINTIC
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if flip else x).to(g_KMN.dtype)


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
            for parameters in self._together([p for p in group["params"] if p.grad is not None]):
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step for parameters of one shape and one split."""
        smoothed = [self._smoothed(p, group["momentum"]) for p in parameters]
        whole = [s.full_tensor() if hasattr(s, "full_tensor") else s for s in smoothed]
        rows = self._parts.get(parameters[0], [whole[0].shape[0]])
        pieces = [
            orthogonalized(g_KMN, group["iterations"]) * (_ADAMW_RMS * max(g_KMN.shape[1:]) ** 0.5)
            for g_KMN in torch.stack(whole).split(rows, dim=1)
        ]
        for parameter, nesterov, update in zip(parameters, smoothed, torch.cat(pieces, dim=1)):
            if hasattr(nesterov, "full_tensor"):
                from torch.distributed.tensor import DTensor, distribute_tensor

                assert isinstance(nesterov, DTensor)
                update = distribute_tensor(update, nesterov.device_mesh, nesterov.placements)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"])

    def _smoothed(self, parameter: Tensor, beta: float) -> Tensor:
        """Nesterov's look-ahead of the momentum, which is brought up to date."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - beta)
        return parameter.grad.lerp(state["momentum"], beta)

    def _together(self, parameters: list[Tensor]) -> list[list[Tensor]]:
        """Parameters of one shape and one split, in order of appearance, few enough for the memory."""
        groups: dict[tuple[int, ...], list[list[Tensor]]] = {}
        for parameter in parameters:
            found = groups.setdefault((*parameter.shape, *self._parts.get(parameter, [])), [[]])
            if found[-1] and (len(found[-1]) + 1) * parameter.numel() > _TOGETHER:
                found.append([])
            found[-1].append(parameter)
        return [group for same in groups.values() for group in same]


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
