"""Speed of the native core on a known shape, beside llama.cpp and OpenVINO in the same minutes.

    python benchmarks/engine.py [--shape phi-3-mini] [--layers N] [--peer PYTHON] [--pairs 7] [--json]
        [--openvino-python PYTHON [--openvino-model FOLDER]] [--neighbour] [--fresh] [--text-model FILE]

Weights are random Q4_0, written once as a GGUF file that ours and llama.cpp read. Speed does not depend on their
values, unless an engine computes with denormal numbers: attention's scores lie further apart than trained ones. `--peer` is the interpreter of an environment with llama-cpp-python or ik-llama-cpp-python; it
may be given several times; a name that begins with ik, as in ik=PYTHON, means the latter. Peers hold their
cache in our type (`--peer-cache same`, with flash attention, which they need for it) or as they do by default.
Runs alternate, ours then each peer's, with a probe of the memory's read rate and of the int8 inner loop before
every round; figures are medians with the smallest and largest, ratios medians of the ratios of a round. With
--threads 1 times are processor time, for ratios on a machine that other programs use (the probe's are not, so
the share of the read rate then means nothing). `--layers` cuts the model to fewer layers (tokens/s are of the
cut model; ratios keep their meaning). Peers run in processes of their own, asleep meanwhile.

`--openvino-python` adds openvino-genai, in its pipeline of continuous batching (what its LLMPipeline is on a
CPU), driven request by request: its weights cannot come from a GGUF file, so that interpreter makes its own
model of the same shape, see openvino_peer.py, once, in the folder --openvino-model (a minute and 4 GB of
memory for 8 layers). Its cache is of our type. Each of `--openvino-settings` is a peer of its own, and the
best of them is named for every figure. It takes one token at a time after a prompt, so it is left out of
steps of several. Every engine holds its weights meanwhile, OpenVINO's 2 GB a setting at 8 layers.

--neighbour adds decoding beside one other process that keeps one CPU busy. --fresh starts both engines anew
from a warm page cache: seconds to the first token, and the largest resident memory with the context filled.
--text-model measures prompt lookup against plain decoding of the same model on prompts of extraction and
editing, and on some that do not copy; with --threads 1 in processor time.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openvino_peer

SHAPES = {  # layers, hidden, heads, kv heads, feed-forward, vocabulary
    "phi-3-mini": (32, 3072, 32, 32, 8192, 32064),
    "phi-3-medium": (40, 5120, 40, 10, 17920, 32064),
    "pocket": (12, 512, 8, 4, 1536, 16384),
}
CONTEXT = 4096
OPENVINO = "openvino"  # how the names of its settings begin


def write_model(path: Path, shape: str, layers: int | None) -> None:
    """Write a GGUF file of architecture llama with random Q4_0 weights."""
    import gguf

    count, hidden, heads, kv, ffn, vocab = SHAPES[shape]
    count = layers or count
    head_dim = hidden // heads
    rng = np.random.default_rng(0)
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), "llama", use_temp_file=False)
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
    part.replace(path)


# Either engine: a loop over standard input in its own interpreter.
_LOOP = r"""
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

rng = np.random.default_rng(1)
clock = time.process_time if threads == 1 else time.perf_counter
def timed(ids):
    began = clock()
    feed(ids.tolist())
    return clock() - began

print(json.dumps({"load_s": time.perf_counter() - began, "facts": facts}), flush=True)
for line in sys.stdin:
    want = json.loads(line)
    took = 0.0
    if want["what"] == "fill":
        clear()
        if want["context"]:
            feed(rng.integers(300, 3000, want["context"]).tolist())
    elif want["what"] == "step":
        took = sum(timed(rng.integers(300, 3000, want["tokens"])) for _ in range(want["repeats"]))
    else:
        clear()
        took = timed(rng.integers(300, 3000, want["tokens"]))
    print(json.dumps({"s": took, "rss": peak()}), flush=True)
"""

_PEER = (
    r"""
import json, sys, time
began = time.perf_counter()
import numpy as np
from llama_cpp import Llama
path, threads, context, cache = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
more = {"q8_0": {"type_k": 8, "type_v": 8, "flash_attn": True}, "f16": {}, "f16-flash": {"flash_attn": True}}[cache]
model = Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, n_ubatch=512,
              use_mmap=False, logits_all=False, verbose=False, **more)
feed, clear, facts = model.eval, model.reset, {}
"""
    + _LOOP
)

# ik_llama.cpp through the low-level interface of its package, with its run-time repacking.
_IK = (
    r"""
import json, sys, time
began = time.perf_counter()
import numpy as np
from ik_llama_cpp import _ctypes_api as C
from ik_llama_cpp._internals import make_batch_range
path, threads, context, cache = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
C.llama_backend_init()
how = C.llama_model_default_params()
how.use_mmap, how.repack_tensors = False, True
model = C.llama_model_load_from_file(path.encode(), how)
how = C.llama_context_default_params()
how.n_ctx, how.n_batch, how.n_ubatch, how.n_threads, how.n_threads_batch = context, 512, 512, threads, threads
how.flash_attn = cache != "f16"
if cache == "q8_0":
    how.type_k = how.type_v = 8
state, at = C.llama_init_from_model(model, how), 0
def clear():
    global at
    C.llama_kv_cache_clear(state)
    at = 0
def feed(ids):
    global at
    for begin in range(0, len(ids), 512):
        piece = ids[begin : begin + 512]
        batch = make_batch_range(piece, pos_start=at, logits_last=begin + 512 >= len(ids))
        if C.llama_decode(state, batch):
            sys.exit("llama_decode failed")
        C.llama_batch_free(batch)
        at += len(piece)
    C.llama_get_logits_ith(state, -1)
facts = {}
"""
    + _LOOP
)

_OURS = (
    r"""
import json, sys, time
began = time.perf_counter()
import numpy as np
from pocketphi.engine import native
from pocketphi.engine.backend import BackendOptions
from pocketphi.engine.weights import open_weights
path, threads, context, cache = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
backend = native.load(open_weights(path), BackendOptions(num_threads=threads, cache_type=cache))
session = backend.new_session(context, "plain")
facts = backend.describe()
feed, clear = lambda ids: backend.forward(session, ids, "last"), lambda: session.truncate(0)
"""
    + _LOOP
)


class EngineEnded(Exception):
    """An engine's process is gone; a peer that asserts must not end the benchmark."""


class Runner:
    """An engine in its own process."""

    def __init__(self, python: str, program: str, model: Path, threads: int, cache: str) -> None:
        self.process = subprocess.Popen(
            [python, "-c", program, str(model), str(threads), str(CONTEXT), cache],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            # As models of the whole shape are computed; ours would take a cut one for a small model.
            env={"POCKETPHI_ACTIVATIONS": "int8", **os.environ},
        )  # fmt: skip
        ready = self._read()
        self.load_s, self.facts = ready["load_s"], ready["facts"]
        self.rss = 0

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineEnded(f"the process of {self.process.args[0]} ended with {self.process.wait()}")  # type: ignore[index]
        return json.loads(line)

    def __call__(self, **want: Any) -> float:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(want) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # reading says what became of it
        answer = self._read()
        self.rss = answer["rss"]
        return answer["s"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Probe:
    """What the machine gives right now, by a tiny model's threads: bytes read and int8 products per second."""

    def __init__(self, threads: int) -> None:
        from pocketphi.engine import native
        from pocketphi.engine.backend import BackendOptions
        from pocketphi.model.config import ModelConfig

        config = ModelConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, max_position_embeddings=32,
        )  # fmt: skip
        options = BackendOptions(num_threads=threads, cache_type="f32")
        self.backend = native.NativeBackend(config, options, interleaved=False, tied=True)

    def __call__(self) -> tuple[float, float]:
        found = self.backend.probe(0.2)
        return found["read_bytes_per_s"], found["int8_macs_per_s"]


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """One other process at 100% of one CPU."""
    spin = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", spin])
    try:
        time.sleep(0.3)
        yield
    finally:
        process.kill()
        process.wait()


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.2f} ({min(values):.2f}-{max(values):.2f})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Comparison:
    """Rounds of ours, then every peer, and what came of them."""

    def __init__(self, ours: Runner, peers: dict[str, Runner], probe: Probe, pairs: int) -> None:
        self.ours, self.peers, self.probe, self.pairs = ours, peers, probe, pairs
        self.figures: dict[str, Any] = {}

    def record(self, name: str, tokens: int, request: dict[str, Any], read_bytes: float = 0.0) -> None:
        mine: list[float] = []
        shares, probes = [], []
        theirs: dict[str, list[float]] = {peer: [] for peer in self.peers}
        for _ in range(self.pairs):
            probes.append(self.probe())
            mine.append(tokens / self.ours(**request))
            if read_bytes:
                shares.append(mine[-1] * read_bytes / probes[-1][0])
            for peer in list(self.peers):
                self.ask(peer, request, tokens, theirs)
        read, macs = (statistics.median(p[i] for p in probes) for i in range(2))
        found: dict[str, Any] = {"tokens_per_s": statistics.median(mine), "all": mine}
        found |= {"read_bytes_per_s_probe": read, "int8_macs_per_s_probe": macs}
        line = f"{name:28s} {spread(mine)} tok/s"
        if shares:
            found["share_of_read_rate"] = statistics.median(shares)
            line += f", {100 * found['share_of_read_rate']:.0f} % of the read rate"
        for peer, values in theirs.items():
            if not values:
                continue
            ratio = statistics.median(a / b for a, b in zip(mine, values))
            found[peer] = {"tokens_per_s": statistics.median(values), "ratio": ratio, "all": values}
            line += f"; {peer} {spread(values)}, ratio {ratio:.2f}"
        settings = [peer for peer in theirs if theirs[peer] and peer.startswith(OPENVINO)]
        if settings:
            best = max(settings, key=lambda peer: found[peer]["tokens_per_s"])
            found["openvino_best"] = {"setting": best, **found[best]}
            line += f"; best of its settings: {best}, ratio {found[best]['ratio']:.2f}"
        say(f"{line}; probe {read / 1e9:.1f} GB/s {macs / 1e9:.0f} GMAC/s")
        self.figures[name] = found

    def fill(self, context: int) -> None:
        self.ours(what="fill", context=context)
        for peer in list(self.peers):
            self.ask(peer, {"what": "fill", "context": context}, 0, {peer: []})

    def ask(self, peer: str, request: dict[str, Any], tokens: int, into: dict[str, list[float]]) -> None:
        """Let one peer compute; a peer that ends is left out from then on, which is said."""
        if request["what"] == "step" and request["tokens"] > self.peers[peer].facts.get(
            "step_tokens", CONTEXT
        ):
            return
        try:
            took = self.peers[peer](**request)
            into[peer].append(tokens / took if took else 0.0)
        except EngineEnded as error:
            say(f"{peer} is out: {error}")
            del self.peers[peer]


def fresh_starts(start: Callable[[], Runner], filled: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Start anew three times: seconds to a first token; then the largest memory with a filled context."""
    seconds = []
    for n in range(3):
        began = time.perf_counter()
        runner = start()
        runner(what="prefill", tokens=16)
        seconds.append(time.perf_counter() - began)
        if n == 2:
            runner(what="fill", context=filled)
        rss = runner.rss
        runner.close()
    found = {"start_to_first_token_s": statistics.median(seconds), "peak_rss_bytes": rss, "filled": filled}
    if facts:
        needed = facts["weight_bytes"] + filled * facts["cache_bytes_per_token"]
        found |= {"weights_and_cache_bytes": needed, "excess_bytes": rss - needed}
    return found


_TEXT = (
    "The town lies on both sides of the river. The old stone bridge was built in 1741 by Johan Meyer and "
    "carries the road to the market. The bridge was damaged by ice in the winter of 1838 and repaired two "
    "years later. The school has two hundred pupils."
)
_LIST = "apples 12, oranges 7, bananas 30, lemons 4, grapes 18, cherries 55, plums 9, melons 2, peaches 11, figs 26."
_NOTICE = (
    "The libary opens at nine on Monday. Members may borrow up to ten books for three weeks. On Monday evening "
    "the reading circle meets in the small room on the second floor, and new members are always welcome."
)
_CODE = """def price(items, tax):
    total = 0
    for item in items:
        total = total + item.price * item.count
    total = total + total * tax
    return round(total, 2)
"""
# What lookup is for, and (from the spelling of the committee on) tasks of the kind that a small model does
# not do by copying, whatever it is told; the last has nothing to copy.
LOOKUP_PROMPTS = {
    "extraction: repeat": "Repeat this text word for word: The quick brown fox jumps over the lazy dog near the "
    "old stone bridge, while seven grey geese watch from the reeds and the miller counts his sacks of barley flour.",
    "extraction: quote": "Quote the second and the third sentence of this text, word for word:\n\n" + _TEXT,
    "extraction: answer": "Text: The old stone bridge was built in 1741 by Johan Meyer and carries the road to the "
    "market. It was damaged by ice in the winter of 1838 and repaired two years later. Since 1990 the bridge is "
    "closed to cars and lorries.\n\nQuestion: What happened to the bridge in the winter of 1838? Answer with the "
    "sentence from the text.",
    "extraction: addresses": "Extract the names and the e-mail addresses: Contact Maria Jensen "
    "(maria.jensen@example.org) for tickets, Peter Holm (peter.holm@example.org) for the programme, Lise Berg "
    "(lise.berg@example.org) for the press and Ole Dahl (ole.dahl@example.org) for everything else.",
    "editing: one word": "Give the list again with one change, apples become pears: " + _LIST,
    "editing: dashes": "Write this list with one item per line and a dash before every item: " + _LIST,
    "editing: quotation marks": "Repeat the text between the lines and put it into quotation marks.\n---\n"
    + _NOTICE.replace("libary", "library")
    + "\n---",
    "editing: JSON": "Translate the keys of this JSON to upper case and change nothing else: "
    '{"name": "Anna Berg", "city": "Oslo", "street": "Karl Johans gate 12", "phone": "+47 22 33 44 55", '
    '"mail": "anna.berg@example.org"}',
    "editing: code": "Copy this code and add a comment line at the top:\n\n" + _CODE,
    "editing: spelling": "Correct the spelling of this text: " + _NOTICE,
    "reworded: spelling": "Correct only the spelling, keep everything else as it is: 'On Monday the comittee will "
    "recieve the anual report of the museum, and on Tuesday the director will anwser questions from the public in "
    "the main hall.'",
    "reworded: days": 'Rewrite this paragraph, replacing "Monday" by "Friday" and changing nothing else:\n\n'
    + _NOTICE,
    "reworded: rename": "Rename the variable total to amount in this Python function and show the whole function:\n\n"
    + _CODE,
    "free: a story": "Write a short story about a fox and a lighthouse.",
}


def lookup_gain(path: Path, threads: int, pairs: int) -> dict[str, float]:
    """Prompt lookup against plain decoding of the same model, in processor time with one thread."""
    from pocketphi import engine

    clock = time.process_time if threads == 1 else time.perf_counter
    gains: dict[str, float] = {}
    with engine.load(path, num_threads=threads) as model:
        for name, prompt in LOOKUP_PROMPTS.items():
            talk, ratios = [{"role": "user", "content": prompt}], []
            plain = model.chat(talk, max_new_tokens=160, lookup=0)  # from here on the prompt is in the cache
            for _ in range(pairs):
                began = clock()
                model.chat(talk, max_new_tokens=160, lookup=0)
                middle = clock()
                quick = model.chat(talk, max_new_tokens=160)
                if quick.tokens != plain.tokens:
                    sys.exit("prompt lookup changed the text")
                ratios.append((middle - began) / (clock() - middle))
            gains[name] = statistics.median(ratios)
            say(
                f"prompt lookup, {name:26s} {len(plain.tokens):4d} tokens, {gains[name]:.2f} times the speed, "
                f"{quick.accepted_tokens:3d} of {quick.drafted_tokens:3d} guesses right, same text"
            )
    copying = [gain for name, gain in gains.items() if name.startswith(("extraction", "editing"))]
    say(
        f"prompt lookup, extraction and editing: median {statistics.median(copying):.2f}, least {min(copying):.2f}"
    )
    return {"lookup_gain_median": statistics.median(copying), "lookup_gain_least": min(copying), **gains}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="phi-3-mini")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--model", type=Path, default=None, help="where the GGUF file is or goes")
    parser.add_argument("--peer", action="append", default=[], metavar="[NAME=]PYTHON")
    parser.add_argument("--peer-cache", nargs="*", default=["same"], choices=["same", "f16", "f16-flash"])
    parser.add_argument("--openvino-python", metavar="PYTHON")
    parser.add_argument("--openvino-model", type=Path, help="where OpenVINO's model is or goes (a folder)")
    parser.add_argument("--openvino-settings", nargs="*", default=list(openvino_peer.SETTINGS),
                        choices=openvino_peer.SETTINGS)  # fmt: skip
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--contexts", type=int, nargs="*", default=[16, 1024, 3500])
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--repeats", type=int, default=8, help="steps timed at a time")
    parser.add_argument("--cache", default="q8_0", help="our cache of keys and values")
    parser.add_argument("--neighbour", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--text-model", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = options.model or Path(f"/tmp/{options.shape}-{options.layers or 'all'}-q4_0.gguf")
    if not model.exists():
        write_model(model, options.shape, options.layers)

    def start_ours() -> Runner:
        return Runner(sys.executable, _OURS, model, options.threads, options.cache)

    starts: dict[str, Callable[[], Runner]] = {}
    for peer in options.peer:
        name, _, python = peer.rpartition("=")
        for cache in options.peer_cache:
            kind = options.cache if cache == "same" else cache
            program = _IK if name.startswith("ik") else _PEER
            starts[f"{name or 'llama.cpp'} {kind}"] = functools.partial(
                Runner, python, program, model, options.threads, kind
            )
    if options.openvino_python:
        folder = options.openvino_model or model.with_name(
            f"{options.shape}-{options.layers or 'all'}-openvino"
        )
        if not folder.exists():
            layers, *rest = SHAPES[options.shape]
            openvino_peer.export(options.openvino_python, folder, (options.layers or layers, *rest), CONTEXT)
        for name in options.openvino_settings:
            program = openvino_peer.engine(name) + _LOOP
            starts[f"{OPENVINO} {name}"] = functools.partial(
                Runner, options.openvino_python, program, folder, options.threads, options.cache
            )
    figures: dict[str, Any] = {"shape": options.shape, "layers": options.layers, "pairs": options.pairs}
    if options.fresh:
        first = start_ours()
        facts = first.facts
        first.close()
        for name, start in {"ours": start_ours, **starts}.items():
            try:
                found = fresh_starts(start, max(options.contexts), facts if name == "ours" else {})
            except EngineEnded as error:
                say(f"{name} is out: {error}")
                continue
            figures[f"fresh {name}"] = found
            say(f"{name}: " + ", ".join(f"{k} {v:.2f}" if k.endswith("_s") else f"{k} {v:,}"
                                       for k, v in found.items()))  # fmt: skip
    if options.prefill or options.contexts:
        comparison = Comparison(
            start_ours(),
            {name: start() for name, start in starts.items()},
            Probe(options.threads),
            options.pairs,
        )
        facts = comparison.ours.facts
        figures |= facts
        comparison.fill(64)  # OpenVINO repacks its weights at the first request
        for tokens in options.prefill:
            comparison.record(f"prefill_{tokens}", tokens, {"what": "prefill", "tokens": tokens})
        for context in options.contexts:
            first_context = context == options.contexts[0]
            rounds = [(step, False) for step in (options.steps if first_context else options.steps[:1])]
            if options.neighbour and first_context:
                rounds.append((options.steps[0], True))
            for step, busy in rounds:
                comparison.fill(context)
                request = {"what": "step", "tokens": step, "repeats": options.repeats}
                bytes_read = facts["read_bytes_per_token"] + context * facts["cache_bytes_per_token"]
                name = f"decode_at_{context}" + (f"_step_{step}" if step > 1 else "")
                name += "_busy_neighbour" if busy else ""
                alone = 0.0 if step > 1 or busy else bytes_read
                if busy:
                    with busy_neighbour():
                        comparison.record(name, step * options.repeats, request, alone)
                    quiet = comparison.figures[f"decode_at_{context}"]["tokens_per_s"]
                    kept = comparison.figures[name]["tokens_per_s"] / quiet
                    say(f"beside a busy neighbour ours keeps {100 * kept:.0f} % of its speed")
                else:
                    comparison.record(name, step * options.repeats, request, alone)
        for runner in (comparison.ours, *comparison.peers.values()):
            runner.close()
        figures |= comparison.figures
    if options.text_model:
        figures |= lookup_gain(options.text_model, options.threads, options.pairs)
    if options.json:
        print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    try:
        main()
    except EngineEnded as ended:
        sys.exit(str(ended))
