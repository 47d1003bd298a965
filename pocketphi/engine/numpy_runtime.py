"""The plain runtime: dense Phi-3 and Llama-style decoders in NumPy float32.

It is written to be read and to be right; the native core is its fast twin and is tested against it.
Every result is a function of the token's own prefix only, bit for bit: not of how the prompt was cut,
not of what ran before. Two rules give that. Every product is of one row with a matrix (never of many
rows at once), because a BLAS sums differently for other numbers of rows; and attention works on blocks
of `_KEYS` keys at fixed places, added in order, so that masked blocks add exact zeros.

Legend: T tokens of a call, D hidden, F feed-forward, V vocabulary, H query heads, K key heads, G = H/K
queries per key head, d head size, C cache capacity, R tokens at a time, N blocks of B = _KEYS keys.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from pocketphi.core.errors import EngineError
from pocketphi.engine.backend import BackendOptions, MemoryPlan, RopeSet, Session, Want, wants_of
from pocketphi.engine.sampler import Sampler
from pocketphi.engine.weights import Weights
from pocketphi.model.config import ModelConfig

_KEYS = 256
# Tokens whose attention is computed in one go; bounds the scores held in memory.
_ATTENTION_TOKENS = 16
_STATE_MAGIC = b"PPKVNP01"


def available() -> str:
    """NumPy is a dependency of the package, so this backend always is available."""
    return ""


def plan(weights: Weights, options: BackendOptions) -> MemoryPlan:
    """Bytes this backend takes for `weights`: everything is float32 here."""
    config = weights.config
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    rows = options.max_batch_tokens
    working = (
        rows * 4 * (6 * config.hidden_size + 4 * config.intermediate_size) + rows * 4 * config.vocab_size
    )
    return MemoryPlan(4 * weights.num_weights, cache, working)


def load(weights: Weights, options: BackendOptions) -> NumpyBackend:
    """Read all weights into memory as float32. EngineError for options this backend does not have."""
    if options.cache_type not in (None, "f32"):
        raise EngineError(
            f"the numpy backend keeps its cache in f32, not {options.cache_type}",
            hint="leave cache_type out, or use the native backend",
        )
    return NumpyBackend(weights, options)


class NumpySession:
    """Keys and values of one sequence: float32 arrays [layers, K, C, d], valid up to `length`."""

    def __init__(self, config: ModelConfig, capacity: int, rope_set: RopeSet) -> None:
        rounded = -(-capacity // _KEYS) * _KEYS
        shape = (config.num_hidden_layers, config.num_key_value_heads, rounded, config.head_dim)
        self._config = config
        self.capacity = capacity
        self.length = 0
        self.rope_set = rope_set
        # Zeros, not empty: masked positions are multiplied by weights of exactly 0 and must be finite.
        self.keys: np.ndarray = np.zeros(shape, np.float32)
        self.values: np.ndarray = np.zeros(shape, np.float32)

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise EngineError(f"cannot cut a session of {self.length} tokens to {length}")
        self.length = length

    def reset(self, rope_set: RopeSet) -> None:
        self.length = 0
        self.rope_set = rope_set

    def rotate(self, rope_set: RopeSet) -> None:
        config = self._config
        old, new = inverse_frequencies(config, self.rope_set), inverse_frequencies(config, rope_set)
        positions = np.arange(self.length, dtype=np.float64)
        angle_Td = positions[:, None] * (new.astype(np.float64) - old.astype(np.float64))
        scale = config.magnitude(long=rope_set == "long") / config.magnitude(long=self.rope_set == "long")
        cos, sin = (
            (scale * np.cos(angle_Td)).astype(np.float32),
            (scale * np.sin(angle_Td)).astype(np.float32),
        )
        stored = self.keys[:, :, : self.length]
        stored[...] = rotate_half(stored, cos, sin)
        self.rope_set = rope_set

    def save(self) -> bytes:
        head = {
            "layers_K_length_d": [*self.keys.shape[:2], self.length, self.keys.shape[3]],
            "rope_set": self.rope_set,
        }
        text = json.dumps(head, sort_keys=True).encode()
        kept = slice(0, self.length)
        return b"".join(
            (
                _STATE_MAGIC,
                struct.pack("<I", len(text)),
                text,
                np.ascontiguousarray(self.keys[:, :, kept]).tobytes(),
                np.ascontiguousarray(self.values[:, :, kept]).tobytes(),
            )
        )

    def close(self) -> None:
        self.length = 0
        self.keys = self.values = np.zeros((0, 0, 0, 0), np.float32)


class NumpyBackend:
    """See `pocketphi.engine.backend.Backend`."""

    name = "numpy"
    # Every token reads all weights again here, so a wrong guess costs as much as a right one saves.
    tokens_per_reading = 0

    def __init__(self, weights: Weights, options: BackendOptions) -> None:
        self.config = config = weights.config
        self._options = options
        self._plan = plan(weights, options)
        self._embed_VD = weights.array("embed")
        self._head_VD = self._embed_VD if weights.tied else weights.array("head")
        self._norm_D = weights.array("norm")
        # Of an embedding table that is not the head too, a token reads one row.
        unread = 0 if weights.tied else self._embed_VD.nbytes - self._embed_VD[:1].nbytes
        self._read_bytes = self._plan.weight_bytes - unread
        names = ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down")
        self._layers = [
            {name: weights.array(f"layers.{n}.{name}") for name in names}
            for n in range(config.num_hidden_layers)
        ]

    def new_session(self, capacity: int, rope_set: RopeSet) -> NumpySession:
        if capacity < 1:
            raise EngineError(f"a session needs room for at least one token, not {capacity}")
        if (rope_set == "plain") != (self.config.rope_scaling is None):
            raise EngineError(f"the rope set '{rope_set}' does not fit this model")
        try:
            return NumpySession(self.config, capacity, rope_set)
        except MemoryError:
            need = capacity * self._plan.cache_bytes_per_token
            raise EngineError(
                f"no memory for a cache of {capacity} tokens ({need} bytes)", hint="ask for less context"
            ) from None

    def forward(
        self, session: Session, ids: Sequence[int] | np.ndarray, want: Want = "last"
    ) -> np.ndarray | None:
        assert isinstance(session, NumpySession)
        ids_T = np.asarray(ids, dtype=np.int64)
        if ids_T.ndim != 1 or not ids_T.size:
            raise EngineError(f"expected a list of at least one token id, found shape {list(ids_T.shape)}")
        if ids_T.min() < 0 or ids_T.max() >= self.config.vocab_size:
            bad = int(ids_T[(ids_T < 0) | (ids_T >= self.config.vocab_size)][0])
            raise EngineError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")
        if session.length + ids_T.size > session.capacity:
            raise EngineError(
                f"{session.length} tokens in the session and {ids_T.size} more exceed "
                f"its capacity of {session.capacity}"
            )
        start, rows = session.length, []
        try:
            for at in range(0, ids_T.size, self._options.max_batch_tokens):
                x_TD = self._layers_forward(session, ids_T[at : at + self._options.max_batch_tokens])
                session.length += x_TD.shape[0]
                if want == "all":
                    rows.append(self._logits(x_TD))
        except BaseException:
            session.length = start
            raise
        if want == "none":
            return None
        return self._logits(x_TD[-1:]) if want == "last" else np.concatenate(rows)

    def forward_batch(
        self, work: Sequence[tuple[Session, Sequence[int]]], want: Want | Sequence[Want] = "last"
    ) -> list[np.ndarray | None]:
        wants = wants_of(want, len(work))
        return [self.forward(session, ids, one) for (session, ids), one in zip(work, wants)]

    def sampler(self, plain: Sampler) -> Sampler:
        return plain

    def restore(self, data: bytes, capacity: int) -> NumpySession:
        """See Backend; the data is untrusted and every size in it is checked."""
        try:
            if data[:8] != _STATE_MAGIC:
                raise ValueError("not a state of this backend")
            (size,) = struct.unpack_from("<I", data, 8)
            head = json.loads(data[12 : 12 + size])
            layers, heads, length, width = (int(n) for n in head["layers_K_length_d"])
            rope_set = head["rope_set"]
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise EngineError(f"the saved session cannot be read: {error}") from None
        session = self.new_session(capacity, rope_set)
        if (layers, heads, width) != (*session.keys.shape[:2], session.keys.shape[3]):
            raise EngineError("the saved session is of a model with another shape")
        if not 0 <= length <= capacity:
            raise EngineError(f"the saved session has {length} tokens, the capacity is {capacity}")
        count = layers * heads * length * width
        if len(data) != 12 + size + 2 * 4 * count:
            raise EngineError(
                f"the saved session has {len(data)} bytes, {12 + size + 8 * count} were expected"
            )
        both = np.frombuffer(data, np.float32, 2 * count, 12 + size).reshape(2, layers, heads, length, width)
        session.keys[:, :, :length], session.values[:, :, :length] = both
        session.length = length
        return session

    def plan(self) -> MemoryPlan:
        return self._plan

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "kernels": "NumPy BLAS, float32",
            "num_threads": None,  # the BLAS library decides
            "cache_type": "f32",
            "weight_bytes": self._plan.weight_bytes,
            "cache_bytes_per_token": self._plan.cache_bytes_per_token,
            "read_bytes_per_token": self._read_bytes,
        }

    def close(self) -> None:
        self._layers = []
        self._embed_VD = self._head_VD = np.zeros((0, 0), np.float32)

    # The model

    def _layers_forward(self, session: NumpySession, ids_T: np.ndarray) -> np.ndarray:
        """Run all layers on T tokens after the session's; writes their keys and values. Returns [T, D]."""
        config = self.config
        T, H, K, d = ids_T.size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        positions_T = np.arange(session.length, session.length + T)
        cos_T1d, sin_T1d = (table[:, None] for table in rope_tables(config, session.rope_set, positions_T))
        x_TD = self._embed_VD[ids_T]
        for n, layer in enumerate(self._layers):
            normed_TD = rms_norm(x_TD, layer["attention_norm"], config.rms_norm_eps)
            qkv = self._linear(normed_TD, layer["qkv"]).reshape(T, H + 2 * K, d)
            q_THd = rotate_half(qkv[:, :H], cos_T1d, sin_T1d)
            session.keys[n][:, positions_T] = rotate_half(qkv[:, H : H + K], cos_T1d, sin_T1d).swapaxes(0, 1)
            session.values[n][:, positions_T] = qkv[:, H + K :].swapaxes(0, 1)
            mixed_TD = self._attention(q_THd, session.keys[n], session.values[n], positions_T)
            x_TD = x_TD + self._linear(mixed_TD, layer["output"])
            normed_TD = rms_norm(x_TD, layer["mlp_norm"], config.rms_norm_eps)
            gate_TF, up_TF = np.split(self._linear(normed_TD, layer["gate_up"]), 2, axis=1)
            x_TD = x_TD + self._linear(up_TF * silu(gate_TF), layer["down"])
        return x_TD

    def _logits(self, x_TD: np.ndarray) -> np.ndarray:
        return self._linear(rms_norm(x_TD, self._norm_D, self.config.rms_norm_eps), self._head_VD)

    @staticmethod
    def _linear(x_TI: np.ndarray, weight_OI: np.ndarray) -> np.ndarray:
        # A stack of T products of one row each, not one product of T rows: see the top of the file.
        return np.matmul(x_TI[:, None], weight_OI.T)[:, 0]

    def _attention(
        self, q_THd: np.ndarray, keys_KCd: np.ndarray, values_KCd: np.ndarray, positions_T: np.ndarray
    ) -> np.ndarray:
        """Causal attention of T queries over the cache, window included. Returns [T, H·d]."""
        T, H, d = q_THd.shape
        K, B = keys_KCd.shape[0], _KEYS
        window = self.config.visible_window
        out_THd = np.empty_like(q_THd)
        for at in range(0, T, _ATTENTION_TOKENS):
            position_R = positions_T[at : at + _ATTENTION_TOKENS]
            R = position_R.size
            # Blocks from the first key that the first query sees to the last query itself.
            first = 0 if window is None else max(0, int(position_R[0]) - window + 1) // B
            N = int(position_R[-1]) // B + 1 - first
            k_KNBd = keys_KCd[:, first * B : (first + N) * B].reshape(K, N, B, d)
            v_KNBd = values_KCd[:, first * B : (first + N) * B].reshape(K, N, B, d)
            q_RKGd = (q_THd[at : at + R] * np.float32(d**-0.5)).reshape(R, K, H // K, d)
            scores_RKGNB = np.matmul(q_RKGd[:, :, :, None, None], k_KNBd.swapaxes(2, 3)[None, :, None])[
                ..., 0, :
            ]
            key_NB = np.arange(first * B, (first + N) * B).reshape(N, B)
            hidden_RNB = key_NB > position_R[:, None, None]
            if window is not None:
                hidden_RNB |= key_NB <= position_R[:, None, None] - window
            scores_RKGNB = np.where(hidden_RNB[:, None, None], np.float32(-np.inf), scores_RKGNB)
            weight_RKGNB = np.exp(scores_RKGNB - scores_RKGNB.max(axis=(3, 4), keepdims=True))
            sums_RKGN = weight_RKGNB.sum(axis=4)
            parts_RKGNd = np.matmul(weight_RKGNB[..., None, :], v_KNBd[None, :, None])[..., 0, :]
            total_RKG, mixed_RKGd = sums_RKGN[..., 0], parts_RKGNd[..., 0, :]
            for block in range(1, N):
                total_RKG = total_RKG + sums_RKGN[..., block]
                mixed_RKGd = mixed_RKGd + parts_RKGNd[..., block, :]
            out_THd[at : at + R] = (mixed_RKGd / total_RKG[..., None]).reshape(R, H, d)
        return out_THd.reshape(T, H * d)


def rms_norm(x: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    """Divide each row by its root mean square, then scale by channel."""
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    return x * (np.float32(1) / np.sqrt(mean + np.float32(eps))) * weight_D


def silu(x: np.ndarray) -> np.ndarray:
    """x · sigmoid(x); large negative values give -0 without a warning."""
    with np.errstate(over="ignore"):
        return x / (np.float32(1) + np.exp(-x))


def rotate_half(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate pair i = (x[i], x[i + d/2]) of the last axis by the angle whose cos and sin are given."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def inverse_frequencies(config: ModelConfig, rope_set: RopeSet) -> np.ndarray:
    """1 / (factor_i · theta^(2i/d)) in float32, [d/2]; factors are 1 for `plain`."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    bases = np.float32(config.rope_theta) ** exponents
    if config.rope_scaling is None:
        return np.float32(1) / bases
    factors = config.rope_scaling["long_factor" if rope_set == "long" else "short_factor"]
    return np.float32(1) / (np.asarray(factors, np.float32) * bases)


def rope_tables(
    config: ModelConfig, rope_set: RopeSet, positions_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin, [T, d/2], times LongRoPE's magnitude factor.

    The angle itself is a float32 product, as in the reference: that is what the models were trained with.
    """
    angle = positions_T.astype(np.float32)[:, None] * inverse_frequencies(config, rope_set)
    magnitude = np.float32(config.magnitude(long=rope_set == "long"))
    wide = angle.astype(np.float64)
    return np.cos(wide).astype(np.float32) * magnitude, np.sin(wide).astype(np.float32) * magnitude
