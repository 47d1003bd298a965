"""Tokens: vocabularies, training, chat templates and the loss mask; the one truth for all stages.

    tokenizer = load("microsoft/Phi-3-mini-4k-instruct")   # a folder, tokenizer.json/.model, or GGUF
    ids = tokenizer.encode("Hello world")
    prompt = tokenizer.chat([{"role": "user", "content": "Hi"}])

Importable without torch.
"""

from __future__ import annotations

from pathlib import Path

from pocketphi.core.artifact import Artifact
from pocketphi.core.gguf import GgufFile
from pocketphi.tokenizer import readers
from pocketphi.tokenizer.template import DEFAULT as DEFAULT_TEMPLATE
from pocketphi.tokenizer.template import variants as templates
from pocketphi.tokenizer.tokenizer import StreamDecoder, Tokenizer
from pocketphi.tokenizer.training import TokenizerConfig, plan, run

__all__ = [
    "DEFAULT_TEMPLATE",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "load",
    "plan",
    "run",
    "templates",
]


def load(source: Artifact | Path | str | GgufFile, *, template: str | None = None) -> Tokenizer:
    """Load a tokenizer from an artifact, a folder, tokenizer.json, tokenizer.model or a GGUF file.

    `template` chooses a chat template (`templates()`); by default it is recognised from the file.
    Raises DataError when nothing readable is there, EngineError when its kind is not supported, UserError
    for an unknown template.
    """
    if isinstance(source, GgufFile):
        return Tokenizer(readers.read_gguf(source), template)
    path = source.path if isinstance(source, Artifact) else Path(source)
    return Tokenizer(readers.read(path), template)
