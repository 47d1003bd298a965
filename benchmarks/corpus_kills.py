"""Kill a corpus run at random moments until it has been killed N times; its files must be those of a quiet run.

    python benchmarks/corpus_kills.py --kills 20 [--engine ray]

Inputs are made up (web pages, JSON lines with copies and near-copies, broken records). Every kill is a
SIGKILL of the whole process, one of four at any moment of its life, the others while it makes parts (Ray takes
seconds to start); the next run continues. The files are compared with those of a quiet local run, whatever the
engine. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "corpus")]

from toy_pages import paragraph, write_inputs  # noqa: E402

from pocketphi import corpus  # noqa: E402
from pocketphi.core.config import parse  # noqa: E402

_RUN = (
    "import json, sys\nfrom pathlib import Path\nfrom pocketphi import corpus\nfrom pocketphi.core.config import parse\n"
    "done = corpus.run(parse(corpus.CorpusConfig, json.loads(sys.argv[1])), {}, out=Path(sys.argv[2]))\n"
    "print(done.checksum, done.counts['documents_in'])\n"
)


def make_inputs(folder: Path, num_lines: int) -> dict:
    write_inputs(folder, num_pages=num_lines // 4, num_lines=num_lines)
    with open(folder / "copies.jsonl", "w") as file:
        for seed in range(num_lines):
            text = paragraph(10_000 + seed, 6)
            if seed % 3 == 0:
                text += " Now there is one more sentence."
            file.write(json.dumps({"url": f"https://site{seed % 5}.org/{seed}", "text": text}) + "\n")
    with open(folder / "made.test.jsonl", "w") as file:
        for seed in range(20):
            file.write(json.dumps({"question": paragraph(10_000 + 7 * seed, 1)}) + "\n")
    return {
        "inputs": [str(folder / name) for name in ("pages", "lines.jsonl", "copies.jsonl")],
        "benchmarks": [str(folder / "made.test.jsonl")],
        "workers": 2,
        "chunk_documents": 24,
    }


def start(config: dict, out: Path, stdout: int = subprocess.DEVNULL, **how: bool) -> subprocess.Popen[bytes]:
    """Run a corpus in a process of its own, which prints its checksum and the documents it read."""
    command = [sys.executable, "-c", _RUN, json.dumps(config), str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=subprocess.DEVNULL, **how)


def finished_parts(out: Path) -> int:
    return len(list(Path(f"{out}.scratch").glob("part-*.json")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--lines", type=int, default=600, help="size of the inputs")
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_inputs(folder / "data", options.lines)
        quiet = corpus.run(parse(corpus.CorpusConfig, config), {}, out=folder / "quiet")
        config["engine"] = options.engine
        started = time.monotonic()
        if start(config, folder / "undisturbed").wait():
            sys.exit("the undisturbed run failed")
        undisturbed_s = time.monotonic() - started
        kills = runs = 0
        moments: list[float] = []
        parts: list[int] = []  # that were finished then
        equal = True
        while kills < options.kills:
            out = folder / f"killed-{runs}"
            runs += 1
            while kills < options.kills:
                begun, before = time.monotonic(), finished_parts(out)
                process = start(config, out)
                moment = chance.uniform(0.05, 0.6) * undisturbed_s
                if chance.random() < 0.75:
                    while process.poll() is None and finished_parts(out) == before:
                        time.sleep(0.02)
                    moment = chance.uniform(0, 0.1) * undisturbed_s
                try:
                    process.wait(moment)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
                    moments.append(round(time.monotonic() - begun, 1))
                    parts.append(finished_parts(out))
                else:
                    break  # it ended before its turn: judged below, and a new one begins
            done = corpus.run(parse(corpus.CorpusConfig, config), {}, out=out)
            files, expected = done.manifest["files"], quiet.manifest["files"]
            for file in sorted(files.keys() | expected.keys()):
                if files.get(file) != expected.get(file):
                    print(f"{out.name}: {file} differs", file=sys.stderr)
                    equal = False
            equal &= done.counts == quiet.counts
            equal &= not out.with_name(out.name + ".scratch").exists()
    figures = {
        "engine": options.engine,
        "documents": quiet.counts["documents_in"],
        "parts": sum(1 for file in quiet.manifest["files"] if file.startswith("documents/")),
        "undisturbed_s": round(undisturbed_s, 1),
        "kills": kills,
        "runs": runs,
        "killed_at_s": moments,
        "parts_finished": parts,
        "same_checksums": equal,
    }
    print(json.dumps(figures, indent=1))
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
