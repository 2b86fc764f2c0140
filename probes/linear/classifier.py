"""Probing classifiers with their controls: is a fact readable from an activation, beyond what the probe itself can memorise?

    result = probe(train, test)                     logistic regression; or "mlp", or any scikit-learn classifier
    result.accuracy, result.interval                bootstrap over documents
    result.majority, result.by_type                 what needs no activation: the commonest label, and the commonest of each word type
    result.control, result.selectivity              accuracy on the control task, and accuracy − control (Hewitt & Liang 2019)

Selectivity compares with labels that are a function of the word type alone, so it is only defined where test types were seen in training;
for a split by type it is refused (the control is then at chance whatever the probe).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.intervals import Interval, mean_interval
from probes.linear.examples import Examples, control_labels
from workbench.instrument.errors import suggestion

KINDS = ("linear", "mlp")


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe is built.

    Args:
        kind: `"linear"` (softmax(Wh + b)) or `"mlp"` (one hidden ReLU layer). strength: of the
            penalty ½‖W‖² beside the summed log loss (scikit-learn's 1/C); 1 is a unit normal prior on weights of standardised features.
        components: keep only so many principal components of the training activations first (None: all): a rank limit.
        hidden: width of the MLP. early_stopping: stop the MLP on a held-out tenth. max_iter, seed: of the optimiser.
    """

    kind: str = "linear"
    strength: float = 1.0
    components: int | None = None
    hidden: int = 64
    early_stopping: bool = False
    max_iter: int = 500
    seed: int = 0

    def build(self) -> Any:
        """A scikit-learn pipeline: optionally reduce, standardise, classify.

        Raises:
            ValueError: an unknown kind, a negative strength.
        """
        from sklearn.decomposition import PCA
        from sklearn.linear_model import LogisticRegression
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if self.kind not in KINDS:
            raise ValueError(
                f"Unknown kind of probe {self.kind!r}.{suggestion(self.kind, KINDS)} "
                f"Expected one of {', '.join(KINDS)}, or a scikit-learn classifier."
            )
        if not self.strength > 0:
            raise ValueError(f"strength is {self.strength}; expected a positive number.")
        reduce = [] if self.components is None else [PCA(self.components, random_state=self.seed)]
        if self.kind == "linear":
            classifier: Any = LogisticRegression(C=1 / self.strength, max_iter=self.max_iter)
        else:
            classifier = MLPClassifier(
                (self.hidden,), alpha=self.strength, early_stopping=self.early_stopping, max_iter=self.max_iter,
                random_state=self.seed,
            )  # fmt: skip
        return make_pipeline(*reduce, StandardScaler(), classifier)


@dataclass(frozen=True)
class ProbeResult:
    """What a probe reads on test examples it was not fitted on.

    Args:
        accuracy, interval: share of test labels told right, with a bootstrap interval over documents.
        macro_f1: F1 averaged over the classes of the test examples: rare classes count as much as common ones.
        majority: accuracy of always saying the commonest training label. by_type: of saying the commonest label of the word's type
            (nan without types; an unseen type gets the commonest label).
        control: accuracy on the control task (nan if not measured). n_train, n_test, n_classes: sizes.
        estimator: the fitted scikit-learn estimator. correct: [test example].
    """

    accuracy: float
    interval: Interval
    macro_f1: float
    majority: float
    by_type: float
    control: float
    n_train: int
    n_test: int
    n_classes: int
    estimator: Any
    correct: NDArray[np.bool_]

    @property
    def selectivity(self) -> float:
        """accuracy − control; nan if the control was not measured."""
        return self.accuracy - self.control

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, nan as None."""
        names = (
            "accuracy",
            "macro_f1",
            "majority",
            "by_type",
            "control",
            "selectivity",
            "n_train",
            "n_test",
            "n_classes",
        )
        values = {name: getattr(self, name) for name in names}
        record = {name: None if value != value else value for name, value in values.items()}
        return record | {"interval": [self.interval.low, self.interval.high], "estimator": repr(self.estimator)}

    def __repr__(self) -> str:
        control = "" if np.isnan(self.control) else f", selectivity {self.selectivity:+.3f}"
        return (
            f"ProbeResult(accuracy {self.accuracy:.3f} {self.interval}, majority {self.majority:.3f}{control}; "
            f"{self.n_train} train, {self.n_test} test, {self.n_classes} classes)"
        )


def fit_probe(train: Examples, probe: ProbeSettings | str | Any = "linear") -> Any:
    """A fitted estimator: of settings, a kind's name, or an unfitted scikit-learn classifier, of which a clone is fitted.

    Raises:
        ValueError: training examples of one class. TypeError: something that is no classifier.
    """
    if len(train.classes) < 2:
        raise ValueError(f"All training labels are {train.classes[0]!r}. Expected at least two classes.")
    settings = ProbeSettings(kind=probe) if isinstance(probe, str) else probe
    if isinstance(settings, ProbeSettings):
        estimator = settings.build()
    else:
        from sklearn.base import BaseEstimator, clone, is_classifier

        if not (isinstance(settings, BaseEstimator) and is_classifier(settings)):
            raise TypeError(
                f"Cannot probe with {settings!r}. Expected 'linear', 'mlp', ProbeSettings or a scikit-learn classifier."
            )
        estimator = clone(settings)
    return estimator.fit(train.features, train.labels)


def probe(
    train: Examples,
    test: Examples,
    probe: ProbeSettings | str | Any = "linear",
    *,
    control: bool = True,
    level: float = 0.95,
    seed: int = 0,
) -> ProbeResult:
    """Fit on `train`, tell the labels of `test`, and fit the same probe once more on the control task.

    Args:
        probe: as for `fit_probe`. control: also measure selectivity (needs types). level: of the interval. seed: of control and bootstrap.

    Raises:
        ValueError: one class; other widths in test; a control without types, or with test types of which training has seen none.
    """
    if not len(test) or train.features.shape[1] != test.features.shape[1]:
        raise ValueError(
            f"train has width {train.features.shape[1]}, test {test.features.shape[1]} with {len(test)} examples. Expected the same site."
        )
    from sklearn.metrics import f1_score

    control_accuracy = _control(train, test, probe, seed) if control else float("nan")
    estimator = fit_probe(train, probe)
    told = estimator.predict(test.features)
    correct = told == test.labels
    majority = Counter(train.labels.tolist()).most_common(1)[0][0]
    return ProbeResult(
        accuracy=float(correct.mean()),
        interval=mean_interval(correct, test.documents, level=level, seed=seed),
        macro_f1=float(f1_score(test.labels, told, average="macro", labels=test.classes, zero_division=0)),
        majority=float((test.labels == majority).mean()),
        by_type=_by_type(train, test, majority),
        control=control_accuracy,
        n_train=len(train),
        n_test=len(test),
        n_classes=len(train.classes),
        estimator=estimator,
        correct=correct,
    )


def _by_type(train: Examples, test: Examples, majority: Any) -> float:
    if train.types is None or test.types is None:
        return float("nan")
    seen: dict[Any, Counter[Any]] = {}
    for word, label in zip(train.types.tolist(), train.labels.tolist(), strict=True):
        seen.setdefault(word, Counter())[label] += 1
    said = [seen[word].most_common(1)[0][0] if word in seen else majority for word in test.types.tolist()]
    return float((np.asarray(said) == test.labels).mean())


def _control(train: Examples, test: Examples, probe: Any, seed: int) -> float:
    """Accuracy of the same probe on the control task."""
    if train.types is None or test.types is None:
        raise ValueError(
            "The control task gives a label to each word type, and these examples have no types. Expected types, or control=False."
        )
    if not np.isin(test.types, train.types).any():
        raise ValueError(
            "No test type occurs in training (a split by type), so control labels of the test cannot be learned and selectivity is not "
            "defined. Expected a split by document, or control=False."
        )
    labels = control_labels(np.concatenate([train.types, test.types]), train.labels, seed)
    learn, check = train.with_labels(labels[: len(train)]), test.with_labels(labels[len(train) :])
    if len(learn.classes) == 1:  # few types, which drew the same label: there is nothing to fit, and one thing to say
        return float((check.labels == learn.classes[0]).mean())
    return float((fit_probe(learn, probe).predict(check.features) == check.labels).mean())
