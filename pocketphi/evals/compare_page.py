"""The page of a comparison: one offline HTML file. Everything from data or from a model is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

# The page may load nothing at all: no script, no font, no picture but what stands in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_ROW, _LEFT, _WIDTH, _RIGHT = 30, 240, 760, 120


def render(tree: Mapping[str, Any], differing: Sequence[Mapping[str, Any]], max_items: int) -> str:
    """Return the page as one HTML document."""
    css = resources.files("pocketphi.evals").joinpath("data/compare.css").read_text(encoding="utf-8")
    a, b = tree["a"], tree["b"]
    title = f"{b['model']} against {a['model']}"
    body = [
        f"<header><h1>{_e(title)}</h1>",
        '<p class="lead">Differences are B minus A over the same items, with '
        f"{100 * tree['confidence']:g}% intervals of a paired bootstrap ({tree['resamples']:,} draws).</p></header>",
        _sides(a, b),
        "<section><h2>Differences</h2>",
        _forest(tree["compared"]),
        _table(tree["compared"]),
        "</section>",
        _splits(tree["compared"]),
        _refused(tree["refused"]),
        _items(tree["compared"], differing, max_items),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(title)}</title><style>{css}</style></head>\n<body><main>"
        + "\n".join(body)
        + "</main></body></html>\n"
    )


def _e(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _sides(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    keys = list(dict.fromkeys([*a["identity"], *b["identity"]]))
    rows = [("model", a["model"], b["model"]), ("evaluation", a["checksum"][:16], b["checksum"][:16])]
    rows += [(k.replace("_", " "), *(s["identity"].get(k, "") for s in (a, b))) for k in keys]
    cells = "".join(
        f'<tr class="{"same" if left == right else "other"}"><td>{_e(name)}</td><td>{_e(_cell(left))}</td>'
        f"<td>{_e(_cell(right))}</td></tr>"
        for name, left, right in rows
    )
    return (
        '<section><h2>The two</h2><div class="scroll"><table><thead><tr><th></th><th>A</th><th>B</th></tr></thead>'
        f"<tbody>{cells}</tbody></table></div></section>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = "" if value is None else str(value)
    return text[:16] if len(text) == 64 else text


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("task", "metric", "A", "B", "B − A", "interval", "p", "p, all tasks", "better", "worse", "items")
    body, common = [], common_notes(rows)
    for r in rows:
        own = [n for n in r["notes"] if n not in common]
        interval = "" if r["low"] is None else f"{r['low']:+.4f} … {r['high']:+.4f}"
        cells = [
            f"<td>{_e(r['task'])}{_notes(own)}</td><td>{_e(r['metric'])}</td>",
            *(f'<td class="n">{x}</td>' for x in (
                f"{r['a']:.4f}", f"{r['b']:.4f}", f"{r['difference']:+.4f}", interval,
                _p(r["p_value"]), _p(r.get("p_value_adjusted")), f"{r['better']:,}", f"{r['worse']:,}", f"{r['n']:,}",
            )),
        ]  # fmt: skip
        body.append("<tr>" + "".join(cells) + "</tr>")
    # Figures stand right-aligned under their heads.
    head = "".join(f"<th{' class=n' if i >= 2 else ''}>{_e(h)}</th>" for i, h in enumerate(heads))
    everywhere = "".join(f'<p class="note">All tasks: {_e(n)}.</p>' for n in common)
    return (
        f'<div class="scroll"><table class="wide"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
        f'</div>{everywhere}<p class="note">“better” and “worse” count items whose figure rose or fell from A to B. p is an exact '
        "sign test where items are right or wrong; “p, all tasks” is adjusted (Holm) for asking about so many "
        "tasks at once. Bits per byte are better when lower.</p>"
    )


def common_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes that every one of several rows has: said once, not at each."""
    if len(rows) < 2:
        return []
    return [n for n in rows[0]["notes"] if all(n in r["notes"] for r in rows)]


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<br><span class="note">{_e(n)}</span>' for n in notes)


def _p(value: float | None) -> str:
    return "" if value is None else "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def _forest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Difference and interval per task, right of the line where B is better."""
    shown = [r for r in rows if r["low"] is not None]
    if not shown:
        return ""

    # Ratings of 1 to 10 and bits per byte on one axis with accuracies would say nothing: each row is
    # drawn in units of its own standard error.
    def scaled(r: Mapping[str, Any], key: str) -> float:
        sign = -1 if r["lower_is_better"] else 1
        return sign * r[key] / r["stderr"] if r["stderr"] else 0.0

    limit = max(3.0, *(abs(scaled(r, k)) for r in shown for k in ("low", "high"))) * 1.05
    height = _ROW * len(shown) + 46
    middle = _LEFT + (_WIDTH - _LEFT - _RIGHT) / 2

    def x(value: float) -> float:
        return middle + value / limit * (_WIDTH - _LEFT - _RIGHT) / 2

    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="differences with intervals">',
        f'<line x1="{middle:.1f}" y1="6" x2="{middle:.1f}" y2="{height - 34}" class="axis"/>',
    ]
    for number, r in enumerate(shown):
        y = 20 + number * _ROW
        low, high = sorted((scaled(r, "low"), scaled(r, "high")))
        clear = "clear" if low > 0 or high < 0 else "unclear"
        parts += [
            f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{_e(str(r["task"])[:34])}</text>',
            f'<line x1="{x(low):.1f}" y1="{y}" x2="{x(high):.1f}" y2="{y}" class="{clear}"/>',
            f'<circle cx="{x(scaled(r, "difference")):.1f}" cy="{y}" r="4.5" class="{clear}"/>',
            f'<text x="{_WIDTH - _RIGHT + 12}" y="{y + 4}">{r["difference"]:+.4f}</text>',
        ]
    parts.append(f'<text x="{x(-limit):.1f}" y="{height - 8}">A better</text>')
    parts.append(f'<text x="{x(limit):.1f}" y="{height - 8}" text-anchor="end">B better</text></svg>')
    return (
        f'<div class="scroll">{"".join(parts)}</div><p class="note">Each row in units of its own standard '
        "error; the number is the difference itself. Filled marks: the interval leaves out zero.</p>"
    )


def _splits(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many items moved, in which direction, per task."""
    bars = []
    for r in rows:
        still = r["n"] - r["better"] - r["worse"]
        widths = [100 * x / r["n"] for x in (r["worse"], still, r["better"])]
        bars.append(
            f'<div class="split"><span>{_e(r["task"])}</span><div class="bar">'
            + "".join(
                f'<i class="{c}" style="width:{w:.2f}%"></i>' for c, w in zip(("down", "still", "up"), widths)
            )
            + f"</div><b>−{r['worse']:,} / +{r['better']:,}</b></div>"
        )
    if not bars:
        return ""
    return (
        "<section><h2>Items that moved</h2>" + "".join(bars)
        + '<p class="note">Left: the figure fell from A to B; right: it rose; between: equal.</p></section>'
    )  # fmt: skip


def _refused(refused: Sequence[Mapping[str, Any]]) -> str:
    if not refused:
        return ""
    rows = "".join(f"<li><b>{_e(r['task'])}</b>: {_e('; '.join(r['reasons']))}</li>" for r in refused)
    return f"<section><h2>Not subtracted</h2><ul>{rows}</ul></section>"


def _items(rows: Sequence[Mapping[str, Any]], differing: Sequence[Mapping[str, Any]], max_items: int) -> str:
    sections = []
    for r in rows:
        mine = [d for d in differing if d["task"] == r["task"]]
        if not mine:
            continue
        shown = mine[:max_items]
        more = f", {len(shown)} shown (differing.jsonl holds all)" if len(shown) < len(mine) else ""
        sections.append(
            f"<details><summary>{_e(r['task'])}: {len(mine):,} items answered differently{more}</summary>"
            + "".join(_item(d) for d in shown)
            + "</details>"
        )
    if not sections:
        return "<section><h2>Items</h2><p>The two answered every item alike.</p></section>"
    return "<section><h2>Items on which the two differ</h2>" + "".join(sections) + "</section>"


def _item(d: Mapping[str, Any]) -> str:
    options = "".join(
        f'<li class="{"right" if o == d["right"] else ""}">{_e(o)}'
        + "".join(f" <b>{s.upper()}</b>" for s in ("a", "b") if d[s] == o)
        + "</li>"
        for o in d["options"]
    )
    listed = f"<ul>{options}</ul>" if options else f"<p>right: <code>{_e(str(d['right'])[:400])}</code></p>"
    written = ""
    for s in ("a", "b"):
        if d[f"{s}_text"] or not d["options"]:
            read = "nothing readable" if d[s] is None else str(d[s])[:400]
            written += (
                f"<p><b>{s.upper()}</b> ({d[f'{s}_score']:g}): <code>{_e(read)}</code></p>"
                f"<blockquote>{_e(d[f'{s}_text'])}</blockquote>"
            )
    where = f"{d['group']} · {d['id']}" if d["group"] else d["id"]
    scores = f"A {d['a_score']:g}, B {d['b_score']:g}"
    return f'<article><p class="note">{_e(where)} · {scores}</p><p class="q">{_e(d["question"])}</p>{listed}{written}</article>'
