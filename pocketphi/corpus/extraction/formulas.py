"""Formulas to LaTeX: MathML trees, and the source that renderers leave in the page."""

from __future__ import annotations

from typing import Any

_MAX_DEPTH = 60
# Letters and signs that have another name in LaTeX; everything else stays as it is.
_SIGNS = {
    "∑": r"\sum", "∏": r"\prod", "∫": r"\int", "∞": r"\infty", "√": r"\sqrt", "≤": r"\le", "≥": r"\ge",
    "≠": r"\ne", "≈": r"\approx", "→": r"\to", "×": r"\times", "·": r"\cdot", "±": r"\pm", "∂": r"\partial",
    "∇": r"\nabla", "∈": r"\in", "∉": r"\notin", "⊂": r"\subset", "⊆": r"\subseteq", "∪": r"\cup",
    "∩": r"\cap", "∀": r"\forall", "∃": r"\exists", "−": "-", "α": r"\alpha", "β": r"\beta",
    "γ": r"\gamma", "δ": r"\delta", "ε": r"\epsilon", "θ": r"\theta", "λ": r"\lambda", "μ": r"\mu",
    "π": r"\pi", "ρ": r"\rho", "σ": r"\sigma", "τ": r"\tau", "φ": r"\phi", "χ": r"\chi", "ψ": r"\psi",
    "ω": r"\omega", "Γ": r"\Gamma", "Δ": r"\Delta", "Θ": r"\Theta", "Λ": r"\Lambda", "Σ": r"\Sigma",
    "Φ": r"\Phi", "Ψ": r"\Psi", "Ω": r"\Omega", "\u2061": "", "\u2062": "", "\u2063": "", "\u2064": "",
}  # fmt: skip


def latex_of(math: Any) -> str:
    """Return the LaTeX of a `<math>` element: its annotation or alttext if it has one, else converted."""
    for annotation in math.iter("annotation"):
        if "tex" in (annotation.get("encoding") or "").lower():
            source = "".join(annotation.itertext()).strip()
            if source:
                return _strip_delimiters(source)
    alternative = (math.get("alttext") or "").strip()
    if alternative:
        return _strip_delimiters(alternative)
    return " ".join(_convert(math, 0).split())


def is_display(math: Any) -> bool:
    """Whether a `<math>` element stands on its own line."""
    return math.get("display") == "block" or math.get("mode") == "display"


def delimited(latex: str, display: bool) -> str:
    """Put LaTeX between dollar signs, doubled for a formula on its own line."""
    latex = _strip_delimiters(latex)
    if not latex:
        return ""
    return f"$${latex}$$" if display else f"${latex}$"


def _strip_delimiters(source: str) -> str:
    source = source.strip()
    for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"{\displaystyle", "}")):
        if source.startswith(start) and source.endswith(end) and len(source) >= len(start) + len(end):
            source = source[len(start) : len(source) - len(end)].strip()
    return source


def _convert(element: Any, depth: int) -> str:
    if not isinstance(element.tag, str) or depth > _MAX_DEPTH:
        return ""
    tag = element.tag.rpartition("}")[2].rpartition(":")[2].lower()
    children = [child for child in element if isinstance(child.tag, str)]
    if tag in ("annotation", "annotation-xml", "mspace", "mphantom"):
        return " "
    if tag in ("mi", "mn", "mo", "ms"):
        return _token(tag, "".join(element.itertext()).strip())
    if tag == "mtext":
        words = "".join(element.itertext()).strip()
        return rf"\text{{{words}}}" if words else " "
    parts = [_convert(child, depth + 1).strip() for child in children]

    def part(index: int) -> str:
        return parts[index] if index < len(parts) else ""

    if tag == "mfrac":
        return rf"\frac{{{part(0)}}}{{{part(1)}}}"
    if tag == "msqrt":
        return rf"\sqrt{{{' '.join(parts)}}}"
    if tag == "mroot":
        return rf"\sqrt[{part(1)}]{{{part(0)}}}"
    if tag == "msup":
        return f"{_base(part(0))}^{_group(part(1))}"
    if tag == "msub":
        return f"{_base(part(0))}_{_group(part(1))}"
    if tag == "msubsup":
        return f"{_base(part(0))}_{_group(part(1))}^{_group(part(2))}"
    if tag == "munder":
        return f"{_base(part(0))}_{_group(part(1))}"
    if tag == "mover":
        return _over(part(0), part(1))
    if tag == "munderover":
        return f"{_base(part(0))}_{_group(part(1))}^{_group(part(2))}"
    if tag == "mfenced":
        separator = (element.get("separators") or ",")[:1]
        return f"{element.get('open') or '('}{f'{separator} '.join(parts)}{element.get('close') or ')'}"
    if tag == "mtr":
        return " & ".join(parts) + r" \\ "
    if tag == "mtable":
        return rf"\begin{{matrix}} {' '.join(parts)} \end{{matrix}}"
    own = (element.text or "").strip()
    return " ".join(filter(None, [own, *parts]))


def _token(tag: str, text: str) -> str:
    converted = "".join(
        f"{sign} "
        if (sign := _SIGNS.get(character)) and sign.startswith("\\")
        else _SIGNS.get(character, character)
        for character in text
    )
    if tag == "mi" and len(text) > 1 and text.isalpha() and text.isascii():
        known = ("sin", "cos", "tan", "log", "ln", "exp", "lim", "max", "min", "det", "gcd", "arg")
        return rf"\{text} " if text in known else rf"\mathrm{{{text}}}"
    return converted


def _over(base: str, mark: str) -> str:
    accents = {
        "¯": "bar",
        "‾": "bar",
        "^": "hat",
        "ˆ": "hat",
        "~": "tilde",
        "˜": "tilde",
        "→": "vec",
        r"\to": "vec",
    }
    accent = accents.get(mark.strip())
    return rf"\{accent}{{{base}}}" if accent else f"{_base(base)}^{_group(mark)}"


def _base(latex: str) -> str:
    return latex if len(latex) <= 1 or (latex.startswith("\\") and " " not in latex) else f"{{{latex}}}"


def _group(latex: str) -> str:
    return latex if len(latex) == 1 else f"{{{latex}}}"
