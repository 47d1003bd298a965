"""Coordinate check of the maximal-update parametrisation, and how learning rates carry over to other widths.

    python benchmarks/mup_coordinate_check.py [--out FOLDER]            the check: seconds on a CPU
    python benchmarks/mup_coordinate_check.py --transfer [--out FOLDER]  the sweep: minutes on a CPU
    ... --transfer --device cuda --head 64 --layers 4 --rows 32 --length 256 --steps 300 \\
        --widths 128,256,512,1024 --kinds adamw --parametrizations mup       a part of it at real sizes

The check trains models of several widths for a few steps and prints the root mean square of each part's
change since the start, with its slope against width (log-log). In the maximal-update parametrisation
every slope is near 0; in the standard one the logits' is about 1 with AdamW, so that the best rate falls
as a model gets wider. The sweep trains on bytes of this interpreter's own documentation and prints the
best learning rate of every width. Both write JSON and an SVG plot.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from pocketphi.model import ModelConfig, PhiForCausalLM
from pocketphi.model.parametrization import MaximalUpdate
from pocketphi.train.config import OptimizerConfig
from pocketphi.train.cross_entropy import chunked_cross_entropy
from pocketphi.train.optimizer import Optimizers

PARTS = ("embedding", "attention", "mlp", "stream", "logits")


def make(
    width: int,
    base: int,
    parametrization: str,
    kind: str,
    *,
    layers: int = 2,
    head: int = 16,
    length: int = 128,
    device: str = "cpu",
    seed: int = 0,
) -> Any:
    """A tiny model of `width` with heads of one size, and its optimizers."""
    config = ModelConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // head,
        num_key_value_heads=max(1, width // head // 2),
        max_position_embeddings=length,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = PhiForCausalLM(config)
    model.reset_parameters(seed=seed, scale_residual=True)
    model.to(device)
    settings = OptimizerConfig(kind=kind, weight_decay=0.0)  # type: ignore[arg-type]
    if parametrization == "standard":
        return model, Optimizers(model, settings)
    scaled = MaximalUpdate.of(config, base)
    scaled.start(model)
    return model, Optimizers(model, settings, scaled.rate_factor)


def text_bytes(limit: int = 4_000_000) -> Tensor:
    """Text that every Python installation carries."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        f for f in sorted(root.glob("*.py")) + sorted(root.glob("*/*.py")) if "site-packages" not in f.parts
    ]
    raw = b"\0".join(f.read_bytes() for f in files)[:limit]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def batches(text: Tensor, rows: int, length: int, seed: int) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    span = torch.arange(length + 1)
    while True:
        starts = torch.randint(0, len(text) - length - 1, (rows, 1), generator=draw)
        yield text[starts + span].long()


def step(model: PhiForCausalLM, optimizers: Optimizers, rows: Tensor, rate: float) -> float:
    x_BTD = model.hidden(rows[:, :-1])
    loss, _ = chunked_cross_entropy(x_BTD.flatten(0, 1), model.lm_head.weight, rows[:, 1:].flatten())
    loss = loss / rows[:, 1:].numel()
    loss.backward()
    optimizers.step(rate)
    optimizers.zero_grad()
    return float(loss.detach())


def activations(model: PhiForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """Outputs of the parts on a fixed batch: embedding, last attention, last MLP, final stream, logits."""
    found: dict[str, Tensor] = {}
    last = model.model.layers[-1]
    hooks = [
        module.register_forward_hook(lambda m, i, output, name=name: found.__setitem__(name, output.detach()))
        for name, module in (
            ("embedding", model.model.embed_tokens),
            ("attention", last.self_attn),  # type: ignore[union-attr]
            ("mlp", last.mlp),  # type: ignore[union-attr]
            ("stream", last),
        )
    ]
    with torch.no_grad():
        found["logits"] = model(ids)
    for hook in hooks:
        hook.remove()
    return found


def coordinate_check(
    widths: list[int],
    parametrization: str,
    kind: str,
    *,
    steps: int = 6,
    rate: float = 1e-2,
    seeds: int = 2,
    rows: int = 8,
    length: int = 64,
) -> dict[str, list[float]]:
    """RMS of each part's change after `steps` steps, by width (mean over seeds)."""
    text = text_bytes()
    sizes: dict[str, list[float]] = {part: [] for part in PARTS}
    for width in widths:
        changes: dict[str, list[float]] = {part: [] for part in PARTS}
        for seed in range(seeds):
            model, optimizers = make(width, widths[0], parametrization, kind, seed=seed)
            feed = batches(text, rows, length, seed)
            fixed = next(batches(text, 4, length, 99))[:, :-1]
            before = activations(model, fixed)
            for _ in range(steps):
                step(model, optimizers, next(feed), rate)
            after = activations(model, fixed)
            for part in PARTS:
                changes[part].append(float((after[part] - before[part]).square().mean().sqrt()))
        for part in PARTS:
            sizes[part].append(float(np.mean(changes[part])))
    return sizes


def slope(widths: list[int], sizes: list[float]) -> float:
    """Exponent of the growth with width: the slope of a line through the logarithms."""
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])


def transfer(
    widths: list[int], rates: list[float], parametrization: str, kind: str, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Loss on rows that are not trained on, by width, for every learning rate."""
    text, steps = text_bytes(), options.steps or 150
    part = len(text) // 10
    text, kept = text[part:], text[:part]
    judged = next(batches(kept, 64, options.length, 7)).to(options.device)
    shape = {
        "layers": options.layers,
        "head": options.head,
        "length": max(128, options.length),
        "device": options.device,
    }
    found: dict[str, list[float]] = {}
    for width in widths:
        found[str(width)] = []
        for rate in rates:
            model, optimizers = make(width, widths[0], parametrization, kind, **shape)
            feed = batches(text, options.rows, options.length, 0)
            for index in range(steps):
                # A short warm-up and a linear decay, as in real runs.
                now = rate * min(1.0, (index + 1) / (0.1 * steps), (steps - index) / (0.5 * steps))
                step(model, optimizers, next(feed).to(options.device), now)
            with torch.no_grad():
                logits = model(judged[:, :-1]).flatten(0, 1)
            value = float(torch.nn.functional.cross_entropy(logits, judged[:, 1:].flatten()))
            found[str(width)].append(value if math.isfinite(value) else 99.0)
        print(f"  width {width}: " + ", ".join(f"{v:.3f}" for v in found[str(width)]), flush=True)
    return found


def best_rate(rates: list[float], losses: list[float]) -> float:
    """The minimum of a parabola through the best rate and its neighbours, in log rate."""
    at = int(np.argmin(losses))
    if at in (0, len(rates) - 1):
        return rates[at]
    x, y = np.log(rates[at - 1 : at + 2]), np.array(losses[at - 1 : at + 2])
    a, b, _ = np.polyfit(x, y, 2)
    return float(np.exp(-b / (2 * a)))


def plot(panels: list[tuple[str, list[Any], dict[str, list[float]]]], path: Path, x: str, y: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.4), sharey=True, squeeze=False
    )
    axes = grid[0]
    for axis, (title, xs, lines) in zip(axes, panels):
        for name, ys in lines.items():
            axis.plot(xs, ys, marker="o", markersize=3, label=name)
        axis.set(xscale="log", title=title, xlabel=x)
    axes[0].set_ylabel(y)
    if "change" in y:
        axes[0].set_yscale("log")
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="mup_results")
    parser.add_argument("--transfer", action="store_true", help="sweep learning rates at several widths")
    parser.add_argument("--widths", default="64,128,256,512")
    parser.add_argument("--rates", default="0.0005,0.001,0.002,0.004,0.008,0.016,0.032,0.064")
    parser.add_argument("--steps", type=int, default=0, help="default 6 (check), 150 (sweep)")
    parser.add_argument("--kinds", default="adamw,muon")
    parser.add_argument("--parametrizations", default="standard,mup")
    sweep = parser.add_argument_group("the sweep's models and batches")
    sweep.add_argument("--device", default="cpu")
    sweep.add_argument("--layers", type=int, default=2)
    sweep.add_argument("--head", type=int, default=16, help="head size; one for all widths")
    sweep.add_argument("--rows", type=int, default=8)
    sweep.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    widths = [int(w) for w in options.widths.split(",")]
    rates = [float(r) for r in options.rates.split(",")]
    name = "transfer" if options.transfer else "coordinates"
    results: dict[str, Any] = {"widths": widths}
    panels = []
    for kind in options.kinds.split(","):
        for parametrization in options.parametrizations.split(","):
            title = f"{parametrization}, {kind}"
            if options.transfer:
                found = transfer(widths, rates, parametrization, kind, options)
                best = [best_rate(rates, found[str(w)]) for w in widths]
                results[title] = {"rates": rates, "losses": found, "best_rate": best}
                exponent = slope(widths, best)
                shown = ", ".join(
                    f"{w}: {r:.2e} (loss {min(found[str(w)]):.3f})" for w, r in zip(widths, best)
                )
                print(f"{title:<16} best rate ~ width^{exponent:+.2f}   {shown}", flush=True)
                lines = {f"width {w}": [min(v, 6.0) for v in found[str(w)]] for w in widths}
                panels.append((title, rates, lines))
            else:
                sizes = coordinate_check(widths, parametrization, kind, steps=options.steps or 6)
                slopes = {part: slope(widths, values) for part, values in sizes.items()}
                results[title] = {"rms_change": sizes, "slopes": slopes}
                print(
                    f"{title:<16} slopes  " + "  ".join(f"{p} {s:+.2f}" for p, s in slopes.items()),
                    flush=True,
                )
                panels.append((title, widths, sizes))
            (out / f"{name}.json").write_text(json.dumps(results, indent=1))
    if options.transfer:
        plot(panels, out / f"{name}.svg", "learning rate", "loss")
    else:
        plot(panels, out / f"{name}.svg", "width", "rms change")
    print(f"wrote {out / name}.json and .svg")


if __name__ == "__main__":
    main()
