"""Tasks whose answer the model writes: arithmetic, mathematics, reasoning, questions, programs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pocketphi.evals import extract
from pocketphi.evals.data import text_sha256
from pocketphi.evals.task import Prompt, Task, Verdict, register

Row = Mapping[str, Any]


def _id(*parts: str) -> str:
    return text_sha256("\0".join(parts))[:12]


# GSM8K and MATH


def _gsm8k(row: Row, number: int) -> Prompt:
    target = extract.plain_number(row["answer"].rpartition("####")[2])
    if target is None:
        raise ValueError("the row's answer ends in no number")
    return Prompt(_id(row["question"]), f"Q: {row['question']}\nA:", target)


def _gsm8k_score(text: str, prompt: Prompt) -> Verdict:
    answer = extract.first_stated_number(text)
    return Verdict(answer, answer == prompt.target)


def _math(row: Row, number: int) -> Prompt:
    target = row.get("answer") or extract.boxed(row["solution"])
    if target is None:
        raise ValueError("the row has neither an answer nor a boxed one")
    text = (
        "Solve the problem step by step. Put the final answer in \\boxed{}.\n\n"
        f"Problem:\n{row['problem']}\n\nSolution:"
    )
    return Prompt(_id(row["problem"]), text, target, group=str(row.get("type") or ""))


def _math_score(text: str, prompt: Prompt) -> Verdict:
    answer = extract.math_answer(text)
    return Verdict(answer, answer is not None and extract.same_math(answer, prompt.target))


# BIG-Bench-Hard


def _bbh(row: Row, number: int) -> Prompt:
    return Prompt(
        _id(row["task"], row["input"]),
        f"Q: {row['input']}\nA: Let's think step by step.\n",
        row["target"],
        group=row["task"],
    )


def _bbh_score(text: str, prompt: Prompt) -> Verdict:
    answer = extract.stated(text)
    return Verdict(answer, answer is not None and extract.same_bbh(answer, prompt.target))


# Questions with a short answer


def _trivia(row: Row, number: int) -> Prompt:
    answer = row["answer"]
    accepted = [answer["value"], *answer["aliases"], *answer.get("normalized_aliases", [])]
    return Prompt(
        str(row["question_id"]),
        f"Question: {row['question']}\nAnswer:",
        answer["value"],
        meta={"accepted": accepted},
    )


def _nq(row: Row, number: int) -> Prompt:
    return Prompt(
        _id(row["question"]),
        f"Question: {row['question']}?\nAnswer:",
        row["answer"][0],
        meta={"accepted": list(row["answer"])},
    )


def _short_score(text: str, prompt: Prompt) -> Verdict:
    answer = text.strip().split("\n")[0].strip()
    return Verdict(answer or None, extract.is_one_of(answer, prompt.meta["accepted"]))


# Programs


def _humaneval(row: Row, number: int) -> Prompt:
    return Prompt(
        row["task_id"],
        row["prompt"],
        row["canonical_solution"],
        meta={"tests": f"{row['test']}\ncheck({row['entry_point']})\n", "entry_point": row["entry_point"]},
    )


def humaneval_program(text: str, prompt: Prompt) -> str:
    """The program to run: a fenced block if there is one, else the prompt continued by the text.

    A block or a reply may repeat the whole function instead; imports of the prompt are kept then.
    """
    name = prompt.meta["entry_point"]
    block = extract.program(text)
    whole = extract.top_level(text if block is None else block)
    if re.search(rf"^def\s+{re.escape(name)}\b", whole, re.MULTILINE):
        if block is None:
            whole = extract.without_afterwords(whole, name)
        return f"{_imports(prompt.prompt)}\n{whole}"
    return prompt.prompt + (text if block is None else block)


def _imports(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith(("import ", "from ")))


def _humaneval_score(text: str, prompt: Prompt) -> Verdict:
    return _run(humaneval_program(text, prompt), prompt)


# The rows that the original paper shows as examples, and those it tests on.
MBPP_SHOTS, MBPP_TEST = (2, 3, 4), range(11, 511)


def _mbpp(row: Row, number: int) -> Prompt | None:
    if row["task_id"] not in MBPP_SHOTS and row["task_id"] not in MBPP_TEST:
        return None
    tests = "\n".join(row["test_list"])
    return Prompt(
        str(row["task_id"]),
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n",
        row["code"].replace("\r\n", "\n").replace("\t", "    ") + "\n[DONE]",
        meta={"tests": f"{row['test_setup_code']}\n{tests}\n"},
    )


def _mbpp_score(text: str, prompt: Prompt) -> Verdict:
    return _run(extract.top_level(extract.program(text) or text.partition("[DONE]")[0]), prompt)


def _run(program: str, prompt: Prompt) -> Verdict:
    from pocketphi.evals import sandbox

    if not program.strip():
        return Verdict(None, False, "empty program")
    found = sandbox.run(program, prompt.meta["tests"])
    return Verdict(program[-2000:], found.passed, found.reason)


# GPQA


def _gpqa(row: Row, number: int) -> Prompt:
    right = row["Correct Answer"].strip()
    options = [right, *(row[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3))]
    # The order shown follows from the question alone.
    options.sort(key=lambda o: _id(row["Question"], o))
    letters = "ABCD"
    listed = "\n".join(f"({letters[i]}) {o}" for i, o in enumerate(options))
    return Prompt(
        _id(row["Question"]),
        f"Question: {row['Question'].strip()}\nChoices:\n{listed}\nLet's think step by step:",
        letters[options.index(right)],
        meta={"count": 4, "explanation": row.get("Explanation") or ""},
    )


def _letter_score(text: str, prompt: Prompt) -> Verdict:
    answer = extract.letter(text, prompt.meta["count"])
    return Verdict(answer, answer == prompt.target)


def letter_score(text: str, prompt: Prompt) -> Verdict:
    """Score a written letter; used where a choice task is answered by generation."""
    return _letter_score(text, prompt)


def solved(task: Task, prompt: Prompt) -> str:
    """A shot as it stands in the few-shot text: the prompt and its answer."""
    if task.name == "mbpp":
        return prompt.prompt + prompt.target
    if task.name == "gpqa":
        return (
            f"{prompt.prompt} {prompt.meta['explanation'].strip()}\nThe correct answer is ({prompt.target})"
        )
    return f"{prompt.prompt} {prompt.target}"


def _generate(name: str, title: str, file: str, columns: tuple[str, ...], **more: Any) -> None:
    register(Task(name, "generate", more.pop("version", 1), title, file, columns, **more))


_generate(
    "gsm8k", "GSM8K, chain of thought", "gsm8k.test", ("question", "answer"), source="OpenAI, MIT", version=2,
    hub="openai/gsm8k:main", read=_gsm8k, score=_gsm8k_score, prefix_file="gsm8k_cot_fewshot8", shots=8,
    stop=("\nQ:", "\n\nQ:", "Q:"), max_new_tokens=256, lm_eval="gsm8k_cot v3.0",
)  # fmt: skip
_generate(
    "math", "MATH", "math.test", ("problem", "solution"), source="Hendrycks et al., MIT",
    hub="EleutherAI/hendrycks_math", version=3, read=_math, score=_math_score, stop=("\n\nProblem:",), max_new_tokens=768,
)  # fmt: skip
_generate(
    "math500", "MATH-500", "math500.test", ("problem", "solution"), source="Hendrycks et al., MIT",
    hub="HuggingFaceH4/MATH-500", version=3, read=_math, score=_math_score, stop=("\n\nProblem:",), max_new_tokens=768,
)  # fmt: skip
_generate(
    "bbh", "BIG-Bench-Hard, chain of thought", "bbh.test", ("task", "input", "target"), source="suzgunmirac, MIT",
    hub="lukaemon/bbh", version=3, read=_bbh, score=_bbh_score, prefix_file="bbh_cot_prompts", shots=3,
    stop=("\n\nQ:", "\nQ:"), max_new_tokens=512, lm_eval="bbh_cot_fewshot v4.0",
)  # fmt: skip
_generate(
    "triviaqa", "TriviaQA, closed book", "triviaqa_wikipedia_nocontext.validation", ("question", "question_id",
    "answer"), source="AI2 OLMo evaluation files, Apache-2.0", hub="mandarjoshi/trivia_qa:rc.wikipedia.nocontext",
    read=_trivia, score=_short_score, shots_file="triviaqa_wikipedia_nocontext.validation", shots=5, stop=("\n",),
    max_new_tokens=32,
)  # fmt: skip
_generate(
    "nq_open", "Natural Questions, closed book", "nq_open.validation", ("question", "answer"),
    source="AI2 OLMo evaluation files, CC-BY-SA-3.0", hub="google-research-datasets/nq_open", read=_nq,
    score=_short_score, shots_file="nq_open.validation", shots=5, stop=("\n",), max_new_tokens=32,
)  # fmt: skip
_generate(
    "humaneval", "HumanEval", "humaneval.test", ("task_id", "prompt", "entry_point", "test", "canonical_solution"),
    source="OpenAI, MIT", hub="openai/openai_humaneval", read=_humaneval, score=_humaneval_score,
    version=3, metric="pass_at_1", stop=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@"),
    # A reply in a conversation opens a fence or an explanation: these would cut it before the program.
    chat_stop=(), max_new_tokens=384,
)  # fmt: skip
_generate(
    "mbpp", "MBPP", "mbpp.all", ("text", "code", "task_id", "test_list", "test_setup_code"),
    source="Google Research, CC-BY-4.0", hub="google-research-datasets/mbpp", read=_mbpp, score=_mbpp_score,
    version=3, metric="pass_at_1", shots_file="mbpp.all", shots=3, shot_ids=tuple(str(i) for i in MBPP_SHOTS), stop=("[DONE]",), max_new_tokens=320,
)  # fmt: skip
_generate(
    "gpqa", "GPQA main, chain of thought", "gpqa_main.test", ("Question", "Correct Answer", "Incorrect Answer 1",
    "Incorrect Answer 2", "Incorrect Answer 3"), source="Rein et al., CC-BY-4.0", hub="Idavidrein/gpqa:gpqa_main",
    read=_gpqa, score=_letter_score, shots_file="gpqa_main.test", shots=2, stop=("\n\nQuestion:",),
    max_new_tokens=768, gated="GPQA's authors gate its rows, so that they stay out of training texts: accept "
    "their terms at huggingface.co/datasets/Idavidrein/gpqa, set HF_TOKEN, and use --hub",
)  # fmt: skip
