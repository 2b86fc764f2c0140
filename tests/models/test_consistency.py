"""The consistency suite: what every architecture of the registry must do. A new architecture is tested by being registered.

All comparisons are in float64; the tolerance 1e-10 is far above rounding at these sizes and far below any effect.
"""

import copy

import pytest
import torch
from torch import Tensor

import models
from models.decoder import Decoder
from models.registry import ARCHITECTURES
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import heads_first
from workbench.instrument.interventions import Patch
from workbench.instrument.selection import Select
from workbench.lab.run_format import FORMS

models.list_models()  # registers all
NAMES = [
    *ARCHITECTURES,
    "t5",
]  # which needs a source besides the text (its tiny preset has one), so it is not among the language models
LINEAR = [name for name in ARCHITECTURES if "state" in ARCHITECTURES[name].shows]
LENGTH = 21
EXACT = 1e-10


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> Decoder:
    return lively(request.param)


def lively(name: str) -> Decoder:
    """The tiny preset in float64 with larger weights, so that every part has an effect well above rounding."""
    model = models.build(name).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def default_points(model: Decoder) -> list[HookPoint]:
    """Points of an ordinary run: not behind a switch, not per position."""
    return [p for p in model.hook_points.points.values() if not p.gated and not p.per_position]


def disturb(x: Tensor, hook: HookPoint) -> Tensor:
    """Another tensor: scaled and noisy (a norm would undo scaling and shifting alone); masked scores stay masked."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    return torch.where(x.isfinite(), x * 1.3 + 0.5 * noise, x)


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


# --------------------------------------------------------------------------------------------------- hook points


def test_replacing_any_hook_point_changes_the_output(model: Decoder, tokens: Tensor) -> None:
    """No declared hook point is dead: replacing its tensor changes the logits, or it says that it only reports."""
    plain = model(tokens)
    dead = []
    for point in default_points(model):
        if not point.editable:
            continue

        changed = model.run_with_hooks(tokens, hooks=[(point.name, disturb)])
        if largest(changed - plain) < 1e-6:
            dead.append(point.name)
    assert not dead


def test_switched_hook_points_are_alive(tokens: Tensor) -> None:
    """The points behind switches exist once switched on, and editing them changes the output."""
    for name in NAMES:
        model = lively(name)
        for switch in model.switches:
            model.set_switch(switch, True)
            gated = [p for p in model.hook_points.points.values() if p.flag == switch]
            sites = [mixer.sizes for mixer in model.mixers if hasattr(mixer, "sizes")]
            if switch == "use_attn_in" and not all(sizes.one_map_each for sizes in sites):
                model.set_switch(switch, False)  # needs one key head per query head, and says so
                continue
            plain = model(tokens)
            for point in gated:
                changed = model.run_with_hooks(tokens, hooks=[(point.name, disturb)])
                assert largest(changed - plain) > 1e-6, (name, point.name)
            model.set_switch(switch, False)


def test_declared_axes_are_the_shapes(model: Decoder, tokens: Tensor) -> None:
    """Axis names count the tensor's axes; batch, pos, head, query and key have the run's sizes."""
    _, cache = model.run_with_cache(tokens)
    sizes = {"batch": 2, "pos": LENGTH, "query": LENGTH, "key": LENGTH, "vocab": 256, "one": 1}
    for address, tensor in cache.items():
        point = cache.point(address)
        if point.layer_index is not None:
            mixer = model.mixers[point.layer_index]
            sizes["head"] = mixer.describe()["n_heads"]
            sizes["key"] = len(model.config.source) if getattr(mixer, "reads_source", False) else LENGTH
        assert len(point.axes) == tensor.dim(), address
        for axis, size in zip(point.axes, tensor.shape, strict=True):
            assert size == sizes.get(axis, size), (address, axis)


def test_watching_changes_nothing(model: Decoder, tokens: Tensor) -> None:
    """Fast path == explicit path: caching everything (explicit attention, explicit norms, patterns) gives the same logits."""
    plain = model(tokens)
    names = [p.name for p in default_points(model)]
    watched, cache = model.run_with_cache(tokens, names=names)
    assert largest(plain - watched) < EXACT
    assert set(names) == {a.split("@")[0] for a in cache}
    for name in names:
        alone, _ = model.run_with_cache(tokens, names=name)
        assert largest(plain - alone) < EXACT, name


def test_patching_with_the_own_cache_is_a_no_op(model: Decoder, tokens: Tensor) -> None:
    """Putting every cached activation back where it came from leaves the logits."""
    plain = model(tokens)
    _, cache = model.run_with_cache(tokens)
    for address, value in cache.items():
        assert largest(model.run_with_hooks(tokens, hooks=[Patch(address, value=value)]) - plain) < EXACT, address


def test_gradients_reach_every_point(model: Decoder, tokens: Tensor) -> None:
    """The loss depends differentiably on every hook point of an ordinary run."""
    _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    assert set(cache.gradients) == set(cache)
    silent = [
        address
        for address, gradient in cache.gradients.items()
        if largest(gradient) == 0 or not gradient.isfinite().all()
    ]
    assert not silent


def test_gradients_do_not_depend_on_watching(model: Decoder, tokens: Tensor) -> None:
    """Parameter gradients are the same on the fast path and with everything watched."""
    parameters = list(model.parameters())
    fast = torch.autograd.grad(model(tokens, return_type="loss"), parameters, allow_unused=True)
    with model.hooks([(point.name, lambda x, hook: None) for point in default_points(model)]):
        explicit = torch.autograd.grad(model(tokens, return_type="loss"), parameters, allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), fast, explicit, strict=True):
        if a is None and b is None:
            continue
        assert a is not None and b is not None, name
        assert largest(a - b) < EXACT, name


# ------------------------------------------------------------------------------------------- patterns and states


def test_pattern_times_values_is_the_output(model: Decoder, tokens: Tensor) -> None:
    """o = α v: the (effective) pattern applied to the values gives the mixer's output, for every layer and head."""
    for layer, mixer in enumerate(model.mixers):
        if not mixer.describe()["pattern"]["exact"]:
            continue  # a Jacobian norm or a mean over channels: its own test says what it is
        point = model.hook_points.resolve(Select(role="z", layer=layer))[0][1][0].point
        pattern_point = model.hook_points.resolve(Select(role="pattern", layer=layer))[0][1][0].point
        value_point = (
            mixer.factor_points["value"] if mixer.factor_points else mixer.hook_v
        )  # the source's, for cross-attention
        names = [point.name, pattern_point.name, value_point.name]
        _, cache = model.run_with_cache(tokens, names=names)
        suffix = "" if point.steps == 1 else "@0"
        value = heads_first(cache[names[2] + suffix], value_point)
        heads = mixer.describe()["n_heads"]
        if value.shape[1] != 1:
            value = value.repeat_interleave(heads // value.shape[1], dim=1)
        z = heads_first(cache[point.name + suffix], point)
        assert largest(cache[pattern_point.name + suffix] @ value - z) < EXACT * max(1.0, largest(z))


def test_pattern_metadata_is_true(model: Decoder, tokens: Tensor) -> None:
    """Signed, row sums and causality are what the metadata says."""
    for layer, pattern in model.patterns(tokens).items():
        meta = pattern.meta
        values = pattern.values
        if meta.causal != "none":  # a source that was read before is visible as a whole
            future = torch.ones(LENGTH, LENGTH).triu(0 if meta.causal == "strict" else 1).bool()
            assert largest(values[..., future]) == 0, layer
        if meta.rows_sum_to == "1":
            assert largest(pattern.row_sums() - 1) < EXACT
        else:
            assert largest(pattern.row_sums() - 1) > 1e-3
        assert meta.signed or not (values < 0).any()
    patterns = model.patterns(tokens).values()
    if any(pattern.meta.signed for pattern in patterns):
        assert any((pattern.values < 0).any() for pattern in patterns if pattern.meta.signed)


@pytest.mark.parametrize("name", LINEAR)
def test_three_modes_agree(name: str, tokens: Tensor) -> None:
    """parallel == chunked (several chunk sizes, none dividing the length) == recurrent."""
    model = lively(name)
    if not any(hasattr(module, "mode") for module in model.modules()):
        pytest.skip("this architecture has one way to run")
    model.set_mode("parallel")
    expected = model(tokens)
    model.set_mode("recurrent")
    assert largest(model(tokens) - expected) < EXACT
    model.set_mode("chunked")
    for size in (1, 4, 8, 16, 64):
        for module in model.modules():
            if hasattr(module, "chunk_size"):
                module.chunk_size = size
        assert largest(model(tokens) - expected) < EXACT, size


def state_points(model: Decoder, layer: int) -> dict[str, HookPoint]:
    """The states of one layer by slot: `state`, and whatever else the mixer carries and lets be edited."""
    points = [p for p in model.hook_points.points.values() if p.role == "state" and p.layer_index == layer]
    return {p.name.rsplit(".hook_", 1)[-1]: p for p in points}


def modes(model: Decoder) -> tuple[str | None, ...]:
    """The execution modes to try; None for a model that has one only."""
    several = any(hasattr(module, "mode") for module in model.modules())
    return ("parallel", "chunked", "recurrent") if several else (None,)


@pytest.mark.parametrize("name", LINEAR)
def test_a_state_edit_propagates_alike_in_every_mode(name: str, tokens: Tensor) -> None:
    """An edit after token t changes later tokens only, and equals stopping the run, editing the carried state and going on."""
    model, at = lively(name), 8
    layer = 1 if state_points(model, 1) else 0  # hybrids

    def edit(state: Tensor, hook: HookPoint | None = None) -> Tensor:
        return 0.5 * state + 0.1

    _, carried = model(tokens[:, : at + 1], return_state=True)
    plain = model(tokens)
    for slot, point in state_points(model, layer).items():
        if not point.editable:
            continue
        expected = model(tokens[:, at + 1 :], state=carried.replaced(layer, **{slot: edit(carried.slot(layer, slot))}))
        for mode in modes(model):
            if mode is not None:
                model.set_mode(mode)
            got = model.run_with_hooks(tokens, hooks=[(f"{point.name}[{at}]", edit)])
            assert largest(got[:, : at + 1] - plain[:, : at + 1]) < EXACT, (slot, mode)
            assert largest(got[:, at + 1 :] - expected) < EXACT, (slot, mode)
            assert largest(got[:, at + 1 :] - plain[:, at + 1 :]) > 1e-6, (slot, mode)


@pytest.mark.parametrize("name", LINEAR)
def test_states_read_traced_and_carried_agree(name: str, tokens: Tensor) -> None:
    """The state read at a position, the traced entries and the state carried out of a run up to there are the same numbers."""
    model = lively(name)
    for layer in range(model.n_layers):
        for slot in state_points(model, layer):
            reading = model.states(tokens, [3, 11, LENGTH - 1], layers=layer, slot=slot)
            state = reading[layer]
            first, last = (0,) * (state.dim() - 2), tuple(size - 1 for size in state.shape[2:])
            between = tuple(min(1 + axis, size - 1) for axis, size in enumerate(state.shape[2:]))
            traced = model.trace_state(tokens, layer, [first, between, last]) if slot == "state" else None
            for number, position in enumerate(reading.positions):
                _, carried = model(tokens[:, : position + 1], return_state=True)
                tolerance = EXACT * max(1.0, largest(state))
                assert largest(carried.slot(layer, slot) - state[:, number]) < tolerance
                for column, entry in enumerate((first, between, last)):
                    if traced is not None:
                        assert largest(traced[:, position, column] - state[(slice(None), number, *entry)]) < tolerance


@pytest.mark.parametrize("name", LINEAR)
def test_traced_entries_follow_padding_edits_and_carried_states(name: str, tokens: Tensor) -> None:
    """However the state came about, an entry traced over all tokens is that entry of the states read there."""
    model, tokens = lively(name), tokens[:, :9]
    layer = next(
        layer for layer in range(model.n_layers) if "state" in state_points(model, layer) or layer == model.n_layers - 1
    )
    if "state" not in state_points(model, layer):
        pytest.skip("every state of this architecture has a name of its own, so it is read, not traced")
    point = state_points(model, layer)["state"]
    left, right = torch.ones_like(tokens, dtype=torch.bool), torch.ones_like(tokens, dtype=torch.bool)
    left[0, :3], right[0, -3:] = False, False
    edit = [(f"{point.name}[4]", lambda state, hook: 0.5 * state)]
    for options in ({"mask": left}, {"mask": right}, {"hooks": edit}):
        states = model.states(tokens, range(9), layers=layer, **options)[layer]
        entries = [(0,) * (states.dim() - 2), tuple(size - 1 for size in states.shape[2:])]
        wanted = torch.stack([states[(slice(None), slice(None), *entry)] for entry in entries], -1)
        traced = model.trace_state(tokens, layer, entries, **options)
        assert largest(traced - wanted) < EXACT * max(1.0, largest(states)), options
    states = model.states(tokens, range(9), layers=layer)[layer]
    _, carried = model(tokens[:, :4], return_state=True)
    traced = model.trace_state(tokens[:, 4:], layer, entries, state=carried)
    wanted = torch.stack([states[(slice(None), slice(4, None), *entry)] for entry in entries], -1)
    assert largest(traced - wanted) < EXACT * max(1.0, largest(states))


@pytest.mark.parametrize("name", LINEAR)
def test_every_state_hook_point_is_alive(name: str, tokens: Tensor) -> None:
    """Editing the state after every token changes the logits in every layer."""
    model = lively(name)
    plain = model(tokens)
    for layer in range(model.n_layers):
        for slot, point in state_points(model, layer).items():
            if point.editable:
                changed = model.run_with_hooks(tokens, hooks=[(f"{point.name}[*]", lambda s, hook: 0.7 * s)])
                assert largest(changed - plain) > 1e-6, (layer, slot)


# ------------------------------------------------------------------------------------------- causality, batches


def test_causality_by_jacobian(model: Decoder, tokens: Tensor) -> None:
    """∂ logits_i / ∂ embedding_j is zero for j > i and not zero for j = i and for some j < i."""
    embedded: list[Tensor] = []

    def keep(x: Tensor, hook: HookPoint) -> Tensor:
        embedded.append(x.detach().requires_grad_())
        return embedded[0]

    for query in (0, 7, LENGTH - 1):
        embedded.clear()
        # a hook's return value is copied on its way into the model; the leaf stays ours
        logits = model.run_with_hooks(tokens[:1], hooks=[("hook_embed", keep)])
        (gradient,) = torch.autograd.grad(logits[0, query].square().sum(), embedded[0])
        reach = gradient[0].abs().sum(-1)
        assert largest(reach[query + 1 :]) == 0 if query + 1 < LENGTH else True
        assert (reach[query] > 0) == (query > 0 or model.predicts_from_one_token)
        if query > 0:
            assert reach[:query].max() > 0


def test_batch_invariance(model: Decoder, tokens: Tensor) -> None:
    """Each sequence's logits are its own, whatever else is in the batch and in whatever order."""
    together = model(tokens)
    for row in range(2):
        assert largest(model(tokens[row : row + 1]) - together[row : row + 1]) < EXACT
    assert largest(model(tokens.flip(0)).flip(0) - together) < EXACT


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_invariance(model: Decoder, tokens: Tensor, side: str) -> None:
    """Padding on either side leaves the real tokens' logits, loss and what follows from the state unchanged."""
    short = tokens[1:, :13]
    fill = torch.full((1, LENGTH - 13), 65)
    padded = torch.cat([fill, short] if side == "left" else [short, fill], dim=1)
    batch = torch.cat([tokens[:1], padded])
    real = torch.ones_like(batch, dtype=torch.bool)
    where = slice(LENGTH - 13, None) if side == "left" else slice(0, 13)
    real[1] = False
    real[1, where] = True
    expected, expected_state = model(short, return_state=True)
    got, state = model(batch, mask=real, return_state=True)
    assert largest(got[1:, where] - expected) < EXACT
    assert largest(got[:1] - model(tokens[:1])) < EXACT
    loss = model(batch[1:], mask=real[1:], return_type="loss")
    assert largest(loss - model(short, return_type="loss")) < EXACT
    more = tokens[:, :4]
    continued = model(more, state=state)
    assert largest(continued[1:] - model(more[1:], state=expected_state)) < EXACT
    assert largest(continued[:1] - model(torch.cat([tokens[:1], more[:1]], dim=1))[:, LENGTH:]) < EXACT


def test_padding_invariance_of_watched_runs(model: Decoder, tokens: Tensor) -> None:
    """With patterns watched (explicit path), a padded batch still gives the same logits, and pads are read by nobody real."""
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), tokens], dim=1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :5] = False
    logits, cache = model.run_with_cache(padded, mask=mask, role="pattern")
    assert largest(logits[:, 5:] - model(tokens)) < EXACT
    for address, pattern in cache.items():
        if cache.point(address).meta.columns != "source token":  # another sequence, whose padding is its own
            assert largest(pattern[:, :, 5:, :5]) == 0


# ---------------------------------------------------------------------------------------- stateful and generation


def test_segments_equal_the_whole(model: Decoder, tokens: Tensor) -> None:
    """Reading in pieces of any size, handing the state on, gives the logits of reading at once."""
    whole = model(tokens)
    for cuts in ([5, 6, 7, 15], list(range(1, LENGTH))):
        state, pieces, start = None, [], 0
        for stop in [*cuts, LENGTH]:
            logits, state = model(tokens[:, start:stop], state=state, return_state=True)
            pieces.append(logits)
            start = stop
        assert largest(torch.cat(pieces, dim=1) - whole) < EXACT


def test_generation_with_state_equals_rereading(model: Decoder, tokens: Tensor) -> None:
    """Greedy and sampled continuations are token-identical with the carried state and by re-reading everything, also padded."""
    prompt = tokens[:, :9]
    for options in ({}, {"temperature": 1.0, "top_k": 20, "seed": 3}):
        with_state = model.generate(prompt, 12, **options)
        assert torch.equal(with_state, model.generate(prompt, 12, use_state=False, **options))
    mask = torch.ones_like(prompt, dtype=torch.bool)
    mask[0, :4] = False
    padded = model.generate(prompt, 12, mask=mask)
    assert torch.equal(padded[:1, 4:], model.generate(prompt[:1, 4:], 12))
    assert torch.equal(padded[1:], model.generate(prompt[1:], 12))


def test_hooks_fire_at_every_step_of_generation(model: Decoder, tokens: Tensor) -> None:
    """A hook sees every generated position once, and steering through it equals steering while re-reading."""
    seen: list[int] = []
    name = f"blocks.{model.n_layers - 1}.hook_resid_post"

    def push(x: Tensor, hook: HookPoint) -> Tensor:
        seen.extend(range(hook.offset, hook.offset + x.shape[1]))
        return x + 0.5 * torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)

    got = model.generate(tokens[:, :6], 5, hooks=[(name, push)])
    times = model.hook_dict[name].steps
    assert seen == [*list(range(6)) * times, *(p for p in (6, 7, 8, 9) for _ in range(times))]
    assert torch.equal(got, model.generate(tokens[:, :6], 5, hooks=[(name, push)], use_state=False))


# --------------------------------------------------------------------------------------- start, stop, save, seeds


def test_stop_and_start_at_layer(model: Decoder, tokens: Tensor) -> None:
    """Stopping before layer l gives its input; starting there from it gives the rest."""
    if model.loops > 1:
        with pytest.raises(ValueError, match="ambiguous"):
            model(tokens, stop_at_layer=1)
        return
    whole = model(tokens)
    for layer in range(model.n_layers):
        stream = model(tokens, stop_at_layer=layer)
        _, cache = model.run_with_cache(tokens, names=f"blocks.{layer}.hook_resid_pre")
        assert largest(stream - cache["resid_pre", layer]) < EXACT
        if layer and not model.stream_is_all:
            with pytest.raises(ValueError, match="more than the residual stream"):
                model(stream, start_at_layer=layer)
            continue
        facts = {"token_ids": tokens} if model.reads_tokens else None
        assert largest(model(stream, start_at_layer=layer, facts=facts) - whole) < EXACT


def test_save_and_load_round_trip(model: Decoder, tokens: Tensor, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A saved model loads with the same class, configuration, weights and logits."""
    models.save(model, tmp_path / "saved")
    loaded = models.load(tmp_path / "saved", dtype=torch.float64)
    assert type(loaded) is type(model) and loaded.config == model.config and loaded.architecture == model.architecture
    assert torch.equal(loaded(tokens), model(tokens))


def test_seeds_reproduce(model: Decoder) -> None:
    """The same configuration gives bit-equal weights, another seed other ones, and building does not touch the global generator."""
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    one, two = models.build(model.architecture), models.build(model.architecture)
    assert torch.equal(torch.rand(1), before)
    other = models.build(model.architecture, seed=1)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_copy_is_independent(model: Decoder, tokens: Tensor) -> None:
    """A deep copy has its own weights and hook points."""
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens), model(tokens))
    assert not {p.uid for p in twin.hook_dict.values()} & {p.uid for p in model.hook_dict.values()}
    fired = []
    with model.hooks([("hook_embed", lambda x, hook: fired.append(1))]):
        twin(tokens)
        assert not fired
        model(tokens)
    assert fired


def test_sixteen_bit_is_safe(model: Decoder, tokens: Tensor) -> None:
    """bfloat16 runs end to end, stays finite and near the float64 logits; phases and decays keep their precision."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    logits = half(tokens)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    spread = float(model(tokens).std())
    assert float((logits.double() - model(tokens)).abs().mean()) < 0.15 * spread
    cached, cache = half.run_with_cache(tokens)
    assert cached.isfinite().all() and all(t.dtype in (torch.bfloat16, torch.float32) for t in cache.values())


def test_descriptions_are_complete(model: Decoder) -> None:
    """Every layer describes its mixer in the terms of the run manifest."""
    for layer, mixer in enumerate(model.mixers):
        record = mixer.describe()
        assert record["form"] in FORMS or (record["form"] is None and record["not_stored"]), layer
        assert {
            "kind",
            "n_heads",
            "n_key_heads",
            "n_value_heads",
            "scale",
            "strict",
            "pattern",
            "state",
            "signals",
        } <= set(record)
        if record["form"] in FORMS and record["form"] != "dense":
            assert {"query", "key", "value"} <= set(mixer.factor_points)
        elif record["form"] == "dense" and record["pattern"]["exact"]:
            # Values of a source are no factors of the run's own tokens.
            assert ("value" in mixer.factor_points) != getattr(mixer, "reads_source", False)
