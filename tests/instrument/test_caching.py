"""`run_with_cache`: what is selected, how it is stored, and that it stays what it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.decoder import Decoder
from tests.instrument.tiny_models import gpt2, lively, nothing_attached, some_tokens
from workbench.instrument.cache import ActivationCache
from workbench.instrument.errors import CachedTensorChanged, HookError, UnknownHookPoint
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.interventions import Ablate, Patch
from workbench.instrument.selection import Select

TOKENS = some_tokens()


@pytest.fixture(scope="module")
def model() -> Decoder:
    return lively("gpt2")


@pytest.fixture(scope="module")
def everything(model: Decoder) -> ActivationCache:
    return model.run_with_cache(TOKENS)[1]


def same(a: Tensor, b: Tensor) -> None:
    """Equal up to rounding: what else is watched decides between a fused and an explicit computation."""
    assert a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-12)


PATTERNS = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
SELECTIONS: dict[str, tuple[Callable[[Decoder], dict[str, Any]], list[str]]] = {
    "name": (lambda m: {"names": PATTERNS[1]}, PATTERNS[1:2]),
    "TransformerLens's word": (lambda m: {"names_filter": PATTERNS[1]}, PATTERNS[1:2]),
    "glob": (lambda m: {"names": "blocks.*.attn.hook_pattern"}, PATTERNS),
    "predicate": (lambda m: {"names": lambda name: name.endswith("pattern")}, PATTERNS),
    "list": (lambda m: {"names": [PATTERNS[2], "hook_embed"]}, [PATTERNS[2], "hook_embed"]),
    "hook point": (lambda m: {"names": m.hook_dict[PATTERNS[0]]}, PATTERNS[:1]),
    "Select": (lambda m: {"names": Select(role="pattern", layer=-1)}, PATTERNS[2:]),
    "Select of several layers": (lambda m: {"names": Select(role="pattern", layer=[0, 2])}, PATTERNS[::2]),
    "Select with a glob": (
        lambda m: {"names": Select(role="norm_scale", name="*.ln2.*")},
        [f"blocks.{i}.ln2.hook_scale" for i in range(3)],
    ),
    "role": (lambda m: {"role": "pattern"}, PATTERNS),
    "role and layers": (lambda m: {"role": "pattern", "layers": [1]}, PATTERNS[1:2]),
    "glob and layers": (lambda m: {"names": "blocks.*.attn.hook_pattern", "layers": 0}, PATTERNS[:1]),
    "the same twice": (lambda m: {"names": [PATTERNS[0], "*.hook_pattern"]}, PATTERNS),
}


@pytest.mark.parametrize("way", SELECTIONS)
def test_every_way_to_select(model: Decoder, everything: ActivationCache, way: str) -> None:
    arguments, wanted = SELECTIONS[way]
    logits, cache = model.run_with_cache(TOKENS, **arguments(model))
    assert sorted(cache) == sorted(wanted)
    for name in wanted:
        same(cache[name], everything[name])
    same(logits, model(TOKENS))


def test_a_layer_alone_means_what_costs_nothing_extra(model: Decoder, everything: ActivationCache) -> None:
    """`layers=1` and `Select(layer=1)` are the part of "everything" in that layer; no head results, no states at every position."""
    inside = {name for name in everything if name.startswith("blocks.1.")}
    assert set(model.run_with_cache(TOKENS, layers=1)[1]) == inside
    assert set(model.run_with_cache(TOKENS, names=Select(layer=1))[1]) == inside
    retnet = lively("retnet")
    assert not [name for name in retnet.run_with_cache(TOKENS, layers=1)[1] if "state" in name]


def test_parts_of_axes(model: Decoder, everything: ActivationCache) -> None:
    """heads= and positions= (numbers, lists, negative ones, slices) keep exactly that part, of pattern rows and of position axes."""
    _, cache = model.run_with_cache(
        TOKENS, names=["*.hook_pattern", "*.hook_z", "*.hook_resid_post"], heads=[0, -1], positions=[2, -1]
    )
    for layer in range(3):
        rows, columns = torch.tensor([2, 7]), torch.tensor([0, 3])
        same(cache["pattern", layer], everything["pattern", layer][:, columns][:, :, rows])
        same(cache["z", layer], everything["z", layer][:, rows][:, :, columns])
        same(cache["resid_post", layer], everything["resid_post", layer][:, rows])
    _, cache = model.run_with_cache(TOKENS, role="resid_post", positions=slice(1, -1))
    same(cache["resid_post", 0], everything["resid_post", 0][:, 1:-1])
    _, cache = model.run_with_cache(TOKENS, role="pattern", pos_slice=3)
    same(cache["pattern", 0], everything["pattern", 0][:, :, 3:4])
    _, cache = model.run_with_cache(TOKENS, role="pattern", heads=range(1, 3), positions=torch.tensor([0, 1]))
    same(cache["pattern", 0], everything["pattern", 0][:, 1:3, :2])


def test_a_part_does_not_keep_the_whole_alive(model: Decoder) -> None:
    _, cache = model.run_with_cache(TOKENS, role="pattern", positions=[-1])
    for tensor in cache.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert cache.nbytes() == 3 * 2 * 4 * 1 * 8 * 8


def test_dtype_and_device(model: Decoder, everything: ActivationCache) -> None:
    """Floating tensors are converted when stored; "meta" stands for another device."""
    _, cache = model.run_with_cache(TOKENS, role="pattern", dtype=torch.float16)
    assert torch.equal(cache["pattern", 0], everything["pattern", 0].half())
    _, cache = model.run_with_cache(TOKENS, role="pattern", device="meta")
    assert cache["pattern", 0].device.type == "meta" and cache["pattern", 0].shape == (2, 4, 8, 8)
    assert everything.to(dtype=torch.bfloat16)["pattern", 0].dtype == torch.bfloat16


def test_the_batch_axis_can_go(model: Decoder) -> None:
    metric = {"gradients_of": lambda logits: logits.sum()}
    _, cache = model.run_with_cache(TOKENS[:1], role="pattern", remove_batch_dim=True, **metric)
    assert cache["pattern", 0].shape == cache.gradients[PATTERNS[0]].shape == (4, 8, 8)
    with pytest.raises(HookError, match="batch=2, expected 1"):
        model.run_with_cache(TOKENS, role="pattern", remove_batch_dim=True)


def test_steps_of_shared_depth() -> None:
    """The bare name is every pass, `name@1` one of them; by_role and depth tell them apart instead of keeping the last."""
    model = lively("looped")
    _, cache = model.run_with_cache(TOKENS, names="blocks.0.hook_resid_pre")
    assert list(cache) == ["blocks.0.hook_resid_pre@0", "blocks.0.hook_resid_pre@1"]
    assert not torch.equal(*cache.values())
    _, one = model.run_with_cache(TOKENS, names="blocks.0.hook_resid_pre@1")
    assert list(one) == ["blocks.0.hook_resid_pre@1"] and torch.equal(
        one["blocks.0.hook_resid_pre@1"], cache["resid_pre@1", 0]
    )
    _, cache = model.run_with_cache(TOKENS, role="pattern")
    assert list(cache.by_role("pattern")) == [(layer, step) for step in range(2) for layer in range(3)]
    assert list(model.patterns(TOKENS, layers=1)) == [(1, 0), (1, 1)]
    with pytest.raises(UnknownHookPoint, match="Did you mean"):
        cache["pattern", 0]


def test_by_role_refuses_to_choose(everything: ActivationCache) -> None:
    """Two norms in a layer: neither is dropped in silence."""
    with pytest.raises(
        UnknownHookPoint, match=r"more than once at layer 0: 'blocks.0.ln1.hook_scale' and 'blocks.0.ln2.hook_scale'"
    ):
        everything.by_role("norm_scale")
    assert list(everything.by_role("pattern")) == [0, 1, 2]
    assert list(everything.by_role("logits")) == [None]


@pytest.mark.parametrize("name", ["retnet", "mamba2", "bdh"])
def test_states_at_positions(name: str) -> None:
    """Every form of position in an address, and positions= of states, against the state at every position."""
    model = lively(name)
    state = next(n for n, p in model.hook_dict.items() if p.role == "state" and p.layer_index == 1)
    _, cache = model.run_with_cache(TOKENS, names=state)
    everywhere = cache[state]
    assert everywhere.shape[:2] == (2, 8)
    assert torch.equal(model.run_with_cache(TOKENS, names=f"{state}[*]")[1][state], everywhere)
    forms = {
        "[3]": everywhere[:, 3],
        "[-1]": everywhere[:, 7],
        "[3:6]": everywhere[:, 3:6],
        "[6:]": everywhere[:, 6:],
        "[-3:-1]": everywhere[:, 5:7],
        "[1,4,-2]": everywhere[:, [1, 4, 6]],
    }
    _, cache = model.run_with_cache(TOKENS, names=[state + written for written in forms])
    assert set(cache) == {state + written for written in forms}
    for written, expected in forms.items():
        assert torch.allclose(cache[state + written], expected, rtol=0, atol=1e-12), written
    for positions, expected in {(0, -1): everywhere[:, [0, 7]], (5,): everywhere[:, [5]]}.items():
        _, cache = model.run_with_cache(TOKENS, names=state, positions=positions)
        same(cache[state], expected)
    for positions in (slice(-3, None), slice(2, -1), slice(None)):
        _, cache = model.run_with_cache(TOKENS, names=state, positions=positions)
        same(cache[state], everywhere[:, positions])
    _, cache = model.run_with_cache(TOKENS, names=state, positions=[-1], heads=[1])
    same(cache[state], everywhere[:, [7]][:, :, [1]])


def test_a_state_is_never_stacked_with_a_gap() -> None:
    """A position that does not occur would shift the others: an error even without strict."""
    model = lively("retnet")
    for strict in (True, False):
        with pytest.raises(HookError, match=r"position 99 of a state: the run has positions 0..7"):
            model.run_with_cache(TOKENS, role="state", positions=[3, 99], strict=strict)
        with pytest.raises(HookError, match="position 99"):
            model.run_with_cache(TOKENS, names="blocks.0.mixer.hook_state[3,99]", strict=strict)


def test_positions_are_absolute_when_a_state_is_carried() -> None:
    """A call that continues 8 tokens: position 9 is its second token, for activations and for states."""
    model = lively("retnet")
    whole = some_tokens(length=12)
    _, everything = model.run_with_cache(whole, names=["*.hook_resid_post", "*.hook_state"])
    _, state = model(whole[:, :8], return_state=True)
    _, cache = model.run_with_cache(
        whole[:, 8:], state=state, names=["*.hook_resid_post", "*.hook_state"], positions=[9, -1]
    )
    for key in ("resid_post", "state"):
        assert torch.allclose(cache[key, 2], everything[key, 2][:, [9, 11]], rtol=0, atol=1e-10)
    with pytest.raises(HookError, match=r"pos 3 .* pos 8..11"):
        model.run_with_cache(whole[:, 8:], state=state, role="resid_post", positions=[3])


def test_other_names_for_the_same_point() -> None:
    """BDH's paper symbols: selecting, globbing, hooking and looking up by them; an unknown one is suggested."""
    model = lively("bdh")
    _, cache = model.run_with_cache(TOKENS, names=["blocks.0.hook_v", "blocks.*.hook_a_ln", "blocks.1.hook_*"])
    assert cache["blocks.0.hook_v"] is cache["blocks.0.hook_resid_pre"] and "blocks.2.ln_a.hook_normalized" in cache
    assert (
        cache["v", 1] is cache["resid_pre", 1] and cache["blocks.2.hook_a_ln"] is cache["blocks.2.ln_a.hook_normalized"]
    )
    assert "blocks.1.ln_a.hook_normalized" in cache, "by its other name, blocks.1.hook_a_ln"
    edited = model.run_with_hooks(TOKENS, hooks=[Ablate("blocks.0.hook_v")])
    assert torch.equal(edited, model.run_with_hooks(TOKENS, hooks=[Ablate("blocks.0.hook_resid_pre")]))
    with pytest.raises(UnknownHookPoint, match=r"Did you mean .*'blocks.0.hook_a_ln'"):
        model.run_with_cache(TOKENS, names="blocks.0.hook_a_lm")


# ------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", ["gpt2", "retnet", "looped"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """The gradient at a point == central difference of the metric along a random direction added there by a hook."""
    model = lively(name)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1].square().sum()

    roles = ["resid_pre", "pattern", "z", "post"]
    names = [n for n in model.hook_dict if n.startswith("blocks.1.") and n.rsplit("hook_")[-1] in roles]
    assert len(names) >= 3
    _, cache = model.run_with_cache(TOKENS, names=names, gradients_of=metric)
    assert set(cache.gradients) == set(cache)
    for address, gradient in cache.gradients.items():
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(3), dtype=gradient.dtype)
        if "pattern" in address:
            direction = direction.tril()

        def moved(epsilon: float, address: str = address, direction: Tensor = direction) -> float:
            return float(
                metric(model.run_with_hooks(TOKENS, hooks=[(address, lambda x, hook: x + epsilon * direction)]))
            )

        difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert difference == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-7)
        assert difference != 0


def test_gradients_of_states_and_parts() -> None:
    """Gradients are selected like the activations: same addresses, same shapes, same numbers as selecting afterwards."""
    model = lively("retnet")
    metric = {"gradients_of": lambda logits: logits.square().sum()}
    _, whole = model.run_with_cache(TOKENS, names=["*.hook_state", "*.hook_z"], **metric)
    _, part = model.run_with_cache(
        TOKENS, names=["*.hook_state", "*.hook_z"], positions=[2, -3], heads=[1], dtype=torch.float32, **metric
    )
    for address, gradient in part.gradients.items():
        assert gradient.shape == part[address].shape and gradient.dtype == torch.float32
        expected = whole.gradients[address][:, [2, 5]][:, :, [1]]
        assert torch.allclose(gradient.double(), expected, rtol=1e-6, atol=1e-9) and expected.abs().max() > 0
    _, single = model.run_with_cache(TOKENS, names="blocks.1.mixer.hook_state[2]", **metric)
    assert torch.allclose(
        single.gradients["blocks.1.mixer.hook_state[2]"], whole.gradients["blocks.1.mixer.hook_state"][:, 2]
    )


def test_gradients_with_frozen_and_unfrozen_parameters_agree() -> None:
    """Frozen parameters (lively models) and ordinary ones give the same gradients, under no_grad too; parameters gather none."""
    model = gpt2().double()
    arguments: dict[str, Any] = {"incl_bwd": True, "return_type": "loss"}
    loss, unfrozen = model.run_with_cache(TOKENS, **arguments)
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        _, quiet = model.run_with_cache(TOKENS, **arguments)
    model.requires_grad_(False)
    frozen_loss, frozen = model.run_with_cache(TOKENS, **arguments)
    assert float(loss.detach()) == pytest.approx(float(frozen_loss.detach()), abs=1e-12)
    for address, gradient in unfrozen.gradients.items():
        assert torch.allclose(gradient, frozen.gradients[address], rtol=0, atol=1e-12), address
        assert torch.equal(gradient, quiet.gradients[address]), address
    assert nothing_attached(model)


def test_gradients_need_a_number_that_depends_on_something(model: Decoder) -> None:
    with pytest.raises(HookError, match=r"Gradients need a scalar; got \(2, 8, 256\)"):
        model.run_with_cache(TOKENS, incl_bwd=True)
    with pytest.raises(HookError, match="does not depend"):
        model.run_with_cache(TOKENS, gradients_of=lambda logits: torch.tensor(1.0))
    assert nothing_attached(model)


def test_undetached_activations_can_be_differentiated() -> None:
    """detach=False keeps the graph: d logits / d cached activation, for a norm's scale as well."""
    model = gpt2().double()
    names = ["blocks.1.hook_resid_mid", "blocks.1.ln2.hook_scale", "blocks.0.attn.hook_pattern"]
    logits, cache = model.run_with_cache(TOKENS, names=names, detach=False)
    gradients = torch.autograd.grad(logits.square().sum(), list(cache.values()))
    _, expected = model.run_with_cache(TOKENS, names=names, gradients_of=lambda logits: logits.square().sum())
    for address, gradient in zip(cache, gradients, strict=True):
        same(gradient, expected.gradients[address])
        assert not expected[address].requires_grad


# --------------------------------------------------------------------------------- a cached tensor stays as it was


def test_in_place_edits_downstream_do_not_reach_the_cache(model: Decoder, everything: ActivationCache) -> None:
    """resid_post of one block and resid_pre of the next are one tensor; zeroing the latter in place leaves the cached former."""

    def zero(x: Tensor, hook: HookPoint) -> None:
        x.zero_()

    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"]
    _, cache = model.run_with_cache(
        TOKENS, names=names, hooks=[("blocks.1.hook_resid_pre", zero), ("blocks.1.ln1.hook_normalized", zero)]
    )
    same(cache[names[0]], everything[names[0]])
    assert cache[names[1]].abs().max() == 0
    assert cache[names[2]].abs().max() > 0


def test_a_buffer_that_a_hook_reuses_is_copied(model: Decoder) -> None:
    """A hook that returns the same tensor at every layer, rewritten each time: the cache holds three different values."""
    buffer = torch.zeros(2, 8, 24, dtype=torch.float64)

    def reuse(x: Tensor, hook: HookPoint) -> Tensor:
        return buffer.fill_(hook.layer_index or 0)

    _, cache = model.run_with_cache(TOKENS, names="*.hook_resid_post", hooks=[("*.hook_resid_post", reuse)])
    assert [float(cache["resid_post", layer].unique()) for layer in range(3)] == [0.0, 1.0, 2.0]
    buffer.fill_(9.0)
    assert float(cache["resid_post", 2].unique()) == 2.0


def test_a_reference_kept_by_a_hook_is_not_the_cached_tensor(model: Decoder, everything: ActivationCache) -> None:
    """Writing into what a hook saw, later in the run or after it, changes neither the run nor the cache."""
    kept: list[Tensor] = []

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept.append(x)

    def spoil(x: Tensor, hook: HookPoint) -> None:
        kept[0].data.fill_(float("nan"))
        kept[0].zero_()

    name = "blocks.0.hook_resid_pre"
    logits, cache = model.run_with_cache(TOKENS, names=name, hooks=[(name, keep), ("blocks.0.hook_attn_out", spoil)])
    kept[0].fill_(5.0)
    assert torch.equal(cache[name], everything[name]) and torch.allclose(logits, model(TOKENS), rtol=0, atol=1e-12)


def test_edits_through_data_and_numpy_count(model: Decoder) -> None:
    """In-place edits that torch's version counter does not see are edits all the same."""

    def zero(x: Tensor, hook: HookPoint) -> None:
        x.data.zero_()

    def zero_by_numpy(x: Tensor, hook: HookPoint) -> None:
        x.numpy()[...] = 0

    expected = model.run_with_hooks(TOKENS, hooks=[Ablate("blocks.1.attn.hook_z")])
    for hook in (zero, zero_by_numpy):
        assert torch.equal(model.run_with_hooks(TOKENS, hooks=[("blocks.1.attn.hook_z", hook)]), expected)


def test_what_the_caller_holds_is_not_the_cache(model: Decoder) -> None:
    """Writing into the returned logits, the returned state, the residual stream given or a patch's value leaves the cache alone."""
    (logits, state), cache = model.run_with_cache(TOKENS, return_state=True)
    before = {address: tensor.clone() for address, tensor in cache.items()}
    logits.fill_(1.0)
    for slots in state.layers:
        for tensor in slots.values():
            tensor.zero_()
    assert all(torch.equal(cache[address], tensor) for address, tensor in before.items())

    residual = torch.randn(2, 8, 24, dtype=torch.float64)
    _, cache = model.run_with_cache(residual, start_at_layer=1, names="blocks.1.hook_resid_pre")
    residual.zero_()
    assert cache["resid_pre", 1].abs().max() > 0

    value = before["blocks.1.hook_resid_pre"]
    _, cache = model.run_with_cache(
        TOKENS, names="blocks.1.hook_resid_pre", hooks=[Patch("blocks.1.hook_resid_pre", value=value)]
    )
    value.zero_()
    assert cache["resid_pre", 1].abs().max() > 0


def test_writing_behind_the_instrument_is_an_error(model: Decoder) -> None:
    """A torch hook on a module gets the live tensor. If it writes into it after it was cached, the run says so."""

    def overwrite(module: Any, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].mul_(2)

    handle = model.blocks[0].mlp.register_forward_pre_hook(overwrite)
    try:
        with pytest.raises(CachedTensorChanged, match=r"blocks.0.ln2.hook_normalized.*work on a clone"):
            model.run_with_cache(TOKENS, names="blocks.0.ln2.hook_normalized")
    finally:
        handle.remove()
    assert nothing_attached(model)


def test_inference_mode_and_function_transforms(model: Decoder, everything: ActivationCache) -> None:
    """Caching works where tensors count no versions (inference mode) or own no memory (torch.func)."""
    with torch.inference_mode():
        _, cache = model.run_with_cache(TOKENS)
        doubled = model.run_with_hooks(TOKENS, hooks=[("blocks.0.hook_attn_out", lambda x, hook: 2 * x)])
        _, part = model.run_with_cache(everything["resid_pre", 1].clone(), start_at_layer=1, role="pattern")
    same(cache["pattern", 2], everything["pattern", 2])
    assert torch.equal(doubled, model.run_with_hooks(TOKENS, hooks=[("blocks.0.hook_attn_out", lambda x, hook: 2 * x)]))
    same(part["pattern", 2], everything["pattern", 2])

    retnet = lively("retnet")  # torch's fused attention has no forward derivative; a linear mixer has

    def last(residual: Tensor) -> Tensor:
        _, cache = retnet.run_with_cache(residual, start_at_layer=1, names="blocks.2.hook_resid_post", detach=False)
        return cache["resid_post", 2]

    x = retnet.run_with_cache(TOKENS, names="blocks.1.hook_resid_pre")[1]["resid_pre", 1]
    _, slope = torch.func.jvp(last, (x,), (torch.ones_like(x),))
    assert torch.allclose(slope, (last(x + 1e-6) - last(x - 1e-6)) / 2e-6, rtol=0, atol=1e-7)
    assert slope.abs().max() > 1e-3


def test_an_inference_tensor_as_input_outside_inference_mode(model: Decoder, everything: ActivationCache) -> None:
    with torch.inference_mode():
        residual = everything["resid_pre", 1].clone()
    _, cache = model.run_with_cache(residual, start_at_layer=1, names="blocks.1.hook_resid_pre")
    assert torch.equal(cache["resid_pre", 1], everything["resid_pre", 1])


# ------------------------------------------------------------------------------------------- the cache as an object


def test_stack_and_save(model: Decoder, everything: ActivationCache, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    assert torch.equal(
        everything.stack("resid_post"), torch.stack([everything["resid_post", layer] for layer in range(3)])
    )
    _, some = model.run_with_cache(
        TOKENS, names=["*.hook_pattern", "blocks.0.hook_resid_post"], gradients_of=lambda x: x.sum()
    )
    with pytest.raises(UnknownHookPoint, match=r"cached for layers \[0\] of 0..2"):
        some.stack("resid_post")
    some.save(tmp_path / "cache.safetensors")
    stored = load_file(tmp_path / "cache.safetensors")
    assert {k: v.shape for k, v in stored.items()} == {
        name + end: some[name].shape for name in some for end in ("", "_grad")
    }
    assert torch.equal(stored[PATTERNS[0] + "_grad"], some.gradients[PATTERNS[0]])
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]
