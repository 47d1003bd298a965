"""MT-bench with a local model as its own judge, to show the flow: the score says nothing about any model.

    python benchmarks/eval_mt_bench_local.py MODEL.gguf --data DATA [--judge JUDGE.gguf] [--limit 2]

Starts an OpenAI-compatible endpoint on the engine (this process, standard library), lets MODEL answer and
the judge rate through it, then compares MODEL's answers with themselves in both orders. A judge that says
who wins there shows its taste for a position: a fair one says tie. Prints the figures as JSON.
`--out` keeps what was written.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pocketphi import engine, evals
from pocketphi.evals import pairwise, tables
from pocketphi.evals.judge import JudgeConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--judge", type=Path, help="default: the model itself")
    parser.add_argument("--limit", type=int, default=2, help="questions")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--judge-tokens", type=int, default=96)
    parser.add_argument("--tries", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-pairs", action="store_true")
    parser.add_argument("--out", type=Path, help="keep the records (answers, judgements) in this folder")
    options = parser.parse_args()
    judge_file = options.judge or options.gguf
    judge_model = engine.load(judge_file, num_threads=options.threads)
    server = serve(judge_model, judge_file.name)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    started = time.monotonic()
    with nullcontext(options.out) if options.out else tempfile.TemporaryDirectory() as folder:
        config = evals.EvalConfig(
            tasks=["mt_bench"],
            data_dir=options.data,
            limit=options.limit,
            max_new_tokens=options.max_new_tokens,
            num_threads=options.threads,
            judge_url=address,
            judge_model=judge_file.name,
            judge_max_tokens=options.judge_tokens,
            judge_tries=options.tries,
            batch_size=1,
            timeout_s=3600,
        )
        found = evals.run(config, {"model": options.gguf}, out=Path(folder) / "eval")
        print(tables.text(found), file=sys.stderr)
        (row,) = tables.flat(found)
        kept = {k: v for k, v in row.items() if not k.startswith(("model.", "group.", "published."))}
        kept["wall_s"] = round(time.monotonic() - started, 1)
        print(json.dumps(kept), flush=True)
        if not options.no_pairs:
            judge_config = JudgeConfig(
                judge_url=address,
                judge_model=judge_file.name,
                judge_tries=options.tries,
                judge_max_tokens=options.judge_tokens,
                data_dir=options.data,
                parallel=1,
                timeout_s=3600,
            )
            pairs = pairwise.run(judge_config, {"a": found, "b": found}, out=Path(folder) / "pairs")
            print(json.dumps(pairwise.read(pairs)), flush=True)
    server.shutdown()


def serve(model: engine.Engine, name: str) -> ThreadingHTTPServer:
    """A chat endpoint on the engine; one answer at a time."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids = model.tokenizer.chat(body["messages"], add_generation_prompt=True)
            room = min(int(body["max_tokens"]), model.context_length - len(ids))
            with lock:
                reply = model.generate(ids, max_new_tokens=room, temperature=0.0) if room > 0 else None
            text = reply.text if reply is not None else ""
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            raw = json.dumps({"model": name, "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *arguments: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


if __name__ == "__main__":
    main()
