"""Speed of the native core on a known shape, beside llama.cpp in the same minutes.

    python benchmarks/engine.py [--shape phi-3-mini] [--layers N] [--peer PYTHON] [--pairs 7] [--json]

Weights are random Q4_0 (speed does not depend on their values), written once as a GGUF file that both
engines read. `--peer` is the interpreter of an environment with llama-cpp-python. Runs alternate, ours then
the peer's, with a probe of the memory's read rate and of the int8 inner loop before every pair; figures are
medians with the smallest and largest. `--layers` cuts the model to fewer layers (tokens/s then are of the
cut model; ratios keep their meaning). Peers run in a process of their own that is asleep meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {  # layers, hidden, heads, kv heads, feed-forward, vocabulary
    "phi-3-mini": (32, 3072, 32, 32, 8192, 32064),
    "phi-3-medium": (40, 5120, 40, 10, 17920, 32064),
    "pocket": (12, 512, 8, 4, 1536, 16384),
}
CONTEXT = 4096


def write_model(path: Path, shape: str, layers: int | None) -> None:
    """Write a GGUF file of architecture llama with random Q4_0 weights."""
    import gguf

    count, hidden, heads, kv, ffn, vocab = SHAPES[shape]
    count = layers or count
    head_dim = hidden // heads
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama", use_temp_file=False)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(count)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [2, 3, 3, *([6] * 256)]
    tokens += [f"t{i}" for i in range(vocab - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types(kinds + [1] * (vocab - len(kinds)))

    def random_q4(rows: int, cols: int) -> np.ndarray:
        blocks = rng.integers(0, 256, (rows, cols // 32, 18), np.uint8)
        # A common scale that keeps activations of the order of 1.
        blocks[:, :, :2] = np.frombuffer(np.float16(0.2 / cols**0.5).tobytes(), np.uint8)
        return blocks.reshape(rows, -1)

    def add(name: str, rows: int, cols: int) -> None:
        writer.add_tensor(name, random_q4(rows, cols), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    add("token_embd.weight", vocab, hidden)
    add("output.weight", vocab, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for n in range(count):
        writer.add_tensor(f"blk.{n}.attn_norm.weight", np.ones(hidden, np.float32))
        writer.add_tensor(f"blk.{n}.ffn_norm.weight", np.ones(hidden, np.float32))
        add(f"blk.{n}.attn_q.weight", heads * head_dim, hidden)
        add(f"blk.{n}.attn_k.weight", kv * head_dim, hidden)
        add(f"blk.{n}.attn_v.weight", kv * head_dim, hidden)
        add(f"blk.{n}.attn_output.weight", hidden, heads * head_dim)
        add(f"blk.{n}.ffn_gate.weight", ffn, hidden)
        add(f"blk.{n}.ffn_up.weight", ffn, hidden)
        add(f"blk.{n}.ffn_down.weight", hidden, ffn)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# The peer: a loop over standard input in its own interpreter.
PEER = r"""
import json, sys, time
import numpy as np
from llama_cpp import Llama
path, threads, context, flash = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1"
began = time.perf_counter()
model = Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, n_ubatch=512,
              flash_attn=flash, use_mmap=False, logits_all=False, verbose=False)
print(json.dumps({"load_s": time.perf_counter() - began}), flush=True)
rng = np.random.default_rng(1)
for line in sys.stdin:
    want = json.loads(line)
    if want["what"] == "fill":
        model.reset()
        if want["context"]:
            model.eval(rng.integers(300, 3000, want["context"]).tolist())
        took = 0.0
    elif want["what"] == "step":
        times = []
        for _ in range(want["repeats"]):
            ids = rng.integers(300, 3000, want["tokens"]).tolist()
            began = time.perf_counter()
            model.eval(ids)
            times.append(time.perf_counter() - began)
        took = sum(times)
    else:
        model.reset()
        ids = rng.integers(300, 3000, want["tokens"]).tolist()
        began = time.perf_counter()
        model.eval(ids)
        took = time.perf_counter() - began
    import resource
    print(json.dumps({"s": took, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)
"""


class Peer:
    """llama.cpp in its own process."""

    def __init__(self, python: str, model: Path, threads: int, context: int, flash: bool) -> None:
        self.process = subprocess.Popen(
            [python, "-c", PEER, str(model), str(threads), str(context), str(int(flash))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.load_s = self._read()["load_s"]
        self.rss = 0

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("the peer process ended early")
        return json.loads(line)

    def __call__(self, **want: Any) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(want) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        self.rss = answer["rss"]
        return answer["s"]


class Ours:
    """The native core behind the same three requests."""

    def __init__(self, model: Path, threads: int, context: int, cache_type: str) -> None:
        from pocketphi.engine import native
        from pocketphi.engine.backend import BackendOptions
        from pocketphi.engine.weights import open_weights

        began = time.perf_counter()
        options = BackendOptions(num_threads=threads, cache_type=cache_type)  # type: ignore[arg-type]
        self.backend = native.load(open_weights(model), options)
        self.load_s = time.perf_counter() - began
        self.session = self.backend.new_session(context, "plain")
        self.rng = np.random.default_rng(1)

    def __call__(self, *, what: str, tokens: int = 0, context: int = 0, repeats: int = 1) -> float:
        if what != "step":
            self.session.truncate(0)
            tokens, repeats = (context, 1) if what == "fill" else (tokens, 1)
        took = 0.0
        for _ in range(repeats if tokens else 0):
            ids = self.rng.integers(300, 3000, tokens)
            began = time.perf_counter()
            self.backend.forward(self.session, ids, "last")
            took += time.perf_counter() - began
        return 0.0 if what == "fill" else took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="phi-3-mini")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--model", type=Path, default=None, help="where the GGUF file is or goes")
    parser.add_argument("--peer", help="python with llama-cpp-python")
    parser.add_argument("--peer-flash", action="store_true")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--contexts", type=int, nargs="*", default=[16, 1024, 3500])
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--repeats", type=int, default=16, help="steps timed at a time")
    parser.add_argument("--cache", default="q8_0")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    model = options.model or Path(f"/tmp/{options.shape}-{options.layers or 'all'}-q4_0.gguf")
    if not model.exists():
        write_model(model, options.shape, options.layers)
    ours = Ours(model, options.threads, CONTEXT, options.cache)
    peer = Peer(options.peer, model, options.threads, CONTEXT, options.peer_flash) if options.peer else None
    facts = ours.backend.describe()
    figures: dict[str, Any] = {
        "shape": options.shape,
        "layers": options.layers,
        "pairs": options.pairs,
        **facts,
    }
    figures |= {"load_s": ours.load_s, "peer_load_s": peer.load_s if peer else None}

    def record(name: str, tokens: int, request: dict[str, Any], read_bytes: float = 0.0) -> None:
        mine, theirs, probes, shares = [], [], [], []
        for _ in range(options.pairs):
            probe = ours.backend.probe(0.2)
            probes.append((probe["read_bytes_per_s"], probe["int8_macs_per_s"]))
            mine.append(tokens / ours(**request))
            if read_bytes:
                shares.append(mine[-1] * read_bytes / probe["read_bytes_per_s"])
            if peer:
                theirs.append(tokens / peer(**request))
        median = statistics.median
        figures[f"{name}_tokens_per_s"] = median(mine)
        figures[f"{name}_read_bytes_per_s_probe"] = median(p[0] for p in probes)
        figures[f"{name}_int8_macs_per_s_probe"] = median(p[1] for p in probes)
        line = f"{name:24s} {median(mine):8.2f} ({min(mine):.2f}-{max(mine):.2f}) tok/s"
        if shares:
            figures[f"{name}_share_of_bandwidth"] = median(shares)
            line += f", {100 * median(shares):.0f} % of the read rate"
        if theirs:
            ratio = median(a / b for a, b in zip(mine, theirs))
            figures[f"{name}_peer_tokens_per_s"] = median(theirs)
            figures[f"{name}_ratio"] = ratio
            line += (
                f"; llama.cpp {median(theirs):8.2f} ({min(theirs):.2f}-{max(theirs):.2f}), ratio {ratio:.2f}"
            )
        line += f"; probe {median(p[0] for p in probes) / 1e9:.1f} GB/s {median(p[1] for p in probes) / 1e9:.0f} GMAC/s"
        print(line, file=sys.stderr, flush=True)

    for tokens in options.prefill:
        record(f"prefill_{tokens}", tokens, {"what": "prefill", "tokens": tokens})
    for context in options.contexts:
        ours(what="fill", context=context)
        if peer:
            peer(what="fill", context=context)
        for step in options.steps if context == options.contexts[0] else options.steps[:1]:
            request = {"what": "step", "tokens": step, "repeats": options.repeats}
            bytes_read = facts["read_bytes_per_token"] + context * facts["cache_bytes_per_token"]
            name = f"decode_at_{context}" + (f"_step_{step}" if step > 1 else "")
            record(name, step * options.repeats, request, bytes_read if step == 1 else 0.0)
            if options.pairs * options.repeats * step + context > CONTEXT - 64:
                ours(what="fill", context=context)
                if peer:
                    peer(what="fill", context=context)
    import resource

    figures["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures["peer_peak_rss_bytes"] = peer.rss if peer else None
    print(f"peak memory {figures['peak_rss_bytes'] / 1e9:.2f} GB, peer {(peer.rss if peer else 0) / 1e9:.2f} GB",
          file=sys.stderr)  # fmt: skip
    if options.json:
        print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
