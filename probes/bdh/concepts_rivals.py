"""What a concept synapse has to beat on the same sentences: the best single neuron, a linear probe, and features that the user brings.

Each rival is chosen or fitted on the discovery sentences only and gives one number per sentence, which is scored on the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from probes.bdh.concepts_recording import Recording
from probes.bdh.concepts_search import effects
from probes.bdh.concepts_statistics import adjusted, partial_basis, partial_directions

Array = NDArray[np.float64]
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse strengths C of the probe's L2 penalty, one of which inner cross-validation chooses."""


@dataclass(frozen=True)
class Rival:
    """name, what was chosen (a neuron, a feature, the probe's penalty), how many it was chosen from, and its number per sentence."""

    name: str
    chosen: str
    searched: int
    values: Array


@dataclass(frozen=True)
class Task:
    """Labels [sentence], covariates [sentence, covariate] to adjust for, discovery [sentence], and groups [sentence] or None."""

    labels: NDArray[np.bool_]
    covariates: Array
    discovery: NDArray[np.bool_]
    groups: tuple[str, ...] | None
    two_sided: bool = False

    def adjust(self, values: Array) -> Array:
        """values [sentence, column] without what the covariates explain within the classes of the discovery sentences."""
        return adjusted(values, self.labels, self.covariates, self.discovery)

    def effects(self, values: Array) -> Array:
        """Partial correlation of each column [sentence, column] with the labels over the discovery sentences."""
        basis = partial_basis(self.covariates[self.discovery])
        direction = partial_directions(self.labels[None, self.discovery], basis)
        columns = torch.from_numpy(values[self.discovery].copy())
        return effects(columns, torch.from_numpy(basis), torch.from_numpy(direction))[0].numpy()

    def best(self, values: Array) -> int:
        """The column of largest effect."""
        found = self.effects(values)
        return int((np.abs(found) if self.two_sided else found).argmax())


def best_neuron(recording: Recording, task: Task, activity: str, layers: Sequence[int]) -> Rival:
    """The neuron whose mean `activity` ("x" or "y") separates the discovery sentences best, over some layers."""
    values = torch.cat([recording.mean_activity(activity, layer) for layer in layers], 1).double().numpy()
    column = task.best(values)
    layer, neuron = divmod(column, recording.n_neurons)
    head, number = divmod(neuron, recording.n_neurons // recording.n_heads)
    chosen = f"{activity}{layers[layer]}[{head}·{number}]"
    return Rival(f"best neuron {activity}", chosen, values.shape[1], task.adjust(values[:, [column]])[:, 0])


def linear_probe(name: str, features: Array, task: Task, seed: int = 0) -> Rival:
    """Logistic regression on features [sentence, feature], fitted on the discovery sentences, as a decision value per sentence.

    The penalty is chosen by cross-validation inside the discovery sentences, over whole groups where there are groups.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, StratifiedKFold

    searched = features.shape[1]
    features = _rotated(task.adjust(features), task.discovery)
    labels = task.labels[task.discovery]
    groups = None if task.groups is None else np.asarray(task.groups)[task.discovery]
    fewest = min(labels.sum(), (~labels).sum())
    if groups is not None:
        fewest = min(len(np.unique(groups[labels == value])) for value in (True, False))
    folds = int(min(5, fewest))
    classifier = LogisticRegression(solver="newton-cholesky", tol=1e-8)
    if folds >= 2:
        splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
        inner = splitter(folds, shuffle=True, random_state=seed)
        fitted = GridSearchCV(classifier, {"C": list(PENALTIES)}, scoring="neg_log_loss", cv=inner, error_score="raise")
        fitted.fit(features[task.discovery], labels, groups=groups)
        chosen = f"C = {fitted.best_params_['C']:g}"
    else:  # one sentence or group of a class: nothing to choose by
        fitted = classifier.set_params(C=1e-2).fit(features[task.discovery], labels)
        chosen = "C = 0.01, not chosen: a class has one group"
    return Rival(name, chosen, searched, fitted.decision_function(features))


def _rotated(features: Array, discovery: NDArray[np.bool_]) -> Array:
    """Standardised features in the coordinates that the discovery sentences span, at most one per discovery sentence.

    An L2-penalised linear fit on those sentences has no weight outside that span, so nothing is lost and a wide fit becomes a small one.
    """
    mean, spread = features[discovery].mean(0), features[discovery].std(0)
    scaled = (features - mean)[:, spread > 0] / spread[spread > 0]
    axes = np.linalg.svd(scaled[discovery], full_matrices=False)[2]
    return scaled @ axes.T


def probes(recording: Recording, task: Task, source_layers: Sequence[int], target_layers: Sequence[int]) -> list[Rival]:
    """A probe on the residual streams entering the target layers, and one on all neurons (y of source, x of target layers)."""
    out = []
    if recording.resid:
        stream = torch.cat([recording.resid[layer] for layer in target_layers], 1).double().numpy()
        out.append(linear_probe("linear probe, residual stream", stream, task))
    parts = [recording.mean_activity("y", layer) for layer in source_layers]
    parts += [recording.mean_activity("x", layer) for layer in target_layers]
    neurons = torch.cat(parts, 1).double().numpy()
    out.append(linear_probe("linear probe, neurons", neurons, task))
    return out


def best_features(
    functions: Mapping[str, Callable[[Sequence[object]], object]], sentences: Sequence[object], task: Task
) -> list[Rival]:
    """Of each function's features (`concepts_features.dictionary_features`, say), the one that separates the discovery sentences best.

    A function takes the list of all sentences, positive ones first, and returns [sentence] or [sentence, feature].
    Raises ValueError for another shape or for numbers that are not finite.
    """
    out = []
    for name, function in functions.items():
        values = np.asarray(function(sentences), float)
        if values.ndim not in (1, 2) or len(values) != len(sentences) or not np.isfinite(values).all():
            raise ValueError(
                f"features[{name!r}] returned shape {values.shape}; expected finite numbers [sentence] or [sentence, feature] "
                f"for {len(sentences)} sentences."
            )
        values = values[:, None] if values.ndim == 1 else values
        column = task.best(values)
        out.append(Rival(name, f"feature {column}", values.shape[1], task.adjust(values[:, [column]])[:, 0]))
    return out
