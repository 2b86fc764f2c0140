"""Panels of the Concepts page: candidates, rivals, shuffles, transfer, causal check, traces."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number
from app.figures.concepts import intervals, null_points, sentence_traces, transfer_maps
from app.figures.synapses import ranked_bars
from app.measure.concepts import KIND, NO_DICTIONARY
from app.panels.base import NothingToShow, Table
from app.panels.results import ResultPanel
from app.panels.synapses import SHOWN_BARS, synapse_name
from app.services import Scene
from app.theme import Theme
from app.view_state import SynapseAddress


class ConceptPanel(ResultPanel):
    """A panel over a concept search."""

    kind = KIND

    def search(self, scene: Scene) -> str:
        """Python that searches again."""
        asked = self.settings(scene)
        dictionary = asked.get("dictionary", NO_DICTIONARY)
        rival = ""
        if dictionary != NO_DICTIONARY:
            rival = f', features=bdh.stored_features(model, RunStore().root / "{dictionary}")'
        return f"""
from probes import bdh

model, asked = models.load("{asked["model"]}"), run.manifest["settings"]
found = bdh.find_concept_synapses(model, asked["positive"], asked["negative"], **asked["search"]{rival})
""".strip()


class ConceptCandidates(ConceptPanel):
    """The candidates on the held-out half."""

    id = "concept-candidates"
    title = "Candidates on the held-out sentences"
    words = "Chosen on one half of the sentences, scored on the other: rank-biserial correlation. Click a line to see it over the open run."
    height = 330

    def addresses(self, scene: Scene) -> list[SynapseAddress]:
        """Their addresses, best on the discovery half first."""
        return [tuple(map(int, row)) for row in self.array(scene, "addresses")]  # type: ignore[misc]

    def values(self, scene: Scene) -> np.ndarray:
        values = self.array(scene, "rank_biserial")
        if not len(values):
            raise NothingToShow("No candidate", "No synapse differs between the two sets of sentences.")
        return values

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        names = [synapse_name(address) for address in self.addresses(scene)[:SHOWN_BARS]]
        return ranked_bars(
            names, self.values(scene)[:SHOWN_BARS], theme, panel=self.id, title="held-out rank-biserial r"
        )

    def table(self, scene: Scene) -> Table:
        rows = self.results(scene)["rows"]
        headers = list(rows[0]) if rows else ["synapse"]
        return headers, ([each if isinstance(each, str) else float(each) for each in row.values()] for row in rows)

    def facts(self, scene: Scene) -> list[str]:
        results, asked = self.results(scene), self.settings(scene)
        good = sum(row["q"] <= 0.05 for row in results["rows"])
        return [f"{results['searched']:,} synapses searched", f"{len(asked['positive'])} + {len(asked['negative'])} sentences",
                f"{good} of {len(results['rows'])} candidates with q ≤ 0.05", *[note.rstrip(".") for note in results["notes"]]]  # fmt: skip

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.search(scene)}\nvalues = np.array([each.rank_biserial for each in found.candidates])"


class ConceptRivals(ConceptPanel):
    """The best synapse beside the best neurons and linear probes."""

    id = "concept-rivals"
    title = "Does the synapse beat a neuron or a probe?"
    words = "AUC on the held-out sentences with 95 % bootstrap intervals; 0.5 is chance. Each was chosen on the discovery half."
    height = 250

    def scores(self, scene: Scene) -> list[dict[str, Any]]:
        """Their records, the synapse first."""
        return self.results(scene)["scores"]

    def values(self, scene: Scene) -> np.ndarray:
        return np.array([score["auc"] for score in self.scores(scene)])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        scores = self.scores(scene)
        low, high = (np.array([_end(score["interval"], side) for score in scores]) for side in (0, 1))
        return intervals(
            [score["name"] for score in scores],
            self.values(scene),
            low,
            high,
            theme,
            panel=self.id,
            title="AUC",
            null=0.5,
        )

    def table(self, scene: Scene) -> Table:
        headers = ["what", "chosen", "searched", "AUC", "low", "high", "p"]
        return headers, (
            [
                s["name"],
                s["chosen"],
                str(s["searched"]),
                s["auc"],
                _end(s["interval"], 0),
                _end(s["interval"], 1),
                _number(s["p"]),
            ]
            for s in self.scores(scene)
        )

    def facts(self, scene: Scene) -> list[str]:
        return [f"{score['name']}: {score['chosen']} of {score['searched']:,}" for score in self.scores(scene)]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.search(scene)}\nvalues = np.array([each.auc for each in found.scores])"


def _end(interval: Any, side: int) -> float:
    ends = list(interval.values()) if isinstance(interval, dict) else interval
    return _number(ends[side])


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


class ConceptShuffles(ConceptPanel):
    """What the whole search finds when labels mean nothing."""

    id = "concept-shuffles"
    title = "The same search with shuffled labels"
    words = "Held-out r of the first choice of each shuffled search: the best of so many synapses always looks good on its own half."
    height = 230

    def values(self, scene: Scene) -> np.ndarray:
        null = np.array(self.results(scene)["shuffles"]["first"], float)
        if not len(null):
            raise NothingToShow("No shuffles", "This search was made without its control: ask for at least 5 shuffles.")
        return null

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        observed = float(self.results(scene)["shuffles"]["observed"][0])
        return null_points(
            self.values(scene), observed, theme, panel=self.id, title="held-out r", name="shuffle", x_title="shuffle"
        )

    def facts(self, scene: Scene) -> list[str]:
        first, best, _ = (number(_number(p)) for p in self.results(scene)["shuffles"]["p"])
        return [f"p {first} for the first choice, {best} for the best candidate"]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.search(scene)}\nvalues = np.asarray(found.shuffles.first)"


class ConceptTransferMap(ConceptPanel):
    """Found in one group, scored in another."""

    id = "concept-transfer"
    title = "Found in one group, scored in another"
    words = "AUC within a group (scored on its other half) and across groups, such as languages; 0.5 is chance."
    height = 270

    def transfer(self, scene: Scene) -> dict[str, Any]:
        """The stored record."""
        why = f"{self.results(scene)['no_transfer']} Groups are written “group | sentence”, four of each set in each."
        return self.recorded(scene, "transfer", "No transfer", why)

    def values(self, scene: Scene) -> np.ndarray:
        return np.array(list(self.transfer(scene)["aucs"].values()), float)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        found = self.transfer(scene)
        return transfer_maps(list(found["aucs"]), found["groups"], self.values(scene), theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        found, values = self.transfer(scene), self.values(scene)
        headers = ["method", *(f"{a} → {b}" for a in found["groups"] for b in found["groups"])]
        return headers, ([name, *map(float, row.ravel())] for name, row in zip(found["aucs"], values, strict=True))

    def snippet_body(self, scene: Scene) -> str:
        return f"""
from probes import bdh

model, asked = models.load("{self.settings(scene)["model"]}"), run.manifest["settings"]
groups = {{"positive_groups": asked["groups"][0], "negative_groups": asked["groups"][1]}}
kept = {{key: asked["search"][key] for key in ("statistic", "layers", "target_heads", "k")}}
found = bdh.concept_transfer(model, asked["positive"], asked["negative"], **groups, **kept)
values = np.array(list(found.aucs.values()))
"""


class ConceptCausal(ConceptPanel):
    """What taking the first candidate out does, against matched random synapses."""

    id = "concept-causal"
    title = "Is it causal?"
    words = "Change of log p in the second halves of held-out positive sentences without it; points: matched random synapses."
    height = 230

    def causal(self, scene: Scene) -> dict[str, Any]:
        """The stored record."""
        return self.recorded(scene, "causal", "No causal check", self.results(scene)["no_causal"])

    def values(self, scene: Scene) -> np.ndarray:
        found = self.causal(scene)
        return np.array([found["mean"], *np.mean(found["matched_effects"], axis=1)])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values = self.values(scene)
        return null_points(values[1:], float(values[0]), theme, panel=self.id, title="nats per token", name="matched synapse",
                           x_title="draw of a matched synapse")  # fmt: skip

    def table(self, scene: Scene) -> Table:
        values = self.values(scene)
        return ["synapse", "nats per token"], (
            ["first candidate" if i == 0 else f"matched {i}", float(v)] for i, v in enumerate(values)
        )

    def facts(self, scene: Scene) -> list[str]:
        found = self.causal(scene)
        low, high = (number(_number(end)) for end in found["interval"])
        draws = len(found["matched_effects"])
        strength, reading = (number(_number(ratio)) for ratio in found["match_ratio"])
        return [f"mean {number(found['mean'])} nats [{low}, {high}]", f"p {number(found['p'])} against {draws} draws",
                f"controls match to {strength} in strength, {reading} in reading"]  # fmt: skip

    def snippet_body(self, scene: Scene) -> str:
        return f"""
{self.search(scene)}
texts = zip(asked["positive"], found.discovery)
held_out = [text for text, seen in texts if not seen]
check = bdh.causal_check(model, found.synapses[:1], held_out, n_matched=asked["draws"], n_bootstrap=500)
values = np.array([check.mean, *check.matched_effects.mean(1)])
"""


class ConceptTraces(ConceptPanel):
    """The first candidate over held-out sentences."""

    id = "concept-traces"
    title = "The first candidate over held-out sentences"
    words = "Strength after every token of sentences that did not choose it; solid: positive, dotted: negative."
    height = 270

    def values(self, scene: Scene) -> np.ndarray:
        traces = self.array(scene, "traces")
        if not len(traces):
            raise NothingToShow("Nothing to trace", "There is no candidate, or no held-out sentence.")
        return traces

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        return sentence_traces(self.results(scene)["traced"], self.values(scene), theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        values = self.values(scene)
        headers = ["class", "sentence", *map(str, range(values.shape[1]))]
        return headers, (
            [*shown, *map(float, row)] for shown, row in zip(self.results(scene)["traced"], values, strict=True)
        )

    def snippet_body(self, scene: Scene) -> str:
        k, a, i, layer, b, j = map(int, self.array(scene, "addresses")[0])
        return f"""
from probes.bdh import Synapse, trace_synapses

model, shown = models.load("{self.settings(scene)["model"]}"), run.manifest["results"]["traced"]
synapse = Synapse(source=({a}, {i}), target=({b}, {j}), target_layer={layer}, source_layer={k})
lines = [trace_synapses(model, text, synapse).strength[0, :, 0].numpy() for _, text in shown]
longest = max(map(len, lines))
values = np.stack([np.pad(line, (0, longest - len(line)), constant_values=np.nan) for line in lines])
"""


PANELS = (
    ConceptCandidates(),
    ConceptRivals(),
    ConceptShuffles(),
    ConceptTransferMap(),
    ConceptCausal(),
    ConceptTraces(),
)
