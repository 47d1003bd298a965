"""Calibrated quantisation: blocks chosen by what the model does with them on real text.

The model is walked layer by layer. Before a matrix is rounded, the text runs up to it through what has
been rounded already, and the mean outer product of its inputs, H = E[x xᵀ], is collected. The error of a
rounded matrix V against W on that text is tr((W−V) H (W−V)ᵀ), which the methods make small:

- `importance`: every block's grid is searched with the diagonal of H as weights.
- `gptq`: columns are rounded in turn and each error is spread over the columns still to come, by the
  Cholesky factor of the inverse of H (Frantar et al., arXiv 2210.17323); grids are fitted to the weights
  as they then are. After that single weights are moved to their best grid value with all others held
  fixed, over and over (cyclic coordinate descent; Behdin et al., arXiv 2309.01885).

Legend: S sequences, T tokens, D hidden size, R rows, C columns, N blocks, W weights of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pocketphi.core import progress
from pocketphi.core.errors import DataError
from pocketphi.engine.formats import dequantise
from pocketphi.engine.weights import Weights
from pocketphi.model import PhiForCausalLM
from pocketphi.quant import rounding

Quantised = tuple[str, np.ndarray, dict[str, float]]
_LAZY_COLUMNS = 256
_SEQUENCES_AT_ONCE = 8


def torch_model(weights: Weights) -> PhiForCausalLM:
    """Build the float32 torch model from an opened model file of any kind."""
    with torch.device("meta"):
        model = PhiForCausalLM(weights.config)
    state = {
        "model.embed_tokens.weight": weights.array("embed"),
        "model.norm.weight": weights.array("norm"),
    }
    if not weights.config.tie_word_embeddings:
        state["lm_head.weight"] = weights.array("head")
    names = {
        "input_layernorm": "attention_norm",
        "self_attn.qkv_proj": "qkv",
        "self_attn.o_proj": "output",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_up_proj": "gate_up",
        "mlp.down_proj": "down",
    }
    for n in range(weights.config.num_hidden_layers):
        for theirs, ours in names.items():
            state[f"model.layers.{n}.{theirs}.weight"] = weights.array(f"layers.{n}.{ours}")
    tensors = {name: torch.from_numpy(np.array(a, dtype=np.float32, order="C")) for name, a in state.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def calibrate(
    weights: Weights,
    types: dict[str, str],
    ids_ST: np.ndarray,
    method: str,
    *,
    damping: float = 0.01,
    refine_passes: int = 2,
) -> Iterator[Quantised]:
    """Quantise every matrix of the model; yield (GGUF name, bytes uint8 [R, row bytes], figures).

    `ids_ST` are token ids of the calibration text, one sequence a row. The figures are `error`, the
    share of the output's energy that is lost on the calibration text, and `error_rtn`, the same for
    rounding to nearest. Raises DataError when the text excites nothing.
    """
    model: Any = torch_model(weights)
    ids = torch.from_numpy(ids_ST.astype(np.int64))
    head = "token_embd.weight" if weights.config.tie_word_embeddings else "output.weight"
    with progress.bar("quantize", len(types), unit="matrices") as bar:
        # The embedding comes first: all layers see it rounded. Its own importance as a head is that of
        # the float model's last states, near enough to the rounded model's.
        last = _Moments(weights.config.hidden_size)
        for rows in ids.split(_SEQUENCES_AT_ONCE):
            last.add(model.hidden(rows))
        embedding = model.model.embed_tokens.weight
        tied = head == "token_embd.weight"
        importance = last.diagonal if tied else None
        raw = rounding.quantise(embedding.numpy(), types["token_embd.weight"], importance, search=True)
        yield "token_embd.weight", raw, {}
        bar.advance(1)
        table = _back(raw, types["token_embd.weight"], embedding)
        states = [nn.functional.embedding(rows, table) for rows in ids.split(_SEQUENCES_AT_ONCE)]
        plan = model.plan(ids.shape[1], torch.device("cpu"))
        around = (plan.cos_BT1P, plan.sin_BT1P, plan.mask)

        def quantised(name: str, linear: nn.Linear, inputs: list[Tensor]) -> Quantised:
            moments = _Moments(linear.in_features)
            for x in inputs:
                moments.add(x)
            raw, figures = quantise_matrix(
                linear.weight.numpy(),
                types[name],
                moments.matrix(name),
                method,
                damping=damping,
                refine_passes=refine_passes,
            )
            linear.weight.copy_(_back(raw, types[name], linear.weight))
            bar.advance(1, error=figures["error"])
            return name, raw, figures

        for n, layer in enumerate(model.model.layers):
            # Every product is computed once: a matrix is rounded as soon as its inputs are known, and
            # what follows it is computed with the rounded one.
            normed = [layer.input_layernorm(x) for x in states]
            yield quantised(f"blk.{n}.attn_qkv.weight", layer.self_attn.qkv_proj, normed)
            mixed = [_input_of(layer.self_attn.o_proj, layer.self_attn, x, *around) for x in normed]
            yield quantised(f"blk.{n}.attn_output.weight", layer.self_attn.o_proj, mixed)
            states = [x + layer.self_attn.o_proj(y) for x, y in zip(states, mixed)]
            normed = [layer.post_attention_layernorm(x) for x in states]
            yield quantised(f"blk.{n}.ffn_up.weight", layer.mlp.gate_up_proj, normed)
            gated = [_input_of(layer.mlp.down_proj, layer.mlp, x) for x in normed]
            yield quantised(f"blk.{n}.ffn_down.weight", layer.mlp.down_proj, gated)
            states = [x + layer.mlp.down_proj(y) for x, y in zip(states, gated)]
        if not tied:
            yield quantised(head, model.lm_head, [model.model.norm(x) for x in states])


def quantise_matrix(
    x_RC: np.ndarray,
    type_: str,
    H_CC: np.ndarray,
    method: str,
    *,
    damping: float = 0.01,
    refine_passes: int = 2,
) -> tuple[np.ndarray, dict[str, float]]:
    """Quantise one matrix whose inputs have the second moments `H_CC` (float64).

    Returns the bytes uint8 [R, row bytes], and the figures of `calibrate`.
    """
    importance = np.diag(H_CC)
    plain = rounding.quantise(x_RC, type_)
    if method == "gptq" and type_ in _FEEDBACK:
        raw = gptq(x_RC, type_, H_CC, damping=damping, refine_passes=refine_passes)
    elif method == "rtn":
        raw = plain
    else:
        raw = rounding.quantise(x_RC, type_, importance, search=True)
    figures = {"error": _lost(x_RC, raw, type_, H_CC), "error_rtn": _lost(x_RC, plain, type_, H_CC)}
    return raw, figures


# With 8 bits rounding is far below everything else; with plain numbers there is no grid to choose.
_FEEDBACK = ("Q4_0", "Q4_1", "Q4_K", "Q6_K")


def gptq(x_RC: np.ndarray, type_: str, H_CC: np.ndarray, *, damping: float, refine_passes: int) -> np.ndarray:
    """Round with error feedback, then improve by coordinate descent; see the module's text."""
    width = rounding.block_type(type_, x_RC.shape[1]).block_size
    rows, columns = x_RC.shape
    H_CC = H_CC.copy()
    dead = np.diag(H_CC) <= 0
    H_CC[dead, dead] = 1.0
    importance = np.diag(H_CC).astype(np.float32)
    factor = _feedback_factor(H_CC, damping)
    # Columns are worked on one at a time: they lie contiguous here.
    x_CR = np.ascontiguousarray(x_RC.T, dtype=np.float32)
    work = x_CR.copy()
    value, step, base, inverse = (np.empty_like(work) for _ in range(4))
    grids = []
    span = max(width, _LAZY_COLUMNS // width * width)
    for outer in range(0, columns, span):
        outer_end = min(outer + span, columns)
        errors = np.empty((outer_end - outer, rows), dtype=np.float32)
        for start in range(outer, outer_end, width):
            at = slice(start, start + width)
            weight = np.broadcast_to(importance[at], (rows, width))
            grid = rounding.fit(np.ascontiguousarray(work[at].T), type_, weight)
            grids.append(grid)
            step_RW, base_RW = grid.columns(width)
            step[at], base[at] = step_RW.T, base_RW.T
            inverse[at] = rounding.inverse(step[at])
            for j in range(start, start + width):
                q = np.clip(np.rint((work[j] - base[j]) * inverse[j]), grid.low, grid.high)
                value[j] = step[j] * q + base[j]
                error = (work[j] - value[j]) / factor[j, j]
                errors[j - outer] = error
                if j + 1 < outer_end:
                    work[j + 1 : outer_end] -= factor[j, j + 1 : outer_end, None] * error
        if outer_end < columns:
            work[outer_end:] -= factor[outer:outer_end, outer_end:].T @ errors
    low, high = grids[0].low, grids[0].high
    for _ in range(refine_passes):
        if not _descend(x_CR, value, step, base, inverse, low, high, H_CC.astype(np.float32)):
            break
    q_CR = np.clip(np.rint((value - base) * inverse), low, high).astype(np.int8)
    blocks = [
        rounding.pack(type_, grid, np.ascontiguousarray(q_CR[i * width : (i + 1) * width].T))
        for i, grid in enumerate(grids)
    ]
    return np.concatenate([b.view(np.uint8).reshape(rows, -1) for b in blocks], axis=1)


def _feedback_factor(H_CC: np.ndarray, damping: float) -> np.ndarray:
    """Return the upper Cholesky factor of (H + damping · mean diagonal)⁻¹, float32 [C, C]."""
    H = torch.from_numpy(H_CC)
    mean = float(torch.diagonal(H).mean())
    while True:
        damped = H + damping * mean * torch.eye(len(H), dtype=H.dtype)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper.to(torch.float32).numpy()
        damping *= 10  # too few tokens for so many channels: trust the feedback less


def _descend(
    x_CR: np.ndarray,
    value_CR: np.ndarray,
    step_CR: np.ndarray,
    base_CR: np.ndarray,
    inverse_CR: np.ndarray,
    low: int,
    high: int,
    H_CC: np.ndarray,
) -> bool:
    """One pass of coordinate descent over all columns, in place; return whether anything moved."""
    columns = len(x_CR)
    gradient = H_CC @ (x_CR - value_CR)  # what is still to be gained along every column
    moved = False
    for outer in range(0, columns, _LAZY_COLUMNS):
        outer_end = min(outer + _LAZY_COLUMNS, columns)
        change = np.zeros((outer_end - outer, x_CR.shape[1]), dtype=np.float32)
        for j in range(outer, outer_end):
            best = value_CR[j] + gradient[j] / H_CC[j, j]
            q = np.clip(np.rint((best - base_CR[j]) * inverse_CR[j]), low, high)
            difference = step_CR[j] * q + base_CR[j] - value_CR[j]
            if difference.any():
                moved = True
                value_CR[j] += difference
                change[j - outer] = difference
                gradient[j:outer_end] -= H_CC[j, j:outer_end, None] * difference
        gradient[outer_end:] -= H_CC[outer:outer_end, outer_end:].T @ change
    return moved


def _lost(x_RC: np.ndarray, raw: np.ndarray, type_: str, H_CC: np.ndarray) -> float:
    """Return tr(E H Eᵀ) / tr(W H Wᵀ): the share of the output's energy that rounding loses."""
    H = H_CC.astype(np.float32)
    error = x_RC - dequantise(raw, type_, x_RC.shape)
    whole = float(np.einsum("rc,rc->", x_RC @ H, x_RC, dtype=np.float64))
    return float(np.einsum("rc,rc->", error @ H, error, dtype=np.float64)) / max(whole, 1e-30)


def _back(raw: np.ndarray, type_: str, like: Tensor) -> Tensor:
    return torch.from_numpy(dequantise(raw, type_, tuple(like.shape)))


class _Moments:
    """Sums x xᵀ over tokens, in float64 between batches."""

    def __init__(self, size: int) -> None:
        self._sum = torch.zeros(size, size, dtype=torch.float64)
        self._count = 0

    def add(self, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self._sum += (flat.T @ flat).to(torch.float64)
        self._count += len(flat)

    @property
    def diagonal(self) -> np.ndarray:
        return (torch.diagonal(self._sum) / max(1, self._count)).numpy()

    def matrix(self, name: str) -> np.ndarray:
        H = (self._sum / max(1, self._count)).numpy()
        if not np.isfinite(H).all() or not np.diag(H).any():
            raise DataError(f"{name}: the calibration text gives no usable activations")
        return H


def _input_of(linear: nn.Module, block: nn.Module, *arguments: Any) -> Tensor:
    """Run `block` and return what `linear` inside it is given."""
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        block(*arguments)
    finally:
        handle.remove()
    return seen[0]
