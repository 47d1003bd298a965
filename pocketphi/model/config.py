"""The shape of a dense Phi-3 model, with the field names of its Hugging Face `config.json`.

Torch-free: the runtime and `phi recipe plan` read shapes without it. Configurations published by
Microsoft, and our own, are data in `configs/*.json`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from pocketphi.core.errors import ConfigError, did_you_mean

# microsoft/Phi-3-*-4k write 2047: flash-attention's count of *earlier* tokens, so that 2048 tokens
# are visible, the token itself included. It is the one published value with that meaning: copies
# converted for other code write 2048, and transformers' own mask makes `sliding_window` tokens
# visible (so 2047 there sees one token fewer than the model was trained with).
FLASH_ATTENTION_WINDOW = 2047

_LONGROPE_ALIASES = ("longrope", "su", "yarn")
_ROPE_KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "short_factor",
    "long_factor",
    "short_mscale",
    "long_mscale",
    "attention_factor",
    "factor",
    "original_max_position_embeddings",
}
# Keys of config.json that would change the function this package computes, and the only value it has.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attention_dropout": 0.0,
    "use_sliding_window": True,
}
_MODEL_TYPES = ("phi3", "llama", "mistral")


@dataclass
class ModelConfig:
    """Shape of a dense Phi-3 decoder. Lengths are in tokens; field names are Hugging Face's.

    `rope_scaling` is None or a mapping with `type` ("longrope"; "su" and "yarn" mean the same),
    `short_factor` and `long_factor` (head_dim / 2 numbers each), and optionally `short_mscale` and
    `long_mscale` or `attention_factor`. The lists may be None in a configuration whose published
    lists are not known in full: it can be planned with, not built.

    Raises ConfigError when the values contradict each other.
    """

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int | None = None
    sliding_window: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 32000
    pad_token_id: int | None = 32000
    initializer_range: float = 0.02
    torch_dtype: str = "bfloat16"
    attention_bias: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, found {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"the head size {self.head_dim} must be even for rotary embeddings")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act {self.hidden_act!r} is not supported (Phi-3 uses 'silu')")
        if self.attention_bias:
            raise ConfigError("attention_bias true is not supported (dense Phi-3 has no biases)")
        if self.original_max_position_embeddings is None:
            self.original_max_position_embeddings = self.max_position_embeddings
        if self.sliding_window is not None and self.sliding_window < 1:
            # Some exporters write 0 or a negative number for "no window".
            self.sliding_window = None
        if self.rope_scaling is not None:
            self.rope_scaling = self._checked_scaling(self.rope_scaling)

    def _checked_scaling(self, scaling: Mapping[str, Any]) -> dict[str, Any]:
        kind = scaling.get("type", scaling.get("rope_type"))
        if kind not in _LONGROPE_ALIASES:
            raise ConfigError(
                f"rope_scaling type {kind!r} is not supported (known: {', '.join(_LONGROPE_ALIASES)})"
            )
        for key in scaling:
            if key not in _ROPE_KEYS:
                raise ConfigError(f"rope_scaling: unknown key '{key}'{did_you_mean(key, _ROPE_KEYS)}")
        # `su` was renamed in mid-2024 and `yarn` was never YaRN in Phi-3's configurations.
        result: dict[str, Any] = {"type": "longrope"}
        for key in ("short_factor", "long_factor"):
            if key not in scaling:
                raise ConfigError(f"rope_scaling: '{key}' is missing")
            factors = scaling[key]
            if factors is not None:
                if not isinstance(factors, (list, tuple)) or len(factors) != self.head_dim // 2:
                    found = len(factors) if isinstance(factors, (list, tuple)) else repr(factors)
                    raise ConfigError(
                        f"rope_scaling.{key}: expected {self.head_dim // 2} numbers, found {found}"
                    )
                if not all(isinstance(f, (int, float)) and f > 0 for f in factors):
                    raise ConfigError(f"rope_scaling.{key}: every factor must be a positive number")
                factors = [float(f) for f in factors]
            result[key] = factors
        for key in ("short_mscale", "long_mscale", "attention_factor", "factor"):
            if scaling.get(key) is not None:
                result[key] = float(scaling[key])
        return result

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def visible_window(self) -> int | None:
        """Tokens a query sees, itself included; None means all earlier ones.

        2048 for Phi-3's configured 2047 (see FLASH_ATTENTION_WINDOW), otherwise `sliding_window`
        as transformers' mask counts it.
        """
        if self.sliding_window == FLASH_ATTENTION_WINDOW:
            return FLASH_ATTENTION_WINDOW + 1
        return self.sliding_window

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; tied embeddings are counted once."""
        per_layer = (
            self.hidden_size * self.head_dim * (self.num_attention_heads + 2 * self.num_key_value_heads)
            + self.hidden_size * self.hidden_size
            + 3 * self.hidden_size * self.intermediate_size
            + 2 * self.hidden_size
        )
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * per_layer + embeddings + self.hidden_size

    @property
    def num_matmul_parameters(self) -> int:
        """Parameters that take part in a matrix product per token: layers and head, no embedding."""
        norms = self.hidden_size * (2 * self.num_hidden_layers + 1)
        table = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self.num_parameters - norms - table

    def train_flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of one training token, forward and backward.

        Six per matrix parameter, and attention counted over the causal half only (the window is not
        subtracted): the count behind every MFU this project prints.
        """
        attention = 6 * self.num_hidden_layers * self.hidden_size * sequence_length
        return 6.0 * self.num_matmul_parameters + attention

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token adds to a 16-bit cache."""
        return 2 * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    @property
    def attention_factor(self) -> float:
        """LongRoPE's magnitude factor on cos and sin for short sequences; see `magnitude`."""
        return self.magnitude(long=False)

    def magnitude(self, *, long: bool) -> float:
        """Factor on cos and sin: explicit mscale first, then sqrt(1 + ln(L'/L) / ln L).

        The explicit values come first because a published one cannot be recomputed from the two
        lengths (Phi-3.5-MoE's was made with another base length).
        """
        if self.rope_scaling is None:
            return 1.0
        explicit = self.rope_scaling.get("long_mscale" if long else "short_mscale")
        if explicit is None:
            explicit = self.rope_scaling.get("attention_factor")
        if explicit is not None:
            return float(explicit)
        original = self.original_max_position_embeddings or self.max_position_embeddings
        scale = self.rope_scaling.get("factor", self.max_position_embeddings / original)
        return 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))

    def require_factors(self) -> None:
        """Raise ConfigError when the LongRoPE lists of this configuration are not known in full."""
        if self.rope_scaling is None:
            return
        for key in ("short_factor", "long_factor"):
            if self.rope_scaling[key] is None:
                raise ConfigError(
                    f"rope_scaling.{key} of this configuration is not known in full",
                    hint="use the config.json that comes with the checkpoint",
                )

    @classmethod
    def from_hf(cls, tree: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face `config.json` mapping of model type phi3, llama or mistral.

        Accepts the field layout of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
        of 5 (`rope_parameters`, `dtype`). Keys that only steer other software are ignored; keys that
        would change the function computed raise ConfigError unless they have the supported value.
        """
        tree = dict(tree)
        model_type = tree.get("model_type", "phi3")
        if model_type not in _MODEL_TYPES:
            raise ConfigError(
                f"{where}: model_type {model_type!r} is not supported{did_you_mean(model_type, _MODEL_TYPES)}"
            )
        for key, value in _FIXED.items():
            if tree.get(key, value) not in (value, None):
                raise ConfigError(f"{where}: {key} {tree[key]!r} is not supported (only {value!r} is)")
        rope = dict(tree.get("rope_parameters") or {})
        scaling = dict(tree.get("rope_scaling") or {}) or rope
        theta = rope.get("rope_theta", scaling.get("rope_theta", tree.get("rope_theta", 10000.0)))
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ConfigError(f"{where}: partial_rotary_factor is not supported")
        original = tree.get("original_max_position_embeddings")
        if scaling.get("original_max_position_embeddings") is not None:
            original = scaling["original_max_position_embeddings"]
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            scaling = {}
        names = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in tree.items() if k in names and k not in ("rope_scaling", "rope_theta")}
        values.pop("original_max_position_embeddings", None)
        for key in [k for k in values if values[k] is None]:
            if key not in ("sliding_window", "bos_token_id", "eos_token_id", "pad_token_id"):
                del values[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            if key not in values:
                raise ConfigError(f"{where}: '{key}' is missing")
        if "num_attention_heads" not in values:
            raise ConfigError(f"{where}: 'num_attention_heads' is missing")
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        if model_type != "phi3":  # the other families have other defaults for what is left out
            values.setdefault("rms_norm_eps", 1e-6)
            values.setdefault("eos_token_id", 2)
            values.setdefault("pad_token_id", None)
            values.setdefault("max_position_embeddings", 2048)
        if tree.get("dtype") is not None:
            values["torch_dtype"] = tree["dtype"]
        values["torch_dtype"] = str(values.get("torch_dtype", "float32")).removeprefix("torch.")
        try:
            config = cls(
                **values,
                original_max_position_embeddings=original,
                rope_theta=float(theta),
                rope_scaling=scaling or None,
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.message}", hint=error.hint) from None
        explicit = tree.get("head_dim")
        if explicit is not None and explicit != config.head_dim:
            raise ConfigError(
                f"{where}: head_dim {explicit} differs from hidden_size / num_attention_heads = "
                f"{config.head_dim}, which is not supported"
            )
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the mapping to write as `config.json`: readable by transformers 4.41 and later."""
        tree = dataclasses.asdict(self)
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            **tree,
            "attention_dropout": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "use_cache": True,
        }

    @classmethod
    def named(cls, name: str) -> ModelConfig:
        """Return a configuration shipped with the package, such as "phi-3-mini-4k" or "nano".

        Raises ConfigError naming the nearest known name.
        """
        known = config_names()
        if name not in known:
            raise ConfigError(f"unknown model configuration '{name}'{did_you_mean(name, known)}")
        return cls.from_hf(_read_named(name), where=f"configs/{name}.json")


def config_names() -> list[str]:
    """Names of the configurations shipped with the package."""
    folder = resources.files("pocketphi.model") / "configs"
    return sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json"))


def describe(name: str) -> str:
    """What is known about the configuration `name`, in a sentence."""
    return str(_read_named(name).get("description", ""))


def _read_named(name: str) -> dict[str, Any]:
    path = resources.files("pocketphi.model") / "configs" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))
