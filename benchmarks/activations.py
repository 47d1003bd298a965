"""What rounding activations costs: the native core at 8 and 16 bits against float32, on one model and text.

    python benchmarks/activations.py MODEL.gguf TEXT.txt

Prints Kullback-Leibler divergence (nats per token), share of equal best tokens, and the gap in loss.
Both sides read the same quantised weights; only the arithmetic differs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pocketphi import engine
from pocketphi.quant import fidelity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=256)
    arguments = parser.parse_args()
    with engine.load(arguments.model, backend="numpy", context_length=arguments.window) as reference:
        ids = reference.tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[: arguments.tokens]
        windows = [ids[i : i + arguments.window] for i in range(0, len(ids), arguments.window)]
        expected = {tuple(w[:-1]): reference.logits(w[:-1]) for w in windows}
    for activations in ("int8", "int16"):
        os.environ["POCKETPHI_ACTIVATIONS"] = activations
        with engine.load(
            arguments.model, backend="native", context_length=arguments.window, cache_type="f32"
        ) as model:
            found = fidelity.compare(lambda i: expected[tuple(i)], model.logits, windows)
        print(
            f"{activations}: KL {found['kl_divergence']:.6f} ± {found['kl_divergence_stderr']:.6f} nats, "
            f"best token equal {found['top1_agreement']:.4f}, loss {found['nll_gap']:+.6f} nats"
        )


if __name__ == "__main__":
    main()
