"""The loss of a model file on a text, through the engine.

The text is cut into windows that are read independently; the first token of a window is not predicted.
Bits per byte count the bytes of exactly the predicted tokens, so that models with other vocabularies can
be compared. Figures are the same as those of the fidelity report where they have the same name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.core import progress
from pocketphi.core.errors import UserError
from pocketphi.quant import fidelity, texts


def perplexity(
    model: Path,
    text: Path,
    *,
    reference: Path | None = None,
    max_tokens: int = 16384,
    window: int = 512,
    num_threads: int | None = None,
) -> dict[str, Any]:
    """Return flat figures: `nll_per_token` (nats) with `_stderr`, `perplexity`, `bits_per_byte`,
    `num_tokens`, and with `reference` those of `fidelity.Comparison`.

    `reference` is the checkpoint that the file was made from, run in float32 by the engine. Raises
    DataError when the text is shorter than a window, UserError for a window of one token.
    """
    from pocketphi import engine

    if window < 2 or max_tokens < window:
        raise UserError(f"a window of {window} tokens out of {max_tokens} gives nothing to predict")
    with engine.load(model, num_threads=num_threads) as loaded:
        tokenizer = loaded.tokenizer
        if window > loaded.context_length:
            progress.say(f"perplexity: windows of {loaded.context_length} tokens, the model's context")
            window = loaded.context_length
        windows, _ = texts.windows_from(text, tokenizer, max_tokens, window, heldout=True)
        judge = None
        if reference is not None:
            judge = engine.load(reference, num_threads=num_threads, tokenizer=tokenizer)
        losses, num_tokens, num_bytes = [], [], 0
        comparison = fidelity.Comparison()
        try:
            with progress.bar("perplexity", len(windows) * (window - 1), unit="tokens") as bar:
                for ids in windows:
                    logits_TV = loaded.logits(ids[:-1])
                    targets_T = np.asarray(ids[1:])
                    logp_TV = fidelity.log_softmax(logits_TV)
                    losses.append(-float(logp_TV[np.arange(len(targets_T)), targets_T].sum()))
                    num_tokens.append(len(targets_T))
                    num_bytes += sum(
                        len(tokenizer.token_bytes(i)) for i in ids[1:] if i not in tokenizer.special_ids
                    )
                    if judge is not None:
                        comparison.add(judge.logits(ids[:-1]), logits_TV, targets_T)
                    bar.advance(len(targets_T), nll=losses[-1] / len(targets_T))
        finally:
            if judge is not None:
                judge.close()
    loss, stderr = fidelity.mean(np.array(losses), np.array(num_tokens, dtype=np.float64))
    figures: dict[str, Any] = {
        "nll_per_token": loss,
        "nll_per_token_stderr": stderr,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": sum(losses) / math.log(2) / max(1, num_bytes),
        "num_tokens": sum(num_tokens),
        "num_bytes": num_bytes,
        "num_windows": len(windows),
        "window_tokens": window,
    }
    if judge is not None:
        figures.update(comparison.figures())
    return {k: round(v, 7) if isinstance(v, float) else v for k, v in figures.items()}
