"""Does a concept synapse found in one language or template work in another? Discovered on all sentences of group A, scored on B."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.bdh.capture import Synapse
from probes.bdh.concepts import joined_groups, make_task, record_for_search, validate
from probes.bdh.concepts_recording import Recording
from probes.bdh.concepts_rivals import best_neuron, probes
from probes.bdh.concepts_search import SearchSpace, search, synapse_values
from probes.bdh.concepts_statistics import auc
from probes.progress import Progress
from workbench.instrument.html import table

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ConceptTransfer:
    """AUC of what was chosen in one group and scored in another, by name: [group discovered on, group scored on].

    Args:
        groups: their names. aucs: `"best synapse"`, `"median of candidates"`, the best neurons and the linear probes. The diagonal is
            scored on the half of a group that it was not chosen on.
        synapses: the first choice on each group (all of it).
    """

    groups: tuple[str, ...]
    aucs: dict[str, Array]
    synapses: tuple[Synapse | None, ...]

    def mean_across(self, name: str) -> float:
        """Mean AUC between different groups."""
        return float(self.aucs[name][~np.eye(len(self.groups), dtype=bool)].mean())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "groups": list(self.groups),
            "aucs": {name: values.tolist() for name, values in self.aucs.items()},
            "synapses": [None if synapse is None else str(synapse) for synapse in self.synapses],
        }

    def __repr__(self) -> str:
        lines = [f"ConceptTransfer between {', '.join(self.groups)}; AUC within a group, and across groups:"]
        for name, values in self.aucs.items():
            lines.append(f"  {name}: {np.diag(values).mean():.3f}, {self.mean_across(name):.3f}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return "".join(
            table(
                name,
                ("found in / scored in", *self.groups),
                [(g, *(f"{v:.3f}" for v in row)) for g, row in zip(self.groups, values, strict=True)],
            )
            for name, values in self.aucs.items()
        )


def concept_transfer(
    model: Any,
    positive: Sequence[Any],
    negative: Sequence[Any],
    *,
    positive_groups: Sequence[str],
    negative_groups: Sequence[str],
    statistic: str = "strength",
    layers: Sequence[tuple[int, int]] | None = None,
    source_heads: Sequence[int] | None = None,
    target_heads: Sequence[int] | None = None,
    k: int = 100,
    alternative: str = "greater",
    adjust_length: bool = True,
    hooks: Sequence[Any] = (),
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    cancel: threading.Event | None = None,
) -> ConceptTransfer:
    """Discover in each group and score in every other; arguments as in `find_concept_synapses`.

    Raises ValueError unless there are at least two groups, each with at least four sentences of each class.
    """
    groups = joined_groups(positive, negative, positive_groups, negative_groups)
    assert groups is not None
    report = Progress(progress, cancel)
    recording, space = record_for_search(
        model, [*positive, *negative], statistic, (layers, source_heads, target_heads), hooks, report.part(0, 0.2)
    )
    return transfer_in_recording(
        recording,
        len(positive),
        groups,
        space=space,
        statistic=statistic,
        k=k,
        alternative=alternative,
        adjust_length=adjust_length,
        seed=seed,
        progress=report.part(0.2, 1),
    )


def transfer_in_recording(
    recording: Recording,
    n_positive: int,
    groups: Sequence[str],
    *,
    space: SearchSpace,
    statistic: str = "strength",
    k: int = 100,
    alternative: str = "greater",
    adjust_length: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> ConceptTransfer:
    """`concept_transfer` on activity that is already recorded."""
    report = progress or Progress()
    labels = np.arange(len(recording)) < n_positive
    of = np.asarray(groups)
    names = [str(name) for name in np.unique(of)]
    few = [name for name in names if min((labels & (of == name)).sum(), (~labels & (of == name)).sum()) < 4]
    if len(names) < 2 or few:
        problem = f"groups {few} have fewer than 4 sentences of a class" if few else f"there is one group, {names[0]!r}"
        raise ValueError(
            f"Cannot transfer: {problem}. Expected at least two groups with at least 4 sentences of each class."
        )
    aucs: dict[str, Array] = {}
    first: list[Synapse | None] = []
    for a, name in enumerate(names):
        inside = np.flatnonzero(of == name)
        report(a / len(names), f"discovering in {name}")
        rng = np.random.default_rng([seed, a])
        half = np.zeros(len(labels), bool)
        for value in (False, True):
            members = rng.permutation(inside[labels[inside] == value])
            half[members[: len(members) // 2]] = True
        for whole in (True, False):
            chosen = of == name if whole else half
            scored = [b for b in range(len(names)) if (b == a) != whole]
            values, best = _chosen_on(recording, labels, chosen, space, statistic, k, alternative, adjust_length)
            if whole:
                first.append(best)
            for b in scored:
                at = (of == names[b]) & ~chosen
                for what, columns in values.items():
                    found = auc(columns[at], labels[at]) if columns.shape[1] else np.array([0.5])
                    aucs.setdefault(what, np.zeros((len(names), len(names))))[a, b] = float(np.median(found))
    report(1.0, "done")
    return ConceptTransfer(tuple(names), aucs, tuple(first))


def _chosen_on(
    recording: Recording,
    labels: NDArray[np.bool_],
    chosen: NDArray[np.bool_],
    space: SearchSpace,
    statistic: str,
    k: int,
    alternative: str,
    adjust_length: bool,
) -> tuple[dict[str, Array], Synapse | None]:
    """Numbers [sentence, column] of everything that the sentences `chosen` choose, and the first synapse."""
    rng = np.random.default_rng(0)
    task = make_task(recording, labels, None, chosen.tolist(), 0.5, adjust_length, alternative, rng)
    found = search(
        recording,
        space,
        labels[None],
        task.covariates,
        np.flatnonzero(chosen),
        statistic=statistic,
        k=k,
        two_sided=task.two_sided,
    )[0]
    _, values = validate(synapse_values(recording, found.synapses, statistic), task, found, alternative)
    sources, targets = (sorted({pair[end] for pair in space.layers}) for end in (0, 1))
    rivals = [best_neuron(recording, task, "y", sources), best_neuron(recording, task, "x", targets)]
    rivals += probes(recording, task, sources, targets)
    out = {"best synapse": values[:, :1], "median of candidates": values}
    out |= {rival.name: rival.values[:, None] for rival in rivals}
    return out, found.synapses[0] if found.synapses else None
