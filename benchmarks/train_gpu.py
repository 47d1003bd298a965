"""Training speed on one GPU: PocketPhi against transformers and transformers + liger-kernel.

    python benchmarks/train_gpu.py [--out FOLDER] [--budget-s 450]

Shape of phi-3-mini (3.82B parameters), sequence 4096, AdamW, gradient clipping, random tokens (made
on the device; reading data is measured elsewhere), no sliding window and no LongRoPE for anyone, plain
causal attention. Every case runs in a process of its own, first to last on the same GPU, and prints the
median of its steps. MFU counts 6 FLOPs per matrix parameter plus causal attention, over 989 TFLOP/s.

Ours: the step of the trainer, with its checks (gradient norm over all parameters, clipping, the update
withheld when the norm is not finite) and float32 moments; float32 master weights (or stochastic
rounding where the case says so). The peers: bfloat16 weights and moments, fused AdamW, which moves half
of our optimizer's memory. Cases that do not fit or do not run say so; nothing is left out.

`--device cpu --model nano --sequence 64 --batches 2` is the dry run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from pocketphi.model import ModelConfig

PEAK_FLOPS = 989e12
# Case and the micro-batches tried, most telling first: a budget that ends early loses the least.
CASES: list[tuple[str, list[int]]] = [
    ("kernels", [4]),
    ("ours-bf16", [6]),
    ("liger", [6]),
    ("ours-fp8", [6]),
    ("transformers", [4]),
    ("liger", [4]),
    ("ours-bf16", [4]),
    ("ours-fp8-rowwise", [4]),
    ("ours-bf16-stochastic", [4]),
    ("ours-bf16-documents", [4]),
    ("ours-fp8-unfused", [4]),
    ("transformers", [2]),
    ("liger", [2]),
    ("ours-bf16", [2]),
]


def shape(options: argparse.Namespace) -> ModelConfig:
    config = ModelConfig.named(options.model)
    return dataclasses.replace(
        config,
        sliding_window=None,
        rope_scaling=None,
        max_position_embeddings=options.sequence,
        original_max_position_embeddings=None,
    )


def weight_type(options: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if options.device == "cuda" else torch.float32  # CPUs emulate bfloat16


# Ours


def ours(options: argparse.Namespace, variant: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return one training step of ours, and what it says about itself."""
    from pocketphi.model import PhiForCausalLM
    from pocketphi.train.acceleration import AccelerationConfig, accelerate
    from pocketphi.train.cross_entropy import chunked_cross_entropy
    from pocketphi.train.low_precision import LowPrecisionAdamW, clip_scale, total_norm

    config = shape(options)
    float8 = "rowwise" if "rowwise" in variant else "tensorwise" if "fp8" in variant else "off"
    torch.set_default_dtype(weight_type(options))
    with torch.device(options.device):
        model = PhiForCausalLM(config, scale_residual=True)
    torch.set_default_dtype(torch.float32)
    accelerate(
        model,
        AccelerationConfig(
            compile=options.compile,
            float8=float8,  # type: ignore[arg-type]
            float8_fused="unfused" not in variant,
            checkpoint_layers=options.checkpoint_layers,
        ),
    )
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizer = LowPrecisionAdamW(
        [{"params": matrices}, {"params": norms, "weight_decay": 0.0}],
        lr=1e-5,
        rounding="stochastic" if "stochastic" in variant else "master",
        compiled=options.compile,
    )
    tokens = options.batch * options.sequence
    documents = None
    if "documents" in variant:  # eight documents a row, of random lengths
        cuts = torch.rand(options.batch, options.sequence, device=options.device) < 8 / options.sequence
        documents = cuts.cumsum(1)

    def step() -> torch.Tensor:
        ids_BT, targets_BT = batch(options, config.vocab_size)
        x_BTD = model.hidden(ids_BT, document_ids_BT=documents)
        loss, _ = chunked_cross_entropy(
            x_BTD.flatten(0, 1), model.lm_head.weight, targets_BT.flatten(), compiled=options.compile
        )
        loss = loss / tokens
        loss.backward()
        optimizer.grad_scale = clip_scale(total_norm(model.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, {"parameters": model.num_parameters}


# Peers


def peer(options: argparse.Namespace, variant: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return one training step of transformers' Phi-3, with liger-kernel where asked for."""
    import transformers

    notes: dict[str, Any] = {"transformers": transformers.__version__}
    if variant == "liger":
        from importlib.metadata import version

        from liger_kernel.transformers import apply_liger_kernel_to_phi3

        apply_liger_kernel_to_phi3()
        notes["liger_kernel"] = version("liger-kernel")
    config = shape(options)
    tree = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type")}
    hf_config = transformers.Phi3Config(**{**tree, "use_cache": False})
    hf_config._attn_implementation = "sdpa"
    torch.set_default_dtype(weight_type(options))
    with torch.device(options.device):
        model = transformers.Phi3ForCausalLM(hf_config)
    torch.set_default_dtype(torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step() -> torch.Tensor:
        ids_BT, _ = batch(options, config.vocab_size)
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, {**notes, "parameters": sum(p.numel() for p in model.parameters())}


def batch(options: argparse.Namespace, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (options.batch, options.sequence + 1), device=options.device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


# Timing


def run_case(options: argparse.Namespace) -> dict[str, Any]:
    """Time one case in this process."""
    from pocketphi.train.acceleration import fastest_attention

    on_gpu = options.device == "cuda"
    torch.manual_seed(0)
    if options.case == "kernels":
        return kernels(options)
    step, notes = (ours if options.case.startswith("ours") else peer)(options, options.case)
    started = time.perf_counter()
    with fastest_attention():
        losses = [step() for _ in range(options.warmup)]
        _synchronize(on_gpu)
        warmup_s = time.perf_counter() - started
        seconds = []
        if on_gpu:  # events between steps: the device is never waited for inside the measurement
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(options.steps + 1)]
            marks[0].record()
            for mark in marks[1:]:
                losses.append(step())
                mark.record()
            _synchronize(on_gpu)
            seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
        else:
            for _ in range(options.steps):
                begin = time.perf_counter()
                losses.append(step())
                seconds.append(time.perf_counter() - begin)
        if on_gpu and options.profile:
            _profile(step, Path(options.out) / f"profile-{options.case}-{options.batch}.txt")
    values = [float(loss) for loss in losses]
    median = statistics.median(seconds)
    tokens = options.batch * options.sequence
    flops = shape(options).train_flops_per_token(options.sequence)
    return {
        **notes,
        "tokens_per_s": round(tokens / median, 1),
        "mfu": round(tokens / median * flops / PEAK_FLOPS, 4),
        "step_s": round(median, 5),
        "step_min_s": round(min(seconds), 5),
        "step_max_s": round(max(seconds), 5),
        "num_steps": len(seconds),
        "warmup_s": round(warmup_s, 1),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "first_loss": round(values[0], 4),
        "last_loss": round(values[-1], 4),
    }


def _synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _profile(step: Callable[[], Any], path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
        torch.cuda.synchronize()
    table = profiler.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90
    )
    path.write_text(table)


def kernels(options: argparse.Namespace) -> dict[str, Any]:
    """Rates of the parts: products in bf16 and fp8, quantisation, attention. One short line each."""
    if options.device != "cuda":
        return {"skipped": "kernels are timed on a GPU only"}
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from triton.testing import do_bench

    from pocketphi.train.float8 import scale_of, to_float8
    from pocketphi.train.float8_kernels import quantize_both

    results: dict[str, Any] = {}
    timed = lambda run: do_bench(run, warmup=20, rep=120, return_mode="median") / 1e3  # noqa: E731
    config = shape(options)
    tokens, width = options.batch * options.sequence, config.hidden_size
    kv = config.num_key_value_heads * config.head_dim
    shapes = {
        "8192": (8192, 8192, 8192),
        "qkv": (tokens, width, width + 2 * kv),
        "o": (tokens, width, width),
        "gate_up": (tokens, width, 2 * config.intermediate_size),
        "down": (tokens, config.intermediate_size, width),
        "gate_up_dw": (2 * config.intermediate_size, tokens, width),
    }
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    one = torch.ones((), device="cuda")
    for name, (n, k, m) in shapes.items():
        a, b = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in ((n, k), (m, k)))
        flops = 2 * n * k * m
        results[f"bf16_{name}_tflops"] = flops / timed(lambda a=a, b=b: a @ b.t()) / 1e12
        a8, b8 = a.to(e4m3), b.to(e4m3)
        for fast in (True, False):
            try:
                run = lambda a=a8, b=b8, f=fast: torch._scaled_mm(  # noqa: E731
                    a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=f
                )
                results[f"fp8_{name}_{'fast' if fast else 'exact'}_tflops"] = flops / timed(run) / 1e12
            except RuntimeError as error:
                results[f"fp8_{name}_error"] = str(error)[:200]
    for label, dtype in (("e4m3", e4m3), ("e5m2", e5m2)):
        x = torch.randn(1000, 3088, device="cuda", dtype=torch.bfloat16)
        scale = scale_of(x, dtype, None)
        expected = to_float8(x, scale, dtype).float()
        straight, turned = quantize_both(x, scale, dtype)
        results[f"quantize_{label}_wrong"] = int(
            (straight.float() != expected).sum() + (turned.float() != expected.t()).sum()
        )
    x = torch.randn(tokens, config.intermediate_size, device="cuda", dtype=torch.bfloat16)
    scale = scale_of(x, e4m3, None)
    results["quantize_both_tb_per_s"] = 4 * x.numel() / timed(lambda: quantize_both(x, scale, e4m3)) / 1e12
    q, k, v = (
        torch.randn(options.batch, options.sequence, config.num_attention_heads, config.head_dim,
                    device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )  # fmt: skip
    flops = 2 * q.numel() * options.sequence  # causal: half of 4 T^2 D
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                heads = [t.transpose(1, 2) for t in (q, k, v)]
                forward = lambda: torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)  # noqa: E731, B023
                results[f"{name.lower()}_forward_tflops"] = flops / timed(forward) / 1e12
                y = forward()
                dy = torch.randn_like(y)
                back = lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)  # noqa: E731, B023
                results[f"{name.lower()}_backward_tflops"] = 2.5 * flops / timed(back) / 1e12
        except RuntimeError as error:
            results[f"{name.lower()}_error"] = str(error)[:200]
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in results.items()}


# All cases


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every case in its own process until the budget is used up."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.budget_s
    rows: list[dict[str, Any]] = []
    chosen = options.cases.split(",") if options.cases else None
    plan = [(case, size) for case, sizes in CASES for size in sizes if chosen is None or case in chosen]
    if options.batches:
        sizes = [int(b) for b in options.batches.split(",")]
        plan = [(case, size) for case in dict.fromkeys(c for c, _ in plan) for size in sizes]
    while plan:
        case, size = plan.pop(0)
        row: dict[str, Any] = {"case": case, "batch": size}
        left = deadline - time.monotonic()
        if left < 20:
            row["error"] = "not run: the time budget is used up"
        else:
            row.update(_in_process(options, case, size, min(left, options.case_s)))
        if str(row.get("error", "")).startswith("out of memory") and size > 1:
            plan.insert(0, (case, size - 1))
        rows.append(row)
        print(json.dumps(row), flush=True)
        (out / "train_gpu.json").write_text(json.dumps(rows, indent=1))
    return rows


def _in_process(options: argparse.Namespace, case: str, size: int, limit_s: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", case, "--batch", str(size), "--out", options.out]
    for name in ("device", "model", "sequence", "steps", "warmup", "checkpoint_layers"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += [] if options.compile else ["--no-compile"]
    command += ["--profile"] if options.profile else []
    try:
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished within {limit_s:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        log = Path(options.out) / f"error-{case}-{size}.txt"
        log.write_text(done.stdout[-20_000:] + "\n" + done.stderr[-40_000:])
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        return {"error": last[:300], "log": log.name}
    return json.loads(lines[-1])


def summarize(rows: list[dict[str, Any]]) -> None:
    """Print the table and the ratios that matter."""
    print(f"\n{'case':<22}{'batch':>6}{'tokens/s':>11}{'MFU':>8}{'step s':>9}{'GB':>7}  loss / error")
    best: dict[str, float] = {}
    for row in rows:
        if "tokens_per_s" in row:
            best[row["case"]] = max(best.get(row["case"], 0), row["tokens_per_s"])
            print(
                f"{row['case']:<22}{row['batch']:>6}{row['tokens_per_s']:>11,.0f}{row['mfu']:>8.1%}"
                f"{row['step_s']:>9.3f}{row['peak_memory_bytes'] / 1e9:>7.1f}  {row['last_loss']}"
            )
        elif "error" in row:
            print(f"{row['case']:<22}{row['batch']:>6}  {row['error'][:120]}")
    for left, right in (
        ("ours-bf16", "transformers"),
        ("ours-bf16", "liger"),
        ("ours-fp8", "ours-bf16"),
        ("ours-fp8-rowwise", "ours-bf16"),
        ("ours-bf16-documents", "ours-bf16"),
    ):
        if left in best and right in best:
            print(f"{left} / {right} = {best[left] / best[right]:.3f} (best batch each)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="train_gpu_results", help="folder for results, profiles and errors")
    parser.add_argument("--budget-s", type=float, default=450, help="stop starting cases after so long")
    parser.add_argument("--case-s", type=float, default=150, help="longest time of one case")
    parser.add_argument("--cases", default="", help="only these, separated by commas")
    parser.add_argument("--batches", default="", help="micro-batches instead of each case's own")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="phi-3-mini-4k")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--checkpoint-layers", type=int, default=0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--profile", action="store_true", help="also write a table of kernels per case")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is None:
        summarize(run_all(options))
        return
    try:
        print(json.dumps(run_case(options)), flush=True)
    except torch.OutOfMemoryError as error:
        print(json.dumps({"error": f"out of memory: {str(error)[:160]}"}))
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
