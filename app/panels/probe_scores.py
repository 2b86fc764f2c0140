"""What the panels of the Probes page share: which scores a run of probes holds, and which score and head the view names."""

from __future__ import annotations

import numpy as np

from app.figures.common import number
from app.measure.probes import KIND
from app.panels.base import NothingToShow
from app.panels.results import ResultPanel, measured
from app.services import Scene
from workbench.lab.runs import Run

SCORE_WORDS = {
    "previous_token": "previous token", "duplicate_token": "equal token", "induction": "after an equal token",
    "first_token": "first token", "current_token": "own token", "broad": "reads evenly", "offset": "one fixed distance",
    "first_mass": "first token", "sink_rate": "texts with this sink", "sink_mass": "all sinks", "retrieval.score": "copy–paste score",
    "local.score": "share of local queries", "basin.score": "depth of the basin",
}  # fmt: skip
FIRST_SHOWN = ("induction.induction", "census.induction", "retrieval.score", "sinks.first_mass")


def in_the_form(reason: str) -> str:
    """A probe's words for a refusal, with the form's tick in place of the argument that they name."""
    return reason.replace(
        "whole_patterns=True, which forms it", "“form patterns that no factors determine” in the form, which makes it"
    )


def score_words(name: str) -> str:
    """`census: previous token` for "census.previous_token"."""
    return f"{name.partition('.')[0]}: {score_title(name)}"


def score_title(name: str) -> str:
    """`previous token` for "census.previous_token"."""
    score = name.partition(".")[2]
    return SCORE_WORDS.get(name) or SCORE_WORDS.get(score) or score.replace("_", " ")


def scores_of(found: Run) -> list[str]:
    """Names of the stored scores, in the order of the probes."""
    return [name for name in found.arrays() if f"{name}.stands_out" in found.arrays() and name.count(".") == 1]


def chosen_score(scene: Scene) -> str:
    """The score that the view shows: the asked one if it was measured, else one by which a head stands out. "" without any."""
    found = measured(scene, KIND)
    known = [] if found is None else scores_of(found)
    if found is None or scene.view.score in known:
        return scene.view.score if known else ""
    order = [name for name in FIRST_SHOWN if name in known] + known
    return next((name for name in order if found.array(f"{name}.stands_out").any()), order[0] if order else "")


def other_score(scene: Scene) -> str:
    """The score that the chosen one is drawn against."""
    found, first = measured(scene, KIND), chosen_score(scene)
    known = [] if found is None else [name for name in scores_of(found) if name != first]
    return next((name for name in (scene.view.against, *FIRST_SHOWN, *known) if name in known), first)


def row_names(found: Run, score: str) -> list[str]:
    """What the rows of a score's tables are called: layers."""
    record = (found.manifest.get("results") or {}).get(score.partition(".")[0]) or {}
    names = record.get("layer_labels") or [str(layer) for layer in record.get("layers") or []]
    return [str(name) for name in names]


def chosen_head(scene: Scene) -> tuple[int, int] | None:
    """Row and head that the view names, if the chosen score has it; else the head of the highest score. None without any score."""
    found, score = measured(scene, KIND), chosen_score(scene)
    if found is None or not score:
        return None
    values = found.array(score)
    if scene.view.measured_head:
        row, head = (int(part) for part in scene.view.measured_head.split("."))
        if row < values.shape[0] and head < values.shape[1]:
            return row, head
    if np.isnan(values).all():
        return None
    best = int(np.nanargmax(values))
    return best // values.shape[1], best % values.shape[1]


class ProbePanel(ResultPanel):
    """A panel over a run of probes."""

    kind = KIND
    depends: tuple[str, ...] = ("run", "result", "score", "measured_head")

    def score(self, scene: Scene) -> str:
        """The chosen score. NothingToShow when no probe gave one."""
        self.check(scene)
        name = chosen_score(scene)
        if not name and any("." in array for array in self.result(scene).arrays()):
            raise NothingToShow(
                "An earlier form of this result", "It was stored without intervals and a null: measure once more."
            )
        if not name:
            raise NothingToShow("No scores", "None of these probes has an answer for this model; their panels say why.")
        return name

    def head(self, scene: Scene) -> tuple[int, int]:
        """Row and number of the chosen head."""
        self.score(scene)
        found = chosen_head(scene)
        if found is None:
            raise NothingToShow("No head", "This score has no value for any head of this model.")
        return found

    def part(self, scene: Scene, name: str) -> np.ndarray | None:
        """An array of the run, None if it was not stored."""
        run = self.result(scene)
        return run.array(name) if name in run.arrays() else None

    def floor(self, scene: Scene, score: str) -> float:
        """The best score among the random twin's heads; nan without a twin."""
        twin = self.part(scene, f"{score}.twin")
        return float("nan") if twin is None or np.isnan(twin).all() else float(np.nanmax(twin))

    def reference(self, scene: Scene, score: str) -> str:
        """Chance and the twin's best head, in words."""
        chance, floor = self.part(scene, f"{score}.chance"), self.floor(scene, score)
        words = []
        if chance is not None and np.isfinite(chance).any():
            words.append(f"chance {number(round(float(np.nanmean(chance)), 2))}")
        words.append(f"random ≤ {number(round(floor, 2))}" if np.isfinite(floor) else "no random twin")
        return " · ".join(words)

    def names(self, scene: Scene, score: str) -> list[tuple[str, str, int, int]]:
        """(`layer.head`, "row.head", row, head) of every head with a score."""
        rows, values = row_names(self.result(scene), score), self.array(scene, score)
        return [(f"{rows[r]}.{h}", f"{r}.{h}", int(r), int(h)) for r, h in np.argwhere(np.isfinite(values)).tolist()]

    def again(self, scene: Scene, probe: str) -> str:
        """Python that measures the probe again; its result is `found`."""
        model = self.result(scene).model.get("name")
        return f"""
from probes.battery import run_probes
from probes.score_tables import score_tables

model, asked = models.load("{model}"), run.manifest["settings"]
kept = ("text", "corpus", "length", "sequences", "vocab", "seed", "whole_patterns")
found = run_probes(model, ["{probe}"], compare=asked["twin"], **{{key: asked[key] for key in kept}})["{probe}"]
""".strip()
