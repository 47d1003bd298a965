"""What computes the numbers: the engine, the torch model, or an endpoint behind HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketphi.core import artifact
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import UserError
from pocketphi.evals.backends.base import Scorer
from pocketphi.evals.config import EvalConfig


def load(model: Artifact | Path | str, config: EvalConfig) -> Scorer:
    """Open what `inputs["model"]` names.

    A GGUF file or artifact goes to the engine, a Hugging Face folder to the torch model, and
    `http(s)://host/v1#model-name` to that endpoint. UserError when it is none of these.
    """
    if isinstance(model, str) and model.startswith(("http://", "https://")):
        from pocketphi.evals.backends.endpoint import EndpointScorer

        return EndpointScorer(model, config)
    if isinstance(model, Artifact):
        folder = model.path
    else:
        folder = Path(model)
        if not folder.exists():
            raise UserError(f"{folder}: no such model file or folder")
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        return _engine(folder, config)
    if folder.is_dir():
        files = sorted(folder.glob("*.gguf"))
        if len(files) == 1:
            return _engine(files[0], config)
        if len(files) > 1:
            raise UserError(
                f"{folder}: holds {len(files)} GGUF files", hint=f"name one of them, such as {files[0]}"
            )
        if (folder / "config.json").is_file():
            from pocketphi.evals.backends.torch_model import TorchScorer

            return TorchScorer(folder, config)
    raise UserError(
        f"{folder}: neither a GGUF file nor a Hugging Face folder nor an artifact that holds one",
        hint="give a *.gguf, a folder with config.json, or http://host:port/v1#model-name",
    )


def model_file_sha256(path: Path) -> str:
    """Hash of what the weights are: the GGUF file, or the folder's weight files and config."""
    if path.is_file():
        return artifact.file_sha256(path)
    names = sorted(p for p in path.iterdir() if p.suffix == ".safetensors" or p.name == "config.json")
    import hashlib

    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name.name}\0{artifact.file_sha256(name)}\n".encode())
    return digest.hexdigest()


def describe_model(inputs: Mapping[str, Any]) -> str:
    """A short name of the model for tables, without any path of this machine."""
    model = inputs["model"]
    if isinstance(model, Artifact):
        return f"{model.path.parent.name}/{model.path.name}" if model.path.parent.name else model.path.name
    text = str(model)
    if text.startswith(("http://", "https://")):
        return text.partition("#")[2] or text
    return Path(text).name


def _engine(path: Path, config: EvalConfig) -> Scorer:
    from pocketphi.evals.backends.engine import EngineScorer

    return EngineScorer(path, config)


def template_sha256(tokenizer: Any) -> str | None:
    """Hash of the chat template as ids: a probe conversation through the tokenizer itself.

    None for a tokenizer without a template.
    """
    import hashlib

    probe = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    try:
        ids = list(tokenizer.chat(probe, add_generation_prompt=True))
    except Exception:  # a template may refuse a system role
        try:
            ids = list(tokenizer.chat(probe[1:], add_generation_prompt=True))
        except Exception:
            return None
    return hashlib.sha256(json.dumps([int(i) for i in ids]).encode()).hexdigest()
