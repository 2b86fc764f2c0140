"""Panels of the Probes page: maps of scores, the random twin beside them, two scores, a list, dose curves, profiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number
from app.figures.concepts import intervals
from app.figures.probes import HeadCurve, HeadMap, distance_profile, dose_curves, head_maps, two_scores
from app.panels.base import NothingToShow, Table
from app.panels.probe_scores import (
    ProbePanel,
    chosen_head,
    in_the_form,
    other_score,
    row_names,
    score_title,
    score_words,
    scores_of,
)
from app.services import Scene
from app.theme import Theme

SHOWN_HEADS, SHOWN_CURVES = 16, 6


class ProbeMap(ProbePanel):
    """The maps of one probe."""

    depends = ("run", "result", "measured_head")

    def __init__(self, probe: str, title: str, words: str, height: int, columns: int) -> None:
        self.probe, self.columns = probe, columns
        self.id, self.title, self.words, self.height = f"probe-{probe}", title, words, height

    def scores(self, scene: Scene) -> list[str]:
        """The probe's stored scores. NothingToShow in the probe's words where it has none."""
        record = self.results(scene).get(self.probe)
        if record is None:
            raise NothingToShow(
                "Not asked for", "This probe was not among those that were measured; choose it in the form."
            )
        if record.get("reason"):
            raise NothingToShow("No answer", in_the_form(str(record["reason"])))
        return [name for name in scores_of(self.result(scene)) if name.startswith(f"{self.probe}.")]

    def values(self, scene: Scene) -> np.ndarray:
        return np.stack([self.array(scene, name) for name in self.scores(scene)])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        scores = self.scores(scene)
        maps = [
            HeadMap(
                score_title(name), self.array(scene, name), self.array(scene, f"{name}.stands_out"), self.reference(scene, name),
            )
            for name in scores
        ]  # fmt: skip
        rows = row_names(self.result(scene), scores[0])
        columns = min(self.columns if scene.pixels >= 512 else 2, len(maps))
        largest = max(0.1, float(np.nanmax(self.values(scene), initial=0.0)))
        return head_maps(maps, rows, theme, panel=self.id, columns=columns, chosen=chosen_head(scene), largest=largest,
                         numbered=scene.pixels >= 512)  # fmt: skip

    def table(self, scene: Scene) -> Table:
        scores = self.scores(scene)
        headers = ["head", *(name.partition(".")[2].replace("_", " ") for name in scores)]
        return headers, (
            [name, *(float(self.array(scene, score)[row, head]) for score in scores)]
            for name, _, row, head in self.names(scene, scores[0])
        )

    def summary(self, scene: Scene) -> str:
        parts = []
        for name in self.scores(scene):
            values = self.array(scene, name)
            if np.isfinite(values).any():
                row, head = np.unravel_index(int(np.nanargmax(values)), values.shape)
                best = f"{row_names(self.result(scene), name)[row]}.{head}"
                parts.append(f"{score_words(name)}: highest at head {best}, {number(float(np.nanmax(values)))}")
        return "; ".join(parts)

    def facts(self, scene: Scene) -> list[str]:
        record, scores = self.results(scene)[self.probe], self.scores(scene)
        facts = []
        for name in scores:
            count = int(self.array(scene, f"{name}.stands_out").sum())
            if count:
                facts.append(f"{score_title(name)}: {count} {'head stands' if count == 1 else 'heads stand'} out")
        facts = facts or ["no head stands out"]
        if scores and np.isnan(self.part(scene, f"{scores[0]}.low")).all():  # type: ignore[arg-type]
            facts = ["one text has no interval, so no head is marked: give several sequences"]
        facts += sorted({words for words in record.get("measured_on") or [] if words})
        facts += [
            f"{name.replace('_', ' ')} left out: {why}".rstrip(".")
            for name, why in (record.get("left_out") or {}).items()
        ]
        return [*facts, f"random twin: {record['twin']}".rstrip(".")] if record.get("twin") else facts

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.again(scene, self.probe)}\nvalues = np.stack([table.values for table in score_tables(found).values()])"


class ProbeTwin(ProbePanel):
    """The chosen score beside the same architecture at random weights."""

    id = "probe-twin"
    title = "Beside random weights"
    words = "The chosen score in the model and in the same architecture at random weights, on one colour scale."
    height = 260

    def values(self, scene: Scene) -> np.ndarray:
        score = self.score(scene)
        twin = self.part(scene, f"{score}.twin")
        if twin is None:
            said = (self.results(scene).get(score.partition(".")[0]) or {}).get("twin")
            reason = str(said) if said else "This result was made without one: tick the random twin in the form."
            raise NothingToShow("No random twin", reason)
        return np.stack([self.array(scene, score), twin])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        score, both = self.score(scene), self.values(scene)
        nothing = np.zeros_like(both[0])
        largest = max(0.1, float(np.nanmax(both)))
        maps = [
            HeadMap("this model", both[0], self.array(scene, f"{score}.stands_out")),
            HeadMap("at random weights", both[1], nothing),
        ]
        rows = row_names(self.result(scene), score)
        return head_maps(maps, rows, theme, panel=self.id, columns=2, chosen=self.head(scene), largest=largest,
                         numbered=scene.pixels >= 512)  # fmt: skip

    def table(self, scene: Scene) -> Table:
        both, score = self.values(scene), self.score(scene)
        return ["head", "this model", "at random weights"], (
            [name, float(both[0, row, head]), float(both[1, row, head])]
            for name, _, row, head in self.names(scene, score)
        )

    def facts(self, scene: Scene) -> list[str]:
        return [score_words(self.score(scene)), self.reference(scene, self.score(scene))]

    def snippet_body(self, scene: Scene) -> str:
        probe, score = self.score(scene).split(".")
        return f"""
{self.again(scene, probe)}
from probes.battery import survey
from probes.score_tables import twin_tables

both = survey(model, ["{probe}"], **{{key: asked[key] for key in kept}})
other = twin_tables(both.results["{probe}"]) or score_tables(both.twin["{probe}"])
values = np.stack([score_tables(found)["{score}"].values, other["{score}"].values])
"""


class ProbeList(ProbePanel):
    """Heads by the chosen score."""

    id = "probe-list"
    title = "Heads by score"
    words = "95 % bootstrap intervals over sequences; the dotted line is the random twin's best head. Click a line to choose the head."
    height = 330

    def order(self, scene: Scene) -> list[tuple[str, str, int, int]]:
        """Heads, highest score first."""
        values = self.array(scene, self.score(scene))
        return sorted(self.names(scene, self.score(scene)), key=lambda each: -float(values[each[2], each[3]]))

    def values(self, scene: Scene) -> np.ndarray:
        values = self.array(scene, self.score(scene))
        return np.array([values[row, head] for _, _, row, head in self.order(scene)])

    def rows(self, scene: Scene) -> list[dict[str, Any]]:
        """For the grid: name, place, score, low, high, whether it stands out."""
        score = self.score(scene)
        parts = {key: self.array(scene, f"{score}.{key}") for key in ("low", "high")}
        values, marked = self.array(scene, score), self.array(scene, f"{score}.stands_out")
        return [
            {"id": place, "head": name, "score": float(values[row, head]),
             **{key: float(part[row, head]) if np.isfinite(part[row, head]) else None for key, part in parts.items()},
             "marked": "✓" if marked[row, head] else ""}
            for name, place, row, head in self.order(scene)
        ]  # fmt: skip

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        rows, score = self.rows(scene)[:SHOWN_HEADS], self.score(scene)
        ends = {
            key: np.array([row[key] if row[key] is not None else np.nan for row in rows]) for key in ("low", "high")
        }
        floor = self.floor(scene, score)
        figure = intervals(
            [row["head"] for row in rows], np.array([row["score"] for row in rows]), ends["low"], ends["high"], theme,
            panel=self.id, title=score_words(score), null=floor if np.isfinite(floor) else 0.0,
        )  # fmt: skip
        figure.data[0].customdata = [row["id"] for row in rows]
        place = "{}.{}".format(*self.head(scene))
        figure.data[0].marker.color = [theme.bad if row["id"] == place else theme.accent for row in rows]
        figure.data[0].marker.symbol = "circle"
        figure.layout.meta = {"panel": self.id, "pick": "mh"}
        figure.update_yaxes(title={"text": "head"})
        return figure

    def table(self, scene: Scene) -> Table:
        rows = self.rows(scene)
        headers = ["head", "score", "low", "high", "stands out"]
        return headers, (
            [row["head"], row["score"], *(float("nan") if row[key] is None else row[key] for key in ("low", "high")), row["marked"]]
            for row in rows
        )  # fmt: skip

    def facts(self, scene: Scene) -> list[str]:
        score = self.score(scene)
        shown = len(self.order(scene))
        first = [f"the first {SHOWN_HEADS} of {shown} heads are drawn"] if shown > SHOWN_HEADS else [f"{shown} heads"]
        return [score_words(score), self.reference(scene, score), *first]

    def snippet_body(self, scene: Scene) -> str:
        probe, score = self.score(scene).split(".")
        return f"""
{self.again(scene, probe)}
table = score_tables(found)["{score}"].values
values = np.sort(table[np.isfinite(table)])[::-1]
"""


class ProbeScatter(ProbePanel):
    """Two scores of every head."""

    id = "probe-scatter"
    title = "Score against score"
    words = "One point per head; dotted lines: the random twin's best head. Click chooses a head, dragging brushes heads for the list."
    height = 330
    depends = ("run", "result", "score", "against", "measured_head")

    def pair(self, scene: Scene) -> tuple[str, str]:
        """The two scores. NothingToShow where there is only one, or their tables have other shapes."""
        first, second = self.score(scene), other_score(scene)
        if first == second:
            raise NothingToShow("One score only", "Measure a second probe to draw two scores against each other.")
        if row_names(self.result(scene), first) != row_names(self.result(scene), second):
            raise NothingToShow(
                "Not the same layers", f"{score_words(first)} and {score_words(second)} are measured on other layers."
            )
        return first, second

    def values(self, scene: Scene) -> np.ndarray:
        first, second = (self.array(scene, name) for name in self.pair(scene))
        places = self.names(scene, self.pair(scene)[0])
        return np.array([[first[r, h], second[r, h]] for _, _, r, h in places])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        first, second = self.pair(scene)
        names, values = self.names(scene, first), self.values(scene)
        return two_scores(
            [each[0] for each in names], [each[1] for each in names], values[:, 0], values[:, 1], theme, panel=self.id,
            x_title=score_words(first), y_title=score_words(second), chosen="{}.{}".format(*self.head(scene)),
            nulls=(self.floor(scene, first), self.floor(scene, second)),
        )  # fmt: skip

    def table(self, scene: Scene) -> Table:
        first, second = self.pair(scene)
        lines = zip(self.names(scene, first), self.values(scene), strict=True)
        return ["head", score_words(first), score_words(second)], (
            [name[0], float(x), float(y)] for name, (x, y) in lines
        )

    def facts(self, scene: Scene) -> list[str]:
        from scipy.stats import spearmanr

        values = self.values(scene)
        kept = values[np.isfinite(values).all(1)]
        if len(kept) < 3 or not np.ptp(kept, axis=0).all():
            return [f"{len(kept)} heads"]
        return [f"{len(kept)} heads", f"Spearman {number(float(spearmanr(kept[:, 0], kept[:, 1]).statistic))}"]

    def snippet_body(self, scene: Scene) -> str:
        pieces = []
        for index, name in enumerate(self.pair(scene)):
            probe, score = name.split(".")
            pieces.append(f'{self.again(scene, probe)}\ntable_{index} = score_tables(found)["{score}"].values')
        return "\n".join(
            [*pieces, "kept = np.isfinite(table_0)", "values = np.stack([table_0[kept], table_1[kept]], axis=1)"]
        )


class ProbeDose(ProbePanel):
    """The chosen score at several lengths."""

    id = "probe-dose"
    title = "The score at other lengths"
    words = "The heads with the highest scores, and the chosen one with its interval. A habit that is there at one length only is fragile."
    height = 270

    def shown(self, scene: Scene) -> list[tuple[str, str, int, int]]:
        """The heads drawn: the chosen one first."""
        score, chosen = self.score(scene), self.head(scene)
        values = self.array(scene, score)
        best = sorted(self.names(scene, score), key=lambda each: -float(values[each[2], each[3]]))
        return sorted(
            [each for each in best if each[2:] == chosen]
            + [each for each in best if each[2:] != chosen][: SHOWN_CURVES - 1],
            key=lambda each: each[2:] != chosen,
        )

    def values(self, scene: Scene) -> np.ndarray:
        found = self.part(scene, f"{self.score(scene)}.by_length")
        if found is None:
            raise NothingToShow(
                "Measured at one length", "Name further lengths in the form to see how the score depends on them."
            )
        return np.stack([found[:, row, head] for _, _, row, head in self.shown(scene)])

    def lengths(self, scene: Scene) -> np.ndarray:
        """Tokens of each measurement."""
        return self.array(scene, "lengths")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        score, values = self.score(scene), self.values(scene)
        ends = [self.array(scene, f"{score}.by_length.{end}") for end in ("low", "high")]
        curves = [
            HeadCurve(name, place, values[index], ends[0][:, row, head], ends[1][:, row, head])
            for index, (name, place, row, head) in enumerate(self.shown(scene))
        ]
        return dose_curves(
            curves,
            self.lengths(scene),
            theme,
            panel=self.id,
            y_title=score_words(score),
            chosen="{}.{}".format(*self.head(scene)),
        )

    def table(self, scene: Scene) -> Table:
        values = self.values(scene)
        headers = ["head", *(f"{length} tokens" for length in self.lengths(scene).tolist())]
        return headers, ([each[0], *map(float, line)] for each, line in zip(self.shown(scene), values, strict=True))

    def facts(self, scene: Scene) -> list[str]:
        probe = self.score(scene).partition(".")[0]
        reasons = (self.results(scene).get(probe) or {}).get("by_length") or {}
        return [f"{length} tokens: {reason}".rstrip(".") for length, reason in reasons.items()]

    def snippet_body(self, scene: Scene) -> str:
        probe, score = self.score(scene).split(".")
        shown = [each[2:] for each in self.shown(scene)]
        return f"""
{self.again(scene, probe)}
from probes.battery import survey

others = [length for length in asked["lengths"] if length != asked["length"]]
swept = survey(model, ["{probe}"], lengths=others, twin=False, **{{key: asked[key] for key in kept}})
each = {{**{{length: results["{probe}"] for length, results in swept.by_length.items()}}, asked["length"]: found}}
tables = [score_tables(each[length])["{score}"].values for length in sorted(each)]
values = np.array([[table[row, head] for table in tables] for row, head in {shown}])
"""


class ProbeProfile(ProbePanel):
    """At which distances the chosen head reads."""

    id = "probe-profile"
    title = "At which distances it reads"
    words = "Mean weight of the chosen head at each distance, over all rows that can see a token there; line: the random twin's same head."
    height = 250
    depends = ("run", "result", "score", "measured_head")

    def place(self, scene: Scene) -> tuple[int, int]:
        """Row and head in the profile's own layers."""
        row, head = self.head(scene)
        label = row_names(self.result(scene), self.score(scene))[row]
        profile = self.settings(scene).get("profile") or {}
        if label not in (profile.get("layer_labels") or []):
            raise NothingToShow(
                "No profile", str(profile.get("no_profile") or "This run was stored without profiles over distances.")
            )
        return profile["layer_labels"].index(label), head

    def values(self, scene: Scene) -> np.ndarray:
        row, head = self.place(scene)
        return self.array(scene, "profile")[row, head]

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        row, head = self.place(scene)
        twin = self.part(scene, "profile.twin")
        line = twin[row, head] if twin is not None and row < twin.shape[0] and head < twin.shape[1] else None
        return distance_profile(self.values(scene), line, theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        return ["distance", "mean weight"], ([str(at), float(value)] for at, value in enumerate(self.values(scene)))

    def facts(self, scene: Scene) -> list[str]:
        values, (row, head) = self.values(scene), self.head(scene)
        name = f"{row_names(self.result(scene), self.score(scene))[row]}.{head}"
        if np.isnan(values).all():
            return [f"head {name}"]
        return [f"head {name}", f"most at {int(np.nanargmax(values))} tokens back, {number(float(np.nanmax(values)))}"]

    def snippet_body(self, scene: Scene) -> str:
        row, head = self.place(scene)
        model = self.result(scene).model.get("name")
        return f"""
from probes.battery import survey

model, asked = models.load("{model}"), run.manifest["settings"]
kept = ("text", "corpus", "length", "sequences", "vocab", "seed", "whole_patterns")
values = survey(model, [], twin=False, **{{key: asked[key] for key in kept}}).profile[{row}, {head}]
"""


DOT = "A dot marks heads whose interval lies above chance and above the random twin's best head."
MAPS = (
    ProbeMap("induction", "Previous token, equal tokens, induction",
             f"Mean weight on the token in question minus chance, on made-up sequences that repeat at varied distances. {DOT}", 250, 3),
    ProbeMap("census", "Census", f"What every head reads on the text, each score minus chance (reads evenly: as it is). {DOT}", 610, 3),
    ProbeMap("sinks", "Attention sinks", f"Tokens that take weight whatever they say: the first one, and anywhere. {DOT}", 250, 3),
    ProbeMap("retrieval", "Retrieval heads",
             f"How often the token that a head reads most is the one that the model copies from the needle. {DOT}", 260, 3),
    ProbeMap("local", "Local queries",
             "Share of queries with 90 % of their weight on the first 4 and the last 16 tokens: a head near 1 hardly needs those between. "
             f"{DOT}", 260, 3),
    ProbeMap("basin", "Attention basin",
             "The last 8 tokens read 8 equal segments: the smaller end less the mean between, over the mean of all. Above 0 both "
             f"ends get more than the middle. {DOT}", 260, 3),
)  # fmt: skip
TWIN, LIST, SCATTER, DOSE, PROFILE = ProbeTwin(), ProbeList(), ProbeScatter(), ProbeDose(), ProbeProfile()
PANELS = (*MAPS, TWIN, LIST, SCATTER, DOSE, PROFILE)
