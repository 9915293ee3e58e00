"""A ridge regression whose penalties, one for each feature, are learnt through its solution.

    beta(w) = argmin_u  1/2 |X u - y|^2 / rows + 1/2 sum_j w_j u_j^2   subject to   s_j u_j >= 0
    w*      = argmin_w  mean over folds of  |X_fold beta_{other folds}(w) - y_fold|^2 / rows of the fold
                        + rho variance_j(log w_j)

Cross-validation usually searches a grid for the one penalty of a ridge regression. With one for each
feature there is no grid to search, but the validation error has a gradient: through the lower
problem, a quadratic program, by one adjoint solve. All folds of all random splits are one batch.

Data: scikit-learn's diabetes data (442 patients, 10 features), as it is, and with the squares and
products that Efron, Hastie, Johnstone and Tibshirani, Least Angle Regression, 2004, section 1, add
(64 features). The signs s are those of the plain ridge fit on the training part; the descent starts at
its one penalty. Steps, rate and rho were chosen on the random splits 100 to 119; the figures are those
of splits 1000 and following, and no test part decides anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LassoCV, RidgeCV
from sklearn.preprocessing import PolynomialFeatures
from threadpoolctl import threadpool_limits

import ddn_solvers as ddn

Array = np.ndarray

FOLDS, TEST_SHARE = 5, 0.25
STEPS, RATE = 30, 0.1  # of Adam
RHO = 0.01  # pulls the penalties together: 64 of them overfit the folds
FIRST_SEED = 1000
ALPHAS = np.logspace(-1, 4, 26)  # the grid of RidgeCV


@dataclass
class Split:
    """One random split: standardised by its training part, columns flipped so that s = +1."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array
    unit: float  # standard deviation of the training targets
    penalty: float  # RidgeCV's, per row
    ridge_coefficients: Array  # RidgeCV's, columns flipped: all >= 0
    ridge_error: float  # test errors are in the data's own units
    lasso_error: float


@dataclass
class Result:
    """Figures of all splits; errors are mean squared errors in the data's own units."""

    names: list[str]  # of the features
    validation: Array  # (steps + 1, splits), over the descent
    test: Array  # (steps + 1, splits), over the descent; for the picture, never used to choose
    ridge: Array  # (splits,), RidgeCV's test error
    lasso: Array  # (splits,), LassoCV's test error
    penalties: Array  # (splits, features), learnt, per row
    ridge_penalty: Array  # (splits,), RidgeCV's, per row
    coefficients: Array  # (splits, features), learnt, columns flipped
    ridge_coefficients: Array  # (splits, features), columns flipped

    @property
    def learnt(self) -> Array:
        """Test error of the learnt penalties after the last step, (splits,)."""
        return self.test[-1]


class SignedRidge(torch.nn.Module):
    """Sign-constrained ridge coefficients as a layer, with one learnable penalty a feature.

    Args:
        penalties: Where to start, (splits, features), positive.
        solver: Any of the library's.
    """

    def __init__(self, penalties: torch.Tensor, solver: str) -> None:
        super().__init__()
        self.log_penalties = torch.nn.Parameter(penalties.log())
        problem = ddn.quadratic_program(penalties.shape[-1], bounds=(0.0, None))
        self.solution = ddn.DeclarativeLayer(problem, solver=solver)

    def forward(self, gram: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
        """Coefficients (splits, *, features) from X^T X / rows and X^T y / rows, (splits, *, ...)."""
        w = self.log_penalties.exp()
        w = w.reshape(w.shape[0], *[1] * (moment.dim() - 2), w.shape[-1])
        return self.solution(P=gram + torch.diag_embed(w), q=-moment)


def features(quadratic: bool) -> tuple[Array, Array, list[str]]:
    """The data: ten features, or with their squares and products, all but the square of a binary one."""
    data = load_diabetes()
    if not quadratic:
        return data.data, data.target, list(data.feature_names)
    expansion = PolynomialFeatures(2, include_bias=False)
    x = expansion.fit_transform(data.data / data.data.std(axis=0))
    names = [str(name) for name in expansion.get_feature_names_out(data.feature_names)]
    kept = [j for j, name in enumerate(names) if name != "sex^2"]
    return x[:, kept], data.target, [names[j] for j in kept]


def split(x: Array, y: Array, seed: int) -> Split:
    """A random split, and what scikit-learn's cross-validated models make of it."""
    shuffled = np.random.default_rng(seed).permutation(len(x))
    test, train = np.split(shuffled, [round(TEST_SHARE * len(x))])
    centre, spread, mean, unit = x[train].mean(0), x[train].std(0), y[train].mean(), y[train].std()
    x, y = (x - centre) / spread, (y - mean) / unit
    ridge = RidgeCV(ALPHAS).fit(x[train], y[train])
    lasso = LassoCV(cv=FOLDS, max_iter=100_000).fit(x[train], y[train])
    errors = [unit**2 * np.mean((model.predict(x[test]) - y[test]) ** 2) for model in (ridge, lasso)]
    x = x * np.where(ridge.coef_ < 0, -1.0, 1.0)
    return Split(
        train_x=x[train],
        train_y=y[train],
        test_x=x[test],
        test_y=y[test],
        unit=float(unit),
        penalty=float(ridge.alpha_) / len(train),
        ridge_coefficients=np.abs(ridge.coef_),
        ridge_error=float(errors[0]),
        lasso_error=float(errors[1]),
    )


@dataclass
class Moments:
    """Mean squared error of coefficients b on some rows: b^T gram b - 2 moment^T b + square."""

    gram: torch.Tensor  # (*, features, features)
    moment: torch.Tensor  # (*, features)
    square: torch.Tensor  # (*)

    @staticmethod
    def of(x: Array, y: Array) -> Moments:
        return Moments(*(torch.as_tensor(v / len(x)) for v in (x.T @ x, x.T @ y, y @ y)))

    @staticmethod
    def stack(many: Sequence[Moments]) -> Moments:
        parts = ([getattr(m, name) for m in many] for name in ("gram", "moment", "square"))
        return Moments(*(torch.stack(part) for part in parts))

    def error(self, b: torch.Tensor) -> torch.Tensor:
        return (b * (self.gram @ b[..., None])[..., 0]).sum(-1) - 2 * (self.moment * b).sum(-1) + self.square


def fold_moments(one: Split) -> tuple[Moments, Moments]:
    """Of the rows outside and inside each fold, centred by those outside, (FOLDS, ...)."""
    outside, inside = [], []
    for rows in np.array_split(np.arange(len(one.train_x)), FOLDS):
        others = np.setdiff1d(np.arange(len(one.train_x)), rows)
        x, y = one.train_x - one.train_x[others].mean(0), one.train_y - one.train_y[others].mean()
        outside.append(Moments.of(x[others], y[others]))
        inside.append(Moments.of(x[rows], y[rows]))
    return Moments.stack(outside), Moments.stack(inside)


def learn(solver: str, quadratic: bool, splits: int, steps: int, progress: Progress | None = None) -> Result:
    """Learn the penalties of all splits side by side, from RidgeCV's one penalty onwards."""
    x, y, names = features(quadratic)
    parts = [split(x, y, seed) for seed in range(FIRST_SEED, FIRST_SEED + splits)]
    outside, inside = (Moments.stack(m) for m in zip(*map(fold_moments, parts), strict=True))
    whole = Moments.stack([Moments.of(p.train_x, p.train_y) for p in parts])
    held_out = Moments.stack([Moments.of(p.test_x, p.test_y) for p in parts])
    units = torch.tensor([p.unit**2 for p in parts], dtype=torch.float64)
    ridge_penalty = torch.tensor([p.penalty for p in parts], dtype=torch.float64)

    model = SignedRidge(ridge_penalty[:, None].expand(splits, len(names)).contiguous(), solver)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    validation, test = [], []
    task = (
        progress.add_task(f"{len(names)} penalties x {splits} splits", total=steps + 1) if progress else None
    )
    for step in range(steps + 1):
        errors = inside.error(model(outside.gram, outside.moment)).mean(-1)  # over folds, (splits,)
        with torch.no_grad():
            coefficients = model(whole.gram, whole.moment)
        validation.append((errors.detach() * units).numpy())
        test.append((held_out.error(coefficients) * units).numpy())
        if step < steps:
            optimizer.zero_grad()
            (errors.sum() + RHO * model.log_penalties.var(-1, correction=0).sum()).backward()
            optimizer.step()
        if progress and task is not None:
            progress.advance(task)
    return Result(
        names=names,
        validation=np.stack(validation),
        test=np.stack(test),
        ridge=np.array([p.ridge_error for p in parts]),
        lasso=np.array([p.lasso_error for p in parts]),
        penalties=model.log_penalties.detach().exp().numpy(),
        ridge_penalty=ridge_penalty.numpy(),
        coefficients=coefficients.numpy(),
        ridge_coefficients=np.stack([p.ridge_coefficients for p in parts]),
    )


def table(results: Sequence[Result]) -> Table:
    """Test errors, mean and standard deviation over the splits, and the paired differences."""
    title = f"Diabetes data: test mean squared error over {len(results[0].ridge)} random splits"
    shown = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("features", "RidgeCV", "LassoCV", "learnt", "learnt - RidgeCV", "better on"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        difference = result.learnt - result.ridge
        shown.add_row(
            str(len(result.names)),
            *(f"{e.mean():.0f} ± {e.std():.0f}" for e in (result.ridge, result.lasso, result.learnt)),
            f"{difference.mean():+.0f} ± {difference.std():.0f}",
            f"{(difference < 0).sum()} of {len(difference)}",
        )
    return shown


@threadpool_limits.wrap(limits=1)  # on matrices this small, threads only wait for each other
def main(solver: str = "auto", quick: bool = False) -> list[Result]:
    """Learn on ten and on sixty-four features, print the comparison, and return the figures.

    Args:
        solver: Any of the library's that takes a quadratic program.
        quick: Ten features, two splits and five steps only.
    """
    with Progress(transient=True) as progress:
        if quick:
            results = [learn(solver, quadratic=False, splits=2, steps=5, progress=progress)]
        else:
            results = [learn(solver, quadratic, 20, STEPS, progress) for quadratic in (False, True)]
    Console().print(table(results))
    return results


if __name__ == "__main__":
    main()
