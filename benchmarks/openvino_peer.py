"""OpenVINO as a peer of engine.py: its model, and its engine as a program for its own interpreter.

That interpreter's environment: a CPU build of torch, `pip install "optimum-intel[openvino]" nncf
openvino-genai`, then `pip uninstall torchvision`, whose build must match torch's or optimum does not load.

The model is a Phi-3 of the shape asked for with random weights, exported by optimum-intel to 4 bits, symmetric,
groups of 128 (Q4_0 is symmetric too, in groups of 32: 4.5 bits to OpenVINO's 4.125), embedding and head to 8
bits a row as its exporter does unless told otherwise. A head of 8 bits is a larger part of a model cut to few
layers: at 8 layers 17% of the bytes that OpenVINO reads for a token, at 32 layers 5%.

The pipeline needs a tokenizer; this one is of bytes, and unused, since requests are given as numbers. Prompts
are computed in one pass and nothing is kept between requests, which are LLMPipeline's settings but for its
cache of prompts. A step includes choosing the token.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    # With AMX, products of bf16 whatever the group of activations: its best prefill there.
    "default": {},
    # Groups of 128 activations instead of 32: its best prefill without AMX.
    "group-128": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"},
    # Its best decoding where bf16 is the default.
    "f32": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128", "INFERENCE_PRECISION_HINT": "f32"},
}

_EXPORT = r"""
import sys
import openvino
import torch
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

folder = sys.argv[1]
layers, hidden, heads, kv_heads, ffn, vocab, context = map(int, sys.argv[2:])
config = Phi3Config(
    vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
    num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=context,
    original_max_position_embeddings=context, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False,
)
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)  # half the memory while it is made
model = Phi3ForCausalLM(config)
torch.set_default_dtype(torch.float32)
model.save_pretrained(folder + "/torch")
del model
bits = OVWeightQuantizationConfig(bits=4, group_size=128, sym=True)
OVModelForCausalLM.from_pretrained(
    folder + "/torch", export=True, quantization_config=bits, compile=False
).save_pretrained(folder)

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
letters = {"<unk>": 0, "<s>": 1, "</s>": 2, **{letter: n + 3 for n, letter in enumerate(alphabet)}}
tokenizer = Tokenizer(models.BPE(letters, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
named = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
for part, name in zip(convert_tokenizer(named, with_detokenizer=True), ("tokenizer", "detokenizer")):
    openvino.save_model(part, f"{folder}/openvino_{name}.xml")
"""

_ENGINE = r"""
import json, sys, time
began = time.perf_counter()
import numpy as np
import openvino
import openvino_genai as genai
path, threads, context, cache = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
how = genai.SchedulerConfig()
how.max_num_batched_tokens, how.enable_prefix_caching = 1 << 30, False
properties = {"INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": {"q8_0": "u8", "q4_0": "u4"}.get(cache, cache)}
pipe = genai.ContinuousBatchingPipeline(path, how, "CPU", {**properties, **settings})
request, count = None, 0
def clear():
    global request
    if request is not None:
        request.cancel()
        while pipe.has_non_finished_requests():
            pipe.step()
    request = None
def feed(ids):
    # A request's tokens after its prompt are those that it chooses itself.
    global request, count
    if request is None:
        rest = genai.GenerationConfig(max_new_tokens=context - len(ids), ignore_eos=True, do_sample=False)
        request, count = pipe.add_request(count, openvino.Tensor(np.array([ids], np.int64)), rest), count + 1
    pipe.step()
facts = {"step_tokens": 1, "version": genai.get_version()}
"""


def engine(setting: str) -> str:
    """The beginning of an engine's program; the loop that serves requests comes after it."""
    return f"settings = {SETTINGS[setting]!r}\n{_ENGINE}"


def export(python: str, folder: Path, shape: Sequence[int], context: int) -> None:
    """Make the model in `folder` with the interpreter `python`; exits with its last lines if it fails.

    `shape`: layers, hidden, heads, kv heads, feed-forward, vocabulary.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    made = subprocess.run(
        [python, "-c", _EXPORT, str(part), *map(str, (*shape, context))], capture_output=True, text=True
    )
    if made.returncode:
        sys.exit(f"{python} could not make OpenVINO's model in {part}:\n{made.stderr[-2000:]}")
    shutil.rmtree(part / "torch")
    part.replace(folder)
