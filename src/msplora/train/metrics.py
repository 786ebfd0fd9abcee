"""The metrics by which GLUE judges each task, and the one that picks the best epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Metrics = dict[str, float]


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> Metrics:
    return {"accuracy": float(accuracy_score(labels, predicted))}


def _accuracy_and_f1(predicted: np.ndarray, labels: np.ndarray) -> Metrics:
    # F1 of class 1 (paraphrase); 0 where nothing is predicted as such, as GLUE counts it.
    f1 = f1_score(labels, predicted, pos_label=1, zero_division=0.0)  # pyright: ignore
    return {**_accuracy(predicted, labels), "f1": float(f1)}


def _accuracy_and_macro_f1(predicted: np.ndarray, labels: np.ndarray) -> Metrics:
    # The mean over the classes, each as heavy as the others.
    f1 = f1_score(labels, predicted, average="macro", zero_division=0.0)  # pyright: ignore
    return {**_accuracy(predicted, labels), "macro_f1": float(f1)}


def _matthews(predicted: np.ndarray, labels: np.ndarray) -> Metrics:
    return {
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
        **_accuracy(predicted, labels),
    }


def _correlations(predicted: np.ndarray, labels: np.ndarray) -> Metrics:
    def number(value: float) -> float:
        # A constant prediction has no correlation; a NaN would never be beaten as "best".
        return 0.0 if math.isnan(value) else float(value)

    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": number(pearsonr(predicted, labels)[0]),  # pyright: ignore
        "spearman": number(spearmanr(predicted, labels)[0]),  # pyright: ignore
    }


# GLUE task -> (its metrics, the one that picks the best epoch).
_GLUE: dict[str, tuple[Callable[[np.ndarray, np.ndarray], Metrics], str]] = {
    "mrpc": (_accuracy_and_f1, "accuracy"),
    "cola": (_matthews, "matthews_correlation"),
    "stsb": (_correlations, "pearson"),
}


def metrics_for(
    glue: str | None, regression: bool, of_images: bool = False
) -> tuple[Callable[[np.ndarray, np.ndarray], Metrics], str]:
    """Return (metrics of predictions and labels, name of the one that picks the best epoch)."""
    if glue in _GLUE:
        return _GLUE[glue]
    if of_images:
        return _accuracy_and_macro_f1, "accuracy"
    return (_correlations, "pearson") if regression else (_accuracy, "accuracy")


def predictions(logits: Any, regression: bool) -> np.ndarray:
    """Turn a classifier's outputs into classes, or into numbers for regression."""
    # Encoder-decoders give a tuple, of which the first entry is the logits.
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float64)
    return logits.reshape(len(logits), -1)[:, 0] if regression else logits.argmax(axis=-1)
