"""Every edit against a token-by-token run in which the same thing is done to the writes themselves."""

import pytest
import torch
from torch import Tensor

import models
from models.bdh.model import BDH
from probes.bdh.capture import Synapse
from probes.bdh.interventions import (
    ablate_neurons,
    ablate_synapse,
    block_reads,
    change_synapse,
    clamp_synapse,
    copy_state,
    copy_synapse,
    freeze_writes,
    mute_synapse,
    synapse_value,
    turned,
)
from probes.bdh.timescales import neurons_of, octiles, periods
from tests.probes.bdh_naive import EXACT, LENGTH, Edit, Naive, largest, naive, tiny_model, tiny_tokens, turn
from workbench.instrument.errors import HookError
from workbench.instrument.interventions import BlockEdge, EditState, load_interventions, save_interventions
from workbench.instrument.selection import Select

AT = 4
SYNAPSES = [Synapse((1, 2), (0, 3), 2), Synapse((0, 1), (1, 0), 2, 0), Synapse((0, 3), (1, 4), 1)]


@pytest.fixture(scope="module")
def model() -> BDH:
    return tiny_model()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return tiny_tokens()


def agree(model: BDH, tokens: Tensor, hooks: list, runs: list[Naive], mode: str = "chunked") -> None:
    """The hooked logits are the naive runs', and differ from the plain ones."""
    model.set_mode(mode)
    try:
        edited = model.run_with_hooks(tokens, hooks=hooks)
    finally:
        model.set_mode("chunked")
    assert largest(edited - torch.stack([run.logits for run in runs])) < EXACT
    assert largest(edited - model(tokens)) > 1e-4


def product(model: BDH, run: Naive, synapse: Synapse, t: int) -> Tensor:
    """What token t writes through one synapse: [head, neuron, d_model] with one row."""
    (a, i), (b, j) = synapse.source, synapse.target
    amount = run.scale[synapse.target_layer, t][synapse.source_layer][0] * run.y[synapse.source_layer, t][a, i]
    row = model.weights.E[a, i].detach()
    out = torch.zeros_like(model.weights.E.detach())
    out[b, j] = amount * run.key[synapse.target_layer, t][b, j] * (row - row.mean())
    return out


def active_synapse(model: BDH, tokens: Tensor) -> list[Synapse]:
    """Synapses that were written in both sequences before token AT (editing one that is 0 would test nothing)."""
    found = [
        Synapse((a, i), (b, j), 2)
        for a in range(2)
        for i in range(6)
        for b in range(2)
        for j in range(6)
        if float(synapse_value(model, tokens, Synapse((a, i), (b, j), 2), after=AT).abs().min()) > 0.1
    ]
    assert found
    return found[:2]


def test_value_is_the_weighted_sum(model: BDH, tokens: Tensor) -> None:
    for synapse in SYNAPSES:
        value = synapse_value(model, tokens, synapse, after=AT)
        for row in range(2):
            run = naive(model, tokens[row])
            (a, i), (b, j) = synapse.source, synapse.target
            terms = [
                run.scale[synapse.target_layer, t][synapse.source_layer][0]
                * run.y[synapse.source_layer, t][a, i]
                * run.key[synapse.target_layer, t][b, j]
                for t in range(AT + 1)
            ]
            assert abs(float(value[row] - torch.stack(terms).sum())) < EXACT


def recomputed(model: BDH, tokens: Tensor, synapse: Synapse) -> Naive:
    """A run whose state, after token AT, is the sum of all writes so far without the synapse's products."""
    masked = torch.zeros_like(model.weights.E.detach())

    def add_up(layer: int, t: int, write: Tensor, run: Naive) -> Tensor:
        if layer == synapse.target_layer and t <= AT:
            masked.add_(write - product(model, run, synapse, t))
        return write

    def replace(layer: int, t: int, state: Tensor) -> Tensor:
        return masked if (layer, t) == (synapse.target_layer, AT) else state

    return naive(model, tokens, on_write=add_up, after=replace)


def without(model: BDH, tokens: Tensor, synapse: Synapse) -> Naive:
    """A run in which the synapse's products are never written."""

    def mask(layer: int, t: int, write: Tensor, run: Naive) -> Tensor:
        return write - product(model, run, synapse, t) if layer == synapse.target_layer else write

    return naive(model, tokens, on_write=mask)


@pytest.mark.parametrize("mode", ["chunked", "recurrent", "parallel"])
def test_ablated_synapse_is_the_state_recomputed_without_its_products(model: BDH, tokens: Tensor, mode: str) -> None:
    for synapse in active_synapse(model, tokens):
        edit = ablate_synapse(model, tokens, synapse, after=AT)
        agree(model, tokens, [edit], [recomputed(model, row, synapse) for row in tokens], mode)


def test_muted_synapse_is_the_run_recomputed_without_its_products(model: BDH, tokens: Tensor) -> None:
    tested = 0
    for source in (0, 1):
        for place in ((1, 2, 0, 3), (0, 1, 1, 0), (0, 3, 1, 4), (1, 0, 0, 2), (1, 5, 1, 1)):
            synapse = Synapse((place[0], place[1]), (place[2], place[3]), 2, source)
            muted = model.run_with_hooks(tokens, hooks=mute_synapse(model, synapse))
            assert largest(muted - torch.stack([without(model, row, synapse).logits for row in tokens])) < EXACT
            tested += largest(muted - model(tokens)) > 1e-4
    assert tested >= 3  # of the ten, so many are active


def test_clamp_change_and_copy(model: BDH, tokens: Tensor) -> None:
    synapse = active_synapse(model, tokens)[0]
    (a, i), (b, j) = synapse.source, synapse.target
    row = (model.weights.E[a, i] - model.weights.E[a, i].mean()).detach()

    def shifted(changes: Tensor) -> list[Naive]:
        def by(change: Tensor) -> Edit:
            added = torch.zeros_like(model.weights.E.detach())
            added[b, j] = change * row
            return lambda layer, t, state: state + added if (layer, t) == (2, AT) else state

        return [naive(model, tokens[n], after=by(change)) for n, change in enumerate(changes)]

    value = synapse_value(model, tokens, synapse, after=AT)
    agree(model, tokens, [clamp_synapse(model, tokens, synapse, 2.5, after=AT)], shifted(2.5 - value))
    agree(model, tokens, [change_synapse(model, synapse, 3.0, after=AT)], shifted(torch.tensor([3.0, 3.0])))
    other = tiny_tokens(batch=1, seed=8)
    copied = copy_synapse(model, tokens, synapse, after=AT, source_tokens=other, source_after=7)
    agree(model, tokens, [copied], shifted(synapse_value(model, other, synapse, after=7) - value))


def test_edits_are_stored_and_read_back(model: BDH, tokens: Tensor, tmp_path) -> None:  # type: ignore[no-untyped-def]
    synapse = active_synapse(model, tokens)[0]
    edits = [ablate_synapse(model, tokens, synapse, after=AT), freeze_writes(model, since=6, length=LENGTH)]
    edits += copy_state(model, tokens, source_after=3, after=5, heads=[1], neurons=[2, 3])
    save_interventions(edits, tmp_path / "edits")
    again = load_interventions(tmp_path / "edits")
    assert torch.equal(model.run_with_hooks(tokens, hooks=again), model.run_with_hooks(tokens, hooks=edits))


@pytest.mark.parametrize(("layers", "heads"), [(None, None), ([1], None), ([0, 2], [1])])
def test_frozen_writes(model: BDH, tokens: Tensor, layers: list | None, heads: list | None) -> None:
    def frozen(layer: int, t: int, key: Tensor) -> Tensor:
        hit = t >= 5 and (layers is None or layer in layers)
        return key * torch.tensor([[0.0 if hit and (heads is None or h in heads) else 1.0] for h in range(2)])

    runs = [naive(model, row, on_key=frozen) for row in tokens]
    agree(model, tokens, [freeze_writes(model, since=5, length=LENGTH, layer=layers, heads=heads)], runs)


def test_frozen_states_stand_still(model: BDH, tokens: Tensor) -> None:
    edit = freeze_writes(model, since=5, length=LENGTH)
    states = model.states(tokens, [4, 8], hooks=[edit])
    assert all(largest(states.at(at, 8) - states.at(at, 4)) == 0 for at in range(3))


def test_blocked_reads(model: BDH, tokens: Tensor) -> None:
    def blind(at: int, t: int, query: Tensor) -> Tensor:
        return query * torch.tensor([[0.0 if (at, h) == (1, 0) and t in (3, 7) else 1.0] for h in range(2)])

    runs = [naive(model, row, on_query=blind) for row in tokens]
    agree(model, tokens, [block_reads(model, positions=[3, 7], layer=1, heads=[0])], runs)
    every = [naive(model, row, on_query=lambda at, t, query: 0 * query) for row in tokens]
    agree(model, tokens, [block_reads(model)], every)


def test_one_token_hidden_from_another(model: BDH, tokens: Tensor) -> None:
    """The general `BlockEdge` is the same as reading a state without that token's write."""
    edit = BlockEdge(layer=1, heads=[0], queries=[6], keys=[2])

    def hidden(row: Tensor) -> Naive:
        removed = torch.zeros_like(model.weights.E.detach())

        def remember(layer: int, t: int, write: Tensor, run: Naive) -> Tensor:
            if (layer, t) == (1, 2):
                removed[0] = write[0]
            return write

        def hide(layer: int, t: int, state: Tensor) -> Tensor:  # taken out before token 6 reads, put back after it
            return state - removed if (layer, t) == (1, 5) else state + removed if (layer, t) == (1, 6) else state

        return naive(model, row, on_write=remember, after=hide)

    agree(model, tokens, [edit], [hidden(row) for row in tokens])


@pytest.mark.parametrize(
    "part",
    [{}, {"heads": [1]}, {"neurons": [0, 1, 4]}, {"octiles": [0, 2]}, {"layer": 1}, {"layer": [0, 2], "heads": [0]}],
)
def test_copied_state(model: BDH, tokens: Tensor, part: dict) -> None:
    other = tiny_tokens(batch=1, length=7, seed=9)
    source = naive(model, other[0])
    layers = range(3) if "layer" not in part else [part["layer"]] if isinstance(part["layer"], int) else part["layer"]
    rows = part.get("neurons", neurons_of(model, part["octiles"]) if "octiles" in part else list(range(6)))

    def swap(layer: int, t: int, state: Tensor) -> Tensor:
        state = state.clone()
        if layer in layers and t == AT:
            for head in part.get("heads", [0, 1]):
                state[head, rows] = source.state[layer, AT][head, rows]
        return state

    runs = [naive(model, row, after=swap) for row in tokens]
    agree(model, tokens, copy_state(model, other, source_after=AT, after=AT, **part), runs)


def test_copied_memories_keep_their_distance(model: BDH, tokens: Tensor) -> None:
    """Copied from token 5 to token 7, everything must look as if it had been written two tokens later."""
    other = tiny_tokens(batch=1, seed=9)
    source = naive(model, other[0])
    _, cache = model.run_with_cache(other, names="blocks.1.attn.hook_value")
    later = torch.zeros_like(source.state[1, 5])
    for t in range(6):
        key = turn(source.x[1, t], t + 2, model.weights.frequencies)
        later += key[:, :, None] * cache["blocks.1.attn.hook_value"][0, t]
    edit = copy_state(model, other, source_after=5, after=7, layer=1)[0]
    assert isinstance(edit.value, Tensor)
    assert largest(edit.value[0] - later) < 1e-6 * largest(
        later
    )  # phases are float32: t + 2 turned at once, or t and 2
    assert largest(source.state[1, 5] - later) > 1e-2 * largest(later)
    assert largest(turned(model, turned(model, edit.value, -2), 2) - edit.value) < 1e-6 * largest(later)
    kept = copy_state(model, other, source_after=5, after=7, layer=1, keep_distance=False)[0]
    assert isinstance(kept.value, Tensor) and largest(kept.value[0] - source.state[1, 5]) < EXACT


def test_ablated_neurons_are_models_without_them(model: BDH, tokens: Tensor) -> None:
    gone = [(0, 2), (1, 5), (1, 0)]
    for of, weight in (("x", "D_x"), ("y", "E"), ("gate", "D_y")):
        smaller = tiny_model()
        with torch.no_grad():
            for head, neuron in gone:
                if weight == "E":
                    smaller.weights.E[head, neuron] = 0
                else:
                    getattr(smaller.weights, weight)[head, :, neuron] = 0
        edited = model.run_with_hooks(tokens, hooks=ablate_neurons(model, gone, of=of))
        assert largest(edited - smaller(tokens)) < EXACT
        assert largest(edited - model(tokens)) > 1e-4

    def silence(at: int, t: int, x: Tensor) -> Tensor:
        x = x.clone()
        if at == 1 and t == 6:
            x[0, 2] = 0
        return x

    runs = [naive(model, row, on_x=silence) for row in tokens]
    edited = model.run_with_hooks(tokens, hooks=ablate_neurons(model, [(0, 2)], layer=1, positions=[6]))
    assert largest(edited - torch.stack([run.logits for run in runs])) < EXACT


def test_whole_states_reset_and_fade(model: BDH, tokens: Tensor) -> None:
    """EditState, of which the edits above are made, against the naive run: reset of one layer, fading of one head."""
    runs = [naive(model, row, after=lambda at, t, s: 0 * s if (at, t) == (1, 5) else s) for row in tokens]
    agree(model, tokens, [EditState(layer=1, after=5, value=0.0)], runs)
    half = torch.tensor([1.0, 0.9], dtype=torch.float64)[:, None, None]
    runs = [naive(model, row, after=lambda at, t, s: s * half if at == 2 else s) for row in tokens]
    agree(model, tokens, [EditState(Select(role="state", layer=2), heads=[1], value=0.9)], runs)


def test_octiles_follow_the_frequencies() -> None:
    model = models.build("bdh", n_neurons=64, n_heads=2)
    expected = [8 * j // 32 for j in range(32)]
    assert octiles(model).tolist() == expected
    assert neurons_of(model, 7) == [28, 29, 30, 31] and neurons_of(model, [0, 1]) == list(range(8))
    assert octiles(models.build("bdh", n_neurons=16384)).tolist() == [8 * j // 8192 for j in range(8192)]
    for theta in (10_000.0, 500_000.0):  # float32 frequencies fall on either side of a boundary
        assert octiles(models.build("bdh", n_neurons=512, theta=theta)).tolist() == [8 * j // 256 for j in range(256)]
    with torch.no_grad():
        model.weights.frequencies.copy_(model.weights.frequencies.flip(0))
    assert octiles(model).tolist() == expected[::-1]
    assert float(periods(model)[31]) == pytest.approx(6.2832, abs=1e-3)
    with pytest.raises(ValueError, match="Octile 8 does not exist"):
        neurons_of(model, 8)
    with pytest.raises(ValueError, match="Octile 1 is empty"):
        neurons_of(models.build("bdh", n_neurons=8), 1)


def test_mistakes_are_named(model: BDH, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="after is 9"):
        ablate_synapse(model, tokens, SYNAPSES[0], after=9)
    with pytest.raises(ValueError, match=r"since is 9 and length 9"):
        freeze_writes(model, since=9, length=9)
    with pytest.raises(ValueError, match="heads has 2"):
        block_reads(model, heads=2)
    with pytest.raises(ValueError, match="Did you mean 'gate'"):
        ablate_neurons(model, [(0, 0)], of="gates")
    with pytest.raises(ValueError, match="neurons is empty"):
        ablate_neurons(model, [])
    with pytest.raises(ValueError, match="Both octiles and neurons"):
        copy_state(model, tokens, source_after=1, after=1, octiles=1, neurons=[1])
    with pytest.raises(TypeError, match="got LanguageModel"):
        freeze_writes(models.build("gpt"), since=1, length=3)
    with pytest.raises(HookError, match="position"):  # a run shorter than it was told
        model.run_with_hooks(tokens[:, :6], hooks=[freeze_writes(model, since=3, length=LENGTH)])
    with pytest.raises(ValueError, match="in one call"):
        model.generate(tokens[:1], 3, hooks=mute_synapse(model, SYNAPSES[0]))
    model.generate(tokens[:1], 3, hooks=mute_synapse(model, SYNAPSES[0]), use_state=False)
