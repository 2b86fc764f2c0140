"""Which documents a model reads at which places of a prompt, and in which order they should stand: planners run on one prompt.

    found = plan_order(model, ["Paris lies in France.\\n", "Rome lies in Italy.\\n", …], "Where is Rome?", answer=" Italy")
    found.profile, found.relevance          what each place gets whatever stands there, and each document wherever it stands
    found.orders                            as given, by Attention Sorting, by AttnRank
    found.answers                           log-probability of the answer in each of them, also with several rotation bases together

Every document visits every place once (the cyclic shifts of the given order), so that means over places and over documents are free of one
another where both act by themselves. Published: Attention Sorting (Peysakhovich & Lerer 2023); AttnRank (Yi et al. 2025), whose profile
comes from calibration prompts and whose relevance from a retriever, here both from the prompt; Attention Buckets (Chen et al. 2023).
"""

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from probes.context_order import attention_buckets, attention_sorting, context_mass, joined, ranked_order
from probes.progress import Progress, Report
from workbench.lab.runs import Run, RunStore

KIND = "document-order"
SHOWN = 40  # characters of a document in its label


@dataclass(frozen=True)
class DocumentOrder:
    """Result of `plan_order`.

    Args:
        documents: as given. mass: weight of the last token on a document at a place, mean over layers and heads, [document, place].
        orders: which document stands at each place, by name of the planner. answers: log-probability in nats of the answer's first token
            after the prompt in that order, by name; `… + buckets` with several bases together. answer: that token's id, None without.
        next_tokens: (id, probability) of the likeliest next tokens, by name of the order.
    """

    documents: tuple[str, ...]
    question: str
    mass: NDArray[np.float64]
    orders: dict[str, tuple[int, ...]]
    answer: int | None
    answers: dict[str, float]
    next_tokens: dict[str, tuple[tuple[int, float], ...]]

    @property
    def profile(self) -> NDArray[np.float64]:
        """What each place gets, mean over documents, [place]."""
        return np.asarray(self.mass.mean(0))

    @property
    def relevance(self) -> NDArray[np.float64]:
        """What each document gets, mean over places, [document]."""
        return np.asarray(self.mass.mean(1))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        record = asdict(self)
        return {
            **record,
            "mass": self.mass.tolist(),
            "profile": self.profile.tolist(),
            "relevance": self.relevance.tolist(),
        }


@torch.no_grad()
def plan_order(
    model: Any,
    documents: Sequence[str],
    question: str,
    *,
    before: str = "",
    answer: str = "",
    rounds: int = 3,
    bases: Sequence[float] = (),
    layers: Any = None,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> DocumentOrder:
    """Measure places and documents, and plan.

    Args:
        documents, question, before: texts, joined as they are: `before`, the documents, the question. answer: whose first token is watched.
        rounds: of Attention Sorting. bases: of Attention Buckets, none for no such passes. layers: whose patterns count, None for all.

    Raises:
        ValueError: fewer than two documents, an empty one, no question. RefusedByPattern: patterns that are no distributions.
        MeasurementCancelled: `cancel` was set.
    """
    if len(documents) < 2 or not all(documents) or not question:
        raise ValueError(
            f"{len(documents)} documents, question {question!r}; expected at least two documents that are not empty, and a question."
        )
    tell, count = Progress(progress, cancel), len(documents)
    ids = [model.to_tokens(document)[0].tolist() for document in documents]
    asked, first = model.to_tokens(question)[0].tolist(), model.to_tokens(before)[0].tolist() if before else []
    mass = np.zeros((count, count))
    for shift in range(count):
        tell(0.6 * shift / count, f"order {shift + 1} of {count}")
        shifted = [(place + shift) % count for place in range(count)]
        tokens, spans = joined([ids[document] for document in shifted], asked, first)
        mass[shifted, range(count)] = (
            context_mass(model, tokens.to(model.device), spans, layers)[0].double().cpu().numpy()
        )
    tell(0.6, "sorting")
    orders = {
        "as given": tuple(range(count)),
        "attention sorting": tuple(attention_sorting(model, ids, asked, rounds, first, layers)),
        "attnrank": tuple(ranked_order(mass.mean(1).tolist(), torch.from_numpy(mass.mean(0)))),
    }
    watched = model.to_tokens(answer)[0, 0].item() if answer else None
    answers: dict[str, float] = {}
    likeliest: dict[str, tuple[tuple[int, float], ...]] = {}
    for number, (name, order) in enumerate(orders.items()):
        tell(0.7 + 0.1 * number, f"reading {name}")
        tokens, _ = joined([ids[document] for document in order], asked, first)
        readings = {name: model(tokens.to(model.device))[0, -1].double().log_softmax(-1)}
        if bases:
            readings[f"{name} + buckets"] = attention_buckets(model, tokens.to(model.device), bases)[0, -1].double()
        for called, log_chances in readings.items():
            best = log_chances.topk(5)
            likeliest[called] = tuple(zip(best.indices.tolist(), best.values.exp().tolist(), strict=True))
            if watched is not None:
                answers[called] = float(log_chances[watched])
    tell(1.0, "done")
    return DocumentOrder(tuple(documents), question, mass, orders, watched, answers, likeliest)


def store_order(
    store: RunStore,
    model: Any,
    found: DocumentOrder,
    title: str | None = None,
    settings: dict[str, Any] | None = None,
) -> Run:
    """Write a run of kind `document-order`: `mass` [document, place], and everything else in its results."""
    record = {"name": model.name, "architecture": model.architecture, **model.about()}
    with store.create(
        KIND, title or f"Order of {len(found.documents)} documents", model=record, text=found.question
    ) as run:
        run.add_array("mass", found.mass, axes=("document", "place"))
        run.set(
            results={name: value for name, value in found.to_json().items() if name != "mass"}, settings=settings or {}
        )
    return store.open(run.id)
