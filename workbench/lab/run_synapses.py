"""Synapses of a BDH over time, from what a trace run stores; numpy only.

    synapses = RunSynapses(store.open(run_id))
    synapses.traces(((1, 0, 210), (2, 2, 190)))["strength"]      # [pos]

A synapse leads from the gated activity y of a neuron (layer, head, neuron) to the activity x of a neuron of a higher layer, and is seen
in the four views of `probes.bdh.synapses` (Kosowski et al. 2025, section 6.3). With z_τ = k_τ[j₀] + i·k_τ[j₀ + 1] the rotated pair that
holds target neuron j, its frequency ω, and C_t = Σ_{τ≤t} y_τ[i] z_τ:

fixed      the entry of the state in its own frame: the real or the imaginary part of C_t
current    the same of e^{−iωt} C_t: as token t sees it
strength   |C_t|
count      Σ_{τ≤t} y_τ[i] x_τ[j]

A run keeps x and y in half precision, so numbers differ from a run of the model by up to about a thousandth.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from workbench.lab.pattern_factors import FactorError
from workbench.lab.run_folder import Run

VIEWS = ("strength", "fixed", "current", "count")
Neuron = tuple[int, int, int]
"""(layer, head, neuron)."""
Address = tuple[Neuron, Neuron]


class RunSynapses:
    """The synapses of one trace run. Raises FactorError, in words, for a run that has none, or whose state fades."""

    def __init__(self, run: Run):
        config: dict[str, Any] = run.model.get("config") or {}
        self.run = run
        self.layers = [layer["layer"] for layer in run.layers if run.has(f"layer.{layer['layer']}.y")]
        if run.model.get("architecture") != "bdh" or "theta" not in config or not self.layers:
            raise FactorError("only a BDH has synapses between neurons, and this run is of another model")
        if config.get("decay") or config.get("residual", "stream") != "stream":
            raise FactorError(
                "synapses are followed in the published BDH; this one fades its state or keeps its stream in the neurons"
            )
        self.theta = float(config["theta"])
        self.heads, self.tokens, self.neurons = run.array(f"layer.{self.layers[0]}.y").shape

    def check(self, address: Address) -> None:
        """Raises FactorError unless both neurons are in the run and the target lies in a higher layer."""
        for layer, head, neuron in address:
            if layer not in self.layers or not (0 <= head < self.heads and 0 <= neuron < self.neurons):
                raise FactorError(
                    f"neuron {neuron} of head {head} in layer {layer} is not in this run, which has layers {self.layers[0]} to "
                    f"{self.layers[-1]}, {self.heads} heads and {self.neurons} neurons per head"
                )
        if address[0][0] >= address[1][0]:
            raise FactorError(
                f"a synapse leads to a higher layer, not from layer {address[0][0]} to layer {address[1][0]}"
            )

    def _activity(self, name: str, neuron: Neuron) -> np.ndarray:
        layer, head, number = neuron
        return self.run.array(f"layer.{layer}.{name}")[head, :, number].astype(np.float64)

    def _writes(self, address: Address) -> np.ndarray:
        """y_τ[i] z_τ, what each token adds to C: complex [pos]."""
        layer, head, neuron = address[1]
        first = neuron - neuron % 2
        turned = self._activity("key", (layer, head, first)) + 1j * self._activity("key", (layer, head, first + 1))
        return self._activity("y", address[0]) * turned

    def written(self, address: Address) -> np.ndarray:
        """How much each token wrote into the synapse's rotary pair: |C_t − C_{t−1}| = y_τ[i] |z_τ|, [pos]."""
        self.check(address)
        return np.abs(self._writes(address))

    def traces(self, address: Address) -> dict[str, np.ndarray]:
        """The four views, each [pos] in float64."""
        self.check(address)
        pair, neuron = self._writes(address).cumsum(), address[1][2]
        # float32 as in the model, whose frequencies are float32
        frequency = np.float32(1.0) / np.float32(self.theta) ** np.float32((neuron - neuron % 2) / self.neurons)
        seen = pair * np.exp(-1j * np.arange(len(pair)) * np.float64(frequency))
        fixed, current = (pair.imag, seen.imag) if neuron % 2 else (pair.real, seen.real)
        together = self._activity("y", address[0]) * self._activity("x", address[1])
        return {"strength": np.abs(pair), "fixed": fixed, "current": current, "count": together.cumsum()}

    def matching_pairs(self, layer: int, head: int, at: int, past: int) -> dict[str, np.ndarray]:
        """Which neurons make token `at` read token `past`, by rotary pair (2p, 2p + 1): `score`, `same` and `cross`, each [pair].

        The scores sum to the pattern's cell. score = same + cross; same: the pair fired alike at both tokens, times cos ω(t − τ); cross:
        what rotation alone makes of one neuron at t and the other at τ. Raises FactorError outside the run, and unless past < at.
        """
        if layer not in self.layers or not 0 <= head < self.heads:
            raise FactorError(
                f"there is no head {head} in layer {layer} of this run, which has layers {self.layers[0]} to {self.layers[-1]} and "
                f"{self.heads} heads"
            )
        if not 0 <= past < at < self.tokens:
            raise FactorError(
                f"token {at} does not read token {past}: expected an earlier one, both of the run's {self.tokens} tokens"
            )
        query, key = (
            self.run.array(f"layer.{layer}.{name}")[head, token].astype(np.float64).reshape(-1, 2)
            for name, token in (("query", at), ("key", past))
        )
        now, then = (
            self.run.array(f"layer.{layer}.x")[head, token].astype(np.float64).reshape(-1, 2) for token in (at, past)
        )
        first = np.arange(0, self.neurons, 2, dtype=np.float32)
        frequency = np.float32(1.0) / np.float32(self.theta) ** (first / np.float32(self.neurons))
        score = (query * key).sum(1)
        same = (now * then).sum(1) * np.cos((at - past) * frequency.astype(np.float64))
        return {"score": score, "same": same, "cross": score - same}
