"""A linear classifier on frozen features: logistic regression with an L2 penalty, by L-BFGS (scikit-learn)."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from vidjoint.metrics import positives

PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # l2: mean loss + l2 / 2 |weights|^2, of features of variance 1
ITERATIONS = 1000  # at most
NEVER = -1e4  # logit of a class without training examples


@dataclass
class Linear:
    """Weights float32[D, C] and bias float32[C], for features as they are."""

    weights: np.ndarray
    bias: np.ndarray
    converged: bool

    def scores(self, x: np.ndarray) -> np.ndarray:
        """float32[n, D] -> logits float32[n, C]."""
        return x @ self.weights + self.bias


def fit(x: np.ndarray, label: np.ndarray, classes: int, penalties: Iterable[float] = PENALTIES) -> Iterator[Linear]:
    """Yields the classifier of each penalty; each starts from the one before, so begin with the strongest.

    A task of many labels has one regression of yes against no for each class.

    Args:
      x: float32[n, D].
      label: int32[n], or int32[n, K] filled up by -1.
    """
    mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-6 * np.maximum(np.abs(mean), 1e-6), scale, np.inf)  # a channel that never changes takes no part
    x = ((x - mean) / scale).astype(np.float32)
    questions = [label] if label.ndim == 1 else list(positives(label, classes).T)
    models = [LogisticRegression(warm_start=True, max_iter=ITERATIONS) for _ in questions]
    for penalty in penalties:
        answers = [_solve(model.set_params(C=1 / (penalty * len(x))), x, target) for model, target in zip(models, questions, strict=True)]
        weights, bias = np.zeros((x.shape[1], classes)), np.full(classes, NEVER)
        for number, (found, coefficients, intercept, _) in enumerate(answers):
            places = found if label.ndim == 1 else [number]
            weights[:, places], bias[places] = coefficients, intercept
        weights /= scale[:, None]
        bias -= mean @ weights
        yield Linear(weights.astype(np.float32), bias.astype(np.float32), all(answer[3] for answer in answers))


def _solve(model: LogisticRegression, x: np.ndarray, target: np.ndarray):
    """(classes that occur, weights [D, these], bias, whether it converged); of yes or no, one column for yes."""
    found = np.unique(target)
    if len(found) == 1:
        sure = NEVER if target.dtype == bool and not found[0] else -NEVER
        return found, np.zeros((x.shape[1], 1)), np.array([sure]), True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, target)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    weights, bias = model.coef_.T.astype(np.float64), model.intercept_.astype(np.float64)
    if len(found) == 2 and target.dtype != bool:  # scikit-learn has one logit for two classes
        weights, bias = np.concatenate([-weights / 2, weights / 2], axis=1), np.concatenate([-bias / 2, bias / 2])
    return found, weights, bias, converged
