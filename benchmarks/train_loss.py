"""What cheaper arithmetic costs in loss: 500 steps of a small real run, five ways, same data and seed.

    python benchmarks/train_loss.py [--out FOLDER] [--text FOLDER ...]

Byte-level language model (Phi-3 blocks, about 100M parameters) on real text: by default the Python
sources and documentation of the standard library on this machine, or the files given. Variants:
float32 weights with autocast (the judge), bfloat16 weights with float32 master, the same with
stochastic rounding, and 8-bit products with tensorwise and rowwise scaling over the float32 master.
Prints the mean loss of the last 50 steps of each and its difference from the judge.

`--device cpu --steps 3 --hidden 64 --layers 2 --batch 2 --sequence 64` is the dry run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from pocketphi.model import ModelConfig, PhiForCausalLM
from pocketphi.train.acceleration import AccelerationConfig, accelerate, fastest_attention
from pocketphi.train.cross_entropy import chunked_cross_entropy
from pocketphi.train.low_precision import LowPrecisionAdamW, clip_scale, total_norm

VARIANTS = {
    "float32-autocast": {"weights": "float32"},
    "bf16-master": {"weights": "master"},
    "bf16-stochastic": {"weights": "stochastic"},
    "fp8-tensorwise": {"weights": "master", "float8": "tensorwise"},
    "fp8-rowwise": {"weights": "master", "float8": "rowwise"},
}


def read_bytes(folders: list[str], limit: int) -> torch.Tensor:
    """All text of the folders as bytes, files in a fixed shuffled order."""
    roots = [Path(f) for f in folders] or [Path(sysconfig.get_paths()["stdlib"])]
    files = [f for root in roots for f in ([root] if root.is_file() else sorted(root.rglob("*")))]
    files = [
        f for f in files if f.suffix in (".py", ".txt", ".md", ".rst") and "site-packages" not in f.parts
    ]
    random.Random(0).shuffle(files)
    parts, size = [], 0
    for file in files:
        raw = file.read_bytes()
        parts.append(raw + b"\0")
        size += len(raw) + 1
        if size > limit:
            break
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def train(name: str, text: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Run one variant and return its losses."""
    how: dict[str, str] = VARIANTS[name]
    torch._dynamo.reset()
    config = ModelConfig(
        vocab_size=256,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 5 // 2 // 16 * 16,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=options.sequence,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = PhiForCausalLM(config)
    model.reset_parameters(seed=0, scale_residual=True)
    exact = {n: p.detach().clone() for n, p in model.named_parameters()}
    low = how["weights"] != "float32"
    model = model.to(options.device, torch.bfloat16 if low else torch.float32)
    accelerate(
        model,
        AccelerationConfig(compile=options.compile, float8=how.get("float8", "off")),  # type: ignore[arg-type]
    )
    rounding = how["weights"] if low else "master"
    optimizer = LowPrecisionAdamW(
        model.parameters(),
        lr=options.rate,
        rounding=rounding,  # type: ignore[arg-type]
        compiled=options.compile,
    )
    if rounding == "master" and low:
        for parameter_name, parameter in model.named_parameters():
            optimizer.keep_master(parameter, exact[parameter_name])
    draw = torch.Generator().manual_seed(1)
    span = torch.arange(options.sequence + 1)
    losses: list[torch.Tensor] = []
    started = time.perf_counter()
    with fastest_attention():
        for step in range(options.steps):
            rate = options.rate * min(1.0, (step + 1) / 50, (options.steps - step) / (options.steps * 0.3))
            for group in optimizer.param_groups:
                group["lr"] = rate
            starts = torch.randint(0, len(text) - options.sequence - 1, (options.batch, 1), generator=draw)
            rows = text[starts + span].long().to(options.device)
            with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=not low):
                x_BTD = model.hidden(rows[:, :-1].contiguous())
                loss, _ = chunked_cross_entropy(
                    x_BTD.flatten(0, 1),
                    model.lm_head.weight,
                    rows[:, 1:].flatten(),
                    chunk=16384,
                    compiled=options.compile,
                )
            loss = loss / (options.batch * options.sequence)
            loss.backward()
            optimizer.grad_scale = clip_scale(total_norm(model.parameters()), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
    values = torch.stack(losses).tolist()
    tail = values[-min(50, len(values)) :]
    return {
        "variant": name,
        "parameters": model.num_parameters,
        "num_steps": len(values),
        "tail_loss": sum(tail) / len(tail),
        "wall_s": round(time.perf_counter() - started, 1),
        "losses": [round(v, 5) for v in values],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="train_loss_results")
    parser.add_argument("--text", nargs="*", default=[], help="folders or files of text")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    text = read_bytes(options.text, 200_000_000)
    print(f"{len(text) / 1e6:.1f} MB of text", flush=True)
    rows: list[dict[str, Any]] = []
    for name in options.variants.split(","):
        row = train(name, text, options)
        rows.append(row)
        (out / "train_loss.json").write_text(json.dumps(rows))
        difference = row["tail_loss"] / rows[0]["tail_loss"] - 1
        print(
            f"{name:<18} loss of the last steps {row['tail_loss']:.5f}  "
            f"({difference:+.3%} against {rows[0]['variant']})  {row['wall_s']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
