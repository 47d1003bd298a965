"""Educational value: how much a reader learns from a text, on a scale from 0 to 5.

    scorer = load_scorer()                # the one in the package; or a path of one's own
    scorer.score(["A plant is ..."])      # float32 [D]

`phi corpus annotate` makes labels with a language model, `phi corpus train-scorer` trains a scorer on
labels. What the scorer in the package measures, and how well: docs/concepts/educational-score.md.
"""

from pocketphi.corpus.educational.scorer import DEFAULT_PATH, Scorer, load_scorer

__all__ = ["DEFAULT_PATH", "Scorer", "load_scorer"]
