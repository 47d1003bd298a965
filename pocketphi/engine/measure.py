"""Figures of a model on this machine: speed, memory, and what the memory itself allows.

Legend: every figure is flat and has its unit in its name.
"""

from __future__ import annotations

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pocketphi.core import machine
from pocketphi.core.errors import EngineError
from pocketphi.engine.engine import Engine


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_bandwidth_bytes_per_s(
    num_threads: int | None = None, size: int = 1 << 28, repeats: int = 3
) -> float:
    """Measure how fast this machine reads memory: the best of a few passes of all threads over `size` bytes."""
    num_threads = num_threads or machine.num_cores()
    data = np.ones(size // 8, dtype=np.uint64)
    parts = np.array_split(data, num_threads)
    best = 0.0
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


def bench(
    engine: Engine,
    *,
    prompt_tokens: int = 512,
    decode_tokens: int = 64,
    repeats: int = 3,
    measure_bandwidth: bool = True,
) -> dict[str, Any]:
    """Measure prefill, decode and time to first token, as medians of `repeats` runs.

    The prompt is made of arbitrary ids (speed does not depend on them); decoding is greedy without
    drafts and never stops early. Raises EngineError when prompt and answer exceed the context.
    """
    total = prompt_tokens + decode_tokens
    if total > engine.context_length:
        raise EngineError(
            f"{prompt_tokens} prompt tokens and {decode_tokens} decoded ones exceed the context of "
            f"{engine.context_length}",
            hint="--prompt-tokens and --decode-tokens make them fewer",
        )
    facts = engine.describe()
    rng = np.random.default_rng(0)
    runs = []
    # One token first: pages of the weights are touched, threads are awake.
    engine.generate([1 % engine.config.vocab_size], max_new_tokens=1, stop_ids=[], lookup=0)
    for _ in range(repeats):
        ids = rng.integers(0, engine.config.vocab_size, prompt_tokens).tolist()
        runs.append(engine.generate(ids, max_new_tokens=decode_tokens, stop_ids=[], lookup=0))

    def median(name: str) -> float:
        return statistics.median(getattr(run, name) for run in runs)

    decode = median("decode_tokens_per_s")
    # Per token: all weights once (of an untied embedding table one row), and the cache at its mean length.
    cache_bytes = facts["cache_bytes_per_token"] * (prompt_tokens + decode_tokens // 2)
    bytes_per_token = facts.get("read_bytes_per_token", facts["weight_bytes"]) + cache_bytes
    figures: dict[str, Any] = {
        "prefill_tokens_per_s": median("prefill_tokens_per_s"),
        "decode_tokens_per_s": decode,
        "time_to_first_token_s": median("time_to_first_token_s"),
        "peak_rss_bytes": peak_rss_bytes(),
        "file_bytes": facts["file_bytes"],
        "bytes_read_per_token": bytes_per_token,
        "achieved_bytes_per_s": decode * bytes_per_token,
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "repeats": repeats,
    }
    if measure_bandwidth:
        # The native core measures with its own threads and loads, which is what it could have had.
        probe = getattr(engine.backend, "probe", None)
        machine_figures = probe() if probe else {"read_bytes_per_s": read_bandwidth_bytes_per_s()}
        figures.update({f"machine_{name}": value for name, value in machine_figures.items()})
        figures["bandwidth_fraction"] = figures["achieved_bytes_per_s"] / figures["machine_read_bytes_per_s"]
    names = ("backend", "kernels", "num_threads", "cache_type", "weight_bytes", "cache_bytes_per_token")
    figures.update({name: facts[name] for name in names})
    figures.update({name: facts[name] for name in ("architecture", "num_parameters", "context_length")})
    return figures
