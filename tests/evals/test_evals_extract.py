"""Reading answers out of texts written by hand: right ones, wrong ones, odd ones."""

from __future__ import annotations

import pytest

from pocketphi.evals import extract
from pocketphi.evals.task import TASKS, Prompt
from pocketphi.evals.tasks import generate


def verdict(task: str, text: str, target: str, **meta):
    score = TASKS[task].score
    assert score is not None
    return score(text, Prompt("1", "", target, meta=meta))


@pytest.mark.parametrize(
    ("text", "target", "correct"),
    [
        # Right.
        (" 2 + 3 = 5. The answer is 5.", "5", True),
        (" So she has $1,234. The answer is $1,234.00.", "1234", True),
        ("The total is 18 eggs.\n#### 18", "18", True),
        ("He is 7 below zero. The answer is -7.", "-7", True),
        ("The answer is 0.50.", "0.5", True),
        ("the ANSWER IS: **72**", "72", True),
        ("5 + 5 = 10, and 10 / 4 = 2.5", "2.5", True),
        ("The answer is 3. Q: Another one? The answer is 9.", "3", True),
        # Wrong.
        ("The answer is 6.", "5", False),
        ("The answer is 55.", "5", False),
        ("The answer is 5.5.", "5", False),
        ("The answer is -5.", "5", False),
        ("5, 6, 7", "5", False),
        # As models of 44M parameters write.
        (" 125 / 3 = 65", "65", True),
        ("The answer is 125 x 2 = 250.", "250", True),
        ("The answer is 125 x 2 = 250.", "125", False),
        ("The answer is $1,000 - $250 + 50 = $800.50, so", "800.5", True),
        ("The answer is 3. 4 + 5 = 9", "3", True),
        ("The answer is 12 - a dozen.", "12", True),
        ("The answer is 10.\n\nThis is a classic example of 1 + 1 = 2", "10", True),
        ("20 is 2 x 5 = 10. 10 is 18. 100 is 100. 100 is", "4", False),
        ("15(10)=35\n15-35=35\nThe answer is 35.", "35", True),
        ("250000(.15)=60% of his house\nSo he has 60/2=10 dollars left\nThe answer is 10.", "40000", False),
        ("The third movie will take 6 hours * 6 = 12 hours\nThe third movie will take 12", "215", False),
        # Odd: nothing to read is nothing, not zero.
        ("", "0", False),
        ("The answer is unknown.", "0", False),
        ("I do not know", "5", False),
        ("............", "0", False),
        ("The answer is five.", "5", False),
    ],
)
def test_gsm8k(text: str, target: str, correct: bool) -> None:
    assert verdict("gsm8k", text, target).correct is correct


@pytest.mark.parametrize("text", ["", "no number here", "$", "- . ,", "The answer is"])
def test_gsm8k_unreadable_is_none(text: str) -> None:
    assert verdict("gsm8k", text, "0").answer is None


@pytest.mark.parametrize(
    ("text", "target", "correct"),
    [
        (r"Thus $x = \boxed{\frac{3}{4}}$.", r"\frac{3}{4}", True),
        (r"\boxed{\dfrac34}", r"\frac{3}{4}", True),
        (r"\boxed{0.75}", r"\frac{3}{4}", True),
        (r"First \boxed{1}, no: \boxed{2}.", "2", True),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left(3,\frac{\pi}{2}\right)", True),
        (r"\boxed{5 \text{ cm}}", "5", True),
        (r"\boxed{\text{Monday}}", r"\text{Monday}", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{x = 5}", "5", True),
        (r"The final answer is $12$.", "12", True),
        (r"so we get $7$", "7", True),
        (r"\boxed{90^\circ}", "90", True),
        ("So, the answer is $g(f(-3)) = 1$.", "1", True),
        (r"\boxed{f(x) = x + 2}", "x+2", True),
        (r"\boxed{x_1 = 3}", "3", True),
        (r"\boxed{\angle ABC = 30^\circ}", "30", True),
        (r"\boxed{AB = 5}", "5", True),
        (r"\boxed{2x + 1 = 7}", "7", False),
        (r"\boxed{x + y = 7}", "7", False),
        (r"\boxed{f(x) = 3, f(y) = 7}", "7", False),
        (r"\boxed{x = 3 = y}", "y", False),
        (r"\boxed{\{1,2\}}", r"\{1,2\}", True),
        # As models of 44M and 135M parameters write: units in words, loops, a formula that is no answer.
        (r"the volume is $24\pi square inches$.", r"24\pi", True),
        ("The answer is 12 dollars.", "12", True),
        ("The final answer is $7$ cm.", "7", True),
        (r"\boxed{3 \text{ feet}} tall", "3", True),
        (r"\boxed{10 \text{ m}}", "10", True),
        (r"\boxed{m}", "m", True),
        (r"\boxed{2m}", "2", False),
        (r"\boxed{12 square}", "12", False),
        ("Let $f(x) = x + 2$. What is $g(x)$?\n\nLet $f(x) = x + 2$. What is $g(x)$?", "2", False),
        ("1.25\n2.25\n3.25\n4.25\n15", "15", False),
        (r"\boxed{\frac{3}{5}}", r"\frac{3}{4}", False),
        (r"\boxed{(1,2)}", "(2,1)", False),
        (r"\boxed{-5}", "5", False),
        (r"\boxed{}", "5", False),
        (r"\boxed{unclosed", "5", False),
        ("", "5", False),
        ("The number 5 comes to mind.", "5", False),
    ],
)
def test_math(text: str, target: str, correct: bool) -> None:
    assert verdict("math", text, target).correct is correct


@pytest.mark.parametrize(
    ("text", "target", "correct"),
    [
        ("So the answer is (A).", "(A)", True),
        ("So the answer is A.", "(A)", True),
        ("the answer is True.", "True", True),
        ("So the answer is false", "False", True),
        ("Step 1. So the answer is valid.", "valid", True),
        ("so the answer is ] > ).", "] > )", True),
        ("So the answer is  apple banana  cherry.", "apple banana cherry", True),
        # As small models write.
        ('The answer is: "The answer is: (A)', "(A)", True),
        ("So the answer is Option (A).", "(A)", True),
        ("So the answer is [A].", "(A)", True),
        ("So the answer is option B", "(A)", False),
        ("So the answer is Optional (A).", "(A)", False),
        ("- Yes\n- Yes\n- Yes\n- Yes", "Yes", False),
        ("Option (A) => A: [A].", "(A)", False),
        ('The answer is: "The answer is: "no non-renewable', "invalid", False),
        ("So the answer is (B).", "(A)", False),
        ("So the answer is (AB).", "(A)", False),
        ("A.", "(A)", False),
        ("The answer is", "True", False),
        ("", "True", False),
        ("the answer is not True.", "True", False),
    ],
)
def test_bbh(text: str, target: str, correct: bool) -> None:
    assert verdict("bbh", text, target).correct is correct


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" B", "B"), ("B.", "B"), ("(C) because", "C"), ("**D**", "D"), ("The answer is (B).", "B"), ("Answer: c", None),
        ("The correct answer is A, not B", "A"), (r"\boxed{D}", "D"), ("I choose (A).", "A"),
        ("The answer is A. The answer is B.", None), ("A dog barks", None), ("E", None), ("", None), ("(A) or (B)", "A"),
        ("Both (A) and (B)", None), ("none of them", None),
    ],
)  # fmt: skip
def test_letters(text: str, letter: str | None) -> None:
    assert extract.letter(text, 4) == letter


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        (" The Beatles\nQuestion: next", True), ("beatles!", True), ("Beatles, The", True), ("The Fab Four", True),
        ("The Rolling Stones", False), ("", False), ("\nBeatles", True), ("...", False),
        ("It was the Beatles who did so", False),
    ],
)  # fmt: skip
def test_short_answers(text: str, correct: bool) -> None:
    accepted = ["The Beatles", "the fab four"]
    assert verdict("triviaqa", text, "The Beatles", accepted=accepted).correct is correct


PROMPT = 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum of xs."""\n'
TESTS = "def check(f):\n    assert f([1, 2]) == 3\n    assert f([]) == 0\n\ncheck(total)\n"


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("    return sum(xs)\n", True),
        ("```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```", True),
        ("Here it is:\n```\n    return sum(xs)\n```\nDone.", True),
        ("    return sum(xs)\n```\n\nThis adds the numbers.", True),
        # Replies in a conversation: a leading space, the whole function, words and calls after it.
        (" def total(xs: List[int]) -> int:\n    return sum(xs)\n", True),
        (" def total(xs):\n    return sum(xs)\n\nresult = total(30)\nprint(result)", True),
        ("def total(xs):\n    s = 0\n    for x in xs:\n        s += x\n    return s\n\nThis adds.", True),
        ("import math\ndef total(xs):\n    return helper(xs)\n\ndef helper(xs):\n    return sum(xs)\n", True),
        (" ```python\n def total(xs):\n    return sum(xs)\n```", True),
        ("    def total(xs):\n        return sum(xs)\n", True),
        (" def total(xs):\n    return total(xs)\n", False),
        (" def total(text: str: str:) -> str:\n    return sum(xs)\n", False),
        ("    sum_to_n(100)\n    >>> sum_to_n(100)\n    15\n", False),
        (" The given list is a list. It is a list.", False),
        ("\n    return sum(xs)\n```", True),
        ("```\n\nThis function adds the numbers.", False),
        ("    return 3\n", False),
        ("    return sum(xs\n", False),
        ("", False),
        ("I cannot do that.", False),
    ],
)
def test_humaneval(text: str, correct: bool) -> None:
    prompt = Prompt("1", PROMPT, "", meta={"tests": TESTS, "entry_point": "total"})
    score = TASKS["humaneval"].score
    assert score is not None
    assert score(text, prompt).correct is correct


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("def double(x):\n    return 2 * x\n[DONE]\nmore", True),
        ("Sure!\n```python\ndef double(x):\n    return x + x\n```", True),
        ("def double(x):\n    return 2 * x\n```\nIt doubles x.", True),
        (" def double(x):\n  return 2 * x\n\nresult = double(True)\n", True),
        (" def double(n):\n  return max(min(n - 1))", False),
        ("\nprint(double(10) == 20", False),
        (" assert double(2) == 4", False),
        ("\n# Test case\nassert double(2);", False),
        ("def double(x):\n    return x\n[DONE]", False),
        ("", False),
        ("[DONE]", False),
        ("def other(x):\n    return 2 * x", False),
    ],
)
def test_mbpp(text: str, correct: bool) -> None:
    assert verdict("mbpp", text, "", tests="assert double(2) == 4\n").correct is correct


def test_a_program_that_ends_the_test_early_has_not_passed() -> None:
    assert not verdict("mbpp", "import sys\nsys.exit(0)\n", "", tests="assert double(2) == 4\n").correct
    assert generate.MBPP_SHOTS == (2, 3, 4)
