"""AdamW over bfloat16 weights that does not lose the small updates.

A bfloat16 weight has 8 significant bits: an update below a 256th of the weight would round away.
Two remedies, by choice:

- `master`: the weight's missing 16 bits are kept beside it, so that weight and rest together *are* a
  float32 number. That costs 2 bytes per parameter where a separate float32 copy costs 4, and less
  memory traffic; the arithmetic is exactly that of float32 AdamW.
- `stochastic`: no extra bits; the updated weight is rounded up or down at random, in proportion, so
  that updates survive on average. The random bits are a hash of (seed, step, parameter, element):
  a resumed run rounds as an undisturbed one, without generator state.

Moments are float32. Gradient clipping and the guard against non-finite gradients are folded into the
update: `grad_scale` multiplies every gradient, and a scale that is not finite leaves weights and
moments as they are, decided on the device without waiting for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from pocketphi.core.errors import ConfigError

Rounding = Literal["master", "stochastic"]


def split_float32(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x as a bfloat16 (rounded half up in magnitude) and the int16 rest; exact together."""
    bits = x.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_float32(weight: Tensor, rest: Tensor) -> Tensor:
    """Inverse of `split_float32`."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + rest.to(torch.int32)).view(torch.float32)


def round_stochastically(x: Tensor, seed: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with the probability of the part cut off.

    `seed` is a 0-dim int64; element i uses 16 bits of a hash of (seed, i).
    """
    index = torch.arange(x.numel(), device=x.device, dtype=torch.int64).view(x.shape)
    # The 32-bit finaliser of MurmurHash3, twice, in int64 with the upper half masked off.
    h = (index + seed) & 0xFFFFFFFF
    for _ in range(2):
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) * 0x42B2AE35) & 0xFFFFFFFF
        h = h ^ (h >> 16)
    bits = x.view(torch.int32) + (h & 0xFFFF).to(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _update(
    weight: Tensor,
    rest: Tensor | None,
    mean: Tensor,
    square: Tensor,
    grad: Tensor,
    numbers: Tensor,
    seed: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step of one tensor. `numbers`: float32 [rate, 1 - beta1^t, 1 - beta2^t, grad_scale]."""
    rate, correction1, correction2, scale = numbers[0], numbers[1], numbers[2], numbers[3]
    accepted = torch.isfinite(scale)
    g = grad.float() * scale
    new_mean = torch.lerp(mean, g, 1 - beta1)
    new_square = torch.lerp(square, g * g, 1 - beta2)
    wide = weight.float() if rest is None else join_float32(weight, rest)
    step = (new_mean / correction1) / ((new_square / correction2).sqrt() + eps)
    updated = torch.where(accepted, wide * (1 - rate * weight_decay) - rate * step, wide)
    mean.copy_(torch.where(accepted, new_mean, mean))
    square.copy_(torch.where(accepted, new_square, square))
    if rest is not None:
        high, low = split_float32(updated)
        weight.copy_(high)
        rest.copy_(low)
    elif seed is not None:
        weight.copy_(torch.where(accepted, round_stochastically(updated, seed), weight))
    else:
        weight.copy_(updated)


@functools.cache
def _compiled_update() -> Callable[..., None]:
    # One dynamic length: a single kernel serves all tensors of a run.
    return torch.compile(_update, dynamic=True, fullgraph=True)


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW (decoupled decay) whose bfloat16 weights keep or randomly round their low bits.

    float32 parameters are updated plainly. Set `grad_scale` (0-dim float32 on the parameters'
    device, or a number) before `step`. State per parameter: `exp_avg`, `exp_avg_sq` (float32),
    `step`, and `rest` (int16) with `rounding="master"`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        rounding: Rounding = "master",
        seed: int = 0,
        compiled: bool | None = None,
    ) -> None:
        if rounding not in ("master", "stochastic"):
            raise ConfigError(f"rounding {rounding!r} is not one of master, stochastic")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.rounding, self.seed, self.compiled = rounding, seed, compiled
        self.grad_scale: Tensor | float = 1.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        position = 0
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            shared: dict[Any, Tensor] = {}
            for parameter in group["params"]:
                position += 1
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter)
                state["step"] += 1
                count = int(state["step"])
                device = parameter.device
                if (device, count) not in shared:  # groups step together: one small transfer for all
                    numbers = [group["lr"], 1 - beta1**count, 1 - beta2**count, 1.0]
                    shared[device, count] = _on_device(numbers, device)
                    shared[device, count][3] = self.grad_scale
                rest = state.get("rest")
                seed = None
                if rest is None and parameter.dtype == torch.bfloat16:
                    mix = self.seed * 0x9E3779B1 + count * 0x85EBCA77 + position * 0xC2B2AE3D
                    seed = torch.full((), mix & 0xFFFFFFFF, dtype=torch.int64, device=device)
                compiled = parameter.is_cuda if self.compiled is None else self.compiled
                update = _compiled_update() if compiled else _update
                update(
                    _flat(parameter),
                    None if rest is None else _flat(rest),
                    _flat(state["exp_avg"]),
                    _flat(state["exp_avg_sq"]),
                    _flat(parameter.grad),
                    shared[device, count],
                    seed,
                    beta1,
                    beta2,
                    group["eps"],
                    group["weight_decay"],
                )

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if self.rounding == "master" and parameter.dtype == torch.bfloat16:
                state["rest"] = torch.zeros_like(parameter, dtype=torch.int16)
        return state

    def keep_master(self, parameter: Tensor, exact: Tensor) -> None:
        """Start the parameter from float32 values `exact` that it had been rounded from."""
        state = self._state_of(parameter)
        high, rest = split_float32(exact.detach().float().to(parameter.device))
        with torch.no_grad():
            parameter.copy_(high)
            state["rest"].copy_(rest)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """As torch's, but moments stay float32 and `rest` int16 (torch casts to the weight's type)."""
        stored = state_dict["state"]
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, values in stored.items():
            parameter = parameters[index]
            self.state[parameter] = {
                key: value.to(parameter.device) if key != "step" else value.clone()
                for key, value in values.items()
            }


def _on_device(numbers: list[float], device: torch.device) -> Tensor:
    host = torch.tensor(numbers, dtype=torch.float32)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def _flat(tensor: Tensor) -> Tensor:
    """The local, one-dimensional view of a possibly sharded tensor."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().view(-1)


def total_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients, float32 0-dim, computed on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients by: at most 1; not finite when the norm is not (no update then)."""
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return torch.where(torch.isfinite(norm), scale, torch.nan)
