"""The HTML of the page. Everything that comes from data or from a model is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from pocketphi.core.progress import duration
from pocketphi.evals import published
from pocketphi.report import plots
from pocketphi.report.plots import short

# The page may load nothing at all: no script, no font, no picture but what stands in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def render(figures: Mapping[str, Any]) -> str:
    """Return the page as one HTML document."""
    sections = [
        ("data", "The data", _data(figures)),
        ("training", "Training", _training(figures)),
        ("scores", "Scores", _scores(figures)),
        ("answers", "Answers", _answers(figures)),
        ("lineage", "Lineage", _lineage(figures)),
        ("forecast", "Forecast and cost", _forecast(figures)),
    ]
    shown = [s for s in sections if s[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in shown)
    body = "".join(f'<section id="{n}"><h2>{t}</h2>{content}</section>' for n, t, content in shown)
    style = resources.files("pocketphi.report").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{_e(figures["title"])}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{_e(figures["title"])}</h1>
<p class="lead">{_e(_sentence(figures))}</p>
<nav>{links}</nav>
{_tiles(figures)}
</header>
<main>{body}</main>
<footer>Made by PocketPhi {_e(figures["code_version"])}. This page is one file: it loads nothing, needs no
network, and can be kept or sent as it is.</footer>
</body>
</html>
"""


def _sentence(figures: Mapping[str, Any]) -> str:
    parts = []
    corpus, train = figures.get("corpus"), figures.get("train")
    if corpus:
        parts.append(f"{corpus['documents']:,} documents were read and {corpus['kept']:,} kept")
    if train:
        parts.append(f"a model was trained on {short(train[0]['curves']['tokens'][-1])} tokens")
    if figures.get("model_file"):
        parts.append(f"it ships as a file of {_bytes(figures['model_file']['bytes'])}")
    if not parts:
        return "What this run made, and how."
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + ". Below: what went in, how it learned, what it scores, and why."


def _tiles(figures: Mapping[str, Any]) -> str:
    tiles: list[tuple[str, str]] = []
    model = figures.get("model") or {}
    if model.get("parameters"):
        tiles.append((short(model["parameters"]), "parameters"))
    if figures.get("corpus"):
        tiles.append((f"{figures['corpus']['kept']:,}", "documents kept"))
    if figures.get("train"):
        tiles.append((short(figures["train"][0]["curves"]["tokens"][-1]), "training tokens"))
        losses = figures["train"][0]["curves"]["loss"]
        tiles.append((f"{plots.running_mean(losses, max(1, len(losses) // 60))[-1]:.2f}", "final loss"))
    for entry in (figures.get("eval") or {}).get("tasks", []):
        if entry["kind"] == "bits":
            tiles.append((f"{entry['value']:.3f}", "bits per byte"))
    if figures.get("model_file"):
        tiles.append((_bytes(figures["model_file"]["bytes"]), "model file"))
    seconds = sum(r["actual_s"] or 0 for r in figures.get("forecast", []))
    if seconds:
        whole = figures.get("corpus") and figures.get("train")
        tiles.append((duration(seconds), "from pages to chat" if whole else "all stages together"))
    if not tiles:
        return ""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{_e(value)}</b><span>{_e(name)}</span></div>' for value, name in tiles
        )
        + "</div>"
    )


def _data(figures: Mapping[str, Any]) -> str:
    corpus = figures.get("corpus")
    if not corpus:
        return ""
    rejected = corpus["documents"] - corpus["kept"]
    total = max(1, corpus["documents"] + corpus["failed"])
    pieces = [
        ("kept", corpus["kept"], "--c1"),
        ("rejected", rejected, "--c2"),
        ("unreadable", corpus["failed"], "--muted"),
    ]
    bar = "".join(
        f'<i style="width:{100 * n / total:.3f}%;background:var({c})"></i>' for _, n, c in pieces if n
    )
    keys = "".join(
        f'<span class="key"><i style="background:var({c})"></i>{n:,} {name}</span>'
        for name, n, c in pieces
        if n
    )
    phases = (
        f"Of the kept documents {corpus['phase1']:,} were read in phase 1 and {corpus['phase2']:,} in phase 2; "
        f"{corpus['heldout']:,} were held out, to measure with. Nothing was deleted: every document lies "
        "beside its verdicts and can be asked for with <code>phi corpus why ID</code>."
    )
    left, right = [], []
    if corpus["rejected_by"]:
        picture = plots.rejected(corpus["rejected_by"], corpus["rejected_only_by"])
        left.append(_card("Rejected, by rule", picture))
    if corpus.get("educational"):
        right.append(_card("Educational score", plots.educational(corpus["educational"])))
    rows = [
        (name, f"{c['documents']:,}", f"{c['kept']:,}", f"{100 * c['kept'] / max(1, c['documents']):.0f}%")
        for name, c in corpus["sources"].items()
    ]
    heads = ("source", "documents", "kept", "share")
    table = _table(heads, rows[:10], numbers=(1, 2, 3))
    if len(rows) > 10:
        rest = _table(heads, rows[10:], numbers=(1, 2, 3))
        table += f"<details><summary>{len(rows) - 10} more sources</summary>{rest}</details>"
    # The shorter column takes the table.
    (left if len(corpus["rejected_by"]) < 8 else right).append(_card("Sources", table))
    return (
        f'<p class="note">{phases}</p><div class="bar" aria-hidden="true">{bar}</div><div>{keys}</div>'
        f"{_columns(left, right)}"
    )


def _training(figures: Mapping[str, Any]) -> str:
    blocks = []
    for stage in figures.get("train", []):
        curves = stage["curves"]
        right = []
        if "learning_rate" in curves:
            right.append(_card("Learning rate", _once(stage, plots.learning_rate(curves))))
        if stage.get("speed"):
            right.append(_card("Speed on this machine", _once(stage, plots.speed(stage["speed"]))))
        # As tall as what stands beside it.
        height = 4.7 if len(right) == 2 else 3.0
        left = [_card("Loss", _once(stage, plots.loss(curves, height=height)))]
        words = {"train": "", "sft": "<h3>Fine-tuning on chats</h3>"}.get(stage["name"], "")
        blocks.append(words + _columns(left, right))
    return '<div class="stack">' + "".join(blocks) + "</div>" if blocks else ""


def _once(stage: Mapping[str, Any], svg: str) -> str:
    """Ids of a second stage's plots must differ from the first's."""
    prefix = f"{stage['name']}-"
    return (
        svg.replace('id="', f'id="{prefix}')
        .replace("url(#", f"url(#{prefix}")
        .replace('href="#', f'href="#{prefix}')
    )


def _is_share(entry: Mapping[str, Any]) -> bool:
    """Whether a score is a share of right answers; lm-eval's tasks may have perplexities and other figures."""
    if entry["kind"] == "harness":
        return bool(entry["paired"]) and entry["metric"] != "bits_per_byte" and 0 <= entry["value"] <= 1
    return entry["kind"] not in ("bits", "conversation")


def _scores(figures: Mapping[str, Any]) -> str:
    found = figures.get("eval")
    if not found:
        return ""
    accuracies = [e for e in found["tasks"] if _is_share(e)]
    left = [_card("Accuracy against chance", plots.scores(accuracies))] if accuracies else []
    rows: list[tuple[str, ...]] = []
    for e in found["tasks"]:
        percent = _is_share(e)
        shown = f"{100 * e['value']:.1f}%" if percent else f"{e['value']:.4f}"
        error = (
            ""
            if e["stderr"] is None
            else f"{196 * e['stderr']:.1f}"
            if percent
            else f"{1.96 * e['stderr']:.4f}"
        )
        seen = e.get("contaminated_share")
        rows.append(
            (
                e["title"] + (f", {e['shots']}-shot" if e["shots"] else ""),
                shown,
                f"± {error}" if error else "",
                f"{100 * e['chance']:.0f}%" if e.get("chance") else "",
                f"{e['n']:,}",
                "" if seen is None else f"{100 * seen:.1f}%",
            )
        )
    heads: tuple[str, ...] = ("task", "score", "95%", "chance", "items", "seen in corpus")
    if not any(r[-1] for r in rows):
        heads, rows = heads[:-1], [r[:-1] for r in rows]
    table = _table(heads, rows, numbers=(1, 2, 3, 4, 5))
    skipped = ""
    if found["skipped"]:
        items = "".join(f"<li>{_e(s['task'])}: {_e(s['reason'])}</li>" for s in found["skipped"])
        skipped = f"<details><summary>not scored</summary><ul>{items}</ul></details>"
    beside = published.table(found["tasks"])
    if beside:
        beside = (
            f"<details><summary>published scores of other models</summary><pre>{_e(beside)}</pre></details>"
        )
    side = found["identity"]
    facts = "".join(
        f'<span class="pill">{_e(k.replace("_", " "))}: {_e(str(v)[:24] if k.endswith("sha256") else str(v))}</span>'
        for k, v in side.items()
        if v is not None
    )
    right = [_card("Figures", table + skipped)]
    limit = f" At most {found['limit']} items of each task, drawn by hash." if found.get("limit") else ""
    return (
        f'<p class="note">Measured on {_e(found["model"])} in its own runtime.{limit} A score whose interval '
        f"touches the chance bar shows nothing.</p>{_columns(left, right)}"
        f"{beside}<details><summary>what these scores depend on</summary><p>{facts}</p></details>"
    )


def _answers(figures: Mapping[str, Any]) -> str:
    answers = figures.get("answers")
    if not answers:
        return f'<p class="note">{_e(figures["answers_note"])}</p>' if figures.get("answers_note") else ""
    near = (figures.get("nearest") or {}).get("nearest") or [[] for _ in answers]
    cards = []
    for answer, documents in zip(answers, near):
        text = answer["text"].strip() or "(no text)"
        cut = "" if answer["ended"] != "length" else " …"
        inner = f'<div class="qa"><div class="q">{_e(answer["prompt"])}</div><div class="a">{_e(text)}{cut}</div></div>'
        if documents:
            found = "".join(_document(d) for d in documents)
            inner += (
                f"<details><summary>nearest training documents ({len(documents)})</summary>{found}</details>"
            )
        cards.append(f'<div class="card">{inner}</div>')
    searched = figures.get("nearest")
    note = "The shipped file's own answers: temperature 0, nothing chosen or corrected."
    if searched:
        share = "" if searched["complete"] else " (the part that the search limit allows)"
        note += (
            f" Under each answer: the training documents, among {searched['searched_documents']:,} kept{share}, that "
            "share the most uncommon three-word phrases with it. That is likeness, no proof of cause."
        )
    return f'<p class="note">{_e(note)}</p><div class="grid">{"".join(cards)}</div>'


def _document(document: Mapping[str, Any]) -> str:
    excerpt = _e(document["excerpt"])
    phrase = _e(document["phrase"])
    place = excerpt.lower().find(phrase)
    if place >= 0:
        end = place + len(phrase)
        excerpt = f"{excerpt[:place]}<mark>{excerpt[place:end]}</mark>{excerpt[end:]}"
    score = document["educational_score"]
    facts = [
        f"{document['shared_triples']} shared phrases",
        *([f"educational score {score}"] if score is not None else []),
        *document["phases"],
        f"passed {len(document['rules_passed'])} rules",
        *([document["license"]] if document["license"] else []),
    ]
    pills = "".join(f'<span class="pill">{_e(f)}</span>' for f in facts)
    where = document["url"] or document["source"]
    return (
        f'<blockquote>{excerpt}</blockquote><p>{pills}<br><span class="hash">{_e(document["id"])}</span> '
        f"{_e(where)}</p>"
    )


_KIND_WORDS = {
    "gguf": "the file that answers",
    "checkpoint": "the weights it was made from",
    "shards": "the tokens the weights have seen",
    "tokenizer": "how text became tokens",
    "corpus": "the documents, and the rules that kept them",
    "eval": "the scores",
}


def _lineage(figures: Mapping[str, Any]) -> str:
    chain = figures.get("chain")
    if not chain:
        return ""
    rows = []
    for node in chain:
        counts = ", ".join(f"{k.replace('_', ' ')} {_number(v)}" for k, v in node["counts"].items())
        rows.append(
            f"<li><b>{_e(node['name'])}</b> · {_e(_KIND_WORDS.get(node['kind'], node['kind']))}<br>"
            f'<span class="note">{_e(counts)}</span><br><span class="hash">{_e(node["checksum"])}</span></li>'
        )
    return (
        '<p class="note">From an answer back to the pages: each artifact names its parents by checksum, so this '
        'chain cannot be broken without being seen.</p><div class="card"><ol class="chain">'
        + "".join(rows)
        + "</ol></div>"
    )


def _forecast(figures: Mapping[str, Any]) -> str:
    rows = figures.get("forecast")
    if not rows:
        return ""
    shown = []
    for r in rows:
        ratio = r["actual_s"] / r["forecast_s"] if r["forecast_s"] and r["actual_s"] is not None else None
        shown.append(
            (
                r["stage"],
                "" if r["forecast_s"] is None else duration(r["forecast_s"]),
                "" if r["actual_s"] is None else duration(r["actual_s"]),
                "" if ratio is None else f"{ratio:.2f}",
                "" if r["forecast_memory_bytes"] is None else _bytes(r["forecast_memory_bytes"]),
                _bytes(r["actual_disk_bytes"]),
            )
        )
    heads = ("stage", "forecast", "actual", "ratio", "memory forecast", "disk")
    table = _table(heads, shown, numbers=(1, 2, 3, 4, 5))
    cost = figures["cost"]
    words = (
        f"{duration(cost['wall_s'])} on {cost['cores']} cores. At {cost['price_per_hour_usd']:.2f} USD an hour that is "
        f"{cost['usd']:.2f} USD; at {cost['watts']:.0f} W it is {cost['watt_hours']:.1f} Wh. Price and power are "
        "assumptions of the recipe (report.price_per_hour_usd, report.watts); the time is measured."
    )
    drawn = [r for r in rows if r["actual_s"] is not None]
    left = [_card("Time, forecast and actual", plots.forecast(drawn))] if drawn else []
    return f'<p class="note">{_e(words)}</p>{_columns(left, [_card("By stage", table)])}'


def _columns(left: Sequence[str], right: Sequence[str], kind: str = "") -> str:
    """Two columns of cards on a wide screen, one on a narrow one."""
    if not left or not right:
        return f'<div class="grid">{"".join([*left, *right])}</div>'
    return (
        f'<div class="columns {kind}"><div class="column">{"".join(left)}</div>'
        f'<div class="column">{"".join(right)}</div></div>'
    )


def _card(title: str, inner: str) -> str:
    return f'<div class="card"><h3>{_e(title)}</h3>{inner}</div>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def cell(tag: str, index: int, text: str) -> str:
        kind = ' class="n"' if index in numbers else ""
        return f"<{tag}{kind}>{_e(text)}</{tag}>"

    head = "".join(cell("th", i, h) for i, h in enumerate(heads))
    body = "".join("<tr>" + "".join(cell("td", i, t) for i, t in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: Any) -> str:
    if isinstance(value, (bool, str)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _bytes(value: float) -> str:
    for size, suffix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {suffix}"
    return f"{value:.0f} bytes"


def _e(text: Any) -> str:
    """Escape for element content and attributes; characters that no page may hold become U+FFFD."""
    cleaned = "".join(c if c in "\n\t" or c >= " " else "\ufffd" for c in str(text))
    return html.escape(cleaned.encode("utf-8", "replace").decode("utf-8"))
