"""How faithful 4-bit files are: rounding to nearest, importance, error feedback, and llama.cpp's own types.

    python benchmarks/quantization.py SOURCE --data DIR [--out DIR] [--llama-cpp PYTHON]

SOURCE is a model with weights of 16 bits or more (a Hugging Face folder), or a quantised GGUF file; the
latter is dequantised, and its grid is hidden by rescaling channels in a way that leaves the function as
it is (norm gains go into the matrices after them; v against o and up against down get random factors).
DIR holds corpus/*.jsonl.zst. `--llama-cpp` names a Python that has llama-cpp-python; its quantiser then
makes Q4_0, Q4_K_S and Q4_K_M from the same 16-bit file. Every file is compared with the float model on
the same windows of text that no calibration has seen. With `--llama-cpp` our files are also loaded by
llama.cpp, and its greedy continuation of 20 beginnings is compared with ours, 64 tokens each. Prints a
table and, with --json, the figures.

--groups 64 128 asks another question: what do wider groups with one scale cost? The layers' matrices are
quantised (calibrated, in memory only) to symmetric 4-bit numbers with one half-precision scale for so many
weights, beside Q4_0 (groups of 32) and Q4_K, everything else at 8 bits, and compared in torch. A width that
does not divide the rows is left out, which is said.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocketphi import engine, quant
from pocketphi import tokenizer as tokenizers
from pocketphi.core.gguf import TYPE_BY_NAME, TensorType
from pocketphi.engine import formats
from pocketphi.engine.weights import Weights, open_weights
from pocketphi.model import save as save_model
from pocketphi.quant import calibration, fidelity, rounding, texts
from pocketphi.quant.calibration import torch_model

RUNS = [
    ("q8_0", "rtn"),
    ("q4_0", "rtn"),
    ("q4_0", "importance"),
    ("q4_0", "gptq"),
    ("q4_k", "rtn"),
    ("q4_k", "gptq"),
    ("q4_k_m", "rtn"),
    ("q4_k_m", "gptq"),
]
CORPORA = ("textbooks-openstax", "encyclopedia", "web-mixed", "stories", "docs-technical")
LLAMA_CPP_TYPES = {"Q4_0": 2, "Q4_K_S": 14, "Q4_K_M": 15}


def natural_folder(source: Path, out: Path) -> Path:
    """Write a float32 Hugging Face folder of `source` whose weights lie on no grid; return it."""
    if (out / "config.json").is_file():
        return out
    with torch.no_grad():
        weights = open_weights(source)
        model: Any = torch_model(weights)
        generator = torch.Generator().manual_seed(0)

        def factors(count: int) -> torch.Tensor:
            return torch.exp(torch.empty(count).uniform_(-0.25, 0.25, generator=generator))

        config = weights.config
        d, H, K = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            attention.qkv_proj.weight *= layer.input_layernorm.weight
            mlp.gate_up_proj.weight *= layer.post_attention_layernorm.weight
            layer.input_layernorm.weight.fill_(1.0)
            layer.post_attention_layernorm.weight.fill_(1.0)
            s = factors(K * d)
            attention.qkv_proj.weight[(H + K) * d :] *= s[:, None]
            attention.o_proj.weight /= s.reshape(K, 1, d).expand(K, H // K, d).reshape(-1)
            s = factors(config.intermediate_size)
            mlp.gate_up_proj.weight[config.intermediate_size :] *= s[:, None]
            mlp.down_proj.weight /= s
        tokenizer = tokenizers.load(source)
        save_model(model, out, tokenizer, dtype="float32")
    return out


def texts_of(data: Path, out: Path, per_corpus: int = 40) -> tuple[Path, Path]:
    """Write calibration and evaluation texts, alternate documents of every corpus; return both files."""
    import zstandard

    calibration, evaluation = out / "calibration.jsonl", out / "evaluation.jsonl"
    with open(calibration, "w") as first, open(evaluation, "w") as second:
        for name in CORPORA:
            with open(data / "corpus" / f"{name}.jsonl.zst", "rb") as raw:
                lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")
                kept = 0
                for number, line in enumerate(lines):
                    if kept >= 2 * per_corpus:
                        break
                    text = json.loads(line)["text"]
                    if number % 7 or len(text) < 1500:
                        continue
                    (first if kept % 2 else second).write(json.dumps({"text": text[:6000]}) + "\n")
                    kept += 1
    return calibration, evaluation


def logits_of(path: Path, reference: Weights) -> fidelity.Logits:
    """Logits of a GGUF file of any type, dequantised by the `gguf` package, in the float32 torch model."""
    import gguf

    found = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}

    class Other(Weights):
        def array(self, name: str) -> np.ndarray:
            from pocketphi.quant import model_file

            for plan in plans:
                if plan.name in found and model_file.source_name(plan.name) == name:
                    tensor = found[plan.name]
                    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(plan.shape)
            raise KeyError(name)

    from pocketphi.quant import model_file
    from pocketphi.quant.config import QuantConfig, tensor_types

    types, _ = tensor_types(QuantConfig(type="f32"), reference.config)
    plans = [p for p in model_file.tensor_plans(reference.config, types) if not p.name.startswith("rope_")]
    model = torch_model(Other(path, "phi3", reference.config, {}))

    def logits(ids: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([list(ids)]))[0].numpy()

    return logits


GREEDY = """
import json, sys
import numpy as np
from llama_cpp import Llama, llama_get_logits_ith
model = Llama(sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=False, verbose=False)
for line in sys.stdin:
    want = json.loads(line)
    model.reset()
    model.eval(want["ids"])
    said = []
    for _ in range(want["count"]):
        logits = np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
        said.append(int(np.argmax(logits)))
        model.eval(said[-1:])
    print(json.dumps(said), flush=True)
"""


def agreement(
    python: str, path: Path, prompts: list[list[int]], count: int = 64, tie: float = 0.5
) -> dict[str, Any]:
    """Greedy decoding of one file by llama.cpp and by us.

    Where the two part, the gap between our two best logits tells a tie that rounding decided (both round
    activations to 8 bits, in another order) from a mistake: `widest_gap` is the largest such gap, in units
    of the logits' standard deviation; `ties` counts the partings with a gap below `tie` of it.
    """
    lines = "".join(json.dumps({"ids": ids, "count": count}) + "\n" for ids in prompts)
    done = subprocess.run(
        [python, "-c", GREEDY, str(path)], input=lines, capture_output=True, text=True, check=True
    )
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    same, ties, gaps, prefixes = 0, 0, [], []
    with engine.load(path, context_length=512) as model:
        for ids, other in zip(prompts, theirs, strict=True):
            ours = model.generate(ids, max_new_tokens=count, stop_ids=[], lookup=0).tokens
            if ours == other:
                same += 1
                prefixes.append(count)
                continue
            at = next(n for n, (a, b) in enumerate(zip(ours, other)) if a != b)
            row = model.logits([*ids, *ours[:at]])[-1]
            gap = float((row[ours[at]] - row[other[at]]) / row.std())
            gaps.append(gap)
            ties += gap < tie
            prefixes.append(at)
    return {
        "prompts": len(prompts), "identical": same, "partings_at_ties": ties, "widest_gap": max(gaps, default=0.0),
        "mean_common_tokens": float(np.mean(prefixes)),
    }  # fmt: skip


def llama_cpp_files(python: str, f32: Path, out: Path) -> dict[str, Path]:
    """Let llama.cpp's quantiser make its types from our float file; return them by name."""
    made = {}
    for name, file_type in LLAMA_CPP_TYPES.items():
        path = out / f"llama-cpp-{name}.gguf"
        code = (
            "import sys, ctypes, llama_cpp as l; p = l.llama_model_quantize_default_params();"
            "p.ftype = int(sys.argv[3]); p.nthread = 2;"
            "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))"
        )
        command = [python, "-c", code, str(f32), str(path), str(file_type)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        made[f"llama.cpp {name}"] = path
    return made


def wide_type(width: int) -> str:
    """Make 4-bit numbers with one scale for `width` weights known to this process; return their name.

    The grid search, the error feedback and the values are those of Q4_0, 4 + 16 / width bits a weight.
    """
    name = f"groups of {width}"
    fields = [("d", "<f2"), ("q", "u1", width // 2)]
    known = formats.FORMATS["Q4_0"]
    formats.FORMATS[name] = formats.Format(name, -1, width, np.dtype(fields), known.decode)
    TYPE_BY_NAME[name] = TensorType(-1, name, width, 2 + width // 2)
    rounding._FIT[name] = rounding._fit_q4_0
    rounding.TYPES = (*rounding.TYPES, name)
    calibration._FEEDBACK = (*calibration._FEEDBACK, name)
    return name


def pack_wide(type_: str, grid: rounding.Grid, q_NW: np.ndarray) -> np.ndarray:
    """`rounding.pack` that also knows the types of `wide_type`."""
    if not type_.startswith("groups of "):
        return _PACK(type_, grid, q_NW)
    blocks = np.zeros(len(q_NW), dtype=formats.FORMATS[type_].layout)
    blocks["d"], blocks["q"] = grid.fields["d"], rounding._nibbles((q_NW + 8).astype(np.uint8))
    return blocks


_PACK = rounding.pack


def wider_groups(
    reference: Weights, ids_ST: np.ndarray, float_logits: fidelity.Logits, windows: Any, widths: list[int]
) -> list[dict[str, Any]]:
    """Return the fidelity of the layers' matrices in Q4_0, in Q4_K and in groups of every width."""
    rounding.pack = pack_wide
    columns = (reference.config.hidden_size, reference.config.intermediate_size)
    rows = []
    for type_ in ["Q4_0", *(wide_type(width) for width in widths), "Q4_K"]:
        kind = TYPE_BY_NAME[type_]
        bits = 8 * kind.block_bytes / kind.block_size
        if any(c % kind.block_size for c in columns):
            print(f"{type_}: rows of {columns} weights do not fill its blocks", file=sys.stderr)
            continue
        names = quant.config.tensor_types(quant.QuantConfig(type="q8_0"), reference.config)[0]
        types = {name: type_ if name.startswith("blk.") else "Q8_0" for name in names}
        model: Any = torch_model(reference)
        state = dict(model.named_parameters())
        part = {"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
                "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
                "token_embd": "model.embed_tokens", "output": "lm_head"}  # fmt: skip
        for name, raw, _ in calibration.calibrate(reference, types, ids_ST, "gptq"):
            stem = name.removesuffix(".weight").split(".")
            path = f"model.layers.{stem[1]}.{part[stem[2]]}" if stem[0] == "blk" else part[stem[0]]
            target = state[f"{path}.weight"]
            with torch.no_grad():
                target.copy_(torch.from_numpy(formats.dequantise(raw, types[name], tuple(target.shape))))

        def logits(ids: Any, model: Any = model) -> np.ndarray:
            with torch.no_grad():
                return model(torch.tensor([list(ids)]))[0].numpy()

        found = fidelity.compare(float_logits, logits, windows)
        rows.append({"name": type_, "bits_per_weight": bits, **found})
        print(
            f"{type_:16} {bits:.3f} bits  KL {found['kl_divergence']:.5f} ± {found['kl_divergence_stderr']:.5f}  "
            f"loss gap {found['nll_gap']:+.5f} ± {found['nll_gap_stderr']:.5f}  same top token "
            f"{found['top1_agreement']:.4f}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/quantization"))
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--tokens", type=int, default=8192, help="evaluated tokens")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument(
        "--runtime",
        choices=("engine", "torch"),
        default="engine",
        help="what runs our files: the engine that ships, or torch on the dequantised weights",
    )
    parser.add_argument("--only", nargs="*", help="runs such as q4_0-gptq")
    parser.add_argument("--groups", nargs="*", type=int, help="compare wider groups instead")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    folder = natural_folder(options.source, out / "float")
    calibration_text, evaluation = texts_of(options.data, out)
    reference = open_weights(folder)
    tokenizer = tokenizers.load(folder)
    windows, _ = texts.windows_from(evaluation, tokenizer, options.tokens, 512, heldout=True)
    documents = [json.loads(line)["text"] for line in evaluation.open()]
    step = max(1, len(documents) // 20)
    beginnings = [tokenizer.encode(text, add_bos=tokenizer.add_bos)[:40] for text in documents[::step]][:20]
    float_model = torch_model(reference)
    cache: dict[tuple[int, ...], np.ndarray] = {}

    def float_logits(ids: Any) -> np.ndarray:
        key = tuple(ids)
        if key not in cache:
            with torch.no_grad():
                cache[key] = float_model(torch.tensor([list(ids)]))[0].numpy().astype(np.float32)
        return cache[key]

    if options.groups is not None:
        size = min(512, reference.config.max_position_embeddings)
        pieces, _ = texts.windows_from(
            calibration_text, tokenizer, options.calibration_tokens, size, heldout=False
        )
        found = wider_groups(reference, np.array(pieces), float_logits, windows, options.groups)
        if options.json:
            print(json.dumps(found, indent=1))
        return

    rows = []

    def report(name: str, path: Path, figures: dict[str, float], seconds: float) -> None:
        row = {"name": name, "file_bytes": path.stat().st_size, "quantise_s": round(seconds, 1), **figures}
        rows.append(row)
        print(
            f"{name:24} {row['file_bytes'] / 1e6:8.2f} MB  KL {figures['kl_divergence']:.5f} "
            f"± {figures['kl_divergence_stderr']:.5f}  loss gap {figures['nll_gap']:+.5f} "
            f"± {figures['nll_gap_stderr']:.5f}  same top token {figures['top1_agreement']:.4f} "
            f"± {figures['top1_agreement_stderr']:.4f}  ({seconds:.0f} s)",
            file=sys.stderr,
            flush=True,
        )

    for type_, method in RUNS:
        name = f"{type_}-{method}"
        if options.only and name not in options.only:
            continue
        config = quant.QuantConfig(
            type=type_,
            method=method,  # type: ignore[arg-type]
            calibration=calibration_text,
            calibration_tokens=options.calibration_tokens,
            fidelity_tokens=0,
            name="benchmark",
        )
        started = time.time()
        made = quant.run(config, {"checkpoint": folder}, out=out / name)
        seconds = time.time() - started
        path = made.file("model.gguf")
        if options.runtime == "engine":
            with engine.load(path, context_length=512) as loaded:
                figures = fidelity.compare(float_logits, loaded.logits, windows)
        else:
            figures = fidelity.compare(float_logits, logits_of(path, reference), windows)
        report(name, path, figures, seconds)
        if options.llama_cpp:
            rows[-1]["llama_cpp_agreement"] = found = agreement(options.llama_cpp, path, beginnings)
            print(f"    llama.cpp says the same: {found}", file=sys.stderr, flush=True)
    if options.llama_cpp:
        whole = quant.run(
            quant.QuantConfig(type="f32", method="rtn", fidelity_tokens=0),
            {"checkpoint": folder},
            out=out / "f32",
        )
        for name, path in llama_cpp_files(options.llama_cpp, whole.file("model.gguf"), out).items():
            report(name, path, fidelity.compare(float_logits, logits_of(path, reference), windows), 0.0)
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
