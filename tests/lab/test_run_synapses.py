"""Synapses read from a run against the probe that runs the model."""

from pathlib import Path

import numpy as np
import pytest

import models
from probes.bdh import Synapse, matching_pairs, trace_synapses
from workbench.lab.factors import LayerFactors
from workbench.lab.pattern_factors import FactorError
from workbench.lab.run_synapses import VIEWS, RunSynapses
from workbench.lab.runs import Run, RunStore
from workbench.lab.trace import trace_run

TEXT = "the dragon hatches and the dragon flies over the old town"


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return models.load("bdh-english")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory: pytest.TempPathFactory) -> Run:  # type: ignore[no-untyped-def]
    return trace_run(model, TEXT, RunStore(tmp_path_factory.mktemp("runs")))


def test_every_view_is_the_probes(model, run: Run) -> None:  # type: ignore[no-untyped-def]
    """Even and odd targets, neighbouring and distant layers; the run holds x and y in half precision."""
    y, x = (run.array(name).astype(float).sum(1) for name in ("layer.1.y", "layer.2.x"))
    sources, targets = np.argsort(-y[0])[:2], np.argsort(-x[1])[:4]
    found = [((1, 0, int(i)), (2, 1, int(j))) for i in sources for j in targets]
    found += [((0, 2, int(np.argmax(run.array("layer.0.y")[2].sum(0, dtype=float)))), (3, 1, int(targets[0]) ^ 1))]
    assert {address[1][2] % 2 for address in found} == {0, 1}
    probe = trace_synapses(
        model, TEXT, [Synapse(source=s[1:], target=t[1:], target_layer=t[0], source_layer=s[0]) for s, t in found]
    )
    reader = RunSynapses(run)
    for number, address in enumerate(found):
        ours = reader.traces(address)
        largest = float(probe.strength[0, :, number].max())
        assert largest > 0.01
        for view in VIEWS:
            np.testing.assert_allclose(
                ours[view], probe.view(view)[0, :, number], atol=2e-3 * largest, rtol=2e-3, err_msg=view
            )
        phase = ours["fixed"] if address[1][2] % 2 == 0 else None
        if phase is not None:  # the two members of a pair are the parts of C
            other = reader.traces((address[0], (*address[1][:2], address[1][2] ^ 1)))["fixed"]
            steps = np.abs(np.diff(phase + 1j * other, prepend=0))
            np.testing.assert_allclose(reader.written(address), steps, atol=1e-9 * largest)


def test_pairs_that_match_are_the_probes_and_sum_to_the_cell(model, run: Run) -> None:  # type: ignore[no-untyped-def]
    reader = RunSynapses(run)
    for layer, head, at, past in ((1, 0, 30, 4), (3, 2, 56, 55)):
        found = reader.matching_pairs(layer, head, at, past)
        assert found["score"].sum() == pytest.approx(LayerFactors.from_run(run, layer).value(head, at, past), rel=1e-5)
        probe = matching_pairs(model, TEXT, layer, head, past=past, at=at, k=256)
        order = probe.pairs.numpy()
        largest = float(probe.contribution.abs().max())
        np.testing.assert_allclose(found["score"][order], probe.contribution, atol=1e-5 * largest)
        np.testing.assert_allclose(found["same"][order], probe.same, atol=2e-3 * largest)
        np.testing.assert_allclose(found["cross"][order], probe.cross, atol=2e-3 * largest)
    for wrong, words in (
        ((1, 4, 9, 2), "no head 4 in layer 1"),
        ((4, 0, 9, 2), "layers 0 to 3"),
        ((1, 0, 2, 2), "earlier one"),
    ):
        with pytest.raises(FactorError, match=words):
            reader.matching_pairs(*wrong)


def test_what_is_no_synapse_is_named(run: Run, tmp_path: Path) -> None:
    reader = RunSynapses(run)
    with pytest.raises(FactorError, match="neuron 512 of head 0 in layer 1"):
        reader.traces(((1, 0, 512), (2, 0, 0)))
    with pytest.raises(FactorError, match="higher layer"):
        reader.written(((2, 0, 0), (2, 0, 0)))
    with pytest.raises(FactorError, match="only a BDH"):
        RunSynapses(trace_run(models.build("llama"), "text", RunStore(tmp_path)))
    with pytest.raises(FactorError, match="fades"):
        RunSynapses(trace_run(models.build("bdh", decay=1.0), "text", RunStore(tmp_path)))
