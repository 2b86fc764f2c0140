"""Panels of the Synapses page: the followed synapses in four views, who wrote them, and the list that a search found."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number, token_label
from app.figures.synapses import ranked_bars, synapse_lines
from app.measure.synapses import KIND, MEASURES
from app.panels.base import FigurePanel, NothingToShow, StripPanel, Table
from app.panels.results import ResultPanel
from app.services import Scene
from app.theme import Theme
from app.view_state import SynapseAddress
from workbench.lab.pattern_factors import FactorError
from workbench.lab.run_synapses import Address, RunSynapses

MARKED_SHARE = 0.1
SHOWN_BARS = 20
AXES = {"strength": "|C|  (y · x)", "fixed": "σ̃  (y · x)", "current": "σ  (y · x)", "count": "Σ y · x"}
VIEW_WORDS = {
    "strength": ("Strength |C|", "How strong each followed synapse is after every token. Markers stand at tokens that wrote."),
    "fixed": ("Fixed frame σ̃", "The entry that the model's own state is made of, seen from position 0. Steps are writes."),
    "current": ("Current frame σ", "Seen from the token being read (the paper's figure 12): it turns although nothing is written."),
    "count": ("Hebbian count", "The sum of y times x without positions: how often they fired together. It never decreases."),
}  # fmt: skip


def ends(address: SynapseAddress) -> Address:
    """Source and target neuron of an address, each (layer, head, neuron)."""
    return (address[0], address[1], address[2]), (address[3], address[4], address[5])


def synapse_name(address: SynapseAddress) -> str:
    """`y 1·0·210 → x 2·2·190`: layer, head, neuron of both ends."""
    return "y {}·{}·{} → x {}·{}·{}".format(*address)


def reader(scene: Scene) -> RunSynapses:
    """The synapses of the open run. NothingToShow when it is no BDH."""
    try:
        return scene.once("run-synapses", make=lambda: RunSynapses(scene.opened()))
    except FactorError as error:
        raise NothingToShow("No synapses in this run", f"{str(error)[:1].upper()}{str(error)[1:]}.") from None


def followed(scene: Scene) -> list[SynapseAddress]:
    """The followed synapses that this run has. NothingToShow when there is none."""
    found = reader(scene)
    kept = []
    for address in scene.view.synapses:
        try:
            found.check(ends(address))
        except FactorError:
            continue
        kept.append(address)
    if not kept:
        raise NothingToShow(
            "No synapse is followed yet",
            "Search for the strongest ones and click one, or type its two neurons. Then its strength over the text, the writes behind it, "
            "its fixed part, what it carries now and how many there are like it stand here.",
        )
    return kept


class SynapseView(FigurePanel):
    """One view of the followed synapses over the text."""

    depends = ("run", "synapses")
    height = 250

    def __init__(self, view: str):
        self.view = view
        self.id = f"synapse-{view}"
        self.title, self.words = VIEW_WORDS[view]

    def values(self, scene: Scene) -> np.ndarray:
        self.check(scene)
        return np.stack([reader(scene).traces(ends(address))[self.view] for address in followed(scene)])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values, addresses = self.values(scene), followed(scene)
        written = np.stack([reader(scene).written(ends(address)) for address in addresses])
        return synapse_lines(
            [synapse_name(address) for address in addresses], values, written, scene.tokens, theme, panel=self.id, title=AXES[self.view],
            share=MARKED_SHARE, last=len(addresses) - 1,
        )  # fmt: skip

    def table(self, scene: Scene) -> Table:
        values = self.values(scene)
        headers = ["token", *(synapse_name(address) for address in followed(scene))]
        return headers, ([token_label(scene.tokens, t), *map(float, values[:, t])] for t in range(values.shape[1]))

    def facts(self, scene: Scene) -> list[str]:
        return [
            f"markers: tokens that wrote at least {MARKED_SHARE:.0%} of the largest write",
            "x and y as stored, in half precision",
        ]

    def snippet_body(self, scene: Scene) -> str:
        pairs = [f"    {ends(address)}," for address in followed(scene)]
        listed = "\n".join(["synapses = [  # (layer, head, neuron) of y, then of x", *pairs, "]"])
        return f'{listed}\nreader = RunSynapses(run)\nvalues = np.stack([reader.traces(each)["{self.view}"] for each in synapses])'


class SynapseWrites(StripPanel):
    """What each token wrote into the synapse that was chosen last."""

    id = "synapse-writes"
    title = "Which tokens wrote it"
    words = "How much every token wrote into the synapse chosen last: y times the size of the rotary pair that holds x."
    depends = ("run", "synapses")
    unit = "y · |z|"

    def values(self, scene: Scene) -> np.ndarray:
        self.check(scene)
        return reader(scene).written(ends(followed(scene)[-1]))

    def facts(self, scene: Scene) -> list[str]:
        values = self.values(scene)
        return [synapse_name(followed(scene)[-1]), f"{int((values > 0).sum())} of {len(values)} tokens write"]

    def snippet_body(self, scene: Scene) -> str:
        return f"synapse = {ends(followed(scene)[-1])}  # (layer, head, neuron) of y, then of x\nvalues = RunSynapses(run).written(synapse)"


class TopSynapses(ResultPanel):
    """What the search found, best first."""

    id = "top-synapses"
    title = "What the search found"
    words = "Click a line to follow that synapse over the text, and again to let it go."
    depends = ("run", "result", "synapses")
    kind = KIND
    height = 380

    def addresses(self, scene: Scene) -> list[SynapseAddress]:
        """Their addresses, best first."""
        return [tuple(map(int, row)) for row in self.array(scene, "addresses")]  # type: ignore[misc]

    def values(self, scene: Scene) -> np.ndarray:
        scores = self.array(scene, "scores")
        if not len(scores):
            raise NothingToShow("Nothing was written", "No synapse into this layer has a score other than 0 here.")
        return scores

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        shown = self.addresses(scene)[:SHOWN_BARS]
        last = scene.view.synapses[-1] if scene.view.synapses else None
        return ranked_bars(
            [synapse_name(address) for address in shown], self.values(scene)[:SHOWN_BARS], theme, panel=self.id,
            title=MEASURES[self.settings(scene)["measure"]], selected=shown.index(last) if last in shown else None,
        )  # fmt: skip

    def table(self, scene: Scene) -> Table:
        values = self.values(scene)
        headers = [
            "source layer",
            "head",
            "neuron",
            "target layer",
            "head",
            "neuron",
            MEASURES[self.settings(scene)["measure"]],
        ]
        return headers, ([*map(str, a), float(v)] for a, v in zip(self.addresses(scene), values, strict=True))

    def facts(self, scene: Scene) -> list[str]:
        asked, total = self.settings(scene), self.results(scene)["total"]
        after = (
            f"after token {asked['at']}" if asked["since"] is None else f"tokens {asked['since'] + 1} to {asked['at']}"
        )
        logit = [f"logit of {chr(asked['logit'])!r}"] if asked["logit"] is not None else []
        return [
            after,
            *logit,
            f"sum over all synapses {number(total)}",
            f"bars: the first {min(SHOWN_BARS, len(self.values(scene)))}",
        ]

    def snippet_body(self, scene: Scene) -> str:
        asked = self.settings(scene)
        calls = {
            "strength": f"strongest_synapses(model, text, {asked['layer']}, at={asked['at']}, k=50)",
            "change": f"most_changed_synapses(model, text, {asked['layer']}, span=({asked['since']}, {asked['at']}), k=50)",
            "read": f"most_read_synapses(model, text, {asked['layer']}, logit={asked['logit']}, at={asked['at']}, k=50)",
        }
        call = calls[asked["measure"]]
        return f"""
from probes.bdh import {call.partition("(")[0]}

model, text = models.load("{self.result(scene).model["name"]}"), run.manifest["text"]
top = {call}
values = top.scores.double().numpy()
"""


def paper_words(results: dict[str, Any]) -> list[str]:
    """How much of the layer's state the paper's account holds: what the layer below wrote. Older results do not say."""
    paper = results.get("paper")
    return (
        []
        if paper is None
        else [
            f"the layer below wrote {paper['share']:.0%} of this state, in its direction to {paper['cosine']:.2f} (cosine)"
        ]
    )


class SynapseAuthors(ResultPanel):
    """Who wrote the synapse chosen last, exactly: with the norms' scales, so that the terms sum to the state's entry."""

    id = "synapse-authors"
    title = "Who wrote it, exactly"
    words = "The tokens whose writes make up the synapse as it stands in the state, with the scales of the layer norms."
    depends = ("run", "result", "synapses")
    kind = KIND
    height = 300

    def explained(self, scene: Scene) -> dict[str, Any]:
        """The record of the synapse chosen last, or of the first of the list."""
        records = self.results(scene)["explained"]
        if not records:
            raise NothingToShow("Nothing was written", "No synapse into this layer holds anything here.")
        if not scene.view.synapses:
            return records[0]
        last = list(scene.view.synapses[-1])
        for record in records:
            if record["address"] == last:
                return record
        raise NothingToShow("This synapse was not explained", "Search again: what is followed then is explained too.")

    def values(self, scene: Scene) -> np.ndarray:
        return np.array([write["value"] for write in self.explained(scene)["writes"]])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        writes = self.explained(scene)["writes"]
        if not writes:
            raise NothingToShow("Nobody wrote it", "This synapse holds nothing after this token.")
        labels = [f"{write['position']} ‘{write['token']}’" for write in writes]
        return ranked_bars(labels, self.values(scene), theme, panel=self.id, title="part of the state's entry")

    def table(self, scene: Scene) -> Table:
        writes = self.explained(scene)["writes"]
        return ["token", "text", "value", "share"], (
            [str(w["position"]), w["token"], w["value"], w["share"]] for w in writes
        )

    def facts(self, scene: Scene) -> list[str]:
        record = self.explained(scene)
        return [
            synapse_name(tuple(record["address"])),
            f"in the state {number(record['total'])}",
            f"the {len(record['writes'])} largest writes make {number(record['listed'])}",
            f"decomposition exact to {number(self.results(scene)['error'])}",
            *paper_words(self.results(scene)),
        ]

    def snippet_body(self, scene: Scene) -> str:
        asked, (k, a, i, layer, b, j) = self.settings(scene), self.explained(scene)["address"]
        return f"""
from probes.bdh import Synapse, attribute_state, who_wrote_synapse

model, text = models.load("{self.result(scene).model["name"]}"), run.manifest["text"]
found = attribute_state(model, text, {layer}, at={asked["at"]})
synapse = Synapse(source=({a}, {i}), target=({b}, {j}), target_layer={layer}, source_layer={k})
values = np.array([write.value for write in who_wrote_synapse(found, synapse, k=12).writes])
"""


PANELS = (*(SynapseView(view) for view in VIEW_WORDS), SynapseWrites(), TopSynapses(), SynapseAuthors())
