"""The authors' released scores, analysed again: one JSON file per model, every head's score in every run of the needle test.

The files are not part of this project and carry no licence: put `head_score/*.json` of github.com/nightdessert/Retrieval_Head into a folder
`retrieval_head` of a data folder.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from case_studies.harness.evidence import NotRun, Sample
from probes.retrieval import THRESHOLD
from workbench.lab.checkpoints import read_json
from workbench.lab.corpora import MissingData, find_data

FOLDER = "retrieval_head"
FAMILIES = {  # two models of a family differ by training on, or by experts made of the same layers
    "mistral": ("Mistral-7B-v0.2-hf", "Mixtral-8x7B-v0.1"),
    "qwen": ("Qwen1.5-14B", "Qwen1.5-14B-Chat"),
}
LLAMA, YI = "llama-2-7b-80k", "Yi-6B-200K"
README_BEST = ((16, 19), (11, 15), (8, 26), (6, 9), (7, 12), (17, 22), (11, 2), (6, 16), (19, 15), (21, 30))
NAMES = (
    "released_share", "released_strong_share", "released_zero_share", "released_largest_run", "always_llama", "always_yi",
    "readme_heads", "family_correlation", "other_correlation",
)  # fmt: skip


def released(folder: Path | None = None) -> dict[str, NDArray[np.float64]]:
    """Scores of every model, [layer, head, run]. Raises MissingData where the files are not there, ValueError for one of another form."""
    found = {}
    for path in sorted((folder or find_data(FOLDER)).glob("*.json")):
        record = read_json(path)
        places = {tuple(int(part) for part in name.split("-")): values for name, values in record.items()}
        runs = {len(values) for values in places.values()}
        shape = tuple(max(place[axis] for place in places) + 1 for axis in (0, 1))
        if len(runs) != 1 or len(places) != shape[0] * shape[1]:
            raise ValueError(f"{path.name}: expected every head of every layer, with equally many runs")
        scores = np.empty((*shape, runs.pop()))
        for (layer, head), values in places.items():
            scores[layer, head] = values
        found[path.stem] = scores
    if not found:
        raise MissingData(f"there is no *.json in the folder {FOLDER!r}")
    return found


def published() -> dict[str, Any]:
    """Statistics of the released scores that the paper states."""
    try:
        scores = released()
    except MissingData as missing:
        return dict.fromkeys(NAMES, NotRun(str(missing))) | {"released_models": {}}
    return statistics(scores)


def statistics(scores: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Shares of heads, heads that score in every run, and correlations between models. scores: [layer, head, run] by model."""
    mean = {name: values.mean(-1) for name, values in scores.items()}
    always = {name: int((values > 0).all(-1).sum()) for name, values in scores.items()}

    def over_models(values: list[float]) -> Sample:
        return Sample(values, over="models")

    families = [pair for pair in FAMILIES.values() if set(pair) <= set(scores)]
    others = [
        (a, b)
        for a, b in combinations(scores, 2)
        if mean[a].shape == mean[b].shape and not any({a, b} == set(pair) for pair in FAMILIES.values())
    ]
    related, unrelated = (
        [float(np.corrcoef(mean[a].ravel(), mean[b].ravel())[0, 1]) for a, b in pairs] for pairs in (families, others)
    )
    return {
        "released_share": over_models([float((m > THRESHOLD).mean()) for m in mean.values()]),
        "released_strong_share": over_models([float((m > 0.5).mean()) for m in mean.values()]),
        "released_zero_share": over_models([float((m == 0).mean()) for m in mean.values()]),
        "released_largest_run": over_models([float(values.max()) for values in scores.values()]),
        "always_llama": float(always[LLAMA]) if LLAMA in always else NotRun(f"{LLAMA}.json is not there"),
        "always_yi": float(always[YI]) if YI in always else NotRun(f"{YI}.json is not there"),
        "readme_heads": same_order(mean[LLAMA]) if LLAMA in mean else NotRun(f"{LLAMA}.json is not there"),
        "family_correlation": Sample(related, over="families") if related else NotRun("no two models of a family"),
        "other_correlation": Sample(unrelated, over="pairs") if unrelated else NotRun("no two models of one shape"),
        "released_models": {
            name: {
                "runs": values.shape[-1],
                "share": float((mean[name] > THRESHOLD).mean()),
                "always": always[name],
                "silent_runs": int((values == 0).all((0, 1)).sum()),
                "largest": float(values.max()),
                "sorted": np.sort(mean[name].ravel())[::-1][:200].round(4).tolist(),
            }
            for name, values in scores.items()
        },
    }


def same_order(mean: NDArray[np.float64]) -> float:
    """How many of the README's ten best heads come out at the same rank. mean [layer, head]."""
    order = np.argsort(-mean, axis=None, kind="stable")[: len(README_BEST)]
    ranked = [(int(i) // mean.shape[1], int(i) % mean.shape[1]) for i in order]
    return float(sum(a == b for a, b in zip(ranked, README_BEST, strict=True)))
