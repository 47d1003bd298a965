"""Time log-likelihood suites against lm-evaluation-harness on llama.cpp: same file, rows, threads, one run.

    python benchmarks/eval_speed.py MODEL.gguf --data DATA --peer-python PEER/bin/python [--limit 40]

Two peers, in turn with ours on the same rows:

- `server`: lm-eval's own back end for GGUF files (`--model gguf`), which asks llama-cpp-python's server;
- `direct`: llama-cpp-python in the process, its cache kept over equal prefixes: the best that lm-eval could
  get out of llama.cpp without a change of its own. (`--peers direct` or `server` runs one of them.)

Prints a row per task with seconds, ratios and the share of equal choices, and a line of totals. Loading
models is not counted on any side. Quiet machines only: every side uses --threads threads.
The server takes 40 ms of one core for every token of a prompt, most of it sorting its vocabulary in Python:
--limit 5 of the default tasks is a quarter of an hour.
Needs: lm-eval, datasets here; llama-cpp-python[server] in the environment of --peer-python. Where llama.cpp ends
in ggml_backend_amx_mul_mat (processors with AMX), it must be built with GGML_NATIVE=OFF and the AVX-512 switches.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

from eval_against_lm_eval import Judge, Row, place_rows

from pocketphi import evals
from pocketphi.evals.task import parse_task

DEFAULT = ("arc_easy", "hellaswag", "piqa", "arc_challenge:shots=5", "mmlu:shots=5")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--peers", nargs="*", default=["server", "direct"], choices=["server", "direct"])
    parser.add_argument("--limit", type=int, default=40, help="items of each task")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--subjects", type=int, default=2, help="MMLU subjects")
    parser.add_argument("--tasks", nargs="*", default=list(DEFAULT))
    options = parser.parse_args()
    for label in options.tasks:
        if options.limit <= parse_task(label).shots:  # lm-eval draws the shots from the rows it is given
            parser.error(f"--limit {options.limit} leaves no items beside the shots of {label}")
    peers: dict[str, Any] = {}
    server = None
    try:
        if "server" in options.peers:
            server, address = start_server(options)
            peers["server"] = Peer(served(address, options.context))
        if "direct" in options.peers:
            peers["direct"] = Peer(direct(options))
        rows = []
        for label in options.tasks:
            rows.append(time_task(label, peers, options))
            print(json.dumps(rows[-1]), flush=True)
    finally:
        if server is not None:
            server.terminate()
            server.wait()
    total: Row = {"total": True, "items": sum(r["items"] for r in rows)}
    for name in ("ours", *peers):
        total[f"{name}_s"] = round(sum(r[f"{name}_s"] for r in rows), 2)
    for name in peers:
        total[f"times_faster_than_{name}"] = round(total[f"{name}_s"] / total["ours_s"], 2)
    print(json.dumps(total))


class Peer(Judge):
    """lm-eval with another model behind the same tasks."""

    def __init__(self, model: Any) -> None:
        self.model = model


def time_task(label: str, peers: dict[str, Any], options: argparse.Namespace) -> Row:
    task = parse_task(label)
    config = evals.EvalConfig(
        tasks=[label],
        data_dir=options.data,
        limit=options.limit,
        num_threads=options.threads,
        max_context_tokens=options.context,
        contamination=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place_rows(task.name, task, config, options, place)
        here = evals.EvalConfig(**{**vars(config), "data_dir": place, "limit": None})
        found = evals.run(here, {"model": options.gguf}, out=place / "ours")
        ours = [json.loads(line) for line in found.file("items.jsonl").read_text().splitlines()]
        if task.name == "mmlu":
            ours.sort(key=lambda r: r["group"])
        row: Row = {"task": label, "items": len(ours), "ours_s": found.manifest["timings"][f"{task.label}_s"]}
        for name, peer in peers.items():
            area = place / name
            area.mkdir()
            for file in place.glob("*.jsonl"):
                (area / file.name).write_bytes(file.read_bytes())
            spent = Clock(peer.model)
            theirs = peer.score(task.name, area, task, task.shots)
            row[f"{name}_s"] = round(spent.stop(), 3)
            row[f"times_faster_than_{name}"] = round(row[f"{name}_s"] / row["ours_s"], 2)
            equal = sum(a["pred"] == best(b) for a, b in zip(ours, theirs))
            row[f"equal_choices_{name}"] = round(equal / len(ours), 4)
    return row


def best(sample: Row) -> int:
    logprobs = [float(r[0]) for r in sample["filtered_resps"]]
    return max(range(len(logprobs)), key=logprobs.__getitem__)


class Clock:
    """Seconds that a model spends on log-likelihoods: lm-eval's own preparations are not counted."""

    def __init__(self, model: Any) -> None:
        self._model, self._seconds = model, 0.0
        original = type(model).loglikelihood

        def timed(requests: Any, *arguments: Any, **more: Any) -> Any:
            started = time.monotonic()
            try:
                return original(model, requests, *arguments, **more)
            finally:
                self._seconds += time.monotonic() - started

        model.loglikelihood = timed

    def stop(self) -> float:
        del self._model.loglikelihood
        return self._seconds


def start_server(options: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str]:
    """llama-cpp-python's server on the file; returns it and its address once it answers."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(options.peer_python), "-m", "llama_cpp.server", "--model", str(options.gguf), "--host", "127.0.0.1",
        "--port", str(port), "--n_ctx", str(options.context), "--n_threads", str(options.threads),
        "--n_threads_batch", str(options.threads), "--logits_all", "true", "--verbose", "false",
    ]  # fmt: skip
    # The environment of this run may point at packages that the peer must not see.
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=clean)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            assert process.stderr is not None
            raise SystemExit(f"the peer's server ended: {process.stderr.read().decode()[-600:]}")
        try:
            urllib.request.urlopen(f"{address}/v1/models", timeout=2).read()
            return process, address
        except OSError:
            time.sleep(0.3)
    process.kill()
    raise SystemExit("the peer's server did not answer within two minutes")


def served(address: str, context: int) -> Any:
    from lm_eval.models.gguf import GGUFLM

    return GGUFLM(base_url=address, max_length=context)


def direct(options: argparse.Namespace) -> Any:
    """llama-cpp-python in this process, taken from the peer's environment."""
    script = "import llama_cpp, pathlib; print(pathlib.Path(llama_cpp.__file__).parents[1])"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = subprocess.run(
        [str(options.peer_python), "-c", script], capture_output=True, text=True, check=True, env=clean
    )
    sys.path.append(where.stdout.strip())
    import numpy as np
    from llama_cpp import Llama
    from lm_eval.api.model import LM

    class DirectLM(LM):
        def __init__(self) -> None:
            super().__init__()
            self.llama = Llama(
                model_path=str(options.gguf),
                n_ctx=options.context,
                n_threads=options.threads,
                n_threads_batch=options.threads,
                logits_all=True,
                verbose=False,
            )
            self.held: list[int] = []

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [self._one(*r.args) for r in requests]

        def _one(self, context: str, continuation: str) -> tuple[float, bool]:
            whole = self.llama.tokenize((context + continuation).encode())
            border = len(self.llama.tokenize(context.rstrip(" ").encode()))
            same = 0
            for a, b in zip(self.held, whole):
                if a != b:
                    break
                same += 1
            # The row before the continuation is needed, so its token is computed at the latest.
            same = min(same, border - 1)
            self.llama.n_tokens = same
            self.llama.eval(whole[same:])
            self.held = whole
            rows = np.asarray(self.llama.scores[border - 1 : len(whole) - 1], dtype=np.float32)
            targets = np.asarray(whole[border:])
            top = rows.max(axis=1, keepdims=True)
            logs = rows - top - np.log(np.exp(rows - top).sum(axis=1, keepdims=True))
            chosen = logs[np.arange(len(targets)), targets]
            return float(chosen.sum()), bool((rows.argmax(axis=1) == targets).all())

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

    return DirectLM()


if __name__ == "__main__":
    sys.exit(main())
