r"""Reading the answer out of what a model wrote.

Every rule returns the answer in a normal form, or None when the text does not give one; None is counted
as "unreadable" and never as right. The rules look for a stated answer first ("The answer is 42.",
"#### 42", "\boxed{42}") and, where the protocol allows it, take the last candidate otherwise.
"""

from __future__ import annotations

import re
import string
import textwrap
from collections.abc import Iterable
from fractions import Fraction

_NUMBER = r"-?\$?\s?-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_STATED_NUMBER = re.compile(
    r"(?:answer\s*(?:is|:|=)\s*:?\s*(?:\*\*)?\s*[a-z ]{0,20}?|####\s*)(" + _NUMBER + r")(?=\D|$)",
    re.IGNORECASE,
)
# What follows a stated number that is only the beginning of a sum.
_WORKED_OUT = re.compile(r"(?:\s*[-+*/x\u00d7\u00f7]\s*\$?[\d.,]*\d%?)+\s*=\s*(-?\$?\d[\d,]*(?:\.\d+)?)")
_ANY_NUMBER = re.compile(r"(?<![\w.])(" + _NUMBER + r")(?![\d])")


def number(text: str) -> str | None:
    """The number that a worked solution ends with: the stated one, else the last one.

    "$1,234.00" -> "1234"; "-3.50" -> "-3.5".
    """
    stated = [m for m in _STATED_NUMBER.findall(text) if re.search(r"\d", m)]
    found = stated or [m for m in _ANY_NUMBER.findall(text) if re.search(r"\d", m)]
    return plain_number(found[-1]) if found else None


def first_stated_number(text: str) -> str | None:
    """The first stated number: what counts when a model goes on to invent further questions.

    "The answer is 125 x 2 = 250" states 250.
    """
    stated = next((m for m in _STATED_NUMBER.finditer(text) if re.search(r"\d", m[1])), None)
    if stated is None:
        return number(text)
    worked_out = _WORKED_OUT.match(text, stated.end())
    return plain_number(worked_out[1] if worked_out else stated[1])


def plain_number(text: str) -> str | None:
    """A number without signs of money, thousands and trailing zeros; None if it is none."""
    bare = re.sub(r"[\s$,]", "", text).rstrip(".")
    try:
        value = Fraction(bare)
    except (ValueError, ZeroDivisionError):
        return None
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.10g}"


def letter(text: str, count: int) -> str | None:
    """The option letter that a text chooses, of the first `count`; None when it names none, or two.

    Accepts "B", "(B)", "B.", "The answer is (B)", "**B**", "Answer: B"; a stated answer wins over a
    letter at the start, and a lone letter inside a sentence ("A dog ...") counts for nothing.
    """
    letters = string.ascii_uppercase[:count]
    stated = re.findall(
        rf"answer\s*(?:is|:|=)?\s*:?\s*(?:option\s*)?[*(\[\"']*([{letters}])(?=[\s).\]*\"',:;]|$)",
        text,
        re.IGNORECASE,
    )
    stated = [s for s in stated if s in letters]
    if stated:
        return stated[-1] if len(set(stated)) == 1 else None
    start = re.match(rf"\s*[*(\[\"']*([{letters}])(?:[).:\]*\"',]|\s*$|\s*\n)", text)
    if start:
        return start.group(1)
    boxed_ = boxed(text)
    if boxed_ is not None and boxed_.strip("() ") in letters and boxed_.strip("() "):
        return boxed_.strip("() ")
    bracketed = set(re.findall(rf"\(([{letters}])\)", text))
    return bracketed.pop() if len(bracketed) == 1 else None


# Units in plain words after a value; the list follows what other graders of MATH leave out.
_UNITS = re.compile(
    r"(?<=[\w)}$])\s+(?:(?:square|cubic|sq\.?|cu\.?)\s+)?"
    r"(?:units?|inch(?:es)?|in\.|feet|foot|ft|yards?|miles?|mph|[ckm]?m|(?:centi|milli|kilo)?met(?:er|re)s?"
    r"|degrees?|dollars?|cents?|hours?|minutes?|seconds?|days?|weeks?|months?|years?|points?)\.?$"
)

# What may stand before "=" when the value after it is the answer: x, x_1, AB, f(2), \\angle ABC.
_NAME = re.compile(r"(?:\\[a-z]+)?[A-Za-z]{0,3}(?:_\{?\w+\}?)?(?:\([^=]*\))?")


def boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} or \fbox{...}, with balanced braces; None when there is none."""
    starts = [m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    if starts:
        depth = 1
        for place in range(starts[-1], len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[starts[-1] : place]
        return None
    bare = re.findall(r"\\boxed\s+([^\s$]+)", text)
    return bare[-1] if bare else None


def math_answer(text: str) -> str | None:
    r"""The final answer of a solution in LaTeX, normalised: \boxed, else "the answer is ...", else the last $...$."""
    found = boxed(text)
    if found is None:
        stated = re.findall(
            r"(?:final\s+)?answer\s*(?:is|:)\s*:?\s*(.+?)(?:\.\s|\.$|\n|$)", text, re.IGNORECASE
        )
        if stated:
            found = stated[-1]
        else:
            dollars = re.findall(r"\$([^$]+)\$", text)
            found = dollars[-1] if dollars else None
    return normal_math(found) if found is not None and found.strip() else None


def same_math(one: str, other: str) -> bool:
    """Whether two answers are equal, as normalised text or as numbers."""
    a, b = normal_math(one), normal_math(other)
    if a == b:
        return True
    left, right = _value(a), _value(b)
    return left is not None and left == right


def normal_math(text: str) -> str:
    """A LaTeX answer without what does not change its meaning: sizes, spaces, units, dollar signs."""
    text = text.strip().strip("$").strip()
    text = re.sub(r"^\\[(\[]|\\[)\]]$", "", text).strip()
    for old, new in (
        ("\\left", ""), ("\\right", ""), ("\\!", ""), ("\\,", ""), ("\\;", ""), ("\\:", ""), ("\\ ", ""),
        ("tfrac", "frac"), ("dfrac", "frac"), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("\\%", ""),
        ("%", ""), ("\u2212", "-"), ("\\cdot", "*"), ("\\times", "*"),
    ):  # fmt: skip
        text = text.replace(old, new)
    # Units at the end ("24\pi square inches", "5 \text{ cm}"); a text that is the whole answer ("\text{Monday}") stays.
    text = _UNITS.sub("", text.strip()).strip().strip("$").strip()
    text = re.sub(r"(?<=\S)\s*\\(?:text|mbox|mathrm)\{\s*[^}]*\}(?:\^\{?[23]\}?)?$", "", text)
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{\s*([^}]*?)\s*\}", r"\1", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\s+", "", text).rstrip(".")
    # "x = 5" and "g(f(-3)) = 1" are 5 and 1, but "x = 5, y = 2" and "2x + 1 = 7" stay whole.
    name, equals, value = text.partition("=")
    if equals and "=" not in value and _NAME.fullmatch(name):
        text = value
    text = re.sub(r"^(-?)\.(\d)", r"\g<1>0.\2", text)
    return text


def _value(text: str) -> Fraction | None:
    """The number that a normalised answer is: "3/4", "\\frac{3}{4}", "0.75", "-\\frac12"."""
    text = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    try:
        return Fraction(text.replace("--", ""))
    except (ValueError, ZeroDivisionError):
        return None


def stated(text: str) -> str | None:
    """What follows the first "the answer is", up to the end of its line, without a final stop.

    A line that says it twice ("The answer is: the answer is (A)") means the last one.
    """
    found = re.search(r"answer\s+is:?\s*(.+)", text, re.IGNORECASE)
    if not found:
        return None
    answer = re.split(r"answer\s+is:?", found.group(1), flags=re.IGNORECASE)[-1]
    answer = answer.strip().strip("*").strip()
    return re.sub(r"\.\s*$", "", answer).strip() or None


def same_bbh(answer: str, target: str) -> bool:
    """Whether a stated answer is the target: "(A)", "A", "[A]" or "Option (A)"; words in any case."""
    a, b = answer.strip().strip("\"'").lower(), target.strip().lower()
    if re.fullmatch(r"\([a-z]\)", b):
        found = re.match(r"(?:option\s+)?[(\[]?([a-z])(?:[)\].:]|\s*$|\s*,)", a)
        return found is not None and found.group(1) == b[1]
    return re.sub(r"\s+", " ", a) == re.sub(r"\s+", " ", b)


def normal_words(text: str) -> str:
    """The TriviaQA form: lower case, no articles, no punctuation, single spaces."""
    lowered = text.lower().replace("_", " ")
    kept = "".join(" " if c in string.punctuation + "‘’´`" else c for c in lowered)
    return " ".join(w for w in kept.split() if w not in ("a", "an", "the"))


def is_one_of(answer: str, accepted: Iterable[str]) -> bool:
    """Whether an answer equals one of the accepted ones in the form of `normal_words`."""
    form = normal_words(answer)
    return bool(form) and form in {normal_words(a) for a in accepted}


def code_block(text: str) -> str | None:
    """The first fenced block of Python in a text; an unclosed fence runs to the end. None without one."""
    found = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return found.group(1) if found else None


def program(text: str) -> str | None:
    """The program in a text with a fence: what stands before a closing fence, else the fenced block.

    A model that goes on with the code it was shown often ends it with a fence and explains it then.
    None for a text without a fence.
    """
    before, fence, _ = text.partition("```")
    if not fence:
        return None
    first = next((line for line in before.splitlines() if line.strip()), "")
    if re.match(r"\s+\S|def |class |import |from |@|return\b", first):
        return before
    return code_block(text)


def top_level(text: str) -> str:
    """A program that starts at the margin: common indentation goes, and a first line that alone is set in.

    Vocabularies with a leading space make replies begin " def f():" over a body of four spaces.
    """
    lines = textwrap.dedent(text.strip("\n")).split("\n")
    if re.match(r"\s+(?:def|class|import|from|@)", lines[0]):
        lines[0] = lines[0].lstrip()
    return "\n".join(lines)


def without_afterwords(text: str, name: str) -> str:
    """A text up to where prose or calls at the margin follow the function `name`."""
    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if re.match(rf"def\s+{re.escape(name)}\b", line)), None)
    if start is None:
        return text
    for i in range(start + 1, len(lines)):
        if re.match(r"\S", lines[i]) and not re.match(r"(?:def|class|import|from)\s|@|#|\)", lines[i]):
            return "\n".join(lines[:i]) + "\n"
    return text


def rating(text: str, lowest: float = 1, highest: float = 10) -> float | None:
    """A judge's "[[7]]" (or "Rating: 7"); None when it is missing, double with two values, or out of range."""
    found = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*\]\]", text)
    if not found:
        found = re.findall(r"(?:^|\b)rating\s*:?\s*\[?(\d+(?:\.\d+)?)(?:\s*/\s*10)?\]?", text, re.IGNORECASE)
    values = {float(v) for v in found}
    if len(values) != 1:
        return None
    value = values.pop()
    return value if lowest <= value <= highest else None


def preference(text: str) -> str | None:
    """A judge's "[[A]]", "[[B]]" or "[[C]]" (tie); None when it is missing or contradicts itself."""
    found = set(re.findall(r"\[\[([ABC])\]\]", text))
    return found.pop() if len(found) == 1 else None
