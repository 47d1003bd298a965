"""Weights into blocks of 4 to 8 bits: Q8_0, Q4_0, Q4_1, Q4_K, Q6_K, as llama.cpp stores them.

Two steps, so that calibrated methods can come between them. `fit` chooses for every group of weights the
grid of values that can be stored: value = step · q + base with a whole number q. `pack` writes grids and
numbers q as blocks. `round_plain` does both by the formulas of ggml's reference (the same bytes as its
`gguf` package for Q8_0, Q4_0 and Q4_1); `round_fitted` searches the grids for the least weighted error.

Legend: R rows, C columns, N blocks (row by row), W weights of a block, G groups of a block that have a
grid of their own, K weights of a group (W = G·K).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pocketphi.core.errors import EngineError, did_you_mean
from pocketphi.core.gguf import TYPE_BY_NAME
from pocketphi.engine.formats import FORMATS

_CHUNK_WEIGHTS = 1 << 20
# A step below this is zero: its inverse would overflow, and half precision cannot hold it.
_TINY = np.float32(6e-8)


@dataclass
class Grid:
    """The values that N blocks can store: step_NG · q + base_NG for q from `low` to `high`.

    `fields` are the blocks' parameters as they are packed.
    """

    step_NG: np.ndarray
    base_NG: np.ndarray
    low: int
    high: int
    fields: dict[str, np.ndarray]

    def round(self, x_NW: np.ndarray) -> np.ndarray:
        """Return the nearest q of every weight, int8 [N, W]; 0 where the step is zero."""
        groups = self.step_NG.shape[1]
        x_NGK = x_NW.reshape(len(x_NW), groups, -1)
        q_NGK = np.rint((x_NGK - self.base_NG[..., None]) * inverse(self.step_NG)[..., None])
        return np.clip(q_NGK, self.low, self.high).astype(np.int8).reshape(x_NW.shape)

    def columns(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return step and base of every weight: float32 [N, W] each."""
        repeat = width // self.step_NG.shape[1]
        return np.repeat(self.step_NG, repeat, axis=1), np.repeat(self.base_NG, repeat, axis=1)


def quantise(
    x_RC: np.ndarray, type_: str, importance_C: np.ndarray | None = None, *, search: bool = False
) -> np.ndarray:
    """Round a matrix into blocks: uint8 [R, bytes of a row].

    Without `search` by ggml's reference formulas; with it, grids are searched for the least squared
    error, weighted by `importance_C` (for example the mean square of each input channel). Types of plain
    numbers (F32, F16, BF16) are converted. Raises EngineError for an unknown type, rows that do not fill
    blocks, or values that are not finite.
    """
    x_RC = np.ascontiguousarray(x_RC, dtype=np.float32)
    rows, columns = x_RC.shape
    kind = block_type(type_, columns)
    if not np.isfinite(x_RC).all():
        raise EngineError("weights that are not finite cannot be quantised")
    if type_ in _PLAIN_NUMBERS:
        return _PLAIN_NUMBERS[type_](x_RC).view(np.uint8).reshape(rows, -1)
    blocks_per_row = columns // kind.block_size
    out = np.empty((rows, blocks_per_row * kind.block_bytes), dtype=np.uint8)
    weight_W = None
    if importance_C is not None:
        weight_W = np.ascontiguousarray(importance_C, dtype=np.float32).reshape(1, blocks_per_row, -1)
    step = max(1, _CHUNK_WEIGHTS // columns)

    def one(start: int) -> None:
        part = x_RC[start : start + step]
        x_NW = part.reshape(-1, kind.block_size)
        if not search and type_ in _PLAIN:
            blocks = _PLAIN[type_](x_NW)
        else:
            weights = None
            if weight_W is not None:
                weights = np.broadcast_to(weight_W, (len(part), blocks_per_row, kind.block_size))
                weights = weights.reshape(x_NW.shape)
            grid = fit(x_NW, type_, weights)
            blocks = pack(type_, grid, grid.round(x_NW))
        out[start : start + step] = blocks.view(np.uint8).reshape(len(part), -1)

    # NumPy releases the lock in its loops: threads use the cores, and order does not matter.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(one, range(0, rows, step)))
    return out


def block_type(type_: str, columns: int):  # type: ignore[no-untyped-def]
    """Return the storage type, checked: EngineError if unknown here or rows do not fill its blocks."""
    if type_ not in TYPES:
        raise EngineError(f"cannot quantise to '{type_}'{did_you_mean(type_, TYPES)}")
    kind = TYPE_BY_NAME[type_]
    if columns % kind.block_size:
        raise EngineError(f"rows of {columns} weights do not fill {type_} blocks of {kind.block_size}")
    return kind


def fit(x_NW: np.ndarray, type_: str, weight_NW: np.ndarray | None = None) -> Grid:
    """Search the grid of least weighted squared error for every block.

    Without weights, larger weights count a little more, as in ggml (they matter more in the product).
    """
    if weight_NW is not None:
        # A channel that was never excited still needs some resolution.
        floor = np.float32(1e-4) * weight_NW.mean(axis=1, keepdims=True) + np.float32(1e-30)
        weight_NW = weight_NW + floor
    return _FIT[type_](x_NW, weight_NW)


def pack(type_: str, grid: Grid, q_NW: np.ndarray) -> np.ndarray:
    """Return the blocks of `type_` as a structured array [N]."""
    blocks = np.zeros(len(q_NW), dtype=FORMATS[type_].layout)
    for name, values in grid.fields.items():
        blocks[name] = values
    if type_ == "Q8_0":
        blocks["q"] = q_NW
    elif type_ == "Q4_0":
        blocks["q"] = _nibbles((q_NW + 8).astype(np.uint8))
    elif type_ == "Q4_1":
        blocks["q"] = _nibbles(q_NW.astype(np.uint8))
    elif type_ == "Q4_K":
        blocks["q"] = _nibbles(q_NW.astype(np.uint8).reshape(-1, 4, 64)).reshape(-1, 128)
    elif type_ == "Q6_K":
        # Two halves of 128 weights, each four runs of 32: low nibbles of runs 0 and 2 (then 1 and 3)
        # share a byte; byte i of the high part holds the upper bits of weight i of the four runs.
        u_N2RK = (q_NW + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
        low = u_N2RK & 15
        blocks["q"] = np.concatenate(
            [low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2
        ).reshape(-1, 128)
        high = u_N2RK >> 4
        blocks["high"] = (
            high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
        ).reshape(-1, 64)
    else:
        raise EngineError(f"cannot pack blocks of type '{type_}'")
    return blocks


def _nibbles(u: np.ndarray) -> np.ndarray:
    """Put the second half of the last axis into the upper four bits of the first half."""
    half = u.shape[-1] // 2
    return u[..., :half] | u[..., half:] << 4


def _half(values: np.ndarray) -> np.ndarray:
    """Round to half precision, large values to its largest."""
    return np.clip(values, -65504, 65504).astype(np.float16)


def inverse(step: np.ndarray) -> np.ndarray:
    """Return 1/step, and 0 where the step is zero or too small to be stored."""
    good = np.abs(step) > _TINY
    return np.where(good, np.float32(1) / np.where(good, step, np.float32(1)), np.float32(0))


# ggml's reference formulas


def _plain_q8_0(x_NW: np.ndarray) -> np.ndarray:
    d_N1 = np.abs(x_NW).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(d_N1 == 0, np.float32(0), np.float32(1) / d_N1)
    scaled = x_NW * inverse
    # Halves away from zero, as C's roundf.
    q_NW = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    blocks = np.zeros(len(x_NW), dtype=FORMATS["Q8_0"].layout)
    blocks["d"], blocks["q"] = _half(d_N1[:, 0]), q_NW
    return blocks


def _plain_q4_0(x_NW: np.ndarray) -> np.ndarray:
    largest = np.take_along_axis(x_NW, np.abs(x_NW).argmax(axis=1)[:, None], axis=1)
    d_N1 = largest / np.float32(-8)
    with np.errstate(divide="ignore"):
        inverse = np.where(d_N1 == 0, np.float32(0), np.float32(1) / d_N1)
    q_NW = np.trunc(x_NW.astype(np.float64) * inverse + 8.5).astype(np.uint8).clip(0, 15)
    blocks = np.zeros(len(x_NW), dtype=FORMATS["Q4_0"].layout)
    blocks["d"], blocks["q"] = _half(d_N1[:, 0]), _nibbles(q_NW)
    return blocks


def _plain_q4_1(x_NW: np.ndarray) -> np.ndarray:
    least = x_NW.min(axis=1, keepdims=True)
    d_N1 = (x_NW.max(axis=1, keepdims=True) - least) / np.float32(15)
    with np.errstate(divide="ignore"):
        inverse = np.where(d_N1 == 0, np.float32(0), np.float32(1) / d_N1)
    q_NW = np.trunc((x_NW - least) * inverse + np.float32(0.5)).astype(np.uint8).clip(0, 15)
    blocks = np.zeros(len(x_NW), dtype=FORMATS["Q4_1"].layout)
    blocks["d"], blocks["m"], blocks["q"] = _half(d_N1[:, 0]), _half(least[:, 0]), _nibbles(q_NW)
    return blocks


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to bfloat16, halves to even."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


_PLAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": _plain_q8_0,
    "Q4_0": _plain_q4_0,
    "Q4_1": _plain_q4_1,
}
_PLAIN_NUMBERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda x: x,
    "F16": _half,
    "BF16": _to_bf16,
}


# Searches


def _symmetric(
    x_NGK: np.ndarray, weight_NGK: np.ndarray, low: int, high: int
) -> tuple[np.ndarray, np.ndarray]:
    """Search the step of grids without a base; return step_NG and the weighted error at it.

    Candidates put the largest weight at -low, a little less or more, with either sign (the grid reaches
    one further on its negative side); each is refined by least squares for its own rounding.
    """
    largest = np.take_along_axis(x_NGK, np.abs(x_NGK).argmax(axis=2)[..., None], axis=2)[..., 0]
    wx_NGK = weight_NGK * x_NGK
    best_gain = np.full(largest.shape, -1.0, dtype=np.float32)
    best_step = np.zeros_like(largest)
    spread = np.arange(-9, 10, dtype=np.float32) / 10 * np.float32(max(1.0, -low / 8) if low < -8 else 1.0)
    for shift in spread:
        for sign in (1, -1):
            reach = np.float32(low) - shift if sign == 1 else np.float32(high) + shift
            scale = inverse(largest) * reach
            q = np.clip(np.rint(x_NGK * scale[..., None]), low, high)
            wq = weight_NGK * q
            sum_xq, sum_qq = (wx_NGK * q).sum(axis=2), (wq * q).sum(axis=2)
            # With the best step for these q, the error falls by (sum xq)^2 / sum qq.
            safe = np.where(sum_qq > 0, sum_qq, np.float32(1))
            gain = np.where(sum_qq > 0, sum_xq * sum_xq / safe, np.float32(0))
            better = gain > best_gain
            best_gain = np.where(better, gain, best_gain)
            best_step = np.where(better, sum_xq / safe, best_step)
    return best_step, best_gain


def _default_weight(x_NGK: np.ndarray) -> np.ndarray:
    return x_NGK * x_NGK + np.float32(1e-30)


def _with_groups(
    x_NW: np.ndarray, weight_NW: np.ndarray | None, groups: int
) -> tuple[np.ndarray, np.ndarray | None]:
    shape = (len(x_NW), groups, x_NW.shape[1] // groups)
    return x_NW.reshape(shape), None if weight_NW is None else weight_NW.reshape(shape)


def _fit_q8_0(x_NW: np.ndarray, weight_NW: np.ndarray | None) -> Grid:
    d_N = _half(np.abs(x_NW).max(axis=1) / np.float32(127))
    step = d_N.astype(np.float32)[:, None]
    return Grid(step, np.zeros_like(step), -127, 127, {"d": d_N})


def _fit_q4_0(x_NW: np.ndarray, weight_NW: np.ndarray | None) -> Grid:
    x_NGK, weight = _with_groups(x_NW, weight_NW, 1)
    step, _ = _symmetric(x_NGK, _default_weight(x_NGK) if weight is None else weight, -8, 7)
    d_N = _half(step[:, 0])
    step = d_N.astype(np.float32)[:, None]
    return Grid(step, np.zeros_like(step), -8, 7, {"d": d_N})


def _affine(x_NGK: np.ndarray, weight_NGK: np.ndarray, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Search step and base (at most zero) of grids 0..high; return step_NG, base_NG."""
    least = np.minimum(x_NGK.min(axis=2), 0)
    span = x_NGK.max(axis=2) - least
    inverse_span = inverse(span)
    sum_w, sum_x = weight_NGK.sum(axis=2), (weight_NGK * x_NGK).sum(axis=2)
    best_error = np.full(least.shape, np.inf, dtype=np.float32)
    best_step, best_base = np.zeros_like(least), least.copy()
    wx = weight_NGK * x_NGK
    for shift in (None, *(np.float32(-0.9) + np.float32(0.1) * i for i in range(24))):
        reach = np.float32(high) + (np.float32(0) if shift is None else shift)
        q = np.clip(np.rint((x_NGK - least[..., None]) * (inverse_span * reach)[..., None]), 0, high)
        wq = weight_NGK * q
        sum_q, sum_qq, sum_xq = wq.sum(axis=2), (wq * q).sum(axis=2), (wx * q).sum(axis=2)
        # The best step and base for these q by weighted least squares.
        determinant = sum_w * sum_qq - sum_q * sum_q
        solvable = determinant > np.float32(1e-6) * sum_w * sum_qq
        safe = np.where(solvable, determinant, np.float32(1))
        safe_qq = np.where(sum_qq > 0, sum_qq, np.float32(1))
        # All q alike (a constant block): keep the base and fit the step alone.
        alone = (sum_xq - least * sum_q) / safe_qq
        step = np.where(solvable, (sum_w * sum_xq - sum_x * sum_q) / safe, alone)
        base = np.where(solvable, (sum_qq * sum_x - sum_q * sum_xq) / safe, least)
        above = base > 0
        step, base = np.where(above, sum_xq / safe_qq, step), np.minimum(base, 0)
        difference = step[..., None] * q + base[..., None] - x_NGK
        error = (weight_NGK * difference * difference).sum(axis=2)
        better = (error < best_error) & (step >= 0)
        best_error = np.where(better, error, best_error)
        best_step, best_base = np.where(better, step, best_step), np.where(better, base, best_base)
    return best_step, best_base


def _fit_q4_1(x_NW: np.ndarray, weight_NW: np.ndarray | None) -> Grid:
    x_NGK, weight = _with_groups(x_NW, weight_NW, 1)
    if weight is None:
        weight = np.abs(x_NGK) + np.sqrt((x_NGK * x_NGK).mean(axis=2, keepdims=True)) + np.float32(1e-30)
    step, base = _affine(x_NGK, weight, 15)
    d_N, m_N = _half(step[:, 0]), _half(base[:, 0])
    return Grid(d_N.astype(np.float32)[:, None], m_N.astype(np.float32)[:, None], 0, 15, {"d": d_N, "m": m_N})


def _fit_q4_k(x_NW: np.ndarray, weight_NW: np.ndarray | None) -> Grid:
    x_NGK, weight = _with_groups(x_NW, weight_NW, 8)
    if weight is None:
        weight = np.abs(x_NGK) + np.sqrt((x_NGK * x_NGK).mean(axis=2, keepdims=True)) + np.float32(1e-30)
    step_NG, base_NG = _affine(x_NGK, weight, 15)
    # Steps and bases are stored as 6-bit multiples of two half-precision numbers.
    d_N = _half(step_NG.max(axis=1) / np.float32(63))
    dmin_N = _half((-base_NG).max(axis=1) / np.float32(63))
    inverse_d, inverse_m = (inverse(v.astype(np.float32))[:, None] for v in (d_N, dmin_N))
    scales = np.clip(np.rint(step_NG * inverse_d), 0, 63)
    minima = np.clip(np.rint(-base_NG * inverse_m), 0, 63)
    d_N, dmin_N = _refine_q4_k(x_NGK, weight, scales, minima, d_N, dmin_N)
    step = d_N.astype(np.float32)[:, None] * scales
    base = -dmin_N.astype(np.float32)[:, None] * minima
    fields = {"d": d_N, "dmin": dmin_N, "scales": _pack_k_scales(scales, minima)}
    return Grid(step, base, 0, 15, fields)


def _refine_q4_k(
    x_NGK: np.ndarray,
    weight: np.ndarray,
    scales: np.ndarray,
    minima: np.ndarray,
    d_N: np.ndarray,
    dmin_N: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Improve d and dmin by least squares for the rounding that they give; keep them if nothing is won."""

    def rounded(d: np.ndarray, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        step = d.astype(np.float32)[:, None] * scales
        base = -m.astype(np.float32)[:, None] * minima
        q = np.clip(np.rint((x_NGK - base[..., None]) * inverse(step)[..., None]), 0, 15)
        difference = step[..., None] * q + base[..., None] - x_NGK
        return q, (weight * difference * difference).sum(axis=(1, 2))

    q, error = rounded(d_N, dmin_N)
    for _ in range(2):
        a = scales[..., None] * q  # x ~ d * a - dmin * b
        b = np.broadcast_to(minima[..., None], a.shape)
        aa, ab, bb = ((weight * u * v).sum(axis=(1, 2)) for u, v in ((a, a), (a, b), (b, b)))
        xa, xb = ((weight * x_NGK * u).sum(axis=(1, 2)) for u in (a, b))
        determinant = aa * bb - ab * ab
        solvable = determinant > np.float32(1e-6) * aa * bb
        safe = np.where(solvable, determinant, np.float32(1))
        new_d = np.where(solvable, (bb * xa - ab * xb) / safe, xa / np.where(aa > 0, aa, np.float32(1)))
        new_m = np.where(solvable, (ab * xa - aa * xb) / safe, np.float32(0))
        candidate = _half(np.maximum(new_d, 0)), _half(np.maximum(new_m, 0))
        new_q, new_error = rounded(*candidate)
        better = new_error < error
        d_N, dmin_N = np.where(better, candidate[0], d_N), np.where(better, candidate[1], dmin_N)
        q, error = np.where(better[:, None, None], new_q, q), np.where(better, new_error, error)
    return d_N, dmin_N


def _pack_k_scales(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Pack 8 scales and 8 minima of 6 bits into 12 bytes (see `engine.formats._k_scales`)."""
    s, m = scales.astype(np.uint8), minima.astype(np.uint8)
    first = s[:, :4] | (s[:, 4:] & 0x30) << 2
    second = m[:, :4] | (m[:, 4:] & 0x30) << 2
    third = (s[:, 4:] & 0x0F) | (m[:, 4:] & 0x0F) << 4
    return np.concatenate([first, second, third], axis=1)


def _fit_q6_k(x_NW: np.ndarray, weight_NW: np.ndarray | None) -> Grid:
    x_NGK, weight = _with_groups(x_NW, weight_NW, 16)
    step_NG, _ = _symmetric(x_NGK, _default_weight(x_NGK) if weight is None else weight, -32, 31)
    # Steps are stored as signed bytes times a half-precision number; the largest gets -128.
    largest = np.take_along_axis(step_NG, np.abs(step_NG).argmax(axis=1)[:, None], axis=1)[:, 0]
    d_N = _half(largest / np.float32(-128))
    scales = np.clip(np.rint(step_NG * inverse(d_N.astype(np.float32))[:, None]), -128, 127)
    step = d_N.astype(np.float32)[:, None] * scales
    return Grid(step, np.zeros_like(step), -32, 31, {"d": d_N, "scales": scales.astype(np.int8)})


_FIT: dict[str, Callable[[np.ndarray, np.ndarray | None], Grid]] = {
    "Q8_0": _fit_q8_0,
    "Q4_0": _fit_q4_0,
    "Q4_1": _fit_q4_1,
    "Q4_K": _fit_q4_k,
    "Q6_K": _fit_q6_k,
}
TYPES: tuple[str, ...] = (*_PLAIN_NUMBERS, *_FIT)
"""Every type that `quantise` writes."""
