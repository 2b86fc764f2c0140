"""Probing every layer of a model, with the two baselines without which a number says little: the embedding, and a random twin.

    report = probe_layers(models.load("gpt-english"), load_treebank("dev")[:300], fact="upos")
    print(report)

The embedding knows the token and nothing around it. A twin of random weights knows whatever the architecture passes on unlearned, which for
parts of speech is a lot. What a layer holds above both was learned, and is in its context.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np

from probes.census import random_twin
from probes.linear.classifier import ProbeResult, probe
from probes.linear.examples import Examples
from probes.linear.words import word_activations
from probes.progress import Progress
from workbench.instrument.errors import UnknownHookPoint
from workbench.instrument.selection import Select
from workbench.lab.stimuli import Sentence


@dataclass(frozen=True)
class LayerProbes:
    """Result of `probe_layers`: probes by site, of the model and of its random twin (empty without one); `embedding` is the first site."""

    fact: str
    embedding: str
    trained: dict[str, ProbeResult]
    twin: dict[str, ProbeResult]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "fact": self.fact,
            "embedding": self.embedding,
            "trained": {site: result.to_json() for site, result in self.trained.items()},
            "twin": {site: result.to_json() for site, result in self.twin.items()},
        }

    def __repr__(self) -> str:
        lines = [f"LayerProbes({self.fact}; majority {self.trained[self.embedding].majority:.3f})"]
        for site, result in self.trained.items():
            twin = f", random twin {self.twin[site].accuracy:.3f}" if site in self.twin else ""
            control = "" if np.isnan(result.control) else f", selectivity {result.selectivity:+.3f}"
            lines.append(f"  {site}: {result.accuracy:.3f} {result.interval}{control}{twin}")
        return "\n".join(lines)


def stream_sites(model: Any, roles: Sequence[str] = ("resid_post",)) -> list[str]:
    """The embedding, then every layer's hook points of these roles, in order of layers.

    Raises:
        UnknownHookPoint: the model has no embedding to compare with, or nothing of a role.
    """
    points = list(model.hook_points.points.values())
    embedding = next((point.name for point in points if point.role == "embed"), None)
    if embedding is None:
        raise UnknownHookPoint(
            f"This model has no hook point of role 'embed'. Its roles are: {', '.join(model.hook_points.roles)}."
        )
    sites = [embedding]
    for role in roles:
        (_, selected), *_ = model.hook_points.resolve(Select(role=role))
        sites += [s.point.name for s in selected]
    if getattr(model, "loops", 1) > 1:
        last = model.loops - 1
        sites = [sites[0], *(f"{site}@{last}" for site in sites[1:])]
    return sites


def probe_layers(
    model: Any,
    sentences: Sequence[Sentence],
    fact: str = "upos",
    *,
    probe_with: Any = "linear",
    roles: Sequence[str] = ("resid_post",),
    split: str = "document",
    pooling: str = "last",
    twin: Any = "random",
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    cancel: Event | None = None,
) -> LayerProbes:
    """Probe the embedding and every layer for a fact about words.

    Args:
        fact: a field of `Sentence` with one entry per word. probe_with: as for `fit_probe`. roles: which hook points of each layer.
        split: as for `Examples.split`; a split by type measures no selectivity. twin: the control model, `"random"`, or None for none.

    Raises:
        ValueError: as for `word_activations` and `probe`. MeasurementCancelled: `cancel` was set.
    """
    sites = stream_sites(model, roles)
    other = random_twin(model) if isinstance(twin, str) and twin == "random" else twin
    subjects = {"trained": model} | ({} if other is None else {"twin": other})
    results: dict[str, dict[str, ProbeResult]] = {"trained": {}, "twin": {}}
    steps, done = len(subjects) * (len(sites) + 1), 0
    for name, subject in subjects.items():
        words = word_activations(subject, sentences, sites, pooling=pooling, cancel=cancel)
        done += 1
        for site in sites:
            Progress(progress, cancel)(done / steps, f"{name}: {site}")
            examples = Examples(
                words[site], np.asarray(words.facts(fact)), np.asarray(words.documents), np.asarray(words.types)
            )
            train, test = examples.split(split, seed=seed)
            results[name][site] = probe(train, test, probe_with, control="type" not in split, seed=seed)
            done += 1
    return LayerProbes(fact, sites[0], results["trained"], results["twin"])
