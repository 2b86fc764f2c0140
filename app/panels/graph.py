"""Panels of the Neuron graph page: modularity, degree tails, edges, hubs of a measured graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number
from app.figures.graph import degree_tails, edge_weights, modularity_points
from app.figures.synapses import ranked_bars
from app.measure.graph import KIND, threshold_of
from app.panels.base import NothingToShow, Table
from app.panels.results import ResultPanel
from app.services import Scene
from app.theme import Theme


def neuron_names(results: dict[str, Any], settings: dict[str, Any], n_nodes: int) -> list[str]:
    """`head·neuron` of every node: the target head's neurons follow the source head's where these are two."""
    size = results["n_neurons"]
    heads = [settings["source_head"], settings["target_head"]]
    return [f"{heads[node // size]}·{node % size}" for node in range(n_nodes)]


class GraphPanel(ResultPanel):
    """A panel over a measured graph."""

    kind = KIND

    def names(self, scene: Scene) -> list[str]:
        """`head·neuron` of every node."""
        return neuron_names(self.results(scene), self.settings(scene), len(self.array(scene, "community")))

    def build(self, scene: Scene) -> str:
        """Python that builds the graph."""
        asked = self.settings(scene)
        heads = f"{asked['source_head']}, {asked['target_head']}"
        edges = ", ".join(f"{name}={value}" for name, value in threshold_of(asked).items())
        made = {
            "x": f'parameter_graph(model, {heads}, "x", {edges})', "y": f'parameter_graph(model, {heads}, "y", {edges})',
            "state": f'state_graph(model, run.manifest["text"], {asked["layer"]}, {heads}, {edges})',
            "coactivation": f'coactivation_graph(model, run.manifest["text"], {asked["layer"]}, {heads}, {edges})',
        }[asked["graph"]]  # fmt: skip
        return f'from probes import bdh\n\nmodel = models.load("{asked["model"]}")\ngraph = bdh.{made}'


class GraphEdges(GraphPanel):
    """The graph itself: its edges, drawn above by cytoscape, and their weights."""

    id = "graph-edges"
    title = "The graph"
    words = (
        "Click a neuron for what it says. Colours are Louvain's communities, the smaller ones grey. Below: the weights."
    )
    height = 150

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, "weight")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        return edge_weights(self.values(scene), theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        names, weight = self.names(scene), self.values(scene)
        ends = zip(self.array(scene, "source"), self.array(scene, "target"), weight, strict=True)
        return ["source (head·neuron)", "target", "weight"], ([names[i], names[j], float(w)] for i, j, w in ends)

    def facts(self, scene: Scene) -> list[str]:
        results = self.results(scene)
        connected = int((self.array(scene, "community") >= 0).sum())
        return [results["name"], f"{len(self.values(scene)):,} edges among {connected:,} of {len(self.names(scene)):,} neurons",
                f"weights from {number(results['threshold'])} on",
                *([f"noise alone would have {results['noise_edges']:,} such edges"] if "noise_edges" in results else [])]  # fmt: skip

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.build(scene)}\nvalues = graph.weight"


class GraphModularity(GraphPanel):
    """Modularity beside its baselines: alone the number says nothing."""

    id = "graph-modularity"
    title = "Modularity beside its baselines"
    words = "Louvain's Q of this graph (line) and of graphs with as many edges: sparse random graphs have a high Q too."
    height = 270

    def point(self, scene: Scene) -> dict[str, Any]:
        """The comparison, as stored."""
        return self.results(scene)["modularity"]

    def values(self, scene: Scene) -> np.ndarray:
        point = self.point(scene)
        return np.array(
            [point["observed"]["q"], *(draw["q"] for draws in point["baselines"].values() for draw in draws)]
        )

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        point = self.point(scene)
        baselines = {name: [draw["q"] for draw in draws] for name, draws in point["baselines"].items()}
        return modularity_points(point["observed"]["q"], baselines, theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        point = self.point(scene)
        rows = [
            ("this graph", point["observed"]),
            *((name, draw) for name, draws in point["baselines"].items() for draw in draws),
        ]
        headers = ["graph", "Q", "communities", "neurons with edges", "giant component"]
        return headers, (
            [name, each["q"], float(each["communities"]), float(each["connected"]), each["giant"]]
            for name, each in rows
        )

    def facts(self, scene: Scene) -> list[str]:
        point = self.point(scene)
        facts = [
            f"Q {number(point['observed']['q'])}",
            f"giant component {point['observed']['giant']:.0%} of all neurons",
        ]
        for name, draws in point["baselines"].items():
            facts.append(
                f"{name}: Q {number(float(np.mean([d['q'] for d in draws])))}, giant {np.mean([d['giant'] for d in draws]):.0%}"
            )
        return [*facts, self.results(scene)["note"].rstrip(".")]

    def snippet_body(self, scene: Scene) -> str:
        asked = self.settings(scene)
        heads = f"{asked['source_head']}, {asked['target_head']}"
        call = "point = bdh.compare_modularity(graph, draws={})".format(asked["draws"])
        if asked["graph"] in ("x", "y"):
            arguments = f'model, {heads}, "{asked["graph"]}", edges=(graph.n_edges,), draws={asked["draws"]}'
            call = f"point = bdh.modularity_curve({arguments}).points[0]"
        draws = "[draw.q for draws in point.baselines.values() for draw in draws]"
        return f"{self.build(scene)}\n{call}\nvalues = np.array([point.observed.q, *{draws}])"


VERDICTS = {
    "power law": "a power law fits better",
    "log-normal": "a log-normal fits better",
    "undecided": "the degrees cannot tell",
}


class GraphDegrees(GraphPanel):
    """Degree distributions with their fits."""

    id = "graph-degrees"
    title = "Degrees"
    words = "Share of neurons with at least k edges, the power law and the log-normal that fit best, and which the degrees prefer."
    height = 300

    def ways(self, scene: Scene) -> list[str]:
        """The directions that were fitted."""
        results = self.results(scene)
        if not results["tails"]:
            raise NothingToShow("Nothing to fit", results["no_fit"])
        return list(results["tails"])

    def values(self, scene: Scene) -> np.ndarray:
        return np.concatenate([self.array(scene, f"ccdf.{way}") for way in self.ways(scene)])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        tails = {way: (self.array(scene, f"ccdf.{way}"), self.array(scene, f"fit.{way}")) for way in self.ways(scene)}
        return degree_tails(tails, theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        parts = ((way, row) for way in self.ways(scene) for row in self.array(scene, f"ccdf.{way}"))
        return ["direction", "k", "share with at least k"], ([way, float(k), float(share)] for way, (k, share) in parts)

    def facts(self, scene: Scene) -> list[str]:
        return [
            f"{way}: {VERDICTS[tail['verdict']]} (likelihood ratio R {tail['log_likelihood_ratio']:+.2f}, p {number(tail['p'])}); "
            f"α {tail['alpha']:.2f} ± {tail['alpha_sd']:.2f} from {tail['xmin']} edges on; "
            f"KS {number(tail['ks'])} power law, {number(tail.get('ks_log_normal', np.nan))} log-normal"
            for way, tail in self.results(scene)["tails"].items()
        ]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.build(scene)}\nvalues = np.concatenate([tail.ccdf for tail in bdh.degree_tails(graph).values()])"


class GraphHubs(GraphPanel):
    """The neurons with most edges."""

    id = "graph-hubs"
    title = "Hubs"
    words = "The neurons with most edges, and the tokens that each promotes when it fires."
    height = 290

    def hubs(self, scene: Scene) -> list[dict[str, Any]]:
        """Their records, most edges first."""
        return self.results(scene)["hubs"]

    def values(self, scene: Scene) -> np.ndarray:
        return np.array([[hub["in_degree"], hub["out_degree"]] for hub in self.hubs(scene)])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        hubs = self.hubs(scene)
        total = np.array(
            [hub["in_degree"] + (hub["out_degree"] if self.results(scene)["directed"] else 0) for hub in hubs]
        )
        labels = [
            f"{hub['head']}·{hub['neuron']}  {' '.join(repr(word)[1:-1] for word, _ in hub['meaning']['promotes'][:4])}"
            for hub in hubs
        ]
        return ranked_bars(labels, total, theme, panel=self.id, title="edges")

    def table(self, scene: Scene) -> Table:
        headers = ["neuron", "in", "out", "strength", "community", "promotes", "excited by"]
        return headers, (
            [f"{hub['head']}·{hub['neuron']}", float(hub["in_degree"]), float(hub["out_degree"]), hub["strength"], str(hub["community"]),
             *(" ".join(word for word, _ in hub["meaning"][side]) for side in ("promotes", "excited_by"))]
            for hub in self.hubs(scene)
        )  # fmt: skip

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.build(scene)}\nvalues = np.array([[hub.in_degree, hub.out_degree] for hub in bdh.graph_hubs(model, graph, k=12)])"


PANELS = (GraphEdges(), GraphModularity(), GraphDegrees(), GraphHubs())
