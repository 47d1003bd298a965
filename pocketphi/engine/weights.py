"""Weights of a model file under one set of names, whatever the file calls them.

A GGUF file (architectures `phi3` and `llama`) or a Hugging Face folder becomes a `Weights`: the shape
(ModelConfig) and a table of tensors named

    embed [V, D]   head [V, D]   norm [D]                        head is embed where embeddings are tied
    layers.N.attention_norm [D]   layers.N.qkv [(H+2K)·d, D]     rows: all queries, all keys, all values
    layers.N.output [D, H·d]      layers.N.mlp_norm [D]
    layers.N.gate_up [2F, D]      layers.N.down [D, F]           rows: gate first, then up

Legend: V vocabulary, D hidden size, F feed-forward size, H query heads, K key heads, d head size.

Nothing is read until it is asked for. A tensor may consist of several parts of the file, stacked along
the rows (q, k and v of a Llama file, each in a format of its own). Rotary halves are in the rotate-half
("NeoX") order: `llama` GGUF files store the rows of q and k interleaved, and `Part.array` puts them back.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.core.errors import CheckpointError, ConfigError, EngineError, did_you_mean
from pocketphi.core.gguf import GgufFile
from pocketphi.engine import formats
from pocketphi.model.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A run of rows as the file holds it.

    source: its name in the file, for messages.
    interleaved_heads: above 0, the rows of each of so many heads lie in pair order (x0 y0 x1 y1 ...)
        and `array` reorders them to halves (x0 x1 ... y0 y1 ...); `raw` is as the file has it.
    """

    source: str
    shape: Shape
    type: str
    raw: Callable[[], Any]
    interleaved_heads: int = 0

    @property
    def num_bytes(self) -> int:
        return formats.lookup(self.type).num_bytes(int(np.prod(self.shape, dtype=np.int64)))

    def array(self) -> np.ndarray:
        """Return the part as a new float32 array, rotary rows in halves."""
        values = formats.dequantise(self.raw(), self.type, self.shape)
        if self.interleaved_heads:
            values = halves(values, self.interleaved_heads)
        return values


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k from pairs (x0 y0 x1 y1 ...) to halves (x0 x1 ... y0 y1 ...) per head."""
    total = rows.shape[0]
    return np.ascontiguousarray(rows.reshape(heads, total // heads // 2, 2, -1).swapaxes(1, 2)).reshape(
        rows.shape
    )


@dataclass
class Weights:
    """A model file, opened. `parts[name]` are the pieces of the tensor `name`, in row order.

    gguf: the open container when the file is one, for its metadata and for backends that map it.
    """

    path: Path
    architecture: str
    config: ModelConfig
    parts: dict[str, tuple[Part, ...]]
    gguf: GgufFile | None = None
    file_bytes: int = 0
    _maps: list[Any] = field(default_factory=list)

    def shape(self, name: str) -> Shape:
        parts = self.parts[name]
        return (sum(p.shape[0] for p in parts), *parts[0].shape[1:])

    def array(self, name: str) -> np.ndarray:
        """Return the tensor `name` as a new float32 array.

        Raises CheckpointError naming the tensor when it holds NaN or infinite values.
        """
        parts = self.parts[name]
        values = parts[0].array() if len(parts) == 1 else np.concatenate([p.array() for p in parts])
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.path}: {int((~np.isfinite(values)).sum())} values of tensor {parts[0].source} "
                "are not finite",
                hint="the file is damaged, or the training run that wrote it diverged",
            )
        return values

    @property
    def tied(self) -> bool:
        return self.parts["head"] is self.parts["embed"]

    @property
    def num_weights(self) -> int:
        return sum(
            int(np.prod(self.shape(n), dtype=np.int64)) for n in self.parts if not (n == "head" and self.tied)
        )

    def types(self) -> dict[str, int]:
        """Bytes by tensor format, for `describe`."""
        found: dict[str, int] = {}
        for name, parts in self.parts.items():
            for part in () if name == "head" and self.tied else parts:
                found[part.type] = found.get(part.type, 0) + part.num_bytes
        return found

    def fingerprint(self) -> str:
        """A hash that tells this model from others: names, shapes, types and some bytes of every tensor.

        Not a checksum of the file: it reads a few kilobytes of each tensor, not gigabytes.
        """
        digest = hashlib.sha256(repr((self.architecture, self.config)).encode())
        for name, parts in sorted(self.parts.items()):
            for part in parts:
                raw = memoryview(part.raw()).cast("B")
                digest.update(f"{name} {part.shape} {part.type}\n".encode())
                digest.update(raw[:2048])
                digest.update(raw[-2048:])
        return digest.hexdigest()

    def keep(self, mapped: Any) -> None:
        """Hold on to a mapping that parts are views of."""
        self._maps.append(mapped)

    def close(self) -> None:
        if self.gguf is not None:
            self.gguf.close()
        self._maps.clear()


def open_weights(path: Path | str) -> Weights:
    """Open a GGUF file, a Hugging Face folder, an artifact folder holding either, or a llama2.c .bin.

    Raises CheckpointError when a tensor is missing or has the wrong shape, EngineError for an
    architecture or tensor type that is not known, DataError for a damaged container, ConfigError for a
    configuration that cannot be computed.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return open_folder(path)
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return open_gguf(found[0])
        raise CheckpointError(
            f"{path}: neither a config.json nor a single .gguf file in this folder ({len(found)} found)",
            hint="name the GGUF file, or a Hugging Face folder with config.json and safetensors",
        )
    if not path.exists():
        raise CheckpointError(f"{path}: no such model file or folder", hint="`phi models` lists what is here")
    if path.suffix == ".bin":
        from pocketphi.engine.llama2c import open_llama2c

        return open_llama2c(path)
    return open_gguf(path)


# GGUF files

_GLOBAL = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
_LAYER = {
    "attention_norm": "attn_norm.weight",
    "output": "attn_output.weight",
    "mlp_norm": "ffn_norm.weight",
    "down": "ffn_down.weight",
}
ARCHITECTURES = ("phi3", "llama")


def open_gguf(path: Path | str) -> Weights:
    """Open a GGUF model file; see `open_weights` for the errors."""
    file = GgufFile(path)
    try:
        architecture = file.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise EngineError(
                f"{path}: architecture {architecture!r} is not supported"
                f"{did_you_mean(str(architecture), ARCHITECTURES)}",
                hint="dense Phi-3 and Llama-style models run here",
            )
        config = config_from_gguf(file)
        return Weights(
            file.path, architecture, config, _gguf_parts(file, architecture, config), file, file.num_bytes
        )
    except BaseException:
        file.close()
        raise


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Read the shape of the model from a GGUF file's metadata and tensor shapes.

    Raises CheckpointError for a missing key and EngineError for one that asks for another computation.
    """
    metadata = file.metadata
    arch = metadata["general.architecture"]

    def number(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if value is None:
            raise CheckpointError(f"{file.path}: metadata key '{arch}.{key}' is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"{file.path}: metadata key '{arch}.{key}' is {value!r}, not a number")
        return value

    if "token_embd.weight" not in file.tensors:
        vocabulary_only = " (it holds a vocabulary only)" if not file.tensors else ""
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing{vocabulary_only}")
    rows = file.tensors["token_embd.weight"].shape[0]
    tokens = metadata.get("tokenizer.ggml.tokens")
    for what, size in (
        ("the vocabulary lists", len(tokens) if isinstance(tokens, list) else None),
        ("metadata says", metadata.get(f"{arch}.vocab_size")),
    ):
        if size is not None and size != rows:
            raise CheckpointError(
                f"{file.path}: vocabulary mismatch: {what} {size} tokens, the embedding has {rows} rows"
            )
    scaling_type = metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling_type not in ("none", "", "longrope") or "rope_freqs.weight" in file.tensors:
        raise EngineError(f"{file.path}: rope scaling '{scaling_type}' of a {arch} file is not supported")
    if metadata.get(f"{arch}.expert_count", 0):
        raise EngineError(f"{file.path}: mixture-of-experts models are not supported")
    context = int(number("context_length"))
    original = int(number("rope.scaling.original_context_length", context))
    heads = int(number("attention.head_count"))
    hidden = int(number("embedding_length"))
    scaling: dict[str, Any] | None = None
    lists = [f"rope_factors_{kind}.weight" for kind in ("short", "long")]
    if any(name in file.tensors for name in lists):
        short, long = (_factors(file, name) for name in lists)
        scaling = {"type": "longrope", "short_factor": short, "long_factor": long}
        factor = metadata.get(f"{arch}.rope.scaling.attn_factor")
        if factor is not None:
            scaling["attention_factor"] = float(factor)
    window = int(number("attention.sliding_window", 0)) if arch == "phi3" else 0
    try:
        config = ModelConfig(
            vocab_size=rows,
            hidden_size=hidden,
            intermediate_size=int(number("feed_forward_length")),
            num_hidden_layers=int(number("block_count")),
            num_attention_heads=heads,
            num_key_value_heads=int(number("attention.head_count_kv", heads)),
            max_position_embeddings=context,
            original_max_position_embeddings=original,
            sliding_window=window or None,
            rope_theta=float(number("rope.freq_base", 10000.0)),
            rope_scaling=scaling,
            rms_norm_eps=float(number("attention.layer_norm_rms_epsilon")),
            tie_word_embeddings="output.weight" not in file.tensors,
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
            pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        )
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: {error.message}", hint=error.hint) from None
    rotary = int(number("rope.dimension_count", config.head_dim))
    for key in ("attention.key_length", "attention.value_length"):
        if number(key, config.head_dim) != config.head_dim:
            raise EngineError(
                f"{file.path}: {key} {number(key)} differs from the head size {config.head_dim}"
            )
    if rotary != config.head_dim:
        raise EngineError(f"{file.path}: rotary size {rotary} differs from the head size {config.head_dim}")
    return config


def _factors(file: GgufFile, name: str) -> list[float]:
    if name not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor '{name}' is missing, though its counterpart is there")
    info = file.tensors[name]
    return formats.dequantise(file.raw(name), info.type.name, info.shape).ravel().tolist()


def _gguf_parts(file: GgufFile, arch: str, config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    used = {"rope_factors_short.weight", "rope_factors_long.weight"}
    # Llama's converter interleaves the rotary halves of q and k, Phi-3's does not.
    interleaved = arch == "llama"

    def part(name: str, shape: Shape, heads: int = 0) -> Part:
        info = file.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{file.path}: tensor '{name}' is missing")
        if info.shape != shape:
            raise CheckpointError(
                f"{file.path}: tensor '{name}' has shape {list(info.shape)}, "
                f"the configuration needs {list(shape)}"
            )
        if info.type.name not in formats.FORMATS:
            raise EngineError(
                f"{file.path}: tensor '{name}' has the type {info.type.name}, which is not supported",
                hint=f"supported: {', '.join(formats.FORMATS)}; convert the file to one of these",
            )
        used.add(name)
        return Part(
            name, info.shape, info.type.name, functools.partial(file.raw, name), heads if interleaved else 0
        )

    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    parts: dict[str, tuple[Part, ...]] = {
        "embed": (part(_GLOBAL["embed"], (config.vocab_size, D)),),
        "norm": (part(_GLOBAL["norm"], (D,)),),
    }
    parts["head"] = (
        parts["embed"] if config.tie_word_embeddings else (part(_GLOBAL["head"], (config.vocab_size, D)),)
    )
    shapes = {"attention_norm": (D,), "output": (D, H * d), "mlp_norm": (D,), "down": (D, F)}
    for n in range(config.num_hidden_layers):
        for name, source in _LAYER.items():
            parts[f"layers.{n}.{name}"] = (part(f"blk.{n}.{source}", shapes[name]),)
        if f"blk.{n}.attn_qkv.weight" in file.tensors:
            if interleaved:
                raise EngineError(f"{file.path}: fused q, k and v in a llama file are not supported")
            qkv: tuple[Part, ...] = (part(f"blk.{n}.attn_qkv.weight", ((H + 2 * K) * d, D)),)
        else:
            qkv = (
                part(f"blk.{n}.attn_q.weight", (H * d, D), H),
                part(f"blk.{n}.attn_k.weight", (K * d, D), K),
                part(f"blk.{n}.attn_v.weight", (K * d, D)),
            )
        parts[f"layers.{n}.qkv"] = qkv
        if f"blk.{n}.ffn_gate.weight" in file.tensors:
            up: tuple[Part, ...] = (
                part(f"blk.{n}.ffn_gate.weight", (F, D)),
                part(f"blk.{n}.ffn_up.weight", (F, D)),
            )
        else:
            up = (part(f"blk.{n}.ffn_up.weight", (2 * F, D)),)
        parts[f"layers.{n}.gate_up"] = up
    # A tensor that we would leave out changes the function: a bias, an adapter, a norm we do not know.
    _refuse_rest(file.path, set(file.tensors) - used)
    return parts


# Hugging Face folders


def open_folder(folder: Path | str) -> Weights:
    """Open a Hugging Face folder with config.json and one or more safetensors files."""
    folder = Path(folder)
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not readable: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{folder / 'config.json'}: expected a mapping")
    config = ModelConfig.from_hf(tree, where=str(folder / "config.json"))
    config.require_factors()
    weights = Weights(folder, str(tree.get("model_type", "phi3")), config, {})
    table = _read_safetensors(folder, weights)
    used: set[str] = set()

    def part(name: str, shape: Shape) -> Part:
        found = table.get(name)
        if found is None:
            raise CheckpointError(f"{folder}: tensor '{name}' is missing")
        if found.shape != shape:
            raise CheckpointError(
                f"{folder}: tensor '{name}' has shape {list(found.shape)}, "
                f"the configuration needs {list(shape)}"
            )
        if found.type not in formats.FORMATS:
            raise EngineError(f"{folder}: tensor '{name}' has the type {found.type}, which is not supported")
        used.add(name)
        return found

    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    parts = weights.parts
    parts["embed"] = (part("model.embed_tokens.weight", (config.vocab_size, D)),)
    parts["norm"] = (part("model.norm.weight", (D,)),)
    if config.tie_word_embeddings:
        parts["head"] = parts["embed"]
        used.add("lm_head.weight")  # some writers store the tied matrix twice
    else:
        parts["head"] = (part("lm_head.weight", (config.vocab_size, D)),)
    for n in range(config.num_hidden_layers):
        at, to = f"model.layers.{n}.", f"layers.{n}."
        parts[to + "attention_norm"] = (part(at + "input_layernorm.weight", (D,)),)
        parts[to + "mlp_norm"] = (part(at + "post_attention_layernorm.weight", (D,)),)
        parts[to + "output"] = (part(at + "self_attn.o_proj.weight", (D, H * d)),)
        parts[to + "down"] = (part(at + "mlp.down_proj.weight", (D, F)),)
        if at + "self_attn.q_proj.weight" in table:
            rows = {"q": H * d, "k": K * d, "v": K * d}
            parts[to + "qkv"] = tuple(part(f"{at}self_attn.{x}_proj.weight", (r, D)) for x, r in rows.items())
        else:
            parts[to + "qkv"] = (part(at + "self_attn.qkv_proj.weight", ((H + 2 * K) * d, D)),)
        if at + "mlp.gate_proj.weight" in table:
            parts[to + "gate_up"] = tuple(part(f"{at}mlp.{x}_proj.weight", (F, D)) for x in ("gate", "up"))
        else:
            parts[to + "gate_up"] = (part(at + "mlp.gate_up_proj.weight", (2 * F, D)),)
    # Old Llama checkpoints store the rotary frequencies, which the configuration already determines.
    _refuse_rest(folder, {n for n in set(table) - used if not n.endswith("rotary_emb.inv_freq")})
    return weights


def _refuse_rest(path: Path, rest: set[str]) -> None:
    if rest:
        shown = ", ".join(sorted(rest)[:4]) + (", ..." if len(rest) > 4 else "")
        raise EngineError(
            f"{path}: {len(rest)} tensors are not part of a dense Phi-3 or Llama model: {shown}",
            hint="ignoring them would compute another function than the one that was trained",
        )


def _read_safetensors(folder: Path, weights: Weights) -> dict[str, Part]:
    """Map every tensor of the folder's safetensors files, checked against the files' sizes."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(listed.values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: not readable: {error}") from None
        if any(Path(n).name != n for n in names):
            raise CheckpointError(f"{index}: names a file outside the folder")
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
    if not names:
        raise CheckpointError(f"{folder}: no safetensors file here")
    table: dict[str, Part] = {}
    for name in names:
        for part in _map_safetensors(folder / name, weights):
            if part.source in table:
                raise CheckpointError(f"{folder}: tensor '{part.source}' occurs in two files")
            table[part.source] = part
    return table


def _map_safetensors(path: Path, weights: Weights) -> list[Part]:
    # The safetensors library gives NumPy no bfloat16; the container is an 8-byte length, JSON, and bytes.
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 8:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors header")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    weights.keep(data)
    weights.file_bytes += size
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > size - 8:
        raise CheckpointError(
            f"{path}: the header claims {header_bytes} bytes, the file has {size}: it is cut short"
        )
    try:
        header = json.loads(bytes(data[8 : 8 + header_bytes]))
        entries = [
            (k, v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in header.items() if k[0] != "_"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: the header is damaged: {error}") from None
    base = 8 + header_bytes
    parts = []
    for name, kind, shape, start, end in entries:
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
            raise CheckpointError(f"{path}: tensor '{name}' has an impossible shape or place")
        if start > end or end > size - base:
            raise CheckpointError(
                f"{path}: tensor '{name}' ends at byte {base + end} of {size}: the file is cut short"
            )
        if kind in formats.FORMATS:
            needed = formats.lookup(kind).num_bytes(int(np.prod(shape, dtype=object)) if shape else 1)
            if needed != end - start:
                raise CheckpointError(
                    f"{path}: tensor '{name}' has {end - start} bytes, its shape needs {needed}"
                )
        view = data[base + start : base + end]
        parts.append(Part(name, shape, kind, constant(view)))
    return parts


def constant(view: memoryview) -> Callable[[], memoryview]:
    """A Part's `raw` for bytes that are already mapped."""
    return lambda: view
