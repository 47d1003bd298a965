"""Loss against parameters and tokens: L(N, D) = E + A / N^alpha + B / D^beta, fitted and read.

The form is Chinchilla's (Hoffmann et al., arXiv 2203.15556, approach 3). For given exponents it is linear
in E, A and B, so the exponents alone are searched (a grid that zooms in) and the rest is non-negative
least squares in closed form. Errors count relative to the loss. Torch-free.

Shapes: G pairs of exponents, R runs, C columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pocketphi.core.errors import DataError

_EXPONENTS = (0.05, 1.5)
_GRID = 21
_ZOOMS = 7


@dataclass(frozen=True)
class Run:
    """A finished run: `parameters` N, `tokens` D, `loss` in nats per token."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """The fitted form; `relative_error` is the root mean square over the runs it was fitted to."""

    irreducible: float
    parameter_factor: float
    parameter_exponent: float
    token_factor: float
    token_exponent: float
    relative_error: float

    def loss(self, parameters: float, tokens: float) -> float:
        return (
            self.irreducible
            + self.parameter_factor * parameters**-self.parameter_exponent
            + self.token_factor * tokens**-self.token_exponent
        )

    def best_parameters(self, flops: float) -> float:
        """Parameters of lowest loss for 6 N D = `flops`; tokens follow from it."""
        a, b = self.parameter_exponent, self.token_exponent
        up, down = a * self.parameter_factor, b * self.token_factor
        if up <= 0 or down <= 0:
            return float("nan")
        return float((up / down * (flops / 6) ** b) ** (1 / (a + b)))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def fit(runs: Sequence[Run]) -> ScalingLaw:
    """Fit the form. Raises DataError with fewer than five runs, or fewer than two sizes or lengths."""
    sizes, lengths = {r.parameters for r in runs}, {r.tokens for r in runs}
    if len(runs) < 5 or len(sizes) < 2 or len(lengths) < 2:
        raise DataError(
            f"{len(runs)} runs of {len(sizes)} sizes and {len(lengths)} lengths do not determine five numbers",
            hint="at least five runs, two sizes and two numbers of tokens",
        )
    n = np.array([r.parameters for r in runs], dtype=np.float64)
    d = np.array([r.tokens for r in runs], dtype=np.float64)
    y = np.array([r.loss for r in runs], dtype=np.float64)
    # Scaled to their means, the columns are of like size whatever the exponents.
    n_mean, d_mean = float(np.exp(np.log(n).mean())), float(np.exp(np.log(d).mean()))
    low = np.array([_EXPONENTS[0]] * 2)
    high = np.array([_EXPONENTS[1]] * 2)
    best: tuple[float, np.ndarray, tuple[float, float]] = (np.inf, np.zeros(3), (0.0, 0.0))
    for _ in range(_ZOOMS):
        alpha_G, beta_G = (
            grid.ravel()
            for grid in np.meshgrid(*(np.linspace(low[i], high[i], _GRID) for i in range(2)), indexing="ij")
        )
        columns_GR3 = np.stack(
            [
                np.ones((len(alpha_G), len(y))),
                (n / n_mean) ** -alpha_G[:, None],
                (d / d_mean) ** -beta_G[:, None],
            ],
            axis=2,
        )
        weights_G3, error_G = _non_negative(columns_GR3 / y[:, None])
        at = int(np.argmin(error_G))
        if error_G[at] < best[0]:
            best = (float(error_G[at]), weights_G3[at], (float(alpha_G[at]), float(beta_G[at])))
        reach = (high - low) / (_GRID - 1) * 2
        low = np.maximum(np.array(best[2]) - reach, _EXPONENTS[0])
        high = np.minimum(np.array(best[2]) + reach, _EXPONENTS[1])
    error, (e, a, b), (alpha, beta) = best
    return ScalingLaw(
        irreducible=float(e),
        parameter_factor=float(a * n_mean**alpha),
        parameter_exponent=alpha,
        token_factor=float(b * d_mean**beta),
        token_exponent=beta,
        relative_error=float((error / len(y)) ** 0.5),
    )


def forecast(runs: Sequence[Run], parameters: float, tokens: float) -> tuple[float, float, float]:
    """Predicted loss, and the lowest and highest that fits without one of the runs predict."""
    value = fit(runs).loss(parameters, tokens)
    others = []
    for left_out in range(len(runs)):
        rest = [r for i, r in enumerate(runs) if i != left_out]
        try:
            others.append(fit(rest).loss(parameters, tokens))
        except DataError:
            continue
    return value, min([value, *others]), max([value, *others])


def _non_negative(columns_GRC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [G, C] >= 0 that bring each of G systems closest to ones, and the squared errors [G]:
    the best of all subsets of columns whose plain least squares is non-negative."""
    num_systems, _, num_columns = columns_GRC.shape
    best_G = np.full(num_systems, np.inf)
    found_GC = np.zeros((num_systems, num_columns))
    for size in range(1, num_columns + 1):
        for subset in itertools.combinations(range(num_columns), size):
            part_GRS = columns_GRC[:, :, subset]
            weights_GS = np.linalg.pinv(part_GRS).sum(axis=2)
            error_G = ((np.einsum("grs,gs->gr", part_GRS, weights_GS) - 1) ** 2).sum(axis=1)
            better_G = (weights_GS >= 0).all(axis=1) & (error_G < best_G)
            best_G[better_G] = error_G[better_G]
            found_GC[better_G] = 0.0
            found_GC[np.ix_(better_G, subset)] = weights_GS[better_G]
    return found_GC, best_G
