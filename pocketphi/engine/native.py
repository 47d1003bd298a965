"""The native core as a backend: C++ kernels behind a small C API, called through ctypes.

The library `libpocketphi` is built by `pip install` and lies in `pocketphi/engine/lib/`; the environment
variable POCKETPHI_NATIVE names another one (a development build), and the value `off` disables it. Every
call releases the interpreter's lock. The structures below mirror native/include/pocketphi.h and are
checked against its version number.

Environment, for measurements and tests: POCKETPHI_KERNELS (generic, avx2, avx512vnni, amx, neon) forces a kernel
set, POCKETPHI_ACTIVATIONS (int8, int16, f32) says how activations meet quantised weights, POCKETPHI_PIN=1 gives
every worker a CPU of its own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

import pocketphi.engine
from pocketphi.core.errors import CheckpointError, EngineError
from pocketphi.engine.backend import BackendOptions, MemoryPlan, RopeSet, Session, Want, wants_of
from pocketphi.engine.formats import lookup
from pocketphi.engine.native_sampler import NativeChoice, NativeSampler, NativeSampling
from pocketphi.engine.numpy_runtime import inverse_frequencies
from pocketphi.engine.sampler import Sampler
from pocketphi.engine.weights import Part, Weights
from pocketphi.model.config import ModelConfig

ABI_VERSION = 2
_CACHE = {"f32": 0, "f16": 1, "q8_0": 2}
_ROPE: dict[RopeSet, int] = {"plain": 0, "short": 1, "long": 2}
_ACTIVATIONS = {"int8": 0, "f32": 1, "int16": 2}
# Below this size activations take 16 bits: see `_choose_activations`.
SMALL_MODEL = 1_000_000_000
_WANT: dict[Want, int] = {"none": 0, "last": 1, "all": 2}


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "window", "tied_head", "rope_interleaved", "max_positions",
        )),
        ("rms_norm_eps", c_float),
        ("inv_freq", POINTER(c_float) * 3),
        ("rope_magnitude", c_float * 3),
    ]  # fmt: skip


class _Options(ctypes.Structure):
    _fields_ = [
        *((n, c_int32) for n in ("num_threads", "cache_type", "max_batch_tokens", "activations", "pin_threads")),
        ("kernels", c_char_p),
    ]  # fmt: skip


class _Work(ctypes.Structure):
    _fields_ = [
        ("session", c_void_p),
        ("ids", POINTER(c_int32)),
        ("num_ids", c_int32),
        ("want", c_int32),
        ("logits", POINTER(c_float)),
    ]


class _Info(ctypes.Structure):
    _fields_ = [
        ("config", _Config),
        ("kernels", c_char_p),
        *((n, c_int32) for n in ("num_threads", "cache_type", "max_batch_tokens")),
        *((n, c_int64) for n in (
            "weight_bytes", "cache_bytes_per_token", "working_bytes", "read_bytes_per_token"
        )),
    ]  # fmt: skip


def library_path() -> Path | None:
    """Where the library is: POCKETPHI_NATIVE if set, else in the package; None when there is none.

    An editable install has the package in two folders, the sources and what was built from them.
    """
    chosen = os.environ.get("POCKETPHI_NATIVE")
    if chosen:
        return None if chosen == "off" else Path(chosen)
    name = "libpocketphi.dylib" if sys.platform == "darwin" else "libpocketphi.so"
    places = (Path(folder) / "lib" / name for folder in pocketphi.engine.__path__)
    return next((path for path in places if path.is_file()), None)


@functools.cache
def _load_library(path: Path) -> ctypes.CDLL:
    """Load the library and declare its functions. OSError or EngineError when it cannot be used."""
    lib = ctypes.CDLL(str(path))
    text, model, session = c_char_p, c_void_p, c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "pp_abi_version": (c_int, []),
        "pp_last_error": (text, []),
        "pp_kernels_available": (text, []),
        "pp_model_create": (model, [POINTER(_Config), POINTER(_Options)]),
        "pp_model_set_tensor": (
            c_int, [model, text, c_int32, c_int64, c_int64, c_void_p, c_size_t, c_int32, c_int32]
        ),
        "pp_model_finish": (c_int, [model]),
        "pp_model_info": (c_int, [model, POINTER(_Info)]),
        "pp_model_free": (None, [model]),
        "pp_session_new": (session, [model, c_int32, c_int32]),
        "pp_session_free": (None, [session]),
        "pp_session_length": (c_int32, [session]),
        "pp_session_truncate": (c_int, [session, c_int32]),
        "pp_session_reset": (c_int, [session, c_int32]),
        "pp_session_rotate": (c_int, [session, c_int32]),
        "pp_session_save_size": (c_int64, [session]),
        "pp_session_save": (c_int, [session, c_void_p, c_size_t]),
        "pp_session_restore": (session, [model, c_void_p, c_size_t, c_int32]),
        "pp_forward": (c_int, [model, POINTER(_Work), c_int32]),
        "pp_sample": (c_int, [POINTER(NativeSampling), POINTER(NativeChoice)]),
        "pp_probe": (c_int, [model, c_double, POINTER(c_double), POINTER(c_double)]),
    }  # fmt: skip
    try:
        for name, (result, arguments) in signatures.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise EngineError(f"{path}: {error}", hint="rebuild the package: pip install .") from None
    if lib.pp_abi_version() != ABI_VERSION:
        raise EngineError(
            f"{path} has interface version {lib.pp_abi_version()}, this package needs {ABI_VERSION}",
            hint="rebuild the package: pip install .",
        )
    return lib


def available() -> str:
    """Return "" when the core can be used here, else the reason why not."""
    path = library_path()
    if path is None:
        return "the library is not built (pip install . builds it)"
    try:
        _load_library(path)
    except (OSError, EngineError) as error:
        return str(error)
    return ""


def kernels() -> str:
    """The kernel set that this machine will use by default."""
    path = library_path()
    return _load_library(path).pp_kernels_available().decode().split(",")[0] if path else ""


class NativeSession:
    """See `pocketphi.engine.backend.Session`."""

    def __init__(self, backend: NativeBackend, handle: int, capacity: int, rope_set: RopeSet) -> None:
        self._backend, self._lib = backend, backend.lib
        self.handle: int | None = handle
        self.capacity = capacity
        self._rope_set: RopeSet = rope_set

    @property
    def length(self) -> int:
        return int(self._lib.pp_session_length(self.handle)) if self.handle else 0

    @property
    def rope_set(self) -> RopeSet:
        return self._rope_set

    def truncate(self, length: int) -> None:
        self._backend.check(self._lib.pp_session_truncate(self._open(), length))

    def reset(self, rope_set: RopeSet) -> None:
        self._backend.check(self._lib.pp_session_reset(self._open(), _ROPE[rope_set]))
        self._rope_set = rope_set

    def rotate(self, rope_set: RopeSet) -> None:
        self._backend.check(self._lib.pp_session_rotate(self._open(), _ROPE[rope_set]))
        self._rope_set = rope_set

    def save(self) -> bytes:
        size = int(self._lib.pp_session_save_size(self._open()))
        data = ctypes.create_string_buffer(size)
        self._backend.check(self._lib.pp_session_save(self.handle, data, size))
        return data.raw

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle:
            self._lib.pp_session_free(handle)
            self._backend.sessions.discard(self)

    def _open(self) -> int:
        if not self.handle:
            raise EngineError("the session is closed")
        return self.handle

    def __del__(self) -> None:
        # The core's memory is not the interpreter's: a forgotten session gives it back too.
        handle = getattr(self, "handle", None)
        if handle and self._backend.model:
            self._lib.pp_session_free(handle)
            self.handle = None


def _choose_activations(config: ModelConfig) -> str:
    """Return how activations meet quantised weights.

    int8 with a scale for every 32, as most runtimes have it, costs a small model dearly where one channel
    outshines the others of its group: SmolLM2-135M forgets the capital of France. With 16 bits (two int8
    numbers) nothing measurable is lost; a prompt takes twice the work, which a small model can afford, and
    a single token hardly any, since reading the weights is what takes the time.
    """
    chosen = os.environ.get("POCKETPHI_ACTIVATIONS")
    if not chosen:
        return "int16" if config.num_parameters < SMALL_MODEL else "int8"
    if chosen not in _ACTIVATIONS:
        raise EngineError(f"POCKETPHI_ACTIVATIONS={chosen}: choose one of {', '.join(_ACTIVATIONS)}")
    return chosen


class NativeBackend:
    """See `pocketphi.engine.backend.Backend`."""

    name = "native"

    def __init__(
        self, config: ModelConfig, options: BackendOptions, *, interleaved: bool, tied: bool
    ) -> None:
        reason = available()
        path = library_path()
        if reason or path is None:
            raise EngineError(f"the native core cannot be used: {reason}")
        self.lib = _load_library(path)
        self.model: int | None = None
        self.config = config
        # Sessions are only remembered while open, to free them before the model.
        import weakref

        self.sessions: weakref.WeakSet[NativeSession] = weakref.WeakSet()
        self.activations = _choose_activations(config)
        # Six places share one reading of a tile; with 16-bit activations a token takes two of them.
        self.tokens_per_reading = 3 if self.activations == "int16" else 6
        self._options = _Options(
            num_threads=options.num_threads or 0,
            cache_type=_CACHE[options.cache_type or "f16"],
            max_batch_tokens=min(options.max_batch_tokens, 256),
            activations=_ACTIVATIONS[self.activations],
            pin_threads=1 if os.environ.get("POCKETPHI_PIN") == "1" else 0,
            kernels=(os.environ.get("POCKETPHI_KERNELS") or "").encode() or None,
        )
        self.cache_type = options.cache_type or "f16"
        native = _Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            window=config.visible_window or 0,
            tied_head=int(tied),
            rope_interleaved=int(interleaved),
            # The caller decides how far past the model's own context a session may go.
            max_positions=max(config.max_position_embeddings, 1 << 20),
            rms_norm_eps=config.rms_norm_eps,
        )
        sets: tuple[RopeSet, ...] = ("plain",) if config.rope_scaling is None else ("short", "long")
        self._frequencies = []
        for rope_set in sets:
            values = np.ascontiguousarray(inverse_frequencies(config, rope_set), np.float32)
            self._frequencies.append(values)
            native.inv_freq[_ROPE[rope_set]] = values.ctypes.data_as(POINTER(c_float))
            native.rope_magnitude[_ROPE[rope_set]] = config.magnitude(long=rope_set == "long")
        self.model = self.lib.pp_model_create(ctypes.byref(native), ctypes.byref(self._options))
        if not self.model:
            raise self.error()

    # Loading

    def set_tensor(
        self,
        name: str,
        type: str,
        shape: tuple[int, ...],
        data: Any,
        *,
        store: str | None = None,
        discard: bool = False,
    ) -> None:
        """Hand one tensor over, by its GGUF name; it is copied into the core's layout.

        data: bytes-like, row-major; store: the type to keep it in; discard: data lies in a private
        mapping of a file whose pages may be dropped. EngineError when it does not fit the model.
        """  # fmt: skip
        raw = np.frombuffer(data, np.uint8)
        rows, cols = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
        self.check(
            self.lib.pp_model_set_tensor(
                self.model, name.encode(), lookup(type).code, rows, cols, raw.ctypes.data, raw.nbytes,
                lookup(store or type).code, int(discard),
            )
        )  # fmt: skip

    def finish(self) -> None:
        self.check(self.lib.pp_model_finish(self.model))

    # The protocol

    def new_session(self, capacity: int, rope_set: RopeSet) -> NativeSession:
        if capacity < 1:
            raise EngineError(f"a session needs room for at least one token, not {capacity}")
        if (rope_set == "plain") != (self.config.rope_scaling is None):
            raise EngineError(f"the rope set '{rope_set}' does not fit this model")
        handle = self.lib.pp_session_new(self.model, capacity, _ROPE[rope_set])
        if not handle:
            raise self.error("ask for less context")
        return self._session(handle, capacity, rope_set)

    def forward(
        self, session: Session, ids: Sequence[int] | np.ndarray, want: Want = "last"
    ) -> np.ndarray | None:
        return self.forward_batch([(session, ids)], want)[0]  # type: ignore[list-item]

    def forward_batch(
        self, work: Sequence[tuple[Session, Sequence[int]]], want: Want | Sequence[Want] = "last"
    ) -> list[np.ndarray | None]:
        items = (_Work * len(work))()
        logits: list[np.ndarray | None] = []
        kept = []
        for item, (session, ids), one in zip(items, work, wants_of(want, len(work))):
            assert isinstance(session, NativeSession)
            given = np.asarray(ids)
            if given.ndim != 1 or not given.size:
                raise EngineError(
                    f"expected a list of at least one token id, found shape {list(given.shape)}"
                )
            if given.min() < 0 or given.max() >= self.config.vocab_size:
                bad = int(given[(given < 0) | (given >= self.config.vocab_size)][0])
                raise EngineError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")
            ids_T = np.ascontiguousarray(given, np.int32)
            rows = {"none": 0, "last": 1, "all": ids_T.size}[one]
            out = np.empty((rows, self.config.vocab_size), np.float32) if rows else None
            logits.append(out)
            kept.append(ids_T)
            item.session = session._open()
            item.ids = ids_T.ctypes.data_as(POINTER(c_int32))
            item.num_ids = ids_T.size
            item.want = _WANT[one]
            if out is not None:
                item.logits = out.ctypes.data_as(POINTER(c_float))
        self.check(self.lib.pp_forward(self._loaded(), items, len(work)))
        return logits

    def sampler(self, plain: Sampler) -> NativeSampler:
        return NativeSampler(self.lib, plain)

    def restore(self, data: bytes, capacity: int) -> NativeSession:
        """See Backend; the data is untrusted: sizes and a checksum are checked."""
        handle = self.lib.pp_session_restore(self._loaded(), data, len(data), capacity)
        if not handle:
            raise self.error()
        code = int.from_bytes(data[28:32], "little")
        return self._session(handle, capacity, next(name for name, n in _ROPE.items() if n == code))

    def plan(self) -> MemoryPlan:
        info = self._info()
        return MemoryPlan(info.weight_bytes, info.cache_bytes_per_token, info.working_bytes)

    def describe(self) -> dict[str, Any]:
        info = self._info()
        return {
            "backend": self.name,
            "kernels": info.kernels.decode(),
            "activations": self.activations,
            "num_threads": info.num_threads,
            "cache_type": self.cache_type,
            "weight_bytes": info.weight_bytes,
            "cache_bytes_per_token": info.cache_bytes_per_token,
            "read_bytes_per_token": info.read_bytes_per_token,
        }

    def probe(self, seconds: float = 0.3) -> dict[str, float]:
        """What this machine gives right now: memory reads, and the int8 products of the inner loop."""
        read, macs = c_double(), c_double()
        self.check(self.lib.pp_probe(self._loaded(), seconds, ctypes.byref(read), ctypes.byref(macs)))
        return {"read_bytes_per_s": read.value, "int8_macs_per_s": macs.value}

    def close(self) -> None:
        model, self.model = self.model, None
        if not model:
            return
        for session in list(self.sessions):
            handle, session.handle = session.handle, None
            if handle:
                self.lib.pp_session_free(handle)
        self.lib.pp_model_free(model)

    def __del__(self) -> None:
        if getattr(self, "model", None):
            self.close()

    # Inside

    def check(self, status: int) -> None:
        """Raise what the core says when a call failed."""
        if status:
            raise self.error()

    def error(self, hint: str | None = None) -> EngineError:
        return EngineError(self.lib.pp_last_error().decode(errors="replace"), hint=hint)

    def _loaded(self) -> int:
        if not self.model:
            raise EngineError("the model is closed")
        return self.model

    def _session(self, handle: int, capacity: int, rope_set: RopeSet) -> NativeSession:
        session = NativeSession(self, handle, capacity, rope_set)
        self.sessions.add(session)
        return session

    def _info(self) -> _Info:
        info = _Info()
        self.check(self.lib.pp_model_info(self._loaded(), ctypes.byref(info)))
        return info


_NAMES = {
    "attention_norm": ("attn_norm",),
    "output": ("attn_output",),
    "mlp_norm": ("ffn_norm",),
    "down": ("ffn_down",),
}


def _tensors(weights: Weights) -> list[tuple[str, Part]]:
    """Every part of the file with the name that the core knows it by, in layer order."""
    pairs = [
        ("token_embd.weight", weights.parts["embed"][0]),
        ("output_norm.weight", weights.parts["norm"][0]),
    ]
    if not weights.tied:
        pairs.append(("output.weight", weights.parts["head"][0]))
    for n in range(weights.config.num_hidden_layers):
        for name in ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down"):
            parts = weights.parts[f"layers.{n}.{name}"]
            names: tuple[str, ...]
            if name == "qkv":
                names = ("attn_qkv",) if len(parts) == 1 else ("attn_q", "attn_k", "attn_v")
            elif name == "gate_up":
                names = ("ffn_up",) if len(parts) == 1 else ("ffn_gate", "ffn_up")
            else:
                names = _NAMES[name]
            pairs += [(f"blk.{n}.{short}.weight", part) for short, part in zip(names, parts, strict=True)]
    return pairs


def load(weights: Weights, options: BackendOptions) -> NativeBackend:
    """Copy the weights into the core's layout, tensor by tensor, giving the file's pages back.

    Raises CheckpointError when a tensor holds values that are not finite, EngineError when something
    does not fit the core.
    """
    pairs = _tensors(weights)
    interleaved = any(part.interleaved_heads for _, part in pairs)
    backend = NativeBackend(weights.config, options, interleaved=interleaved, tied=weights.tied)
    try:
        for name, part in pairs:
            try:
                backend.set_tensor(name, part.type, part.shape, part.raw(), discard=weights.gguf is not None)
            except EngineError as error:
                if "not finite" in error.message:
                    raise CheckpointError(f"{weights.path}: tensor {part.source}: {error.message}") from None
                raise EngineError(f"{weights.path}: {error.message}", hint=error.hint) from None
        backend.finish()
    except BaseException:
        backend.close()
        raise
    return backend
