"""The variants of BDH under the probes of the published model: measured where the measurement holds, refused in words where it does not."""

from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.bdh.model import BDH
from probes.bdh import (
    attribute_state,
    coactivation_graph,
    graph_hubs,
    head_census,
    measure_sparsity,
    modularity_curve,
    neuron_says,
    parameter_graph,
    sparse_activations,
    state_graph,
    trace_synapses,
)
from probes.bdh.capture import Synapse, capture_writes, require_bdh


@pytest.fixture(params=["bdh-paper", "bdh-decay"])
def variant(request: pytest.FixtureRequest) -> BDH:
    return models.build(request.param)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))


def test_what_a_state_is_made_of_is_refused(variant: BDH, tokens: Tensor) -> None:
    """The sums of the published model leave out the decay and have another residual: a number would be wrong."""
    calls: list[Any] = [
        lambda: capture_writes(variant, tokens, 1),
        lambda: trace_synapses(variant, tokens, [Synapse((0, 1), (1, 2), 1)]),
        lambda: attribute_state(variant, tokens, 1),
        lambda: state_graph(variant, tokens[:1], 1, edges=20),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="worked out for the published model"):
            call()
    assert require_bdh(variant, variants=True) is variant
    assert require_bdh(models.build("bdh", detach_memory=True)).config.detach_memory  # computes the same


def test_activity_is_measured_as_it_is(variant: BDH, tokens: Tensor) -> None:
    """Counts of active neurons agree with the cached activations."""
    _, cache = variant.run_with_cache(tokens, names=["blocks.1.hook_x", "blocks.1.hook_y"])
    sparsity = measure_sparsity(variant, tokens)
    sparse = sparse_activations(variant, tokens, dtype=torch.float32)
    for name in ("x", "y"):
        dense = cache[f"blocks.1.hook_{name}"]
        share = (dense != 0).float().mean(-1)[..., 1:]  # [batch, head, pos]; the first token is left out
        assert torch.allclose(sparsity.active[name][:, 1, :, 1:], share)
        assert float(share.mean()) > 0.05
        rows = sparse[name, 1, 0].dense()
        assert torch.equal(rows.view_as(dense[:, 0]), dense[:, 0].detach())


def test_wiring_is_that_of_the_weights(variant: BDH, tokens: Tensor) -> None:
    """E D_x means the same in every variant; what fires together is counted, not derived."""
    graph = parameter_graph(variant, 0, 1, edges=30)
    dense = (variant.weights.E[0] @ variant.weights.D_x[1]).detach().double()
    assert torch.allclose(torch.from_numpy(graph.weight), dense[graph.source, graph.target], atol=1e-6)
    assert float(dense.flatten().topk(30).values[-1]) == pytest.approx(graph.threshold, abs=1e-6)
    curve = modularity_curve(variant, edges=(40,), draws=2, seeds=1)
    assert curve.note == "The model still has its initial weights." and len(head_census(variant)) == 4
    together = coactivation_graph(variant, tokens, 1, edges=20)
    _, cache = variant.run_with_cache(tokens, names=["blocks.1.hook_x"])
    x = cache["blocks.1.hook_x"][:, 0, 1:].flatten(0, 1).double()
    pair = torch.stack([x[:, together.source[0]], x[:, together.target[0]]])
    assert together.weight[0] == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-5)
    hub = graph_hubs(variant, graph, k=1, tokens=3)[0]
    assert hub.meaning == neuron_says(variant, hub.head, hub.neuron, 3) and len(hub.meaning.promotes) == 3
