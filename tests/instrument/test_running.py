"""Running with hooks: calls, nested blocks, permanent hooks, backward hooks, partial runs, generation, padding, steps and states."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.decoder import Decoder
from tests.instrument.tiny_models import gpt2, largest, lively, nothing_attached, some_tokens
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.interventions import Ablate, EditState, Scale, Steer
from workbench.instrument.selection import Select

TOKENS = some_tokens()
POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> Decoder:
    return lively("gpt2")


@pytest.fixture(scope="module")
def plain(model: Decoder) -> Tensor:
    return model(TOKENS)


def double(x: Tensor, hook: HookPoint) -> Tensor:
    return 2 * x


def add_one(x: Tensor, hook: HookPoint) -> Tensor:
    return x + 1


def zero_in_place(x: Tensor, hook: HookPoint) -> None:
    x.zero_()


def after(model: Decoder, residual: Tensor) -> Tensor:
    """What the model makes of a residual stream that leaves block 1: the oracle for every edit at POINT."""
    return model(residual, start_at_layer=2)


def before(model: Decoder) -> Tensor:
    """The residual stream that leaves block 1."""
    return model(TOKENS, stop_at_layer=2)


# ----------------------------------------------------------------------------------------------------- hooks


def test_a_hook_replaces_the_activation(model: Decoder, plain: Tensor) -> None:
    changed = model.run_with_hooks(TOKENS, hooks=[(POINT, double)])
    assert largest(changed - after(model, 2 * before(model))) < 1e-12 < largest(changed - plain)
    assert torch.equal(model(TOKENS), plain) and nothing_attached(model)


def test_a_hook_that_returns_nothing_only_reads_or_edits_in_place(model: Decoder, plain: Tensor) -> None:
    seen: list[str] = []
    assert torch.equal(
        model.run_with_hooks(TOKENS, hooks=[("*.hook_resid_post", lambda x, hook: seen.append(hook.name))]), plain
    )
    assert seen == [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    changed = model.run_with_hooks(TOKENS, hooks=[(POINT, zero_in_place)])
    assert largest(changed - after(model, torch.zeros_like(before(model)))) < 1e-12


def test_signatures_that_are_fine(model: Decoder) -> None:
    """Any name for the second argument, keyword-only `hook`, *args, **kwargs, defaults, callable objects, bound methods, partials."""
    from functools import partial

    class Doubler:
        def __call__(self, x: Tensor, hook: HookPoint) -> Tensor:
            return 2 * x

        def method(self, x: Tensor, point: HookPoint) -> Tensor:
            return 2 * x

    def keyword(x: Tensor, *, hook: HookPoint) -> Tensor:
        assert hook.name == POINT
        return 2 * x

    def with_default(x: Tensor, hook: HookPoint, factor: float = 2.0) -> Tensor:
        return factor * x

    fine = [
        lambda x, whatever: 2 * x,
        lambda *arguments: 2 * arguments[0],
        lambda x, **named: 2 * x if named["hook"].layer() == 1 else None,
        keyword,
        with_default,
        partial(with_default, factor=2),
        partial(lambda factor, x, hook: factor * x, 2),
        Doubler(),
        Doubler().method,
    ]
    expected = model.run_with_hooks(TOKENS, hooks=[(POINT, double)])
    for function in fine:
        assert torch.equal(model.run_with_hooks(TOKENS, hooks=[(POINT, function)]), expected)


def test_hooks_run_in_the_order_attached_outer_blocks_first(model: Decoder) -> None:
    residual = before(model)
    expected = {"ab": after(model, 2 * residual + 1), "ba": after(model, 2 * (residual + 1))}
    assert largest(model.run_with_hooks(TOKENS, hooks=[(POINT, double), (POINT, add_one)]) - expected["ab"]) < 1e-12
    with model.hooks([(POINT, add_one)]):
        assert largest(model.run_with_hooks(TOKENS, hooks=[(POINT, double)]) - expected["ba"]) < 1e-12
        with model.hooks([(POINT, double)]) as inner:
            assert inner is model
            assert largest(model(TOKENS) - expected["ba"]) < 1e-12
        assert largest(model(TOKENS) - after(model, residual + 1)) < 1e-12
    assert nothing_attached(model)


def test_the_cache_holds_what_the_model_went_on_with(model: Decoder) -> None:
    """In a block, inner or outer: the cache sees the activation after every edit."""
    expected = 2 * before(model) + 1
    with model.hooks([(POINT, double)]):
        _, cache = model.run_with_cache(TOKENS, names=POINT, hooks=[(POINT, add_one)])
    assert largest(cache[POINT] - expected) < 1e-12


def test_transformer_lens_words(model: Decoder) -> None:
    """fwd_hooks= and bwd_hooks= as in TransformerLens."""
    assert torch.equal(
        model.run_with_hooks(TOKENS, fwd_hooks=[(POINT, double)]), model.run_with_hooks(TOKENS, hooks=[(POINT, double)])
    )


# ------------------------------------------------------------------------------------------------- permanent


def test_permanent_hooks_stay_until_removed(model: Decoder, plain: Tensor) -> None:
    changed = model.run_with_hooks(TOKENS, hooks=[(POINT, double)])
    residual = before(model)
    handle = model.add_hook(POINT, double)
    assert torch.equal(model(TOKENS), changed) and model.list_hooks() == {POINT: 1}
    assert "1 permanent hook" in repr(model.hook_dict[POINT])
    both = model.run_with_hooks(TOKENS, hooks=[(POINT, add_one)])
    assert largest(both - after(model, 2 * residual + 1)) < 1e-12, "permanent hooks come first"
    _, cache = model.run_with_cache(TOKENS, names=POINT)
    assert largest(model(cache[POINT], start_at_layer=2) - changed) < 1e-12, "the cache sees them"
    handle.remove()
    handle.remove()
    assert torch.equal(model(TOKENS), plain) and nothing_attached(model)


def test_reset_takes_off_all_permanent_hooks(model: Decoder, plain: Tensor) -> None:
    handles = [model.add_hook("*.hook_attn_out", Ablate("*.hook_attn_out")), model.add_hook(POINT, double)]
    assert sum(model.list_hooks().values()) == 4
    assert largest(model(TOKENS) - plain) > 1e-3
    model.reset_hooks()
    for handle in handles:
        handle.remove()
    assert torch.equal(model(TOKENS), plain) and nothing_attached(model)


def test_a_permanent_hook_on_a_pattern_makes_its_layer_explicit(model: Decoder, plain: Tensor) -> None:
    """Reading a pattern that the fused kernel never forms works permanently as well."""
    seen: list[tuple[int, ...]] = []
    handle = model.add_hook("blocks.0.attn.hook_pattern", lambda x, hook: seen.append(tuple(x.shape)))
    assert largest(model(TOKENS) - plain) < 1e-12 and seen == [(2, 4, 8, 8)]
    handle.remove()


# -------------------------------------------------------------------------------------------------- backward


def test_backward_hooks_read_and_replace_gradients() -> None:
    model = gpt2().double()
    names = ["blocks.1.hook_resid_pre", "blocks.0.attn.hook_pattern"]
    _, cache = model.run_with_cache(TOKENS, names=names, incl_bwd=True, return_type="loss")
    seen: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = gradient

    with model.hooks(bwd_hooks=[(names, keep)]):
        model(TOKENS, return_type="loss").backward()
    assert {n: largest(seen[n] - cache.gradients[n]) < 1e-15 for n in names} == dict.fromkeys(names, True)

    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = model.run_with_hooks(TOKENS, return_type="loss", bwd_hooks=[("blocks.1.hook_resid_pre", double)])
    loss.backward()
    for name, parameter in model.named_parameters():
        below = name.startswith(("embed", "pos_embed", "blocks.0"))
        assert largest(parameter.grad - (2 if below else 1) * expected[name]) < 1e-12, name
    assert nothing_attached(model)


def test_gradients_pass_from_point_to_point_even_where_both_hold_one_tensor() -> None:
    """What leaves a block is what enters the next: an edit of the gradient there is seen here, upstream of it, and not the other way."""
    model = gpt2().double()
    seen: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = gradient

    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    _, cache = model.run_with_cache(TOKENS, names=names, incl_bwd=True, return_type="loss")
    for doubled, factors in ((names[1], (2, 2)), (names[0], (2, 1))):
        with model.hooks(bwd_hooks=[(doubled, double), (names, keep)]):
            model(TOKENS, return_type="loss").backward()
        for name, factor in zip(names, factors, strict=True):
            assert largest(seen[name] - factor * cache.gradients[name]) < 1e-15, (doubled, name)


def test_backward_hooks_run_in_the_order_attached() -> None:
    model = gpt2().double()
    seen: list[Tensor] = []
    keep = (POINT, lambda gradient, hook: seen.append(gradient))
    for hooks in ([keep, (POINT, double), keep], [(POINT, double), (POINT, double), keep]):
        with model.hooks(bwd_hooks=hooks):
            model(TOKENS, return_type="loss").backward()
    with model.hooks(bwd_hooks=[(POINT, double)]), model.hooks(bwd_hooks=[keep]):
        model(TOKENS, return_type="loss").backward()
    assert [largest(g - factor * seen[0]) < 1e-15 for g, factor in zip(seen[1:], (2, 4, 2), strict=True)] == [True] * 3


def test_permanent_backward_hooks() -> None:
    model = gpt2().double()
    seen: list[Tensor] = []
    handle = model.add_hook("blocks.1.hook_resid_pre", lambda gradient, hook: seen.append(gradient), backward=True)
    for _ in range(2):
        model(TOKENS, return_type="loss").backward()
    handle.remove()
    model(TOKENS, return_type="loss").backward()
    assert len(seen) == 2 and torch.equal(*seen)


# ---------------------------------------------------------------------------------------------- partial runs


def test_stop_and_start(model: Decoder, plain: Tensor) -> None:
    """Stopping gives the residual stream that enters the layer; starting there gives the logits; hooks fire in both halves."""
    _, cache = model.run_with_cache(TOKENS)
    for layer in range(3):
        residual = model(TOKENS, stop_at_layer=layer)
        assert largest(residual - cache["resid_pre", layer]) < 1e-12
        assert largest(model(residual, start_at_layer=layer) - plain) < 1e-12
    assert torch.equal(model(TOKENS, stop_at_layer=-1), model(TOKENS, stop_at_layer=2))
    _, part = model.run_with_cache(TOKENS, stop_at_layer=1)
    assert set(part) == {name for name in cache if name.startswith(("hook_", "blocks.0"))}
    half = model.run_with_hooks(TOKENS, stop_at_layer=2, hooks=[(POINT, double)])
    assert largest(half - 2 * before(model)) < 1e-12
    rest = model.run_with_hooks(
        before(model), start_at_layer=1, stop_at_layer=2, hooks=[("blocks.1.hook_attn_out", zero_in_place)]
    )
    assert rest.shape == half.shape


# ------------------------------------------------------------------------------------------------ generation

GENERATORS = ["gpt2", "llama", "alibi", "retnet", "mamba2", "bdh"]


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_hooks_fire_in_generation_as_in_whole_runs(name: str, side: str | None) -> None:
    """With the cache or state, hooks see each token once; edits by absolute position give the tokens of the slow way."""
    model = lively(name)
    prompt = some_tokens(length=6)
    mask = None
    if side is not None:
        mask = torch.ones_like(prompt, dtype=torch.bool)
        mask[0, slice(0, 2) if side == "left" else slice(4, 6)] = False
    point = "blocks.1.hook_resid_post"
    edits = [
        Steer(point, direction=torch.randn(model.d_model, dtype=torch.float64), coefficient=50.0, positions=[1, 7, 8]),
        Scale("blocks.0.hook_resid_pre", factor=0.5, positions=[3, 6]),
    ]
    shapes: list[tuple[int, ...]] = []
    offsets: list[int] = []

    def look(x: Tensor, hook: HookPoint) -> None:
        shapes.append(tuple(x.shape))
        offsets.append(hook.offset)

    arguments: dict[str, Any] = {"max_new_tokens": 5, "mask": mask}
    fast = model.generate(prompt, hooks=[*edits, (point, look)], **arguments)
    slow = model.generate(prompt, hooks=edits, use_state=False, **arguments)
    assert torch.equal(fast, slow) and torch.equal(fast[:, :6], prompt)
    assert shapes == [(2, 6, model.d_model)] + [(2, 1, model.d_model)] * 4 and offsets == [0, 6, 7, 8, 9]
    assert not torch.equal(fast, model.generate(prompt, **arguments)), "the edits change what is generated"
    assert nothing_attached(model)


@pytest.mark.parametrize("name", ["retnet", "mamba2", "bdh"])
def test_states_are_edited_in_generation(name: str) -> None:
    """EditState after a generated token equals re-reading the whole sequence with the same edit."""
    model = lively(name)
    prompt = some_tokens(length=5)
    for after_token in (2, 4, 6):
        edit = EditState(layer=1, after=after_token, operation="scale", value=-1.0)
        fast = model.generate(prompt, 6, hooks=[edit])
        slow = model.generate(prompt, 6, hooks=[edit], use_state=False)
        assert torch.equal(fast, slow)


def test_cached_keys_can_be_edited_in_generation() -> None:
    """With a key/value cache an edit of a key at its own step stays in the cache, as in a whole run."""
    model = lively("gpt2")
    prompt = some_tokens(length=5)
    edit = [Ablate("blocks.*.attn.hook_k", positions=[2, 6]), Ablate("blocks.0.attn.hook_v", positions=[1], heads=[0])]
    assert torch.equal(model.generate(prompt, 6, hooks=edit), model.generate(prompt, 6, hooks=edit, use_state=False))


def test_patterns_in_generation_reach_back_over_the_cache() -> None:
    """At a decoding step the pattern is one row over all earlier tokens, the last row of the whole run's pattern."""
    model = lively("llama")
    rows: list[Tensor] = []
    tokens = model.generate(
        some_tokens(length=4), 4, hooks=[("blocks.2.attn.hook_pattern", lambda x, hook: rows.append(x))]
    )
    whole = model.patterns(tokens[:, :-1])[2].values
    assert [tuple(row.shape[2:]) for row in rows] == [(4, 4), (1, 5), (1, 6), (1, 7)]
    for number, row in enumerate(rows[1:], start=4):
        assert largest(row[:, :, 0] - whole[:, :, number, : number + 1]) < 1e-12


# ------------------------------------------------------------------------------------------ padding and steps


@pytest.mark.parametrize("name", ["gpt2", "llama", "retnet", "mamba2", "bdh"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_real_tokens_of_a_padded_batch_have_the_activations_of_a_run_alone(name: str, side: str) -> None:
    model = lively(name)
    short = TOKENS[1:, :5]
    fill = torch.full((1, 3), 7)
    batch = torch.cat([TOKENS[:1], torch.cat([fill, short] if side == "left" else [short, fill], dim=1)])
    where = slice(3, 8) if side == "left" else slice(0, 5)
    mask = torch.ones_like(batch, dtype=torch.bool)
    mask[1] = False
    mask[1, where] = True
    _, padded = model.run_with_cache(batch, mask=mask)
    _, alone = model.run_with_cache(short)
    checked = 0
    for address, tensor in alone.items():
        axes = alone.point(address).axes
        if "pos" in axes and "position" not in alone.point(address).role:
            dim = axes.index("pos")
            ours = padded[address][1:].narrow(dim, where.start, 5)
            assert largest(ours - tensor) < 1e-10, address
            checked += 1
        elif axes[-2:] == ("query", "key") and "pattern" in address:
            assert largest(padded[address][1:, :, where, where] - tensor) < 1e-10, address
            checked += 1
    assert checked > 20


def test_steps_of_shared_depth_are_edited_apart() -> None:
    """`name@1` is the second pass only; the bare name is every pass; hook.step tells which one runs."""
    model = lively("looped")
    steps: list[int] = []
    name = "blocks.0.hook_resid_pre"
    _, cache = model.run_with_cache(TOKENS, names=[name, "blocks.2.hook_resid_post"])

    def unchanged(step: int | None) -> list[bool]:
        address = name if step is None else f"{name}@{step}"
        _, edited = model.run_with_cache(TOKENS, names=name, hooks=[(address, double)])
        return [largest(edited[f"{name}@{s}"] - cache[f"{name}@{s}"]) < 1e-12 for s in range(2)]

    assert unchanged(0) == [False, False] and unchanged(1) == [True, False] and unchanged(None) == [False, False]
    model.run_with_hooks(TOKENS, hooks=[(name, lambda x, hook: steps.append(hook.step))])
    assert steps == [0, 1]
    second = model.run_with_hooks(TOKENS, hooks=[(f"{name}@1", double)])
    assert largest(second - model.run_with_hooks(TOKENS, hooks=[Scale(f"{name}@1", factor=2.0)])) == 0


@pytest.mark.parametrize("name", ["retnet", "mamba2", "bdh"])
def test_state_addresses(name: str) -> None:
    """Edits at `[t]`, `[-1]`, `[3:6]`, `[*]` and the bare name change the tokens after the first edited position, and no earlier one."""
    model = lively(name)
    plain = model(TOKENS)
    state = next(n for n, p in model.hook_dict.items() if p.role == "state" and p.layer_index == 0)
    fired: list[tuple[int, ...]] = []

    def turn(x: Tensor, hook: HookPoint) -> Tensor:  # a mere factor would be taken out again by BDH's norm
        fired.append(tuple(x.shape))
        return x.flip(-1)

    for written, count, first in (
        ("[3]", 1, 4),
        ("[-1]", 1, 8),
        ("[3:6]", 3, 4),
        ("[6:]", 2, 7),
        ("[1,-2]", 2, 2),
        ("[*]", 8, 1),
        ("", 8, 1),
    ):
        fired.clear()
        changed = model.run_with_hooks(TOKENS, hooks=[(state + written, turn)])
        assert len(fired) == count and set(fired) == {tuple(model.states(TOKENS, 0)[0][:, 0].shape)}, written
        assert largest((changed - plain)[:, :first]) < 1e-12
        assert first == 8 or largest((changed - plain)[:, first:]) > 1e-6, written


def test_negative_state_positions_mean_each_call_anew() -> None:
    """One block, two calls of different length: [-1] is the last token of each, never the first call's position in the second."""
    model = lively("retnet")
    fired: list[float] = []
    longer = some_tokens(length=12)
    with model.hooks([("blocks.0.mixer.hook_state[-1]", lambda s, hook: fired.append(float(s.norm())))]):
        for tokens in (longer[:, :8], longer):
            model(tokens)
    expected = [float(model.states(tokens, -1)[0].norm()) for tokens in (longer[:, :8], longer)]
    assert fired == pytest.approx(expected, rel=1e-12)


def test_selecting_by_role_runs_the_same_on_every_architecture() -> None:
    for name in ("gpt2", "retnet", "mamba2"):
        model = lively(name)
        changed = model.run_with_hooks(TOKENS, hooks=[(Select(role="mixer_out", layer=[0, 2]), zero_in_place)])
        assert largest(changed - model(TOKENS)) > 1e-3
