"""The student: a linear model over hashed words and word pairs, with a calibrated output.

A document's raw value is the mean weight of its words and pairs; `shrinkage` adds that many weightless
ones, so that a handful of words is never strong evidence, and `bias` is what a text without any known
word gets. A monotone table then maps raw values to the 0 to 5 scale.

Weights are 16-bit integers and summed as integers: a score depends on the document alone, never on its
neighbours in the batch, the order of summation or the machine.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.core.artifact import write_atomic
from pocketphi.core.errors import DataError
from pocketphi.corpus.educational import features

DEFAULT_PATH = Path(__file__).with_name("default.npz")
FORMAT = "pocketphi-educational-scorer-1"
MIN_SCORE, MAX_SCORE = 0.0, 5.0


@dataclass(frozen=True)
class Scorer:
    """Scores texts; make one with `load_scorer`.

    weights: int16 [2**bits], one per slot; raw = scale * sum / (count + shrinkage) + bias.
    knots_raw, knots_score: float64 [K], both non-decreasing, the calibration table.
    card: what it was trained on and how well it did.
    """

    weights: np.ndarray
    scale: float
    bias: float
    shrinkage: float
    knots_raw: np.ndarray
    knots_score: np.ndarray
    card: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    @property
    def bits(self) -> int:
        return len(self.weights).bit_length() - 1

    def raw(self, texts: Sequence[str]) -> np.ndarray:
        """Return the uncalibrated values, float64 [len(texts)]."""
        parts = []
        for batch in features.hash_batches(texts, self.bits):
            last_D = np.maximum(batch.ends_D - 1, batch.starts_D)
            values_W = self.weights.take(batch.pairs_W).astype(np.int32)
            # The last word of a document begins no pair.
            values_W[last_D[batch.ends_D > batch.starts_D]] = 0
            values_W += self.weights.take(batch.words_W)
            # Sums may wrap around 2**32 along a batch; the difference of two of them never does,
            # since a document has fewer than 2**14 words and pairs of fewer than 2**15 each.
            sums_W = np.zeros(len(values_W) + 1, dtype=np.int32)
            np.cumsum(values_W, out=sums_W[1:])
            total_D = (sums_W.take(batch.ends_D) - sums_W.take(batch.starts_D)).astype(np.float64)
            num_D = batch.ends_D - 2 * batch.starts_D + last_D
            parts.append(self.scale * total_D / (num_D + self.shrinkage) + self.bias)
        return np.concatenate(parts) if parts else np.zeros(0)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Return the educational value of each text, float32 [len(texts)] between 0 and 5.

        A text longer than `features.MAX_CHARS` characters is judged by evenly spread windows.
        """
        return np.interp(self.raw(texts), self.knots_raw, self.knots_score).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        """Flat facts for a manifest or a person: format, sha256, sizes and the training card."""
        return {
            "format": FORMAT,
            "sha256": self.sha256,
            "num_slots": len(self.weights),
            "num_weights_nonzero": int(np.count_nonzero(self.weights)),
            "max_chars_read": features.MAX_CHARS,
            "min_score": float(self.knots_score[0]),
            "max_score": float(self.knots_score[-1]),
            **self.card,
        }

    def to_bytes(self) -> bytes:
        """Return the file's content; equal scorers give equal bytes."""
        arrays = {
            "weights": self.weights.astype(np.int16),
            "numbers": np.array([self.scale, self.bias, self.shrinkage], dtype=np.float64),
            "knots_raw": np.asarray(self.knots_raw, dtype=np.float64),
            "knots_score": np.asarray(self.knots_score, dtype=np.float64),
            "card": np.frombuffer(
                json.dumps({"format": FORMAT, **self.card}, sort_keys=True).encode(), dtype=np.uint8
            ),
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # zip members carry a fixed date
        return buffer.getvalue()

    def save(self, path: Path | str) -> Path:
        """Write the scorer to one .npz file, whole or not at all."""
        path = Path(path)
        write_atomic(path, self.to_bytes())
        return path


def load_scorer(path: Path | str | None = None) -> Scorer:
    """Open a scorer file, or a `scorer` artifact folder; without a path the one in the package.

    Raises DataError that names the file when it is missing, damaged or of another format.
    """
    path = DEFAULT_PATH if path is None else Path(path)
    if path.is_dir():
        path = path / "scorer.npz"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the scorer: {error.strerror}",
            hint="leave the path out to use the scorer in the package",
        ) from None
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        card = json.loads(arrays["card"].tobytes())
        if card.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        weights, numbers = arrays["weights"], arrays["numbers"]
        knots_raw, knots_score = arrays["knots_raw"], arrays["knots_score"]
        size = len(weights)
        if weights.dtype != np.int16 or weights.ndim != 1 or size < 2 or size & (size - 1):
            raise ValueError(f"weights are {weights.dtype} {weights.shape}, not int16 [2**bits]")
        if numbers.shape != (3,) or not np.isfinite(numbers).all() or numbers[2] <= 0:
            raise ValueError("scale, bias and shrinkage are not three finite numbers")
        if knots_raw.ndim != 1 or knots_raw.shape != knots_score.shape or not len(knots_raw):
            raise ValueError("the calibration table has columns of different length")
        if (np.diff(knots_raw) <= 0).any() or (np.diff(knots_score) < 0).any():
            raise ValueError("the calibration table is not monotone")
        if knots_score[0] < MIN_SCORE or knots_score[-1] > MAX_SCORE:
            raise ValueError("the calibration table leaves the scale from 0 to 5")
    except Exception as error:  # a damaged zip raises many kinds
        raise DataError(f"{path}: not a readable scorer: {error}") from None
    scale, bias, shrinkage = (float(x) for x in numbers)
    digest = hashlib.sha256(raw).hexdigest()
    return Scorer(weights, scale, bias, shrinkage, knots_raw, knots_score, card, digest)
