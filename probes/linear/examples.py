"""Examples for probes: activations with labels, and what keeps a probe honest — splits, and control labels.

    examples = Examples(words["blocks.1.hook_resid_post"], words.facts("upos"), words.documents, words.types)
    train, test = examples.split("document", seed=0)

A random split leaks: words of one document, and occurrences of one word type, fall on both sides. `"document"` keeps documents whole;
`"type"` keeps word types whole, so that the probe is tested on words it has never seen; `"document and type"` does both (examples of a
training document with a test type, and the reverse, are left out).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.instrument.errors import suggestion
from workbench.lab.activation_store import ActivationStore

SPLITS = ("random", "document", "type", "document and type")
Labels = NDArray[Any]


@dataclass(frozen=True)
class Examples:
    """Activations with one label each.

    Args:
        features: [example, width]. labels: [example], strings or numbers. documents, types: of each example; None: every example its own.

    Raises:
        ValueError: lengths that differ, features that are no matrix or not finite.
    """

    features: NDArray[Any]
    labels: Labels
    documents: NDArray[Any] | None = None
    types: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        for name in ("features", "labels", "documents", "types"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value))
        if self.features.ndim != 2:
            raise ValueError(f"features have shape {self.features.shape}; expected [example, width].")
        for name in ("labels", "documents", "types"):
            value = getattr(self, name)
            if value is not None and value.shape != self.features.shape[:1]:
                raise ValueError(f"{name} have shape {value.shape}; expected one for each of {len(self)} examples.")
        if not np.isfinite(self.features).all():
            raise ValueError("features hold nan or inf. Expected finite activations.")

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, chosen: NDArray[Any] | slice) -> "Examples":
        def part(values: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if values is None else values[chosen]

        return Examples(self.features[chosen], self.labels[chosen], part(self.documents), part(self.types))

    @property
    def classes(self) -> NDArray[Any]:
        """The labels that occur, sorted."""
        return np.unique(self.labels)

    def with_labels(self, labels: Sequence[Any] | NDArray[Any]) -> "Examples":
        """The same activations under other labels."""
        return Examples(self.features, np.asarray(labels), self.documents, self.types)

    def split(self, by: str = "document", test_share: float = 0.3, seed: int = 0) -> tuple["Examples", "Examples"]:
        """Train and test examples; see the module docstring. `test_share`: of the documents, types or examples.

        Raises:
            ValueError: an unknown way, documents or types that are not known, fewer than two of them, a side left empty.
        """
        if by not in SPLITS:
            raise ValueError(f"Unknown split {by!r}.{suggestion(by, SPLITS)} Expected one of {', '.join(SPLITS)}.")
        if not 0 < test_share < 1:
            raise ValueError(f"test_share is {test_share}; expected a number between 0 and 1.")
        rng = np.random.default_rng(seed)
        units: list[NDArray[Any]] = [np.arange(len(self))] if by == "random" else []
        for name, values in (("document", self.documents), ("type", self.types)):
            if name in by:
                if values is None:
                    raise ValueError(f"A split by {name} needs the {name} of each example, and these have none.")
                units.append(values)
        in_test = [_chosen(values, test_share, rng, by) for values in units]
        test, train = np.logical_and.reduce(in_test), ~np.logical_or.reduce(in_test)
        if not test.any() or not train.any():
            raise ValueError(f"A split by {by} of {len(self)} examples leaves one side empty. Expected more examples.")
        return self[train], self[test]

    @classmethod
    def from_store(
        cls, store: ActivationStore, site: str, label: Callable[[dict[str, NDArray[np.int64]]], Any]
    ) -> "Examples":
        """Every row of one site of an activation store. `label(facts)` gives the labels [row] from `token`, `position`, `sequence` [row].

        Documents are the store's sequences, types its token ids.
        """
        facts = {name: values.numpy() for name, values in store.facts().items()}
        return cls(store.rows(site).numpy(), np.asarray(label(facts)), facts["sequence"], facts["token"])


def _chosen(values: NDArray[Any], share: float, rng: np.random.Generator, by: str) -> NDArray[np.bool_]:
    """True for examples of the units that were drawn for testing."""
    names, number = np.unique(values, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"A split by {by} needs at least two different ones; all examples have {names[0]!r}.")
    count = min(max(1, round(share * len(names))), len(names) - 1)
    return np.isin(number, rng.permutation(len(names))[:count])


def control_labels(types: Sequence[Any] | NDArray[Any], labels: Labels, seed: int = 0) -> Labels:
    """The control task of Hewitt & Liang (2019): every word type gets one label, drawn from how often labels occur, whatever the context.

    Nothing in an activation but the identity of its word can tell these labels; a probe that learns them is able to memorise.

    Args:
        types: of each example. labels: the real task's, whose frequencies are drawn from. One seed is one task: pass train and test
            types to one call, or the same type would get two labels.
    """
    names, number = np.unique(np.asarray(types), return_inverse=True)
    return np.random.default_rng(seed).choice(np.asarray(labels), size=len(names))[number]
