"""Plots as inline SVG whose colours follow the page's light or dark theme.

Matplotlib draws with marker colours, which are replaced by CSS variables afterwards; text stays text.
Figures are narrow on purpose: at the width of a phone their letters keep a readable size.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

# Marker colour -> CSS variable of page.css.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
SERIES = ("#010211", "#010212", "#010213", "#010214")
MARKERS = "osD^v<>PX*"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    **{color: f"var(--c{i + 1})" for i, color in enumerate(SERIES)},
}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def loss(curves: dict[str, Any], width: float = 5.4, height: float = 3.1) -> str:
    """Loss against tokens, one colour per phase: the logged values faint, their running mean strong."""
    with _figure("loss", width, height) as (figure, axes):
        tokens, losses, phases = curves["tokens"], curves["loss"], curves["phase"]
        smooth = running_mean(losses, max(1, len(losses) // 60))
        for index, (phase, start, end) in enumerate(stretches(phases)):
            color = SERIES[index % len(SERIES)]
            axes.plot(tokens[start:end], losses[start:end], color=color, alpha=0.28, linewidth=1)
            # One point more, so that the curve has no gap between phases.
            stop = min(end + 1, len(tokens))
            axes.plot(tokens[start:stop], smooth[start:stop], color=color, label=phase)
        low, high = min(smooth), _high(losses)
        checked = list(dict.fromkeys(c["name"] for c in curves.get("checks", [])))
        for index, name in enumerate(checked):
            points = [(c["tokens"], c["value"]) for c in curves["checks"] if c["name"] == name]
            axes.plot(
                *zip(*points),
                linestyle=":",
                linewidth=0.8,
                marker=MARKERS[index % len(MARKERS)],
                color=SERIES[3],
                alpha=0.85,
                markersize=4.5,
                clip_on=False,
                label=name.removeprefix("heldout-").replace("_", " ") + " (held out)",
            )
            low = min(low, *(v for _, v in points))
        _tokens_axis(axes, tokens)
        axes.set_ylabel("loss (nats per token)")
        axes.set_ylim(max(0, low - 0.12 * (high - low) - 0.02), high + 0.05 * (high - low) + 0.02)
        axes.legend(loc="upper right", fontsize=7 if len(checked) > 3 else None)
    return figure.svg


def learning_rate(curves: dict[str, Any], width: float = 5.4, height: float = 2.0) -> str:
    """Learning rate against tokens."""
    with _figure("rate", width, height) as (figure, axes):
        for index, (_, start, end) in enumerate(stretches(curves["phase"])):
            stop = min(end + 1, len(curves["tokens"]))
            axes.plot(
                curves["tokens"][start:stop],
                curves["learning_rate"][start:stop],
                color=SERIES[index % len(SERIES)],
            )
        _tokens_axis(axes, curves["tokens"])
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return figure.svg


def speed(curves: dict[str, list[float]], width: float = 5.4, height: float = 2.0) -> str:
    """Tokens per second against tokens."""
    with _figure("speed", width, height) as (figure, axes):
        axes.plot(curves["tokens"], curves["tokens_per_s"], color=SERIES[2], linewidth=1.2)
        _tokens_axis(axes, curves["tokens"])
        axes.set_ylabel("tokens per second")
        axes.set_ylim(bottom=0, top=_high(curves["tokens_per_s"]) * 1.15)
    return figure.svg


def rejected(rules: dict[str, int], only: dict[str, int], width: float = 5.4) -> str:
    """Documents rejected by each rule; the strong part is those that no other rule rejects."""
    names = list(rules)[:14]
    height = 0.9 + 0.27 * len(names)
    with _figure("rules", width, height) as (figure, axes):
        rows = range(len(names))
        axes.barh(
            rows, [rules[n] for n in names], color=SERIES[1], alpha=0.4, height=0.62, label="any reason"
        )
        axes.barh(
            rows, [only.get(n, 0) for n in names], color=SERIES[1], height=0.62, label="the only reason"
        )
        axes.set_yticks(rows, [n.replace("_", " ") for n in names])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("documents")
        _short_numbers(axes.xaxis)
        axes.legend(loc="lower right")
    return figure.svg


def educational(histogram: dict[str, Any], width: float = 5.4, height: float = 2.9) -> str:
    """Histogram of the educational score, kept documents on top of rejected ones."""
    with _figure("score", width, height) as (figure, axes):
        edges = histogram["edges"]
        # Filled steps, not bars: translucent bars would show their seams.
        rejected = histogram["rejected"]
        total = [r + k for r, k in zip(rejected, histogram["kept"])]
        axes.stairs(rejected, edges, fill=True, color=SERIES[1], alpha=0.45, linewidth=0, label="rejected")
        axes.stairs(total, edges, baseline=rejected, fill=True, color=SERIES[0], linewidth=0, label="kept")
        axes.set_xlabel("educational score")
        axes.set_ylabel("documents")
        axes.grid(axis="x", visible=False)
        _short_numbers(axes.yaxis)
        axes.legend()
    return figure.svg


def scores(entries: Sequence[dict[str, Any]], width: float = 5.4) -> str:
    """Accuracy with 95% intervals (1.96 standard errors) against chance, one row per task."""
    height = 1.0 + 0.36 * len(entries)
    with _figure("scores", width, height) as (figure, axes):
        for row, entry in enumerate(entries):
            error = 1.96 * (entry["stderr"] or 0)
            if entry.get("chance"):
                axes.plot(
                    [entry["chance"]] * 2, [row - 0.34, row + 0.34], color=MUTED, linewidth=2, alpha=0.8
                )
            axes.errorbar(
                entry["value"],
                row,
                xerr=error,
                fmt="o",
                color=SERIES[0],
                markersize=6,
                elinewidth=1.8,
                capsize=3,
            )
        axes.set_yticks(range(len(entries)), [e["title"] for e in entries])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(entries) - 0.4, -0.6)
        ends = [e["value"] + 1.96 * (e["stderr"] or 0) for e in entries]
        axes.set_xlim(0, 1.0 if max(ends, default=0) > 0.78 else 0.8)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}%")
        axes.set_xlabel("accuracy, 95% interval; upright bar: chance")
    return figure.svg


def forecast(rows: Sequence[dict[str, Any]], width: float = 5.4) -> str:
    """Seconds forecast and seconds taken, stage by stage."""
    height = 1.0 + 0.42 * len(rows)
    with _figure("forecast", width, height) as (figure, axes):
        places = range(len(rows))
        guesses = [r["forecast_s"] or 0 for r in rows]
        axes.barh([p - 0.19 for p in places], guesses, height=0.34, color=MUTED, alpha=0.45, label="forecast")
        axes.barh(
            [p + 0.19 for p in places],
            [r["actual_s"] or 0 for r in rows],
            height=0.34,
            color=SERIES[0],
            label="actual",
        )
        axes.set_yticks(places, [r["stage"] for r in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("seconds")
        axes.legend()
    return figure.svg


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over 2 * width + 1 values, narrower at the ends."""
    found = []
    for index in range(len(values)):
        window = values[max(0, index - width) : index + width + 1]
        found.append(sum(window) / len(window))
    return found


def stretches(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of equal labels: [(label, start, end)]."""
    found: list[tuple[str, int, int]] = []
    for index, label in enumerate(labels):
        if found and found[-1][0] == label:
            found[-1] = (label, found[-1][1], index + 1)
        else:
            found.append((label, index, index + 1))
    return found


class _Drawing:
    """Holds the finished SVG of one figure."""

    svg = ""


class _figure:
    """Context manager: a styled figure that becomes `drawing.svg` when the block ends."""

    def __init__(self, name: str, width: float, height: float) -> None:
        self._name, self._size = name, (width, height)
        self._drawing = _Drawing()

    def __enter__(self) -> tuple[_Drawing, Any]:
        import matplotlib
        from matplotlib.figure import Figure

        self._context = matplotlib.rc_context({**_STYLE, "svg.hashsalt": self._name})
        self._context.__enter__()
        self._figure = Figure(figsize=self._size, layout="constrained")
        return self._drawing, self._figure.add_subplot()

    def __exit__(self, *problem: Any) -> None:
        try:
            if problem[0] is None:
                buffer = io.StringIO()
                self._figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
                self._drawing.svg = _themed(buffer.getvalue(), self._name)
        finally:
            self._context.__exit__(*problem)


def _themed(svg: str, name: str) -> str:
    """Return the svg element alone, responsive, with theme colours and ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    # Several figures stand in one page: ids must differ between them.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    # Text takes the page's own font and, where no colour is set, the page's ink.
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px; font-family: inherit", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg.replace("<svg ", '<svg class="plot" role="img" fill="currentColor" ', 1).strip()


def _tokens_axis(axes: Any, tokens: Sequence[float]) -> None:
    axes.set_xlabel("tokens")
    _short_numbers(axes.xaxis)
    if len(tokens) > 1:
        axes.set_xlim(min(tokens[0], 0), tokens[-1])


def _short_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.set_major_formatter(lambda x, _: short(x))


def short(value: float) -> str:
    """1234567 -> "1.2M"."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _high(values: Sequence[float]) -> float:
    """A top that one spike does not decide: the 99.5th percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.995 * len(ordered)))]
