"""Hugging Face model folders: config.json, safetensors (one file or shards with an index),
generation_config.json. Every mismatch is a CheckpointError that names file, tensor and shapes.

Weights of Llama-style checkpoints (separate q/k/v and gate/up) are fused while loading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pocketphi.core.errors import CheckpointError, ConfigError
from pocketphi.model.config import ModelConfig
from pocketphi.model.parametrization import folded
from pocketphi.model.transformer import PhiForCausalLM, default_stop_ids

MAX_SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FUSED = {
    "self_attn.qkv_proj.weight": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj.weight": ("gate_proj", "up_proj"),
}
_FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what the file says about it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def load(
    folder: Path | str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> PhiForCausalLM:
    """Load a Hugging Face folder of model type phi3, llama or mistral.

    `dtype` is a torch type or its name; None or "auto" keeps the type the configuration states.
    Raises CheckpointError when a file is missing or corrupt, or a tensor is missing, of the wrong
    shape, or not expected; ConfigError when the architecture is not supported.
    """
    folder = Path(folder)
    config = read_config(folder)
    target = _dtype(dtype, config, folder)
    stored = _scan(folder)
    with torch.device("meta"):
        model = PhiForCausalLM(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    sources = _match(folder, config, expected, stored)
    weights: dict[str, Tensor] = {}
    with _Reader() as reader:
        for name, parts in sources.items():
            tensors = [reader.read(part, stored[part]).to(device=device, dtype=target) for part in parts]
            weights[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=0)
        if config.tie_word_embeddings and "lm_head.weight" in stored:
            head = reader.read("lm_head.weight", stored["lm_head.weight"])
            table = weights["model.embed_tokens.weight"]
            if not torch.equal(head.to(device=device, dtype=target), table):
                raise CheckpointError(
                    f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from the embeddings",
                    hint='set "tie_word_embeddings": false in config.json if the head is its own',
                )
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.stop_ids = _read_stop_ids(folder, config)
    return model.requires_grad_(True)


def read_config(folder: Path | str) -> ModelConfig:
    """Read `config.json` of a model folder. Raises CheckpointError or ConfigError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder}: config.json is missing", hint="is this a Hugging Face model folder?"
        )
    return ModelConfig.from_hf(_read_json(path), where=str(path))


def save(
    model: PhiForCausalLM,
    folder: Path | str,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | str | None = None,
    stop_ids: Iterable[int] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write `model` as a Hugging Face folder that transformers loads; return the folder.

    Files are written under temporary names and renamed, config.json last, so an interrupted save is
    never a loadable mixture. `tokenizer` is saved beside the weights and gives the stop ids, unless
    `stop_ids` does. `dtype` converts the weights (None keeps the model's). The bytes depend on the
    weights alone. Raises CheckpointError when the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    target = None if dtype in (None, "auto") else _named_dtype(dtype)
    weights: dict[str, Tensor] = {}
    # A tied head appears once, as the embeddings; factors of a parametrisation go into the weights.
    for name, value in folded(model, ((n, _whole(p)) for n, p in model.named_parameters())):
        weights[name] = value.to(device="cpu", dtype=target or value.dtype).contiguous()
    written = {str(w.dtype).removeprefix("torch.") for w in weights.values()}
    tree = model.config.to_hf()
    tree["torch_dtype"] = written.pop() if len(written) == 1 else "float32"
    if stop_ids is None:
        stop_ids = sorted(tokenizer.stop_ids) if tokenizer is not None else model.stop_ids
    generation = {
        "bos_token_id": model.config.bos_token_id,
        "eos_token_id": [int(i) for i in stop_ids],
        "pad_token_id": model.config.pad_token_id,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        _write_weights(weights, folder, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(folder)
        _write_json(folder / "generation_config.json", generation)
        _write_json(folder / "config.json", tree)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot write the checkpoint: {error}") from None
    return folder


def _whole(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _write_weights(weights: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in weights.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    names = [
        _SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    for old in [*folder.glob("model*.safetensors"), folder / _INDEX]:
        if old.name not in names:
            old.unlink(missing_ok=True)
    index: dict[str, str] = {}
    total = 0
    for file_name, shard in zip(names, shards):
        temporary = folder / f".{file_name}.partial"
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(shard, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # safetensors would leave it readable by its owner alone
        os.replace(temporary, folder / file_name)
        index.update(dict.fromkeys(shard, file_name))
        total += sum(t.numel() * t.element_size() for t in shard.values())
    if len(shards) > 1:
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _match(
    folder: Path,
    config: ModelConfig,
    expected: dict[str, tuple[int, ...]],
    stored: dict[str, StoredTensor],
) -> dict[str, list[str]]:
    """Map each parameter to the stored tensors it is made of; check all names and shapes."""
    sources: dict[str, list[str]] = {}
    kv_rows = config.num_key_value_heads * config.head_dim
    rows = {"q_proj": config.hidden_size, "k_proj": kv_rows, "v_proj": kv_rows}
    for name, shape in expected.items():
        sources[name] = [name]
        if name not in stored:
            suffix = next((s for s in _FUSED if name.endswith(s)), None)
            parts = []
            if suffix is not None:
                prefix, inner = name.removesuffix(suffix), suffix.split(".")[0]
                parts = [f"{prefix}{inner}.{part}.weight" for part in _FUSED[suffix]]
            if any(part in stored for part in parts):
                sources[name] = parts
        for part in sources[name]:
            want = shape
            if part != name:
                want = (rows.get(part.split(".")[-2], config.intermediate_size), shape[1])
            if part not in stored:
                raise CheckpointError(
                    f"{folder}: tensor '{part}' is missing (expected shape {list(want)})",
                    hint="the folder is incomplete, or config.json describes another model",
                )
            found = stored[part]
            if found.shape != want:
                raise CheckpointError(
                    f"{found.path}: tensor '{part}' has shape {list(found.shape)}, "
                    f"config.json asks for {list(want)}",
                    hint="config.json describes another model",
                )
            if found.dtype not in _FLOAT_TYPES:
                raise CheckpointError(
                    f"{found.path}: tensor '{part}' has type {found.dtype}; only floating-point weights load"
                )
    used = {part for parts in sources.values() for part in parts}
    if config.tie_word_embeddings:
        used.add("lm_head.weight")
    extra = sorted(n for n in stored if n not in used and not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise CheckpointError(
            f"{stored[extra[0]].path}: {len(extra)} tensors that config.json does not account for, "
            f"such as '{extra[0]}' {list(stored[extra[0]].shape)}",
            hint="config.json describes another model (fewer layers, or tied embeddings)",
        )
    return sources


def _scan(folder: Path) -> dict[str, StoredTensor]:
    """List all tensors of a folder from the headers alone."""
    index_path = folder / _INDEX
    if index_path.exists():
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path}: 'weight_map' is missing or empty")
        if any(Path(str(file)).name != file for file in weight_map.values()):
            raise CheckpointError(f"{index_path}: a shard's name points outside the folder")
        stored: dict[str, StoredTensor] = {}
        for file in sorted(set(weight_map.values())):
            stored.update(_header(folder / file))
        for name, file in weight_map.items():
            if name not in stored:
                raise CheckpointError(f"{folder / file}: tensor '{name}' is in the index but not in the file")
        return stored
    if (folder / _SINGLE).exists():
        return _header(folder / _SINGLE)
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    raise CheckpointError(
        f"{folder}: no {_SINGLE} and no {_INDEX}",
        hint=f"{pickles[0]} is a pickle, which is never loaded: convert it to safetensors"
        if pickles
        else None,
    )


def _header(path: Path) -> dict[str, StoredTensor]:
    if not path.exists():
        raise CheckpointError(f"{path}: the shard is missing")
    try:
        with safe_open(path, framework="pt") as file:
            result = {}
            for name in file.keys():  # noqa: SIM118 - not a mapping
                view = file.get_slice(name)
                result[name] = StoredTensor(path, tuple(view.get_shape()), view.get_dtype())
            return result
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file: {error}", hint="truncated or corrupt: copy it again"
        ) from None


class _Reader:
    """Keeps the shards open while tensors are read from them."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def read(self, name: str, where: StoredTensor) -> Tensor:
        try:
            if where.path not in self._open:
                self._open[where.path] = safe_open(where.path, framework="pt")
            return self._open[where.path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{where.path}: cannot read tensor '{name}': {error}") from None


def _read_stop_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """All ids that generation_config.json lists; the configuration's own where there is none."""
    path = folder / "generation_config.json"
    listed = _read_json(path).get("eos_token_id") if path.exists() else None
    if listed is None:
        return default_stop_ids(config)
    ids = [listed] if isinstance(listed, int) else list(listed)
    if not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in ids):
        raise CheckpointError(
            f"{path}: eos_token_id {listed!r} is not in a vocabulary of {config.vocab_size}"
        )
    # A single id in Microsoft's own files was a bug of theirs: the other two are stops as well.
    return tuple(dict.fromkeys([*ids, *(i for i in default_stop_ids(config) if set(ids) & {32000, 32007})]))


def _dtype(dtype: torch.dtype | str | None, config: ModelConfig, folder: Path) -> torch.dtype:
    if dtype not in (None, "auto"):
        return _named_dtype(dtype)
    try:
        return _named_dtype(config.torch_dtype)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error.message}") from None


def _named_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    names |= {"float64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in names:
        raise ConfigError(f"weight type {dtype!r} is not one of {', '.join(names)}")
    return names[str(dtype)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
