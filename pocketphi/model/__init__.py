"""The Phi-3 decoder: configuration (no torch), blocks, Hugging Face folders, reference generation.

`ModelConfig` is importable without torch; everything else imports torch on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pocketphi.model.config import ModelConfig

if TYPE_CHECKING:
    from pocketphi.model.attention import KVCache
    from pocketphi.model.checkpoint import load, save
    from pocketphi.model.generation import generate
    from pocketphi.model.transformer import PhiForCausalLM

__all__ = ["KVCache", "ModelConfig", "PhiForCausalLM", "generate", "load", "save"]

_LAZY = {
    "KVCache": "attention",
    "PhiForCausalLM": "transformer",
    "generate": "generation",
    "load": "checkpoint",
    "save": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"pocketphi.model.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'pocketphi.model' has no attribute '{name}'")
