"""Multiple-choice tasks, scored by the log-likelihood of each option.

The cloze prompts are those of lm-evaluation-harness 0.4 (the task version it corresponds to is named
as `lm_eval`), so that scores can be checked against it item by item.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml

from pocketphi.core.errors import DataError
from pocketphi.evals.data import text_sha256
from pocketphi.evals.task import LETTERS, Question, Task, register

Row = Mapping[str, Any]


def _bare(query: str) -> str:
    """ "Question: X\\nAnswer:" -> "X": these files keep a prompt where the origin keeps a question."""
    text = re.sub(r"^(Question|Goal):\s*", "", query)
    return re.sub(r"\nAnswer:\s*$", "", text)


def _id(row: Row, number: int, *names: str) -> str:
    for name in names:
        if row.get(name) not in (None, ""):
            return str(row[name])
    return f"row-{number}"


def _content_id(*parts: str) -> str:
    return text_sha256("\0".join(parts))[:12]


def _arc(row: Row, number: int) -> Question:
    text = _bare(row["query"])
    return Question(
        _id(row, number, "id"),
        text,
        tuple(row["choices"]),
        int(row["gold"]),
        cloze=(f"Question: {text}\nAnswer:",),
    )


def _openbookqa(row: Row, number: int) -> Question:
    text = _bare(row["query"])
    return Question(_id(row, number, "id"), text, tuple(row["choices"]), int(row["gold"]), cloze=(text,))


def _hellaswag_text(text: str) -> str:
    # "[title]" and other brackets are leftovers of the WikiHow pages.
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(row: Row, number: int) -> Question:
    if "endings" in row:
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
        text = _hellaswag_text(f"{row['activity_label']}: {context}")
        options = tuple(_hellaswag_text(e) for e in row["endings"])
        return Question(_id(row, number, "ind"), text, options, int(row["label"]), cloze=(text,))
    # The train file keeps prompt and endings ready made.
    options = tuple(c.strip() for c in row["choices"])
    return Question(_id(row, number, "ind"), row["query"], options, int(row["gold"]), cloze=(row["query"],))


def _piqa(row: Row, number: int) -> Question:
    options = (row["sol1"], row["sol2"])
    return Question(
        _content_id(row["goal"], *options),
        row["goal"],
        options,
        int(row["label"]),
        cloze=(f"Question: {row['goal']}\nAnswer:",),
    )


def _winogrande(row: Row, number: int) -> Question:
    sentence, options = row["sentence"], (row["option1"], row["option2"])
    before, blank, after = sentence.partition("_")
    if not blank:
        raise DataError(f"winogrande row {number}: the sentence has no blank: {sentence!r}")
    # What is scored is the rest of the sentence, after each of the two fillings.
    rest = " " + after.strip()
    return Question(
        _content_id(sentence, *options),
        sentence,
        options,
        int(row["answer"]) - 1,
        cloze=tuple(before + o for o in options),
        continuations=(rest, rest),
    )


def _boolq(row: Row, number: int) -> Question:
    passage, _, question = row["query"].rpartition("\nQuestion: ")
    question = re.sub(r"\nAnswer:\s*$", "", question)
    # The file lists "yes" first; the order "no", "yes" is that of the origin's label.
    gold = row["choices"][int(row["gold"])]
    return Question(
        _id(row, number, "idx"),
        question,
        ("no", "yes"),
        ("no", "yes").index(gold),
        passage=passage,
        cloze=(f"{passage}\nQuestion: {question}\nAnswer:",),
    )


def _sciq(row: Row, number: int) -> Question:
    options = (row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"])
    support = row["support"].lstrip()
    return Question(
        _content_id(row["question"], *options),
        row["question"],
        options,
        3,
        passage=support,
        cloze=(f"{support}\nQuestion: {row['question']}\nAnswer:",),
    )


def _mmlu(row: Row, number: int) -> Question:
    text = row["question"].strip()
    return Question(
        _content_id(row["subject"], text, *row["choices"]),
        text,
        tuple(row["choices"]),
        int(row["answer"]),
        group=row["subject"],
        cloze=(f"Question: {text}\nAnswer:",),
    )


def _mmlu_heading(subject: str) -> str:
    name = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {name}.\n\n"


def _lambada(row: Row, number: int) -> Question:
    return Question(_id(row, number, "id"), row["query"], (row["answers_text"][0],), 0, cloze=(row["query"],))


def _commonsense(row: Row, number: int) -> Question:
    text = _bare(row["query"])
    return Question(
        _id(row, number, "id"),
        text,
        tuple(row["choices"]),
        int(row["gold"]),
        cloze=(f"Question: {text}\nAnswer:",),
    )


def _social(row: Row, number: int) -> Question:
    options = (row["answerA"], row["answerB"], row["answerC"])
    text = f"{row['context']} {row['question']}"
    return Question(
        _content_id(text, *options), text, options, int(row["label"]) - 1, cloze=(f"Q: {text}\nA:",)
    )


def _anli(row: Row, number: int) -> Question:
    options = ("True", "Neither", "False")
    text = f"{row['statement']} True, False, or Neither?"
    return Question(
        _content_id(row["context"], row["statement"]),
        text,
        options,
        "enc".index(row["gold_label"]),
        passage=row["context"],
        cloze=(f"{row['context']}\nQuestion: {text}\nAnswer:",),
    )


def _medqa(row: Row, number: int) -> Question:
    body = row["query"].removesuffix("\nAnswer:")
    stem, options = body[len("Question: ") :], []
    # The options stand in the prompt, one a line, after the question.
    pieces = re.split(r"\n ([A-E])\. ", stem)
    options = pieces[2::2]
    if pieces[1::2] != list(LETTERS[: len(options)]) or not 4 <= len(options) <= 5:
        raise DataError(f"medqa row {number}: the options could not be read from its query")
    return Question(
        _content_id(pieces[0], *options),
        pieces[0],
        tuple(options),
        int(row["gold"]),
        cloze=(f"Question: {pieces[0]}\nAnswer:",),
    )


def _agieval(row: Row, number: int) -> Question | None:
    # Fill-in tasks (math, gaokao-mathcloze) have no options, a few physics rows several answers.
    label = row["label"]
    if isinstance(label, list) and len(label) == 1:
        label = label[0]
    if not row["options"] or not isinstance(label, str) or len(label) != 1:
        return None
    options = tuple(re.sub(r"^\s*\(?[A-G]\)?\s*[.:]?\s*", "", o, count=1) for o in row["options"])
    if label not in LETTERS[: len(options)]:
        return None
    passage = row["passage"] or ""
    return Question(
        _content_id(row["task"], passage, row["question"], *options),
        row["question"],
        options,
        LETTERS.index(label),
        passage=passage,
        group=row["task"],
        cloze=((passage + "\n" if passage else "") + f"Question: {row['question']}\nAnswer:",),
    )


def _split_answers(text: str) -> list[str]:
    return [a.strip() for a in text.split(";") if a.strip()]


def _truthfulqa(row: Row, number: int) -> Question:
    best = row["Best Answer"].strip()
    right = list(dict.fromkeys([best, *_split_answers(row["Correct Answers"])]))
    wrong = [a for a in dict.fromkeys(_split_answers(row["Incorrect Answers"])) if a not in right]
    return Question(
        _content_id(row["Question"]),
        row["Question"],
        (*right, *wrong),
        0,
        cloze=(f"Q: {row['Question']}\nA:",),
        true=(True,) * len(right) + (False,) * len(wrong),
    )


def _medmcqa(row: Row, number: int) -> Question:
    options = (row["opa"], row["opb"], row["opc"], row["opd"])
    return Question(
        _id(row, number, "id"),
        row["question"],
        options,
        int(row["cop"]),
        cloze=(f"Question: {row['question']}\nAnswer:",),
    )


def _copa(row: Row, number: int) -> Question:
    joiner = {"cause": "because", "effect": "therefore"}[row["question"]]
    options = tuple(c[:1].lower() + c[1:] for c in (row["choice1"], row["choice2"]))
    context = f"{row['premise'].strip()[:-1]} {joiner}"
    return Question(_id(row, number, "idx"), context, options, int(row["label"]), cloze=(context,))


def _rte(row: Row, number: int) -> Question:
    text = f"{row['sentence2']} True or False?"
    return Question(
        _id(row, number, "idx"),
        text,
        ("True", "False"),
        int(row["label"]),
        passage=row["sentence1"],
        cloze=(f"{row['sentence1']}\nQuestion: {text}\nAnswer:",),
    )


@cache
def house_items() -> tuple[Question, ...]:
    """The questions that come with the package: they need no file and no download."""
    raw = resources.files("pocketphi.evals").joinpath("data/house.yaml").read_text(encoding="utf-8")
    found = []
    for item in yaml.safe_load(raw)["items"]:
        # The file lists the right choice first; the order shown follows from the id alone.
        turn = hashlib.sha256(item["id"].encode()).digest()[0] % len(item["choices"])
        options = tuple(item["choices"][-turn:] + item["choices"][:-turn]) if turn else tuple(item["choices"])
        text = item["question"]
        found.append(Question(item["id"], text, options, turn, cloze=(f"Question: {text}\nAnswer:",)))
    return tuple(found)


def _choice(
    name: str,
    title: str,
    file: str | None,
    columns: tuple[str, ...],
    read: Callable[[Row, int], Question | None] | None,
    source: str,
    **more: Any,
) -> None:
    register(Task(name, "choice", more.pop("version", 1), title, file, columns, source, read=read, **more))


_OLMO = "AI2 OLMo evaluation files"
_QCG = ("query", "choices", "gold")

_choice("house", "House questions", None, (), None, "written for PocketPhi, MIT", metric="accuracy_norm")
_choice(
    "arc_easy", "ARC-Easy", "arc_easy.test", _QCG, _arc, f"{_OLMO}, CC-BY-SA-4.0", hub="allenai/ai2_arc:ARC-Easy",
    shots_file="arc_easy.train", metric="accuracy_norm", lm_eval="arc_easy v1.0",
)  # fmt: skip
_choice(
    "arc_challenge", "ARC-Challenge", "arc_challenge.test", _QCG, _arc, f"{_OLMO}, CC-BY-SA-4.0",
    hub="allenai/ai2_arc:ARC-Challenge", shots_file="arc_challenge.train", metric="accuracy_norm",
    lm_eval="arc_challenge v1.0",
)  # fmt: skip
_choice(
    "hellaswag", "HellaSwag", "hellaswag.validation", ("ctx_a", "ctx_b", "activity_label", "endings", "label"),
    _hellaswag, "Rowan Zellers, MIT", hub="Rowan/hellaswag", shots_file="hellaswag.train", metric="accuracy_norm",
    lm_eval="hellaswag v1.0",
)  # fmt: skip
_choice(
    "piqa", "PIQA", "piqa.validation", ("goal", "sol1", "sol2", "label"), _piqa, f"{_OLMO}, AFL-3.0",
    hub="ybisk/piqa", shots_file="piqa.train", metric="accuracy_norm", lm_eval="piqa v1.0",
)  # fmt: skip
_choice(
    "winogrande", "WinoGrande XL", "winogrande_xl.validation", ("sentence", "option1", "option2", "answer"),
    _winogrande, f"{_OLMO}, CC-BY", hub="allenai/winogrande:winogrande_xl", shots_file="winogrande_xl.train",
    lm_eval="winogrande v1.0",
)  # fmt: skip
_choice(
    "openbookqa", "OpenBookQA", "openbookqa.test", _QCG, _openbookqa, f"{_OLMO}, Apache-2.0",
    hub="allenai/openbookqa:main", shots_file="openbookqa.train", metric="accuracy_norm", lm_eval="openbookqa v1.0",
)  # fmt: skip
_choice(
    "boolq", "BoolQ", "boolq.validation", _QCG, _boolq, f"{_OLMO}, CC-BY-SA-3.0", hub="aps/super_glue:boolq",
    shots_file="boolq.train", lm_eval="boolq v2.0",
)  # fmt: skip
_choice(
    "sciq", "SciQ", "sciq.validation", ("question", "distractor1", "distractor2", "distractor3", "correct_answer",
    "support"), _sciq, f"{_OLMO}, CC-BY-NC-3.0", hub="allenai/sciq", shots_file="sciq.validation",
    metric="accuracy", lm_eval="sciq v1.0 (validation rows)",
)  # fmt: skip
_choice(
    "mmlu", "MMLU", "mmlu.test", ("question", "subject", "choices", "answer"), _mmlu, f"{_OLMO}, MIT",
    hub="cais/mmlu:all", shots_file="mmlu.dev", format="letters", heading=_mmlu_heading, shots_by_group=True,
    lm_eval="mmlu v1.0",
)  # fmt: skip
_choice(
    "lambada", "LAMBADA (OpenAI)", "lambada_openai.test", ("query", "answers_text"), _lambada, f"{_OLMO}, MIT",
    hub="EleutherAI/lambada_openai", metric="accuracy", lm_eval="lambada_openai v1.0",
)  # fmt: skip
_choice(
    "commonsense_qa", "CommonsenseQA", "commonsense_qa.validation", _QCG, _commonsense, f"{_OLMO}, MIT",
    hub="tau/commonsense_qa", shots_file="commonsense_qa.train", format="letters", lm_eval="commonsense_qa",
)  # fmt: skip
_choice(
    "social_iqa", "SocialIQA", "social_iqa.validation", ("context", "question", "answerA", "answerB", "answerC",
    "label"), _social, f"{_OLMO}, CC-BY-4.0", hub="allenai/social_i_qa", shots_file="social_iqa.train",
    lm_eval="social_iqa v0.0",
)  # fmt: skip
for _round in (1, 2, 3):
    _choice(
        f"anli_r{_round}", f"ANLI round {_round}", f"anli_r{_round}.dev", ("context", "statement", "gold_label"),
        _anli, "Facebook AI, CC-BY-NC-4.0", hub=f"facebook/anli:dev_r{_round}", shots_file=f"anli_r{_round}.dev",
        lm_eval=f"anli_r{_round} v1.0 (dev rows)",
    )  # fmt: skip
_choice(
    "medqa", "MedQA (USMLE)", "medqa_us_4to5_options.test", ("query", "gold"), _medqa, "AI2 OLMo evaluation files, MIT",
    hub="bigbio/med_qa", shots_file="medqa_us_4to5_options.test", format="letters",
)  # fmt: skip
_choice(
    "medmcqa", "MedMCQA", "medmcqa.validation", ("question", "opa", "opb", "opc", "opd", "cop"), _medmcqa,
    "AI2 OLMo evaluation files, Apache-2.0", hub="openlifescienceai/medmcqa", shots_file="medmcqa.validation",
    format="letters",
)  # fmt: skip
_choice(
    "agieval", "AGIEval v1, questions with options", "agieval_v1.test", ("task", "passage", "question", "options",
    "label"), _agieval, "ruixiangcui/AGIEval, MIT", hub="hails/agieval-*", format="letters",
)  # fmt: skip
_choice(
    "truthfulqa_mc2", "TruthfulQA MC2", "truthfulqa.all", ("Question", "Best Answer", "Correct Answers",
    "Incorrect Answers"), _truthfulqa, "TruthfulQA, Apache-2.0", hub="truthfulqa/truthful_qa",
    shots_file="truthfulqa.all", metric="mc2",
)  # fmt: skip
# lm-eval's copa v1.0 is this with two spaces before an option.
_choice(
    "copa", "COPA", "copa.validation", ("premise", "choice1", "choice2", "question", "label"), _copa,
    f"{_OLMO}, BSD-2-Clause", hub="aps/super_glue:copa", shots_file="copa.validation",
)  # fmt: skip
_choice(
    "rte", "RTE", "rte.validation", ("sentence1", "sentence2", "label"), _rte, f"{_OLMO}, GLUE",
    hub="nyu-mll/glue:rte", shots_file="rte.validation", lm_eval="rte v1.0",
)  # fmt: skip
