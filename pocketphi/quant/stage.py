"""The quantisation stage: checkpoint in, GGUF file and fidelity report out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi import __version__
from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact, Draft
from pocketphi.core.errors import DataError, UserError
from pocketphi.engine.weights import Weights, open_weights
from pocketphi.quant import fidelity, model_file, rounding, texts
from pocketphi.quant.config import SCHEMES, QuantConfig, tensor_types
from pocketphi.quant.gguf_writer import TensorPlan, write_gguf
from pocketphi.tokenizer import Tokenizer
from pocketphi.tokenizer import load as load_tokenizer

FILE = "model.gguf"


def run(
    config: QuantConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Quantise `inputs["checkpoint"]` (a checkpoint artifact, Hugging Face folder or GGUF file).

    Publishes a `gguf` artifact: model.gguf, quantization.json (type and error of every tensor) and, when
    there is text to measure on, fidelity.json. Raises CheckpointError for a damaged checkpoint, UserError
    when a calibrated method is asked for without text.
    """
    if "checkpoint" not in inputs:
        raise UserError("quantize: the input 'checkpoint' is missing")
    given = inputs["checkpoint"]
    parent: Artifact | None = None
    if isinstance(given, Artifact) or (Path(given) / artifact.MANIFEST).is_file():
        parent = artifact.load(given)
        source = parent.path
    else:
        source = Path(given)
    shards = texts.shards_of(parent)
    calibration = config.calibration or (shards.path if shards else None)
    measured_on = config.fidelity_text or (shards.path if shards else None)
    method = _method(config, calibration)
    # The shards are a parent too: without them the same configuration gives another file.
    parents = [p for p in (parent, shards) if p is not None]
    outside = [] if parent else _files(source)
    outside += [f for p in (config.calibration, config.fidelity_text) if p for f in _files(p)]
    asked: dict[str, Any] = {"kind": "gguf", "config": config, "parents": parents, "sources": outside}
    out = out or artifact.default_path("gguf", config, parents, outside)
    if done := artifact.reuse(out, **asked):
        progress.say(f"quantize: up to date at {out}")
        return done
    weights = open_weights(source)
    try:
        with artifact.create(out, **asked) as draft:
            tokenizer = _tokenizer(weights, source)
            _write(config, weights, tokenizer, draft, method, calibration, parent)
            if config.fidelity_tokens and measured_on is not None and tokenizer is not None:
                _measure(config, weights, tokenizer, draft, measured_on)
            elif config.fidelity_tokens:
                progress.say("quantize: no fidelity report, there is no text to measure on (fidelity_text)")
    finally:
        weights.close()
    counts = draft.counts
    shown = f", KL {counts['kl_divergence']:.4f} nats" if "kl_divergence" in counts else ""
    progress.say(
        f"quantize: {config.type} by {method}, {counts['file_bytes'] / 1e6:.2f} MB "
        f"({counts['bits_per_weight']:.2f} bits a weight){shown} -> {out}"
    )
    return draft.artifact


def plan(config: QuantConfig, inputs_plan: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Forecast from the `parameters` of the stage before: flat figures in SI units."""
    parameters = next(
        (
            float(inputs_plan[s]["parameters"])
            for s in ("sft", "train")
            if "parameters" in inputs_plan.get(s, {})
        ),
        4e6,
    )
    scheme = SCHEMES[config.type]
    bits = (
        8 * rounding.TYPE_BY_NAME[scheme.matrix].block_bytes / rounding.TYPE_BY_NAME[scheme.matrix].block_size
    )
    calibrated = config.method in ("auto", "gptq") and scheme.matrix.startswith("Q4")
    seconds = parameters / 20e6
    if calibrated:
        # Two forward passes over the text, and the feedback itself.
        seconds += 2 * 2 * parameters * config.calibration_tokens / 5e10 + parameters / 4e5
    seconds += 4 * parameters * config.fidelity_tokens / 2e10
    return {
        "wall_s": round(3 + seconds, 1),
        "peak_memory_bytes": int(4e8 + (12 if calibrated else 4) * parameters),
        "disk_bytes": int(parameters * bits / 8 * 1.1 + 1e6),
        "bits_per_weight": round(bits, 3),
        "parameters": int(parameters),
    }


def _method(config: QuantConfig, calibration: Path | None) -> str:
    four_bits = SCHEMES[config.type].matrix in ("Q4_0", "Q4_1", "Q4_K")
    if config.method == "auto":
        if not four_bits:
            return "rtn"
        if calibration is None:
            progress.say("quantize: rounding to nearest, there is no calibration text (calibration=PATH)")
            return "rtn"
        return "gptq"
    if config.method != "rtn" and calibration is None:
        raise UserError(
            f"quantize: method '{config.method}' needs calibration text",
            hint="--set calibration=FILE (.txt or .jsonl), or a checkpoint whose shards are still there",
        )
    return config.method


def _files(path: Path) -> list[Path]:
    """What a path outside any artifact stands for: the file, or the files of a folder."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    return [path]


def _tokenizer(weights: Weights, source: Path) -> Tokenizer | None:
    if weights.gguf is not None:
        return load_tokenizer(weights.gguf)
    if (source / "tokenizer.json").is_file() or (source / "tokenizer.model").is_file():
        return load_tokenizer(source)
    progress.say(f"quantize: {source} has no tokenizer; the file gets none and cannot chat")
    return None


def _write(
    config: QuantConfig,
    weights: Weights,
    tokenizer: Tokenizer | None,
    draft: Draft,
    method: str,
    calibration: Path | None,
    parent: Artifact | None,
) -> None:
    model = weights.config
    types, replaced = tensor_types(config, model)
    if replaced:
        progress.say(
            f"quantize: {len(replaced)} of {len(types)} matrices take {'/'.join(sorted({types[r] for r in replaced}))}, "
            "their rows do not fill blocks of 256"
        )
    plans = model_file.tensor_plans(model, types)
    lineage = {"version": __version__, "quantization": f"{config.type} {method}"}
    if parent is not None:
        lineage["checkpoint"] = parent.checksum
    made: dict[str, np.ndarray] = {}
    notes: dict[str, dict[str, Any]] = {p.name: {"type": p.type} for p in plans}
    if method != "rtn":
        from pocketphi.quant.calibration import calibrate

        if tokenizer is None:
            raise UserError("quantize: calibration needs the checkpoint's tokenizer")
        assert calibration is not None
        size = min(config.sequence_length, model.max_position_embeddings)
        windows, _ = texts.windows_from(
            calibration, tokenizer, config.calibration_tokens, size, heldout=False
        )
        draft.counts["calibration_tokens"] = sum(map(len, windows))
        steps = calibrate(
            weights,
            types,
            np.array(windows),
            method,
            damping=config.damping,
            refine_passes=config.refine_passes,
        )
        for name, raw, figures in steps:
            made[name] = raw
            notes[name].update({k: float(f"{v:.4g}") for k, v in figures.items()})

    def data(tensor: TensorPlan) -> np.ndarray:
        if tensor.name in made:
            return made.pop(tensor.name)
        values = model_file.source_array(weights, tensor.name)
        return rounding.quantise(values.reshape(-1, values.shape[-1]), tensor.type)

    metadata = model_file.metadata(config, model, tokenizer, lineage)
    size_bytes = write_gguf(draft.path / FILE, metadata, plans, data)
    artifact.write_atomic(draft.path / "quantization.json", json.dumps(notes, indent=1) + "\n")
    num_weights = sum(int(np.prod(p.shape)) for p in plans)
    draft.counts.update(
        file_bytes=size_bytes,
        num_weights=num_weights,
        bits_per_weight=round(8 * sum(p.num_bytes for p in plans) / num_weights, 4),
        method=method,
    )
    for type_ in sorted({p.type for p in plans}):
        draft.counts[f"bytes_{type_}"] = sum(p.num_bytes for p in plans if p.type == type_)


def _measure(config: QuantConfig, weights: Weights, tokenizer: Tokenizer, draft: Draft, source: Path) -> None:
    size = min(config.sequence_length, weights.config.max_position_embeddings)
    try:
        windows, _ = texts.windows_from(source, tokenizer, config.fidelity_tokens, size, heldout=True)
    except DataError as error:
        if config.fidelity_text is not None:
            raise
        # Nobody asked for this text in particular: a small corpus holds out little or nothing.
        progress.say(f"quantize: no fidelity report: {error.message}")
        return
    figures = measure(draft.path / FILE, weights, windows)
    artifact.write_atomic(draft.path / "fidelity.json", json.dumps(figures, indent=1) + "\n")
    draft.counts.update(figures)


def measure(file: Path, reference: Weights, windows: list[list[int]]) -> dict[str, float]:
    """Compare a written file, in the engine, with the float32 model that it was made from, in torch."""
    import torch

    from pocketphi import engine
    from pocketphi.quant.calibration import torch_model

    model = torch_model(reference)

    def logits(ids: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([list(ids)], dtype=torch.long))[0].numpy()

    size = max(map(len, windows))
    with engine.load(file, context_length=size) as loaded:
        figures = fidelity.compare(logits, loaded.logits, windows)
    return {k: round(v, 7) if isinstance(v, float) else v for k, v in figures.items()}
