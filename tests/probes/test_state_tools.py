"""The state verbs and readings on every kind of memory, against plain loops with the same edit and against planted memories."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.decoder import Decoder
from models.registry import ARCHITECTURES
from probes.state_tools import recall, retention_matrix, state_point, state_spectrum, token_table
from probes.state_tools_edits import (
    ablate_levels,
    ablate_modes,
    clamp_gate,
    cut_edges,
    erase_key,
    freeze,
    implant,
    patch_signal,
    patch_state,
    reset,
    scale_write,
)
from tests.probes.naive_memories import AFTER, LAYER, LENGTH, factors_of, lively, mlstm, run, tokens
from workbench.instrument.errors import HookError, UnknownHookPoint
from workbench.instrument.hooked_model import heads_first, main_point
from workbench.instrument.interventions import load_interventions, save_interventions

models.list_models()
FAMILIES = {
    "retnet": "linear",
    "mamba2": "linear",
    "bdh": "linear",
    "aaren": "linear",
    "gla": "linear",
    "gateloop": "linear",
    "deltanet": "delta",
    "gated-deltanet": "delta",
    "kda": "delta",
    "loglinear-mamba2": "level",
    "loglinear-gdn": "level",
    "titans-linear": "memory",
    "titans": "memory",
}
PRESENT = [name for name in FAMILIES if name in ARCHITECTURES]
EXACT = 1e-10


@pytest.fixture(scope="module", params=PRESENT)
def case(request: pytest.FixtureRequest) -> tuple[str, Decoder, dict[str, Any]]:
    """(family, model, clean factors of LAYER)."""
    model = lively(request.param)
    return FAMILIES[request.param], model, factors_of(model, tokens())


def z_of(model: Decoder, hooks: Any = ()) -> Tensor:
    """What the memory of LAYER reads, [batch, head, pos, state_v]."""
    point = main_point(model.hook_points.points.values(), "z", LAYER)
    assert point is not None
    names = point.name if point.steps == 1 else f"{point.name}@0"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens(), names=names, hooks=list(hooks))
    return heads_first(cache[names], point)


def same(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().abs().max()) < EXACT * max(1.0, float(b.detach().abs().max()))


def softmax_of_keys(model: Decoder, f: dict[str, Any], positions: Any, added: float) -> Tensor:
    """What Aaren reads, by a softmax over its scores with something added to those of some tokens."""
    point = next(p for p in model.hook_points.points.values() if p.role == "key_score" and p.layer_index == LAYER)
    score = model.run_with_cache(tokens(), names=point.name)[1][point.name].detach().transpose(1, 2)
    score[:, :, positions] += added
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    return score[:, :, None].expand(-1, -1, LENGTH, -1).masked_fill(hidden, -torch.inf).softmax(-1) @ f["value"]


def is_network(model: Decoder) -> bool:
    return getattr(getattr(model.mixers[LAYER], "memory", None), "first", None) is not None


def unit_keys(f: dict[str, Any]) -> Tensor:
    """The key of token 3 of the first sequence, per head, of length 1."""
    key: Tensor = f["key"][0, :, 3]
    return key / key.norm(dim=-1, keepdim=True)


# ------------------------------------------------------------------------------------------------------------- verbs


def test_the_loop_is_the_mixer(case: Any) -> None:
    family, model, f = case
    expected, states = run(family, f)
    assert same(z_of(model), expected)
    reading = model.states(tokens(), [AFTER], layers=LAYER)
    assert same(reading[LAYER][:, 0], states[AFTER])


def test_patch_state(case: Any) -> None:
    """The state of other tokens is put in; edits also survive their files."""
    family, model, f = case
    _, states = run(family, f)
    other = states[2].flip(0).detach()
    verbs = patch_state(model, LAYER, other, after=AFTER)
    expected, _ = run(family, f, lambda s: other)
    for mode in ("chunked", "recurrent"):
        model.set_mode(mode)
        assert same(z_of(model, verbs), expected), mode
    model.set_mode("chunked")
    assert not same(z_of(model), expected)


def test_reset(case: Any) -> None:
    """Outputs after a reset are those of a text that begins there, where a memory has no clock of its own."""
    family, model, f = case
    mixer = model.mixers[LAYER]
    if model.architecture == "aaren":  # its normaliser is reset too
        got = z_of(model, reset(model, LAYER, after=AFTER))
        late = {n: x[:, :, AFTER + 1 :] if isinstance(x, Tensor) and x.dim() > 2 else x for n, x in f.items()}
        sums = late["key"][..., 0]
        total = torch.zeros_like(sums)
        running = torch.zeros_like(sums[:, :, 0])
        for t in range(sums.shape[2]):
            running = late["log_decay"][:, :, t].exp() * running + sums[:, :, t]
            total[:, :, t] = running
        late["query"] = total.reciprocal().unsqueeze(-1)
        expected, _ = run(family, late)
        assert same(got[:, :, AFTER + 1 :], expected)
        return
    first = getattr(getattr(mixer, "memory", None), "first", None)

    def forget(state: Tensor) -> Tensor:
        return torch.zeros_like(state) if first is None else first.detach().expand_as(state)

    if family == "memory":  # the momentum is forgotten with it: the loop with both
        verbs = reset(model, LAYER, after=AFTER)
        assert len(verbs) == 2
        carried = model(tokens()[:, : AFTER + 1], return_state=True)[1]
        slots = {"state": forget(carried.slot(LAYER, "state")), "momentum": 0 * carried.slot(LAYER, "momentum")}
        expected = model(tokens()[:, AFTER + 1 :], state=carried.replaced(LAYER, **slots))
        assert same(model.run_with_hooks(tokens(), hooks=verbs)[:, AFTER + 1 :], expected)
        return
    expected, _ = run(family, f, forget)
    assert same(z_of(model, reset(model, LAYER, after=AFTER)), expected)


def test_erase_key(case: Any) -> None:
    family, model, f = case
    if is_network(model):
        with pytest.raises(HookError, match="is a network"):
            erase_key(model, LAYER, torch.ones(8), after=AFTER)
        return
    key = unit_keys(f)

    def erase(state: Tensor) -> Tensor:
        k = key if state.dim() == 4 else key[:, None]
        return state - k[..., None] * torch.einsum("...kv,...k->...v", state, k.expand(*state.shape[:-1]))[..., None, :]

    expected, _ = run(family, f, erase)
    verbs = erase_key(model, LAYER, 3.0 * key, after=AFTER)
    assert same(z_of(model, verbs), expected) and not same(z_of(model), expected)
    reading = model.states(tokens(), [AFTER], layers=LAYER, hooks=verbs)
    assert recall(model, LAYER, reading[LAYER][:, 0], key[None, :, None].expand(2, -1, 1, -1)).abs().max() < 1e-12


def test_implant(case: Any) -> None:
    """The loop with the association written in; the key is then answered with the value exactly."""
    family, model, f = case
    if is_network(model):
        with pytest.raises(HookError, match="is a network"):
            implant(model, LAYER, torch.ones(8), torch.ones(8), after=AFTER)
        return
    key = 2.0 * unit_keys(f)
    value = f["value"].expand(*f["key"].shape[:3], -1)[1, :, 5]

    def add(state: Tensor) -> Tensor:
        written = key[:, :, None] * value[:, None] / key.square().sum(-1)[:, None, None]
        if state.dim() == 4:
            return state + written
        return torch.cat([state[:, :, :1] + written[:, None], state[:, :, 1:]], 2)

    expected, _ = run(family, f, add)
    assert same(z_of(model, implant(model, LAYER, key, value, after=AFTER, replace=False)), expected)
    verbs = implant(model, LAYER, key, value, after=AFTER)
    reading = model.states(tokens(), [AFTER], layers=LAYER, hooks=verbs)
    answer = recall(model, LAYER, reading[LAYER][:, 0], key[None, :, None].expand(2, -1, 1, -1))
    assert same(answer[:, :, 0], value.expand(2, -1, -1))


def test_scale_write_and_patch_signal(case: Any) -> None:
    """One token's write is doubled, another's key replaced."""
    family, model, f = case
    edited = {name: x.clone() if isinstance(x, Tensor) else x for name, x in f.items()}
    name = "write" if "write" in f else "value"
    edited[name][:, :, 4] *= 2.0
    if model.architecture in ("mamba2", "loglinear-mamba2"):
        edited["log_decay"] = edited["log_decay"].clone()
        edited["log_decay"][:, :, 4] *= 2.0  # Δ sets both
    if model.architecture == "bdh":
        pytest.skip("its value is the stream itself, from which its keys are made: changing it changes them too")
    verbs = scale_write(model, LAYER, 2.0, positions=4)
    if model.architecture == "aaren":
        assert same(z_of(model, verbs), softmax_of_keys(model, f, 4, math.log(2)))
        return
    expected, _ = run(family, edited)
    assert same(z_of(model, verbs), expected)
    point = model.mixers[LAYER].factor_points["key"]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens(), names=point.name)
    verbs = patch_signal(model, LAYER, "key", cache[point.name].flip(0), positions=5)
    patched = {**f, "key": f["key"].clone()}
    patched["key"][:, :, 5] = f["key"].flip(0)[:, :, 5]
    expected, _ = run(family, patched)
    assert same(z_of(model, verbs), expected)


def test_clamp_gate(case: Any) -> None:
    family, model, f = case
    constant = "log_decay" in model.mixers[LAYER].constant_factors()
    if constant or "log_decay" not in f:
        with pytest.raises(HookError, match="constant of the layer" if constant else "no signal of role 'decay'"):
            clamp_gate(model, LAYER, 0.5)
        return
    if model.architecture == "aaren":
        pytest.skip("its normaliser fades with its state: the consistency suite and its own tests hold that")
    for kept in (0.25, 0.0, 1.0):
        edited = {**f, "log_decay": f["log_decay"].clone()}
        edited["log_decay"][:, 1, 5] = torch.tensor(kept, dtype=torch.float64).log().clamp(min=-1e4)
        expected, _ = run(family, edited)
        assert same(z_of(model, clamp_gate(model, LAYER, kept, heads=1, positions=5)), expected)


def test_freeze(case: Any) -> None:
    """The state after the frozen tokens is the state before them."""
    family, model, f = case
    frozen = [7, 8, 9]
    if "log_decay" in model.mixers[LAYER].constant_factors():
        with pytest.raises(HookError, match="fades at a constant rate"):
            freeze(model, LAYER, frozen)
        return
    if model.architecture == "bdh":
        pytest.skip("its value is the stream itself, from which its keys are made: changing it changes them too")
    if model.architecture == "aaren":  # what is read after is as if the frozen tokens had not been there
        got = z_of(model, freeze(model, LAYER, frozen))[:, :, 10:]
        assert same(got, softmax_of_keys(model, f, frozen, -torch.inf)[:, :, 10:])
        return
    reading = model.states(tokens(), [6, 9], layers=LAYER, hooks=freeze(model, LAYER, frozen))[LAYER]
    before, after = (reading[:, i].sum(2) if family == "level" else reading[:, i] for i in range(2))
    assert same(after, before)
    plain = model.states(tokens(), [9], layers=LAYER)[LAYER][:, 0]
    assert not same(plain.sum(2) if family == "level" else plain, before)


def test_cut_edges(case: Any) -> None:
    """The readers lose exactly alpha_ij v_j."""
    _, model, f = case
    if not model.mixers[LAYER].describe()["pattern"]["exact"]:
        with pytest.raises(HookError, match="only reports how strongly"):
            cut_edges(model, LAYER, queries=9, keys=3)
        return
    alpha = model.patterns(tokens(), layers=LAYER)[LAYER].values.clone()
    value = f["value"].expand(*f["key"].shape[:3], -1)
    alpha[:, :, 9, 3] = 0
    if model.architecture == "aaren":
        alpha[:, :, 9] /= alpha[:, :, 9].sum(-1, keepdim=True)
    assert same(z_of(model, cut_edges(model, LAYER, queries=9, keys=3)), alpha @ value)


def test_ablations(case: Any) -> None:
    """Levels and modes that are not read."""
    family, model, f = case
    if family == "level":
        edited = {**f, "level": f["level"].clone()}
        edited["level"][..., [0, 2]] = 0
        assert same(z_of(model, ablate_levels(model, LAYER, [0, 2])), run(family, edited)[0])
    else:
        with pytest.raises(HookError, match="no signal of role 'level'"):
            ablate_levels(model, LAYER, 0)
    if is_network(model):
        with pytest.raises(HookError, match="is a network"):
            ablate_modes(model, LAYER, 0)
    elif model.architecture not in ("bdh", "aaren"):
        edited = {**f, "query": f["query"].clone()}
        edited["query"][..., 1] = 0
        assert same(z_of(model, ablate_modes(model, LAYER, 1)), run(family, edited)[0])


def test_verbs_on_mlstm() -> None:
    """Against its loop, with the denominator that each edit brings about: C and n are written together, and C alone is patched.

    Where n·q is near zero the division by it enlarges rounding, so agreement is asked to 1e-8 of the largest output.
    """

    def near(a: Tensor, b: Tensor) -> bool:
        return float((a - b).detach().abs().max()) < 1e-8 * float(b.detach().abs().max())

    model = lively("mlstm")
    names = {name: f"blocks.{LAYER}.mixer.hook_{name}" for name in ("q", "k", "v", "write", "log_decay", "stabiliser")}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens(), names=list(names.values()))
    f = {name: cache[address].transpose(1, 2) for name, address in names.items()}
    expected, states = mlstm(model, f)
    assert near(z_of(model), expected)
    other = states[2].flip(0)
    patched = mlstm(model, f, lambda c, n: (other, n))[0]
    assert near(z_of(model, patch_state(model, LAYER, other, after=AFTER)), patched) and not near(patched, expected)
    emptied = mlstm(model, f, lambda c, n: (0 * c, 0 * n))[0]
    assert near(z_of(model, reset(model, LAYER, after=AFTER)), emptied)
    doubled = {**f, "write": f["write"].clone()}
    doubled["write"][:, 1, 4] *= 2.0
    assert near(z_of(model, scale_write(model, LAYER, 2.0, heads=1, positions=4)), mlstm(model, doubled)[0])
    held = {**f, "log_decay": f["log_decay"].clone()}
    held["log_decay"][:, :, 5] = math.log(0.25)
    assert near(z_of(model, clamp_gate(model, LAYER, 0.25, positions=5)), mlstm(model, held)[0])


@pytest.mark.parametrize("name", [n for n, record in ARCHITECTURES.items() if "state" in record.shows])
def test_freezing_stops_every_memory_or_says_why_not(name: str) -> None:
    """All architectures: the state after the frozen tokens is the one before them, and readings work or refuse in words."""
    model = lively(name)
    layer = next(p.layer_index for p in model.hook_points.points.values() if p.role == "state")
    assert layer is not None
    assert "state norm" in token_table(model, tokens(), layer)
    try:
        verbs = freeze(model, layer, [7, 8])
    except HookError as error:
        assert any(
            word in str(error) for word in ("constant rate", "neither write strengths nor values", "only reports")
        )
        return
    if name.startswith("bdh") or name == "aaren":
        return  # the value is the stream; the unit of the sums changes: see above
    reading = model.states(tokens(), [6, 8], layers=layer, hooks=verbs)[layer]
    before, after = (reading[:, i].sum(2) if reading.dim() > 5 else reading[:, i] for i in range(2))
    assert same(after, before)


def test_verbs_are_files_too(tmp_path: Any) -> None:
    model = lively("mamba2")
    f = factors_of(model, tokens())
    key = unit_keys(f)
    verbs = [*implant(model, LAYER, key, f["value"][0, :, 2], after=AFTER), *freeze(model, LAYER, [8, 9])]
    save_interventions(verbs, tmp_path / "edits")
    assert same(z_of(model, load_interventions(tmp_path / "edits")), z_of(model, verbs))
    with pytest.raises(HookError, match="carries no recurrent"):
        reset(models.build("gpt"), 0, after=2)
    with pytest.raises(HookError, match="between 0 and 1"):
        clamp_gate(model, LAYER, 1.5)
    with pytest.raises(HookError, match="Did you mean 'state'"):
        patch_state(model, LAYER, torch.zeros(1), after=1, slot="stat")
    with pytest.raises(HookError, match="shared by several heads"):
        ablate_modes(model, LAYER, 0, heads=1)


# ---------------------------------------------------------------------------------------------------------- readings


def test_retention_is_the_states_answer(case: Any) -> None:
    """Against states read one by one and asked one by one."""
    family, model, f = case
    retention = retention_matrix(model, tokens(), LAYER)
    _, states = run(family, f)
    value = f["value"].expand(*f["key"].shape[:3], -1)
    for t, j in ((0, 0), (5, 2), (12, 12), (12, 0)):
        answer = recall(model, LAYER, states[t], f["key"][:, :, j : j + 1])[:, :, 0]
        cosine = torch.cosine_similarity(answer, value[:, :, j], dim=-1)
        error = (answer - value[:, :, j]).norm(dim=-1) / value[:, :, j].norm(dim=-1)
        assert same(retention.cosine[:, :, t, j], cosine) and same(retention.relative_error[:, :, t, j], error)
    future = torch.ones(LENGTH, LENGTH).triu(1).bool()
    assert retention.cosine[..., future].isnan().all() and not retention.cosine[..., ~future].isnan().any()
    assert retention.by_age().shape == (*retention.cosine.shape[:2], LENGTH)
    assert same(retention.by_age()[..., 12], retention.cosine[:, :, 12, 0])


def test_token_table_and_spectrum(case: Any) -> None:
    family, model, f = case
    _, states = run(family, f)
    table = token_table(model, tokens(), LAYER)
    heads = states[0].shape[1]
    assert {tuple(x.shape) for x in table.values()} <= {(2, heads, LENGTH), (2, 1, LENGTH)} | {
        (2, x.shape[1], LENGTH) for x in table.values()
    }
    assert same(table["state norm"], torch.stack([s.flatten(2).norm(dim=-1) for s in states], -1))
    if "log_decay" in f and f["log_decay"].dim() == 3 and "log_decay" not in model.mixers[LAYER].constant_factors():
        assert same(table["kept"], f["log_decay"].exp())
    if family == "level":
        assert same(table["level 2"], f["level"][..., 2])
    if family == "memory":
        assert (table["surprise"] > 0).all() and "memory loss" in table and "momentum kept" in table
    spectrum = state_spectrum(model, tokens(), LAYER, [4, 12])
    expected = torch.stack([torch.linalg.svdvals(states[t]) for t in (4, 12)], 1)
    assert same(spectrum.singular_values, expected)
    rank = spectrum.effective_rank
    assert (rank >= 0).all() and (rank <= expected.shape[-1] + 1e-9).all()


def test_ranks_of_planted_spectra() -> None:
    from probes.state_tools import Spectrum

    even = Spectrum(torch.tensor([[[[2.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]]), (0,))
    assert torch.allclose(even.effective_rank, torch.tensor([[[2.0, 1.0, 0.0]]]))
    assert torch.allclose(even.stable_rank, torch.tensor([[[2.0, 1.0, 0.0]]]))


def test_layers_without_a_memory_say_so() -> None:
    model = models.build("gpt")
    for call in (lambda: retention_matrix(model, "abc", 0), lambda: state_point(model, 1)):
        with pytest.raises(UnknownHookPoint, match=r"carries no recurrent state\. No layer of this model has one"):
            call()
