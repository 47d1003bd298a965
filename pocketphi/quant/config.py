"""What to quantise to: the named schemes, and the type of every tensor."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pocketphi.core.errors import ConfigError, did_you_mean
from pocketphi.core.gguf import TYPE_BY_NAME
from pocketphi.model.config import ModelConfig

Method = Literal["auto", "rtn", "importance", "gptq"]


@dataclass(frozen=True)
class Scheme:
    """Types of a model: `matrix` of the layers, `head` of the output (and of the embedding where it is
    the same), `more` of the down projections of the layers that get more bits. `file_type` is the number
    that llama.cpp shows."""

    matrix: str
    head: str
    file_type: int
    more: str | None = None


SCHEMES: dict[str, Scheme] = {
    "f32": Scheme("F32", "F32", 0),
    "f16": Scheme("F16", "F16", 1),
    "bf16": Scheme("BF16", "BF16", 32),
    "q8_0": Scheme("Q8_0", "Q8_0", 7),
    "q6_k": Scheme("Q6_K", "Q6_K", 18),
    "q4_0": Scheme("Q4_0", "Q6_K", 2),
    "q4_1": Scheme("Q4_1", "Q6_K", 3),
    "q4_k": Scheme("Q4_K", "Q6_K", 14),
    "q4_k_m": Scheme("Q4_K", "Q6_K", 15, more="Q6_K"),
}

# Rows that do not fill blocks of 256 take the nearest type with blocks of 32.
FALLBACK = {"Q4_K": "Q4_1", "Q6_K": "Q8_0"}


@dataclass
class QuantConfig:
    """How to write the GGUF file.

    `type` is a scheme (`SCHEMES`); `layers` gives single tensors another type, by pattern on their GGUF
    name, the last match wins: `{"blk.0.*": q8_0, token_embd.weight: q4_0}`.

    `method`: `rtn` rounds to nearest; `importance` searches each block's scale for the least error
    weighted by how strongly its input channels are excited; `gptq` also feeds rounding errors back into
    the weights still to be rounded and then improves single weights in turn (`refine_passes`); `auto` is
    `gptq` where calibration text is at hand and the type is of 4 bits, else `rtn`.

    Calibration text is `calibration` (a .txt or .jsonl file or folder, or a shards artifact), or the
    shards that the checkpoint was trained on, if they are still there. The fidelity report compares the
    written file, in the engine, with the checkpoint on `fidelity_text` or held-out shards
    (`fidelity_tokens` 0 leaves it out).
    """

    type: str = "q4_0"
    method: Method = "auto"
    layers: dict[str, str] = field(default_factory=dict)
    calibration: Path | None = None
    calibration_tokens: int = 32768
    sequence_length: int = 512
    damping: float = 0.01
    refine_passes: int = 2
    fidelity_text: Path | None = None
    fidelity_tokens: int = 4096
    name: str = "pocketphi"

    def __post_init__(self) -> None:
        if self.type not in SCHEMES:
            raise ConfigError(f"unknown quantisation type '{self.type}'{did_you_mean(self.type, SCHEMES)}")
        for pattern, type_ in self.layers.items():
            if type_ not in _SINGLE:
                raise ConfigError(
                    f"layers: '{pattern}': unknown type '{type_}'{did_you_mean(type_, _SINGLE)}"
                )
        if self.calibration_tokens < 256 or not 16 <= self.sequence_length <= self.calibration_tokens:
            raise ConfigError(
                "calibration_tokens must be at least 256, and sequence_length from 16 to calibration_tokens"
            )
        if not 0 < self.damping < 1 or self.refine_passes < 0 or self.fidelity_tokens < 0:
            raise ConfigError("damping must lie between 0 and 1; refine_passes and fidelity_tokens from 0 up")


_SINGLE = {n.lower(): n for n in ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_0", "Q4_1", "Q4_K")}


def tensor_types(config: QuantConfig, model: ModelConfig) -> tuple[dict[str, str], list[str]]:
    """Return the type of every matrix by GGUF name, and the names that took a fallback type.

    Raises ConfigError when a pattern of `layers` fits no tensor or rows do not fill any block.
    """
    scheme = SCHEMES[config.type]
    types: dict[str, str] = {}
    num = model.num_hidden_layers
    head = "token_embd.weight" if model.tie_word_embeddings else "output.weight"
    types["token_embd.weight"] = scheme.matrix
    for n in range(num):
        for part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
            types[f"blk.{n}.{part}.weight"] = scheme.matrix
        if scheme.more and more_bits(n, num):
            types[f"blk.{n}.ffn_down.weight"] = scheme.more
    types[head] = scheme.head
    for pattern, type_ in config.layers.items():
        fitting = [n for n in types if fnmatch.fnmatchcase(n, pattern)]
        if not fitting:
            raise ConfigError(
                f"layers: '{pattern}' fits no tensor (they are called {', '.join(list(types)[:5])}, ...)"
            )
        types.update(dict.fromkeys(fitting, _SINGLE[type_]))
    replaced = []
    for name, type_ in types.items():
        columns = _columns(name, model)
        while columns % TYPE_BY_NAME[types[name]].block_size:
            if types[name] not in FALLBACK:
                raise ConfigError(
                    f"{name}: rows of {columns} weights do not fill {type_} blocks "
                    f"of {TYPE_BY_NAME[type_].block_size}",
                    hint="choose f16 or bf16 for it",
                )
            types[name] = FALLBACK[types[name]]
        if types[name] != type_:
            replaced.append(name)
    return types, replaced


def more_bits(layer: int, num_layers: int) -> bool:
    """Whether a layer's down projection gets more bits: the first and last eighth, and every third
    between, as in llama.cpp's Q4_K_M."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _columns(name: str, model: ModelConfig) -> int:
    return model.intermediate_size if ".ffn_down." in name else model.hidden_size
