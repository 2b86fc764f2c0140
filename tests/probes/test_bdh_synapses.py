"""Synapse time series against explicit neuron × neuron matrices built token by token."""

import math

import pytest
import torch
from torch import Tensor

import models
import probes.bdh
from models.bdh.model import BDH
from probes.bdh.capture import Synapse, capture_writes
from probes.bdh.synapses import VIEWS, trace_synapses
from tests.probes.bdh_naive import EXACT, LENGTH, largest, naive, tiny_model, tiny_tokens, turn
from workbench.instrument.interventions import Ablate
from workbench.lab.catalogue import gather

HEADS, NEURONS = 2, 6


@pytest.fixture(scope="module")
def model() -> BDH:
    return tiny_model()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return tiny_tokens()


def every_synapse(source_layer: int, target_layer: int) -> list[Synapse]:
    return [
        Synapse((a, i), (b, j), target_layer, source_layer)
        for a in range(HEADS)
        for i in range(NEURONS)
        for b in range(HEADS)
        for j in range(NEURONS)
    ]


def matrices(model: BDH, tokens: Tensor, source_layer: int, target_layer: int) -> dict[str, Tensor]:
    """The four n × n matrices after every token of one sequence, as [pos, n · n], from the naive run alone."""
    run, f = naive(model, tokens), model.weights.frequencies
    n = HEADS * NEURONS
    fixed, count = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    memory: list[tuple[int, Tensor, Tensor]] = []
    out: dict[str, list[Tensor]] = {name: [] for name in VIEWS}
    for t in range(len(tokens)):
        y, x = run.y[source_layer, t].flatten(), run.x[target_layer, t]
        fixed = fixed + torch.outer(y, turn(x, t, f).flatten())
        count = count + torch.outer(y, x.flatten())
        memory.append((t, y, x))
        # equation 16: every remembered x is turned on by the distance t − τ, never by an absolute position
        current = torch.zeros(n, n, dtype=torch.float64)
        for then, past_y, past_x in memory:
            current += torch.outer(past_y, _turned_back(past_x, t - then, f).flatten())
        pairs = fixed.view(n, HEADS, NEURONS // 2, 2)
        strength = pairs.square().sum(-1, keepdim=True).sqrt().expand_as(pairs).reshape(n, n)
        for name, matrix in zip(VIEWS, (fixed, current, strength, count), strict=True):
            out[name].append(matrix.flatten())
    return {name: torch.stack(values) for name, values in out.items()}


def _turned_back(x: Tensor, distance: int, frequencies: Tensor) -> Tensor:
    angle = -distance * frequencies[::2].double() * 2 * math.pi
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).flatten(-2)


@pytest.mark.parametrize(("source_layer", "target_layer"), [(0, 1), (1, 2), (0, 2)])
def test_every_synapse_equals_the_full_matrix(model: BDH, tokens: Tensor, source_layer: int, target_layer: int) -> None:
    traces = trace_synapses(model, tokens, every_synapse(source_layer, target_layer))
    for row in range(2):
        expected = matrices(model, tokens[row], source_layer, target_layer)
        for name in ("fixed", "strength", "count"):
            assert largest(traces.view(name)[row] - expected[name]) < EXACT, name
            assert largest(expected[name]) > 0.1
        # the model's phases are float32, so turning by t and back is not turning by the distance: 1e-6, not 1e-10
        assert largest(traces.current[row] - expected["current"]) < 1e-6 * largest(expected["current"])
        assert largest(expected["current"] - expected["fixed"]) > 0.05 * largest(expected["fixed"])


def test_current_frame_is_the_fixed_one_turned_back(model: BDH, tokens: Tensor) -> None:
    """With the model's own float32 phases the two frames agree exactly: turning the current frame on by t gives the fixed one."""
    traces = trace_synapses(model, tokens, every_synapse(0, 1))
    for t in range(LENGTH):
        rows = traces.current[0, t].view(-1, NEURONS)
        # a float32 cosine and sine are no exact rotation: turning back and on scales by cos² + sin²
        cycles = (torch.tensor(float(t)) * model.weights.frequencies) % 1
        length = (cycles * 2 * math.pi).cos().double() ** 2 + (cycles * 2 * math.pi).sin().double() ** 2
        assert largest(turn(rows, t, model.weights.frequencies) / length - traces.fixed[0, t].view(-1, NEURONS)) < EXACT


def test_the_right_layers_heads_and_gating_are_used(model: BDH, tokens: Tensor) -> None:
    """Ungated y, y of the same layer, or un-rotated x give other numbers: the oracle above would notice."""
    right = trace_synapses(model, tokens, every_synapse(0, 1)).fixed[0, -1]
    run = naive(model, tokens[0])

    def total(source: dict, layer: int, target: dict) -> Tensor:
        products = [torch.outer(source[layer, t].flatten(), target[1, t].flatten()) for t in range(LENGTH)]
        return torch.stack(products).sum(0).flatten()

    assert largest(right - total(run.y, 0, run.key)) < EXACT
    for wrong in (
        total(run.gate, 0, run.key),
        total(run.y, 1, run.key),
        total(run.y, 0, run.x),
        total(run.x, 0, run.key),
    ):
        assert largest(right - wrong) > 1e-2


def test_position_zero_is_silent(model: BDH, tokens: Tensor) -> None:
    traces = trace_synapses(model, tokens, every_synapse(1, 2))
    for name in VIEWS:
        assert largest(traces.view(name)[:, 0]) == 0
        assert largest(traces.view(name)[:, 1:]) > 0


def test_changes_are_the_writes(model: BDH, tokens: Tensor) -> None:
    synapse = Synapse((1, 2), (0, 3), 1)
    traces = trace_synapses(model, tokens, synapse)
    run = naive(model, tokens[1])
    products = torch.tensor([run.y[0, t][1, 2] * run.key[1, t][0, 3] for t in range(LENGTH)], dtype=torch.float64)
    assert largest(traces.changes()[1, :, 0] - products) < EXACT
    assert bool((traces.changes("count") >= 0).all())


def test_padding_does_not_count(model: BDH, tokens: Tensor) -> None:
    mask = torch.ones(2, LENGTH + 3, dtype=torch.bool)
    mask[0, :3] = False
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens[:1]], 1)
    other = torch.cat([tokens[1:], tokens[1:, :3]], 1)
    synapses = [Synapse((0, i), (1, j), 2) for i in range(NEURONS) for j in range(NEURONS)]
    with_padding = trace_synapses(model, torch.cat([padded, other]), synapses, mask=mask)
    plain = trace_synapses(model, tokens[:1], synapses)
    for name in VIEWS:
        assert largest(with_padding.view(name)[0, 3:] - plain.view(name)[0]) < EXACT
        assert largest(plain.view(name)) > 1e-3


def test_hooks_of_the_run_are_seen(model: BDH, tokens: Tensor) -> None:
    synapse = Synapse((0, 1), (1, 2), 1)
    silenced = trace_synapses(model, tokens, synapse, hooks=[Ablate("blocks.0.hook_y", heads=[0])])
    assert largest(silenced.fixed) == 0
    assert largest(trace_synapses(model, tokens, synapse).fixed) > 0


def test_synapses_make_the_state(model: BDH, tokens: Tensor) -> None:
    """Coefficient-weighted synapses times cen(E), plus the embedding's part, are the model's own state."""
    for layer in range(3):
        writes = capture_writes(model, tokens, layer)
        true = model.states(tokens, [4], layers=layer)[layer][:, 0]
        assert largest(sum(writes.state(4, source) for source in writes.sources) - true) < EXACT  # type: ignore[arg-type]
        run = naive(model, tokens[1])
        for source in writes.sources:
            expected = torch.stack([run.scale[layer, t][source][0] for t in range(LENGTH)])
            assert largest(writes.coefficients[source][1] / expected - 1) < EXACT


def test_sixteen_bit_models_are_traced_in_32(tokens: Tensor) -> None:
    """A bfloat16 model's synapses are near the exact ones, and its decomposition near its own state."""
    exact, rounded = models.build("bdh"), models.build("bdh").bfloat16()
    synapses = [Synapse((0, i), (1, j), 2) for i in range(16) for j in range(16)]
    text = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    expected, found = (trace_synapses(m, text, synapses).strength for m in (exact, rounded))
    assert largest(found - expected) < 0.1 * largest(expected) and largest(expected) > 1
    writes = capture_writes(rounded, text, 2)
    assert writes.keys.dtype == writes.y[0].dtype == torch.float32
    rebuilt = torch.stack([writes.state(11, source) for source in writes.sources]).sum(0)
    assert largest(rebuilt - rounded.states(text, 11)[2][:, 0]) < 0.05 * largest(rebuilt)


def test_only_the_sources_asked_for_are_kept(model: BDH, tokens: Tensor) -> None:
    writes = capture_writes(model, tokens, 2, sources=[1])
    assert list(writes.y) == [1] and writes.sources == ["embedding", 0, 1]
    assert torch.equal(writes.written(1), capture_writes(model, tokens, 2).written(1))
    with pytest.raises(ValueError, match=r"y of layer 0 was not kept in this run; kept: \[1\]"):
        writes.written(0)


def test_mistakes_are_named(model: BDH, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \(head, neuron\)"):
        Synapse((1, 2, 3), (0, 0), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Layer 0 has none"):
        Synapse((0, 0), (0, 0), 0)
    with pytest.raises(ValueError, match="lower layer"):
        Synapse((0, 0), (0, 0), 1, 1)
    with pytest.raises(ValueError, match=r"target_layer of .* is 3; expected 1\.\.2"):
        trace_synapses(model, tokens, Synapse((0, 0), (0, 0), 3))
    with pytest.raises(ValueError, match=r"source of .* \(0, 6\); this model has heads 0\.\.1 with neurons 0\.\.5"):
        trace_synapses(model, tokens, Synapse((0, 6), (0, 0), 1))
    with pytest.raises(ValueError, match="synapses is empty"):
        trace_synapses(model, tokens, [])
    with pytest.raises(TypeError, match="got LanguageModel"):
        trace_synapses(models.build("gpt2"), tokens, Synapse((0, 0), (0, 0), 1))
    with pytest.raises(ValueError, match="Did you mean 'strength'"):
        trace_synapses(model, tokens, Synapse((0, 0), (0, 0), 1)).view("strenght")
    dropping = tiny_model(dropout=0.5).train()
    with pytest.raises(ValueError, match="training mode"):
        trace_synapses(dropping, tokens, Synapse((0, 0), (0, 0), 1))


def test_public_names_exist_and_declare_what_they_implement() -> None:
    assert all(callable(getattr(probes.bdh, name)) for name in probes.bdh.__all__)
    declared = {record.name for record in gather(["probes.bdh"]) if record.slug == "bdh"}
    assert {"trace_synapses", "attribute_state", "read_circuit", "measure_sparsity", "copy_state"} <= declared


def test_table_names_every_synapse() -> None:
    model = models.build("bdh")
    traces = trace_synapses(model, "<one> two", [Synapse((0, 1), (1, 2), 1), Synapse((1, 3), (0, 4), 2, 0)])
    table = traces._repr_html_()
    assert "y0[0·1] → x1[1·2]" in table and "y0[1·3] → x2[0·4]" in table
    assert "<one>" not in table and "&lt;one&gt;" in table
    assert "batch=1, pos=9, synapse=2" in repr(traces)
