"""The two rules on unsafe text: how the learned one was trained, what each finds, what each rejects by mistake.

    python benchmarks/unsafe_scorer.py DATA [--out FOLDER] [--speed-only] [--json]

DATA holds safety/, alignment/, benchmarks/, corpus/ and webpages/. In this order:

1. Gathers the labelled texts (only rows whose licence permits it), trains the model of the package again, and
   says whether the file that comes out is the shipped one, byte by byte.
2. ROC AUC and the share rejected, by category, for the word list, the learned score and both together: on
   the moderation set by models that have not seen the text (five folds) and by one that has seen nothing of
   that set; on prompts to language models by one that has seen nothing but the moderation set; on sets whose
   licence kept them out of training.
3. The share of ordinary text that is rejected, by collection; learned collections by models that have not seen
   the source, where a file has more than one, and the worst cases.
4. Documents per second of processor time, on one core.

Writes FOLDER/unsafe.npz, FOLDER/labelled/*.jsonl, FOLDER/figures.json and FOLDER/mistakes.jsonl.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from educational_scorer import speed

from pocketphi.corpus import extraction
from pocketphi.corpus.document import Document
from pocketphi.corpus.educational import evaluation, labels, metrics
from pocketphi.corpus.educational.labels import LabelConfig, Labelled
from pocketphi.corpus.educational.scorer import Scorer
from pocketphi.corpus.educational.training import FitConfig, Weights, fit
from pocketphi.corpus.rules import language, rules
from pocketphi.corpus.rules.batch import Batch
from pocketphi.corpus.rules.unsafe import MODEL_PATH, unsafe_share
from pocketphi.evals.data import DataFile, read

LEARNED, LISTED = "unsafe_share", "unsafe_per_100_words"
CATEGORIES = ("sexual", "hateful", "harassing", "violent", "self-harm")
MODERATION = {
    "sexual": ("S", "S3"),
    "hateful": ("H", "H2"),
    "harassing": ("HR",),
    "violent": ("V", "V2"),
    "self-harm": ("SH",),
}
ADVBENCH = {
    "Violence/armed conflict": "violent", "Radicalisation": "violent", "Self-harm": "self-harm",
    "Harassment/abuse/intimidation": "harassing", "Discrimination": "hateful", "Stereotyping": "hateful",
    "Dehumanisation/objectification": "hateful", "Sexualisation": "sexual",
}  # fmt: skip
STRONGREJECT = {
    "Violence": "violent", "Hate, harassment and discrimination": "hateful", "Sexual content": "sexual",
}  # fmt: skip
HARMBENCH = {"harassment_bullying": "harassing", "harmful": "violent"}
RED_TEAM = {
    "airt_imminent_crisis.prompt": "self-harm", "hate.prompt": "hateful", "harassment.prompt": "harassing",
    "sexual.prompt": "sexual", "violence.prompt": "violent",
}  # fmt: skip
# Files of FOLDER/labelled with their total weight in training. Unsafe texts come first.
UNSAFE = {"moderation-unsafe": 4.0, "prompts-unsafe": 0.5, "red-team-chats": 0.15}
CORPUS = {
    "web-mixed": 0.3, "stories": 1.0, "books-classics": 0.3, "encyclopedia": 0.3, "docs-technical": 0.3,
    "howto-cookbook": 0.3, "textbooks-openstax": 0.3, "textbooks-math": 0.3, "news-speeches": 0.3,
}  # fmt: skip
ORDINARY = {
    "moderation-safe": 5.0, "prompts-safe": 0.5, "open-assistant": 2.0, "self-instruct": 1.5,
    "gpteacher": 0.5, "hellaswag": 0.6, "social-iqa": 0.5, "bbq": 0.5, "boolq": 0.5, **CORPUS,
}  # fmt: skip
NOT_PERMITTED = ("-nc", "copyright", "unspecified")
FIT = FitConfig(
    bits=18, epochs=10, learning_rate=1.0, min_documents=3, min_groups=1, min_cut_words=15, max_cut_words=150,
    cuts_per_document=2,
)  # fmt: skip
NUM_FOLDS = 5
MAX_CHARS = 4000  # of one document in training
MAX_DOCUMENTS = 1000  # of one ordinary file
SPEED_FILES = ("web-mixed", "encyclopedia", "textbooks-openstax")
READ_CHARS = 40_000  # of one document in measuring
KNOTS = np.linspace(-8.0, 8.0, 65)


def rows_of(data: Path, name: str) -> list[dict[str, Any]]:
    """All rows of one file of DATA."""
    path = data / name
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    return list(read(DataFile(path, ""), ()))


def unsafe_texts(data: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield (file, set, text, categories) of labelled texts; no category where people found nothing."""
    for row in rows_of(data, "safety/openai_moderation_samples-1680.jsonl.gz"):
        found = [c for c, keys in MODERATION.items() if any(str(row.get(key)) == "1" for key in keys)]
        yield "moderation-unsafe" if found else "moderation-safe", "moderation", row["prompt"], found
    for row in rows_of(data, "safety/advbench.jsonl.zst"):
        if found := sorted({ADVBENCH[k] for k in row["harm_categories"] if k in ADVBENCH}):
            yield "prompts-unsafe", "advbench", row["value"], found
    for row in rows_of(data, "safety/strongreject_dataset.csv"):
        if row["category"] in STRONGREJECT:
            yield "prompts-unsafe", "strongreject", row["forbidden_prompt"], [STRONGREJECT[row["category"]]]
    for row in rows_of(data, "safety/harmbench_behaviors_text_all.csv"):
        if row["SemanticCategory"] in HARMBENCH:
            yield "prompts-unsafe", "harmbench", row["Behavior"], [HARMBENCH[row["SemanticCategory"]]]
    for row in rows_of(data, "safety/pyrit_airt_prompts.jsonl.zst"):
        if row["file"] in RED_TEAM:
            yield "prompts-unsafe", "airt", row["value"], [RED_TEAM[row["file"]]]
    for row in rows_of(data, "safety/xstest_prompts.csv"):
        if row["label"] == "safe":
            yield "prompts-safe", "xstest", row["prompt"], []
        elif "privacy" not in row["type"]:
            yield "prompts-unsafe", "xstest", row["prompt"], ["violent"]
    # What people wrote to break an assistant; nobody said which of them is unsafe, so they weigh little.
    for row in rows_of(data, "alignment/hh-rlhf_harmless-base.test.jsonl.zst"):
        turns = [part.split("\n\nAssistant:")[0].strip() for part in row["chosen"].split("\n\nHuman:")[1:]]
        yield "red-team-chats", "hh-rlhf", "\n".join(turns), ["any"]


def ordinary_texts(data: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (file, source and place, text) of texts that are harmless by where they come from."""

    def messages(node: dict[str, Any]) -> Iterator[str]:
        yield node["text"]
        for reply in node.get("replies", []):
            yield from messages(reply)

    for row in rows_of(data, "alignment/open-assistant_en_100_trees.jsonl.zst"):
        yield from (("open-assistant", "oasst", text) for text in messages(row["prompt"]))
    for row in rows_of(data, "alignment/self-instruct_seed_tasks.jsonl.zst"):
        for instance in row["instances"]:
            yield "self-instruct", "seed", f"{row['instruction']}\n{instance['input']}"
            yield "self-instruct", "seed", instance["output"]
    for row in rows_of(data, "alignment/self-instruct_user_oriented.jsonl.zst"):
        yield "self-instruct", "user", row["instruction"]
    for row in rows_of(data, "alignment/gpteacher_roleplay.jsonl.zst"):
        yield "gpteacher", "gpteacher", row["instruction"]
        yield "gpteacher", "gpteacher", row["response"]
    for row in rows_of(data, "benchmarks/hellaswag.train.jsonl.zst")[::20]:
        yield "hellaswag", "hellaswag", f"{row['query']} {row['choices'][row['gold']]}"
    for row in rows_of(data, "benchmarks/social_iqa.train.jsonl.zst")[::20]:
        yield "social-iqa", "social-iqa", f"{row['context']} {row['question']}"
    for row in rows_of(data, "safety/bbq_6_categories.jsonl.zst")[::12]:
        yield "bbq", row["category"], f"{row['context']} {row['question']}"
    for row in rows_of(data, "benchmarks/boolq.train.jsonl.zst")[::8]:
        yield "boolq", "boolq", row["query"]
    for name in CORPUS:
        for row in rows_of(data, f"corpus/{name}.jsonl.zst"):
            if permitted(row):
                yield name, labels.group_of(row), row["text"]


def permitted(row: dict[str, Any]) -> bool:
    """Whether a row's licence lets a model that learned from it be given to anybody for any use."""
    return bool(row["license"]) and not any(word in row["license"].lower() for word in NOT_PERMITTED)


def gather(data: Path, folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Write the labelled texts as JSON lines; return text and categories of each by id."""
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, tuple[str, list[str]]] = {}
    seen: set[str] = set()
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, source, text, found in [
        *unsafe_texts(data),
        *((name, source, text, []) for name, source, text in ordinary_texts(data)),
    ]:
        if text in seen:  # the sets of prompts quote one another
            continue
        seen.add(text)
        identity = f"{name}-{len(files[name])}"
        files[name].append({"id": identity, "source": source, "text": text, "unsafe": 5 * (name in UNSAFE)})
        known[identity] = (text, found)
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return known


def load(folder: Path) -> tuple[Labelled, np.ndarray]:
    """Return the hashed texts and the weight of each file."""
    weights = {**UNSAFE, **ORDINARY}
    entries = tuple(
        LabelConfig(
            str(folder / f"{name}.jsonl"),
            name=name,
            weight=weight,
            max_documents=MAX_DOCUMENTS if name in CORPUS else None,
            score_field="unsafe",
        )
        for name, weight in weights.items()
    )
    found = labels.load(entries, bits=FIT.bits, max_chars=MAX_CHARS, min_words=4, clean=True)
    return found, np.array(list(weights.values()))


def scorer_of(weights: Weights, card: dict[str, Any]) -> Scorer:
    """The shipped form: its score is the probability, of evenly many safe and unsafe windows, to be unsafe."""
    integers, scale = weights.quantised()
    probability = np.round(1.0 / (1.0 + np.exp(-KNOTS)), 6)
    return Scorer(integers, scale, weights.bias, weights.shrinkage, KNOTS, probability, card)


@cache
def is_english(text: str) -> bool:
    """What the language rule says of a text."""
    return language.identify(text)[0] == "en"


class Sides:
    """Scores of texts: learned, of the word list, and both in units of their thresholds."""

    def __init__(self, texts: list[str], learned: np.ndarray) -> None:
        listed = rules[LISTED].function
        assert listed is not None
        self.list = np.asarray(listed(Batch([Document("", text) for text in texts])), dtype=np.float64)
        # As the rule does: what is not identified as English has no learned score.
        self.learned = np.where([is_english(text) for text in texts], learned, 0.0)
        self.list_rejects = self.list > rules[LISTED].max
        self.learned_rejects = self.learned > rules[LEARNED].max
        self.both = np.maximum(self.learned / rules[LEARNED].max, self.list / rules[LISTED].max)

    def areas(self, mark: np.ndarray, against: Sides) -> dict[str, float]:
        """ROC AUC of the marked texts over all of `against`."""
        return {
            name: metrics.roc_auc(getattr(self, name)[mark], getattr(against, name))
            for name in ("list", "learned", "both")
        }

    def rejected(self, mark: np.ndarray | None = None) -> dict[str, float]:
        """Shares past the default thresholds."""
        chosen = np.ones(len(self.list), dtype=bool) if mark is None else mark
        either = self.list_rejects | self.learned_rejects
        columns = (("list", self.list_rejects), ("learned", self.learned_rejects), ("both", either))
        return {name: float(column[chosen].mean()) for name, column in columns}


def clipped(texts: Iterable[str]) -> list[str]:
    return [text[:READ_CHARS] for text in texts]


def never_learned(data: Path) -> dict[str, tuple[str, list[str]]]:
    """Collections that are in no part of the training, by name: ("unsafe" or "ordinary", texts)."""
    found: dict[str, tuple[str, list[str]]] = {}
    wanted = ("S004", "S005", "S006sh", "S006violence", "S006threat")
    found["do-not-answer"] = (
        "unsafe",
        [
            row["prompt"]
            for row in rows_of(data, "safety/do_not_answer.jsonl.zst")
            if row["file"].startswith("discrimination") or any(w in i for i in row["intents"] for w in wanted)
        ],
    )
    for name in ("I-CoNa", "I-Controversial"):
        tree = json.loads((data / f"safety/safety-tuned-llamas_{name}.json").read_text(encoding="utf-8"))
        found[name] = "unsafe", tree["instructions"]
    alpaca = rows_of(data, "safety/harmless_instructions_refusal_direction.jsonl.zst")[::8]
    found["alpaca-instructions"] = "ordinary", [row["instruction"] for row in alpaca]
    found["p3-prompts"] = (
        "ordinary",
        [row["prompt"] for row in rows_of(data, "alignment/t0_p3_sample40.jsonl.zst")[::3]],
    )
    for name in (*CORPUS, "lowquality"):
        others: dict[str, list[str]] = defaultdict(list)
        for row in rows_of(data, f"corpus/{name}.jsonl.zst"):
            if name == "lowquality":
                others[f"lowquality: {row['id'].split('/')[0]}"].append(row["text"])
            elif not permitted(row):
                others[f"{name} (others)"].append(row["text"])
        for key, texts in others.items():
            found[key] = "ordinary", clipped(texts[:: max(1, len(texts) // 2000)])
    pages = []
    for path in sorted((data / "webpages").glob("*.jsonl.zst")):
        pages += [extraction.extract(row["html"]).text for row in rows_of(data, f"webpages/{path.name}")]
    found["web pages"] = "ordinary", clipped(page for page in pages if len(page) > 200)
    return found


def measure(data: Path, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train, compare with the shipped file and judge; return (figures, worst mistakes)."""
    known = gather(data, out / "labelled")
    found, file_weights = load(out / "labelled")
    names = np.array(found.file_names)[found.file]
    everything = np.arange(len(found))
    counts = {name: int((names == name).sum()) for name in found.file_names}
    final = scorer_of(
        fit(found, everything, file_weights, FIT), {"language": "en", "axis": "unsafe", "trained_on": counts}
    )
    final.save(out / "unsafe.npz")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (out / "unsafe.npz", MODEL_PATH)]
    figures: dict[str, Any] = {"shipped_scorer_reproduced": digests[0] == digests[1]}
    figures["scorer_bytes"] = len(final.to_bytes())
    mistakes: list[dict[str, Any]] = []

    texts = clipped(known[identity][0] for identity in found.ids)
    marks = {c: np.array([c in known[identity][1] for identity in found.ids]) for c in CATEGORIES}
    fold_D, _, count = evaluation.folds(found, (), NUM_FOLDS)
    learned_D = np.zeros(len(found))
    for fold in range(count):
        model = scorer_of(fit(found, np.flatnonzero(fold_D != fold), file_weights, FIT), {})
        own = np.flatnonzero(fold_D == fold)
        learned_D[own] = unsafe_share([texts[d] for d in own], model)
    unseen = Sides(texts, learned_D)
    of_set = np.isin(names, ("moderation-unsafe", "moderation-safe"))
    ordinary = np.isin(names, list(ORDINARY)) & ~of_set
    figures["moderation_texts_not_english"] = sum(not is_english(texts[d]) for d in np.flatnonzero(of_set))

    def part(sides: Sides, chosen: np.ndarray) -> Sides:
        smaller = object.__new__(Sides)
        smaller.__dict__ = {key: value[chosen] for key, value in sides.__dict__.items()}
        return smaller

    def by_category(title: str, sides: Sides, chosen: np.ndarray, against: dict[str, Sides]) -> None:
        every = {**{c: marks[c] & chosen for c in CATEGORIES}, "any": np.isin(names, list(UNSAFE)) & chosen}
        for category, mark in every.items():
            if mark.sum() < 10:
                continue
            key = f"{title}.{category}"
            figures[f"{key}.texts"] = int(mark.sum())
            for other, side in against.items():
                areas = sides.areas(mark, side)
                figures.update({f"{key}.roc_auc_{other}.{n}": v for n, v in areas.items()})
            figures.update({f"{key}.rejected.{n}": v for n, v in sides.rejected(mark).items()})

    safe = np.array(names == "moderation-safe")
    by_category(
        "moderation, text unseen",
        unseen,
        of_set,
        {"set": part(unseen, safe), "ordinary": part(unseen, ordinary)},
    )
    blind = Sides(
        texts, unsafe_share(texts, scorer_of(fit(found, np.flatnonzero(~of_set), file_weights, FIT), {}))
    )
    by_category("moderation, set unseen", blind, of_set, {"set": part(blind, safe)})
    without_prompts = ~np.isin(names, ("prompts-unsafe", "prompts-safe", "red-team-chats"))
    from_moderation = scorer_of(fit(found, np.flatnonzero(without_prompts), file_weights, FIT), {})
    others = Sides(texts, unsafe_share(texts, from_moderation))
    elsewhere = never_learned(data)
    sides = {
        name: Sides(found_texts, unsafe_share(found_texts, final))
        for name, (_, found_texts) in elsewhere.items()
    }
    harmless = elsewhere["alpaca-instructions"][1]
    alpaca = Sides(harmless, unsafe_share(harmless, from_moderation))
    prompts = np.array(names == "prompts-unsafe")
    by_category("prompts, sets unseen", others, prompts, {"alpaca": alpaca})
    chats = np.array(names == "red-team-chats")
    by_category("red-team chats, set unseen", others, chats, {"alpaca": alpaca})
    for name, (kind, found_texts) in elsewhere.items():
        side = sides[name]
        figures[f"{kind}.{name}.texts"] = len(found_texts)
        if kind == "unsafe":
            every = np.ones(len(found_texts), dtype=bool)
            areas = side.areas(every, sides["alpaca-instructions"])
            figures.update({f"{kind}.{name}.roc_auc_alpaca.{n}": v for n, v in areas.items()})
        else:
            mistakes += worst(name, found_texts, side)
        figures.update({f"{kind}.{name}.rejected.{n}": v for n, v in side.rejected().items()})
    for name in ORDINARY:
        chosen = np.array(names == name)
        figures[f"ordinary.{name}, unseen.texts"] = int(chosen.sum())
        rejected = unseen.rejected(chosen)
        figures.update({f"ordinary.{name}, unseen.rejected.{n}": v for n, v in rejected.items()})
        if name != "moderation-safe":
            mistakes += worst(
                f"{name}, unseen", [texts[d] for d in np.flatnonzero(chosen)], part(unseen, chosen)
            )
    return figures, mistakes


def worst(name: str, texts: list[str], sides: Sides, most: int = 12) -> list[dict[str, Any]]:
    """The ordinary texts that either rule rejects, highest first."""
    order = [i for i in np.argsort(-sides.both, kind="stable")[:most].tolist() if sides.both[i] > 1]
    return [
        {
            "collection": name,
            "learned": round(float(sides.learned[i]), 3),
            "list": round(float(sides.list[i]), 2),
            "chars": len(texts[i]),
            "excerpt": " ".join(texts[i][:400].split())[:240],
        }
        for i in order
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/unsafe-scorer"))
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    mistakes: list[dict[str, Any]] = []
    if not arguments.speed_only:
        figures, mistakes = measure(arguments.data, arguments.out)
        lines = "".join(json.dumps(case, ensure_ascii=False) + "\n" for case in mistakes)
        (arguments.out / "mistakes.jsonl").write_text(lines, encoding="utf-8")
    figures |= speed(arguments.data, unsafe_share, SPEED_FILES, num_documents=2000)
    (arguments.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in figures.items():
        head, _, tail = key.rpartition(".")
        if tail in ("list", "learned", "both"):
            rows[head][tail] = value
        else:
            print(f"{key:<60}{value:.4f}" if isinstance(value, float) else f"{key:<60}{value}")
    print(f"\n{'':<60}{'list':>9}{'learned':>9}{'both':>9}")
    for head, row in rows.items():
        print(f"{head:<60}" + "".join(f"{row[name]:>9.4f}" for name in ("list", "learned", "both")))
    print(f"\nmistakes: {arguments.out / 'mistakes.jsonl'}")


if __name__ == "__main__":
    main()
