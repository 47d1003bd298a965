"""The scorer stage: labelled documents in, a `scorer` artifact with its report out.

artifact = train_scorer.run(TrainScorerConfig(labels=(LabelConfig("a.jsonl.zst", score=4.5), ...)))
load_scorer(artifact.path)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import ConfigError, DataError
from pocketphi.corpus.educational import evaluation, labels, metrics
from pocketphi.corpus.educational.labels import LabelConfig, Labelled
from pocketphi.corpus.educational.scorer import Scorer
from pocketphi.corpus.educational.training import BIAS, FitConfig, Weights, fit

KIND = "scorer"
_HOW = (
    "Every document was scored by a model that was trained without it, and without its whole source wherever "
    "a file has more than one. `unseen_sources` counts documents of the latter kind only."
)
_MAX_KNOTS = 48
_END = 1.5  # raw units beyond the outermost knots at which the scale ends


@dataclass(frozen=True)
class TrainScorerConfig:
    """Settings of `phi corpus train-scorer`. `axis` chooses the grade to learn from an annotations artifact:
    educational, or durable (lasting knowledge against passing facts).

    `folds` are lists of substrings of source names: each list is held out together once. Without them
    sources are dealt into `num_folds`. `high` and `low` say which labels the ROC AUC sets apart.
    """

    labels: tuple[LabelConfig, ...] = ()
    fit: FitConfig = field(default_factory=FitConfig)
    folds: tuple[tuple[str, ...], ...] = ()
    num_folds: int = 4
    high: float = 4.0
    low: float = 1.0
    clean: bool = True  # strip headers, quoting, markup and addresses before training
    max_chars: int = 24_000  # read of one document
    language: str = "en"
    axis: str = "educational"

    def __post_init__(self) -> None:
        if not 10 <= self.fit.bits <= 22:
            raise ConfigError(f"fit.bits must be between 10 and 22, found {self.fit.bits}")
        if (len(self.folds) or self.num_folds) < 2:
            raise ConfigError("at least two folds are needed to measure on unseen sources")
        if self.axis not in ("educational", "durable"):
            raise ConfigError(f"axis is educational or durable, found {self.axis!r}")


def run(
    config: TrainScorerConfig,
    inputs: Mapping[str, Artifact | Path | str] | None = None,
    *,
    out: Path | None = None,
) -> Artifact:
    """Train, calibrate and measure a scorer; `inputs["annotations"]` adds an annotations artifact.

    Files: scorer.npz, report.json, report.md, confusions.jsonl. Raises ConfigError without labels and
    DataError when a labelled file cannot be used.
    """
    parents = []
    wanted = list(config.labels)
    if inputs and "annotations" in inputs:
        found = artifact.load(inputs["annotations"], kind="annotations")  # type: ignore[arg-type]
        parents.append(found)
        wanted.append(
            LabelConfig(str(found.file("annotations.jsonl")), name="annotations", score_field=config.axis)
        )
    if not wanted:
        raise ConfigError(
            "labels is empty: there is nothing to learn from",
            hint="name labelled files in the recipe (section train-scorer: labels), or annotate some first",
        )
    sources = [str(path) for entry in config.labels for path in labels.files_of(entry)]
    out = Path(out) if out is not None else artifact.default_path(KIND, config, parents, sources)
    if done := artifact.reuse(out, kind=KIND, config=config, parents=parents, sources=sources):
        return done
    with artifact.create(
        out, kind=KIND, config=config, parents=parents, sources=sources, seed=config.fit.seed
    ) as draft:
        data = labels.load(
            tuple(wanted),
            bits=config.fit.bits,
            max_chars=config.max_chars,
            min_words=12,
            clean=config.clean,
        )
        file_weights = np.array([entry.weight for entry in wanted])
        scorer, report, cases = train(data, file_weights, config)
        # A figure that the labels do not give (no source of low label, say) is null, not a number.
        report = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in report.items()}
        scorer.save(draft.path / "scorer.npz")
        artifact.write_atomic(draft.path / "report.json", json.dumps(report, indent=1) + "\n")
        artifact.write_atomic(draft.path / "report.md", markdown(report))
        lines = "".join(json.dumps(case, ensure_ascii=False) + "\n" for case in cases)
        artifact.write_atomic(draft.path / "confusions.jsonl", lines)
        draft.counts.update({k: v for k, v in report.items() if isinstance(v, (int, float))})
    return draft.artifact


def train(
    data: Labelled, file_weights: np.ndarray, config: TrainScorerConfig
) -> tuple[Scorer, dict[str, Any], list[dict[str, Any]]]:
    """Return (scorer, report, worst confusions)."""
    if len(np.unique(data.labels)) < 2:
        raise DataError("all labels are equal: nothing can be learned from them")
    fold_D, unseen_D, num_folds = evaluation.folds(data, config.folds, config.num_folds)
    models: list[Weights] = []
    with progress.bar("training", num_folds + 1, unit="models") as bar:
        for fold in range(num_folds):
            models.append(fit(data, np.flatnonzero(fold_D != fold), file_weights, config.fit))
            bar.advance()
        final = fit(data, np.arange(len(data)), file_weights, config.fit)
        bar.advance()
    held = evaluation.HeldOut(data, models, fold_D, unseen_D)
    raw_D = held.raw(range(len(data)))
    weight_D = file_weights[data.file] / np.bincount(data.file)[data.file]
    score_D = np.zeros(len(data))
    for fold in range(num_folds):
        own = fold_D == fold
        if own.any() and (~own).any():
            knots = calibrate(raw_D[~own], data.labels[~own], weight_D[~own])
            score_D[own] = np.interp(raw_D[own], *knots)
    report = evaluation.figures(held, raw_D, score_D, high=config.high, low=config.low)
    knots_raw, knots_score = calibrate(raw_D, data.labels, weight_D)
    integers, scale = final.quantised()
    card = {
        "language": config.language,
        "axis": config.axis,
        "trained_on": {name: int((data.file == file).sum()) for file, name in enumerate(data.file_names)},
        "num_features": final.num_kept,
    }
    for figure in ("roc_auc_unseen_sources", "roc_auc_unseen_documents", "spearman_labels"):
        if not math.isnan(report[figure]):
            card[figure] = report[figure]
    scorer = Scorer(integers, scale, BIAS, config.fit.shrinkage, knots_raw, knots_score, card)
    report["scorer_bytes"] = len(scorer.to_bytes())
    report["num_features"] = final.num_kept
    cases = evaluation.confusions(data, score_D, high=config.high, low=config.low)
    return scorer, report, cases


def calibrate(raw: np.ndarray, target: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return knots (raw, score) of a strictly increasing piecewise linear map fitted to the labels.

    Knots stand at the centres of the steps of the isotonic fit, so that values inside one step keep
    their order; outside, the map runs on to the ends of the scale.
    """
    fitted = metrics.isotonic(raw, target, weight)
    _, block = np.unique(fitted, return_inverse=True)
    mass = np.bincount(block, weights=weight)
    centres = np.bincount(block, weights=weight * raw) / mass
    heights = np.bincount(block, weights=weight * target) / mass
    while len(centres) > _MAX_KNOTS:  # merge the lightest step with its lighter neighbour
        i = int(mass.argmin())
        j = i - 1 if i and (i == len(mass) - 1 or mass[i - 1] <= mass[i + 1]) else i + 1
        total = mass[i] + mass[j]
        for column in (centres, heights):
            column[j] = (column[i] * mass[i] + column[j] * mass[j]) / total
        mass[j] = total
        centres, heights, mass = np.delete(centres, i), np.delete(heights, i), np.delete(mass, i)
    knots_raw = np.concatenate([[centres[0] - _END], centres, [centres[-1] + _END]])
    knots_score = np.clip(np.concatenate([[0.0], heights, [5.0]]), 0.0, 5.0)
    keep = np.concatenate([[True], np.diff(knots_raw) > 1e-9])
    return knots_raw[keep], np.maximum.accumulate(knots_score)[keep]


def markdown(report: Mapping[str, Any]) -> str:
    """The report for a person."""
    lines = ["# Educational scorer: report", "", _HOW, ""]
    lines += ["| figure | value |", "|---|---|"]
    for key, value in report.items():
        if value is None or isinstance(value, (int, float)):
            shown = "not to be had from these labels" if value is None else value
            lines.append(f"| {key} | {value:.4f} |" if isinstance(value, float) else f"| {key} | {shown} |")
    lines += ["", "## Folds", "", "| low sources held out | high | low | ROC AUC |", "|---|---|---|---|"]
    for fold in report["folds"]:
        names = ", ".join(fold["low_sources"])
        lines.append(
            f"| {names} | {fold['documents_high']} | {fold['documents_low']} | {fold['roc_auc']:.4f} |"
        )
    lines += [
        "",
        "## Files",
        "",
        "| file | documents | mean label | score p5 | p50 | p95 |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["by_file"]:
        lines.append(
            f"| {row['name']} | {row['documents']} | {row['mean_label']:.2f} | {row['score_p05']:.2f} "
            f"| {row['score_p50']:.2f} | {row['score_p95']:.2f} |"
        )
    lines += ["", "## Calibration", "", "| mean score | mean label | documents |", "|---|---|---|"]
    for row in report["calibration_bins"]:
        lines.append(f"| {row['mean_score']:.2f} | {row['mean_label']:.2f} | {row['documents']} |")
    lines += ["", "## Confusion", "", "Rows: rounded label 0 to 5. Columns: rounded score 0 to 5.", ""]
    lines += ["| label | 0 | 1 | 2 | 3 | 4 | 5 |", "|---|---|---|---|---|---|---|"]
    for label, row in enumerate(report["confusion_label_by_score"]):
        lines.append(f"| {label} | " + " | ".join(str(n) for n in row) + " |")
    return "\n".join(lines) + "\n"
