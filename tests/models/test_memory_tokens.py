"""The Recurrent Memory Transformer against [memory ; segment ; memory] run at once, and everything that reads it in pieces."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from models.attention.masks import PrefixConfig
from models.attention.memory_slots import MemorySlotsConfig
from models.attention.site import AttentionConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.memory_tokens import RecurrentMemory
from models.parts.channel_mixers import MLPConfig
from models.segments import in_segments
from models.weight_processing import CannotProcess, process_weights
from workbench.instrument.errors import HookError
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.interventions import Ablate, BlockEdge, EditPattern, EditState, Patch, Steer
from workbench.instrument.pieces import by_position, whole_call
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

SLOTS, SEGMENT = 3, 5


def recurrent(both_ways: bool = True, position: str = "rope", groups: int = 4, layers: int = 2) -> RecurrentMemory:
    mixer = MemorySlotsConfig(
        n_heads=4, n_key_value_heads=groups, position=position, slots=SLOTS, segment=SEGMENT, both_ways=both_ways
    )
    model = RecurrentMemory(LanguageModelConfig(layers, 24, mixer=mixer, mlp=MLPConfig(40))).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5).add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return a.shape == b.shape and float((a - b).detach().abs().max()) < tolerance


class Direct:
    """The same weights, every segment at once: an ordinary model over [memory ; segment ; memory]."""

    def __init__(self, model: RecurrentMemory) -> None:
        site = model.config.mixers[0]
        mask = PrefixConfig(site.slots) if site.both_ways else None
        plain = AttentionConfig(site.n_heads, site.n_key_value_heads, position=site.position, mask=mask)
        self.model = LanguageModel(replace(model.config, mixer=plain)).double()
        weights = {name: value for name, value in model.state_dict().items() if name != "first_memory"}
        self.model.load_state_dict(weights)
        self.start = model.first_memory.detach()

    def segment(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        stream = torch.cat([memory, self.model.W_E[tokens], memory], dim=1)
        stream = self.model(stream, start_at_layer=0, stop_at_layer=self.model.n_layers)
        assert self.model.ln_final is not None
        return self.model.unembed_residual(stream)[:, SLOTS:-SLOTS], self.model.ln_final(stream)[:, -SLOTS:]

    def text(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the memory before each segment."""
        memories, logits = [self.start.expand(len(tokens), -1, -1)], []
        for piece in tokens.split(SEGMENT, dim=1):
            found, memory = self.segment(piece, memories[-1])
            logits.append(found)
            memories.append(memory)
        return torch.cat(logits, 1), memories[:-1]


# ------------------------------------------------------------------------------------------------------ the equation


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("position", "groups"), [("rope", 4), ("none", 2)])
def test_reading_in_turn_is_memory_segment_memory_at_once(
    both_ways: bool, position: str, groups: int, tokens: Tensor
) -> None:
    """Logits and every memory, over three full segments and a begun one."""
    model = recurrent(both_ways, position, groups)
    expected, memories = Direct(model).text(tokens)
    assert close(model(tokens), expected)
    found = model.states(tokens, [SEGMENT - 2, SEGMENT - 1, 2 * SEGMENT, 16], layers=0)[0]
    for number, which in enumerate((0, 1, 2, 3)):
        assert close(found[:, number], memories[which])
    assert not close(memories[1], memories[2], 1e-3)


def test_a_segment_by_hand(tokens: Tensor) -> None:
    """Without any model: projections, rotation, masks, softmax, norms of two layers over eleven columns."""
    model = recurrent()
    memory = model.first_memory.expand(2, -1, -1)
    x = torch.cat([memory, model.W_E[tokens[:, :SEGMENT]], memory], 1)
    columns = x.shape[1]
    angle = torch.arange(columns)[:, None] * 10000.0 ** (-torch.arange(0, 6, 2) / 6)
    cosine, sine = (f(angle).double()[:, None] for f in (torch.cos, torch.sin))

    def turned(y: Tensor) -> Tensor:
        a, b = y[..., :3], y[..., 3:]
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)

    visible = torch.ones(columns, columns).tril().bool()
    visible[:SLOTS, :SLOTS] = True
    for block in model.blocks:
        h, site = block.ln1(x), block.attn
        q, k, v = (f(h).unflatten(-1, (4, 6)) for f in (site.query, site.key, site.value))
        scores = torch.einsum("bihd,bjhd->bhij", turned(q), turned(k)) / 6**0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        x = x + site.output(torch.einsum("bhij,bjhv->bihv", weights, v).flatten(-2))
        x = x + block.mlp(block.ln2(x))
    assert model.ln_final is not None
    x = model.ln_final(x)
    logits, state = model(tokens[:, :SEGMENT], return_state=True)
    assert close(logits, model.unembed(x)[:, SLOTS:-SLOTS], 1e-4)  # angles are float32, logits about 10
    assert close(state.slot(0, "state"), x[:, -SLOTS:], 1e-4)


def test_gradients_are_those_of_the_direct_formulation(tokens: Tensor) -> None:
    """Through the memory, from the last segment's loss to the first segment's tokens and to every weight."""
    model = recurrent()
    direct = Direct(model)
    direct.start.requires_grad_()
    ours = model(tokens)[:, 15:].square().sum()
    theirs = direct.text(tokens)[0][:, 15:].square().sum()
    names = [name for name, _ in direct.model.named_parameters()]
    parameters = dict(model.named_parameters())
    got = torch.autograd.grad(ours, [parameters[name] for name in names] + [model.first_memory])
    expected = torch.autograd.grad(theirs, [*direct.model.parameters(), direct.start])
    for name, a, b in zip([*names, "first_memory"], got, expected, strict=True):
        assert close(a, b, 1e-8 * max(1.0, float(b.abs().max()))), name
        assert float(b.abs().max()) > 0, name


# ---------------------------------------------------------------------------------------------- hooks, over segments


def test_a_text_is_one_axis_for_the_cache_and_pieces_for_functions(tokens: Tensor) -> None:
    """A function sees each position once, with its number; the cache holds all of them, as a function that kept the pieces would."""
    model, seen, kept = recurrent(), [], []

    def look(x: Tensor, hook: HookPoint) -> None:
        seen.append((hook.offset, x.shape[1]))
        kept.append(x)

    name = "blocks.1.hook_resid_post"
    with model.hooks([(name, look)]):
        _, cache = model.run_with_cache(tokens)
    assert seen == [(0, 5), (5, 5), (10, 5), (15, 2)]
    assert torch.equal(cache[name], torch.cat(kept, 1))
    for options, part in (({"positions": [1, 6, -1]}, [1, 6, 16]), ({"positions": slice(4, 12)}, list(range(4, 12)))):
        _, some = model.run_with_cache(tokens, names=name, **options)
        assert close(some[name], cache[name][:, part])  # the fused kernel ran
    _, half = model.run_with_cache(tokens, role="pattern", heads=[2], dtype=torch.float32)
    assert torch.equal(half["pattern", 0], cache["pattern", 0][:, 2:3].float())


def test_rows_are_shared_by_the_memory_and_the_own_segment(tokens: Tensor) -> None:
    """Both patterns together are one softmax and give z with the values that they stand for."""
    model = recurrent()
    _, cache = model.run_with_cache(tokens)
    direct = Direct(model)
    memories = direct.text(tokens)[1]
    segment = torch.arange(17) // SEGMENT
    for layer in range(2):
        pattern, slots = cache["pattern", layer], cache["memory_pattern", layer]
        assert close(pattern.sum(-1) + slots.sum(-1), torch.ones(2, 4, 17).double())
        assert float(pattern[..., segment[:, None] != segment[None]].abs().max()) == 0
        assert float(slots.min()) > 0
        assert close(
            torch.cat([cache["memory_scores", layer], cache["attn_scores", layer]], -1).softmax(-1),
            torch.cat([slots, pattern], -1),
        )
        for number, memory in enumerate(memories):
            rows = segment == number
            stream = torch.cat([memory, model.W_E[tokens[:, rows]]], 1)
            _, whole = direct.model.run_with_cache(stream, start_at_layer=0, names=[f"blocks.{layer}.attn.*"])
            at = f"blocks.{layer}.attn.hook_"
            expected = whole[at + "pattern"][:, :, SLOTS:]
            assert close(torch.cat([slots[:, :, rows], pattern[:, :, rows][..., rows]], -1), expected)
            assert close(cache["z", layer][:, rows], whole[at + "z"][:, SLOTS:])
    meta = model.patterns(tokens)[0].meta
    assert meta.columns == "token" and not meta.before and meta.rows_sum_to == "free" and not meta.exact


def test_what_is_written_is_what_the_slots_behind_the_segment_read(tokens: Tensor) -> None:
    """Rows of the write tokens in the direct formulation; 0 in the segment that is not full, also with the other layer unwatched."""
    model = recurrent(groups=2)
    direct = Direct(model)
    memories = direct.text(tokens)[1]
    _, cache = model.run_with_cache(tokens)
    _, alone = model.run_with_cache(tokens, names="blocks.1.attn.hook_writing_pattern")
    assert close(alone["writing_pattern", 1], cache["writing_pattern", 1])
    for layer in range(2):
        written = cache["writing_pattern", layer]
        assert written.shape == (2, 4, SLOTS, 17) and float(written[..., 15:].abs().max()) == 0
        for number in range(3):
            rows = slice(number * SEGMENT, (number + 1) * SEGMENT)
            stream = torch.cat([memories[number], model.W_E[tokens[:, rows]], memories[number]], 1)
            _, whole = direct.model.run_with_cache(stream, start_at_layer=0, role="pattern")
            assert close(written[..., rows], whole["pattern", layer][:, :, -SLOTS:, SLOTS:-SLOTS])


def test_a_token_that_is_not_written(tokens: Tensor) -> None:
    """Its column cut in every layer's map of the writing: as cut in the rows of the write tokens of the direct formulation."""
    model = recurrent()
    direct = Direct(model)

    def forget(pattern: Tensor, hook: HookPoint) -> None:
        pattern[..., 2] = 0

    def forget_there(pattern: Tensor, hook: HookPoint) -> None:
        pattern[:, :, -SLOTS:, SLOTS + 2] = 0

    got = model.run_with_hooks(
        tokens, hooks=[(f"blocks.{layer}.attn.hook_writing_pattern", forget) for layer in (0, 1)]
    )
    with direct.model.hooks([(f"blocks.{layer}.attn.hook_pattern", forget_there) for layer in (0, 1)]):
        _, memory = direct.segment(tokens[:, :5], direct.start.expand(2, -1, -1))
    plain = model(tokens)
    assert close(got[:, :5], plain[:, :5]) and not close(got[:, 5:], plain[:, 5:], 1e-6)
    assert close(got[:, 5:10], direct.segment(tokens[:, 5:10], memory)[0])


@pytest.mark.parametrize("at", [2, 4, 8, 9])
def test_an_edited_memory_is_that_of_a_run_that_stopped_there(at: int, tokens: Tensor) -> None:
    """Within and at the end of a segment; before it nothing changes, behind it everything that is read and written."""
    model = recurrent()
    plain, memory = model(tokens), "blocks.0.attn.hook_state"
    edit = EditState(memory, after=at, operation="scale", value=0.2)
    got = model.run_with_hooks(tokens, hooks=[edit])
    _, state = model(tokens[:, : at + 1], return_state=True)
    expected = model(tokens[:, at + 1 :], state=state.replaced(0, state=0.2 * state.slot(0, "state")))
    assert close(got[:, : at + 1], plain[:, : at + 1]) and close(got[:, at + 1 :], expected)
    assert not close(got[:, at + 1], plain[:, at + 1], 1e-6)
    one_slot = EditState(memory, after=at, value=0.0, at={"slot": [1]})
    assert not close(model.run_with_hooks(tokens, hooks=[one_slot]), got, 1e-6)


def test_the_memory_of_another_text_makes_the_rest_that_texts(tokens: Tensor) -> None:
    """Patched between segments, in one call or by the state: the direct formulation with the other memory."""
    model, other = recurrent(), tokens.flip(1)
    theirs = Direct(model).text(other)[1][1]
    patched = model.run_with_hooks(tokens[:, :10], hooks=[Patch("blocks.0.attn.hook_state[4]", value=theirs)])
    assert close(patched[:, 5:], Direct(model).segment(tokens[:, 5:10], theirs)[0])
    reader = in_segments(model, tokens[:, :10], 5, detach=False)
    _, state = next(reader)
    logits, _ = reader.send(state.replaced(0, state=theirs))
    assert close(logits, patched[:, 5:])


def test_only_the_memory_goes_from_segment_to_segment(tokens: Tensor) -> None:
    """Between segments the state holds nothing else; gradients go through it unless it is detached."""
    model = recurrent()
    _, state = model(tokens[:, :10], return_state=True)
    sizes = {(layer, name): value.shape[1] for layer, slots in enumerate(state.layers) for name, value in slots.items()}
    assert sizes == {(0, "state"): SLOTS, (0, "key"): 0, (0, "value"): 0, (1, "key"): 0, (1, "value"): 0}
    _, begun = model(tokens[:, :12], return_state=True)
    assert begun.slot(1, "key").shape == (2, 2, 4, 6)
    for detach in (False, True):
        losses = [loss for loss, _ in in_segments(model, tokens[:, :10], 5, detach=detach, return_type="loss")]
        (gradient,) = torch.autograd.grad(losses[1], model.first_memory, allow_unused=True)
        assert (gradient is None) == detach and (detach or float(gradient.abs().max()) > 0)


@pytest.mark.parametrize("cut", [3, 5, 11])
def test_interventions_name_positions_of_the_whole_text(cut: int, tokens: Tensor) -> None:
    """In one call of four segments, or from a state within it: the same edit at the same token. The end is that of the call."""
    model = recurrent()
    direction = torch.linspace(-1, 1, 24, dtype=torch.float64)
    name, last = "blocks.0.hook_resid_post", torch.zeros(2, 17, 24, dtype=torch.float64)
    last[:, 16] = direction
    hand = model.run_with_hooks(
        tokens, hooks=[Steer(name, direction=last)]
    )  # a tensor that covers the call, cut into pieces
    assert close(model.run_with_hooks(tokens, hooks=[Steer(name, direction=direction, positions=[-1])]), hand)
    assert close(model.run_with_hooks(tokens, hooks=[Steer(name, direction=direction, positions=[16])]), hand)
    plain = model(tokens)
    assert close(hand[:, :16], plain[:, :16]) and not close(hand[:, 16], plain[:, 16], 1e-6)
    edit = Ablate(name, positions=[12])
    whole = model.run_with_hooks(tokens, hooks=[edit])
    _, state = model(tokens[:, :cut], return_state=True)
    assert close(model.run_with_hooks(tokens[:, cut:], hooks=[edit], state=state), whole[:, cut:])
    assert not close(whole[:, 13:], plain[:, 13:], 1e-6) and close(whole[:, :12], plain[:, :12])


def test_cut_and_forced_edges(tokens: Tensor) -> None:
    """Keys count the text's tokens; one of an earlier segment can be forced while its values are there, and is refused later."""
    model = recurrent()
    cut = model.run_with_hooks(tokens, hooks=[BlockEdge(layer=0, queries=[8], keys=[6])])
    plain = model(tokens)
    assert close(cut[:, :8], plain[:, :8]) and not close(cut[:, 8], plain[:, 8], 1e-6)
    force = EditPattern(layer=1, queries=[8], keys=[2], value=0.5)
    forced, cache = model.run_with_cache(tokens, hooks=[force])
    assert close(forced[:, :8], plain[:, :8])
    value = cache["v", 1]
    _, normal = model.run_with_cache(tokens)
    assert close(cache["z", 1][:, 8], normal["z", 1][:, 8] + 0.5 * value[:, 2])
    _, state = model(tokens[:, :5], return_state=True)
    with pytest.raises(HookError, match="of them only the memory is left"):
        model.run_with_hooks(tokens[:, 5:10], hooks=[force], state=state)
    with pytest.raises(HookError, match="reads the call in pieces"):
        model.run_with_hooks(tokens, hooks=[Ablate("blocks.0.hook_resid_post", value="mean")])


def test_functions_may_speak_of_the_whole_call(tokens: Tensor) -> None:
    """What covers the call is cut into pieces; a function that only reads can have it whole, before or behind an edit, and may not edit."""
    model, name = recurrent(), "blocks.0.hook_mlp_out"
    mine = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    before: list[Tensor] = []
    after: list[Tensor] = []
    hooks = [
        (name, whole_call(lambda x, hook: before.append(x))), (name, lambda x, hook: mine),
        (name, whole_call(lambda x, hook: after.append(x))),
    ]  # fmt: skip
    replaced = model.run_with_hooks(tokens, hooks=hooks)
    assert close(replaced, model.run_with_hooks(tokens, hooks=[Patch(name, value=mine)]))
    assert len(before) == len(after) == 1 and torch.equal(after[0], mine)
    assert before[0].shape == mine.shape and not close(before[0], mine, 1e-3)
    with pytest.raises(HookError, match="only reads"):
        model.run_with_hooks(tokens, hooks=[(name, whole_call(lambda x, hook: 2 * x))])
    ordinary = models.build("gpt").double()
    with pytest.raises(HookError, match="only reads"):
        ordinary.run_with_hooks(tokens, hooks=[(name, whole_call(lambda x, hook: 2 * x))])


def test_functions_that_find_tokens_by_their_place(tokens: Tensor) -> None:
    """`by_position`: the piece stands at its place in a tensor of the whole call, in maps of tokens too, and edits in place count."""
    model, name = recurrent(), "blocks.0.hook_mlp_out"

    @by_position
    def silence(x: Tensor, hook: HookPoint) -> None:
        assert x.shape[1] == 17
        x[:, [3, 12]] = 0

    expected = model.run_with_hooks(tokens, hooks=[Ablate(name, positions=[3, 12])])
    assert close(model.run_with_hooks(tokens, hooks=[(name, silence)]), expected)

    @by_position
    def cut(pattern: Tensor, hook: HookPoint) -> Tensor:
        assert pattern.shape[2:] == (17, 17)
        pattern[:, :, 8, 6] = 0
        return pattern

    edge = EditPattern(layer=0, queries=[8], keys=[6], value=0.0)
    assert close(
        model.run_with_hooks(tokens, hooks=[("blocks.0.attn.hook_pattern", cut)]),
        model.run_with_hooks(tokens, hooks=[edge]),
    )


def test_gradients_at_cached_points_are_those_of_the_text(tokens: Tensor) -> None:
    """Gradient of the last segment's logits at an activation of the first: a finite difference through the memory."""
    model, name = recurrent(), "blocks.0.hook_resid_post"

    def metric(logits: Tensor) -> Tensor:
        return logits[:, 16].square().sum()

    _, cache = model.run_with_cache(tokens, names=name, gradients_of=metric)
    direction = torch.zeros(2, 17, 24, dtype=torch.float64)
    direction[:, 3] = torch.linspace(-1, 1, 24)
    step = 1e-6
    up, down = (
        metric(model.run_with_hooks(tokens, hooks=[Steer(name, direction=sign * step * direction)])) for sign in (1, -1)
    )
    slope = float((up - down).detach()) / (2 * step)
    assert abs(slope) > 1e-3
    assert float((cache.gradients[name] * direction).sum()) == pytest.approx(slope, rel=1e-5)


def test_hooks_on_blocks_do_not_touch_the_memory_itself(tokens: Tensor) -> None:
    """Reading and writing pass the blocks unseen, also for permanent hooks; a model that a hook runs reads its own text."""
    model, fired = recurrent(), []
    handle = model.add_hook("blocks.1.attn.hook_z", lambda z, hook: fired.append(z.shape[1]))
    twin = copy.deepcopy(recurrent())
    alone = twin(tokens[:, :12])
    inner = []

    def run_another(x: Tensor, hook: HookPoint) -> None:
        inner.append(twin.run_with_cache(tokens[:, :12], names="blocks.0.hook_resid_post"))

    model.run_with_hooks(tokens, hooks=[("blocks.0.hook_resid_mid", run_another)])
    handle.remove()
    assert fired == [5, 5, 5, 2] and len(inner) == 4
    assert all(close(logits, alone) and cache["resid_post", 0].shape == (2, 12, 24) for logits, cache in inner)


# --------------------------------------------------------------------------------------------- traces, padding, refusals


def test_a_trace_holds_the_text_over_all_segments(tokens: Tensor, tmp_path: Path) -> None:
    """Patterns, weights of slots and the memory after every token, as the model itself tells them; an edited run too."""
    model = models.build("recurrent-memory")
    edit = EditState("blocks.0.attn.hook_state", after=4, operation="scale", value=3.0)
    for interventions in ([], [edit]):
        run = trace_run(model, tokens[0], RunStore(tmp_path), interventions=interventions)
        with torch.no_grad(), model.hooks(interventions):
            _, cache = model.run_with_cache(tokens[:1])
            memory = model.states(tokens[:1], range(17), layers=0)[0][0]
        for layer in range(3):
            assert np.abs(run.array(f"layer.{layer}.pattern") - cache["pattern", layer][0].numpy()).max() < 1e-6
            weights = run.array(f"quantity.blocks.{layer}.attn.hook_memory_pattern")  # [head, slot, query]
            assert np.abs(weights - cache["memory_pattern", layer][0].transpose(1, 2).numpy()).max() < 1e-6
        assert np.abs(run.array("layer.0.states")[0] - memory.numpy()).max() < 1e-5
        assert run.array("loss").shape == (17,) and run.array("resid_norm").shape == (4, 17)


def test_padded_texts_end_their_segments_by_themselves(tokens: Tensor) -> None:
    """Three texts of different lengths, padded on either side and in between: each is what it is alone."""
    model = recurrent()
    texts = [tokens[0, :17], tokens[1, :11], tokens[1, 3:9]]
    real = torch.zeros(3, 20, dtype=torch.bool)
    real[0, 3:], real[1, 9:], real[2, 0:2] = True, True, True
    real[2, 5:9] = True
    batch = torch.full((3, 20), 65)
    for row, text in enumerate(texts):
        batch[row, real[row]] = text
    names = ["blocks.1.attn.hook_memory_pattern", "blocks.0.attn.hook_writing_pattern"]
    together, cache = model.run_with_cache(batch, mask=real, names=names)
    plain = model(batch, mask=real)
    for row, text in enumerate(texts):
        alone, single = model.run_with_cache(text[None], names=names)
        assert close(plain[row, real[row]], alone[0]) and close(together[row, real[row]], alone[0])
        assert close(cache["memory_pattern", 1][row][:, real[row]], single["memory_pattern", 1][0])
        assert close(cache["writing_pattern", 0][row][..., real[row]], single["writing_pattern", 0][0])
        assert float(cache["writing_pattern", 0][row][..., ~real[row]].abs().sum()) == 0


def test_what_does_not_go_with_a_memory_is_refused(tokens: Tensor) -> None:
    def build(mixer: object, **changes: object) -> RecurrentMemory:
        return RecurrentMemory(LanguageModelConfig(2, 24, n_ctx=9, mixer=mixer, **changes))  # type: ignore[arg-type]

    good = MemorySlotsConfig(n_heads=4, slots=3, segment=5)
    with pytest.raises(ValueError, match="AttentionConfig; expected MemorySlotsConfig"):
        build(AttentionConfig(n_heads=4, position="rope"))
    with pytest.raises(ValueError, match="disagree"):
        build((good, replace(good, segment=6)))
    with pytest.raises(ValueError, match="loops=1"):
        build(good, loops=2)
    for change, words in (
        ({"position": "learned"}, "learned positions"), ({"position": "alibi"}, "bias"), ({"window": 4}, "window"),
        ({"causal": False}, "causal"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            build(replace(good, **change))
    with pytest.raises(ValueError, match="at least 1 each"):
        MemorySlotsConfig(n_heads=4, slots=0)
    with pytest.raises(TypeError, match="RecurrentMemory"):
        LanguageModel(LanguageModelConfig(2, 24, mixer=good))(tokens)
    with pytest.raises(ValueError, match="go up by one"):
        recurrent()(tokens, facts={"positions": 2 * torch.arange(17)[None]})
    _, state = recurrent()(tokens, return_state=True)
    with pytest.raises(HookError, match="'state' of layer 0"):
        state.replaced(0, state=torch.zeros(2, 4, 24).double())


def test_the_last_norm_is_the_memorys_too() -> None:
    """So it cannot be folded into the unembedding, however long segments are; the other norms can."""
    model = models.build("recurrent-memory", mixer=MemorySlotsConfig(n_heads=4, slots=2, segment=12))
    with pytest.raises(CannotProcess, match="ln_final cannot be folded"):
        process_weights(model, fold_norms=True)
    tokens = torch.arange(30)[None]
    folded = process_weights(model, fold_norms=True, partial=True)
    assert folded.processing is not None and "blocks.0.ln1" in folded.processing.folded
    assert close(folded(tokens), model(tokens), 1e-5)


def test_memory_tokens_begin_as_large_as_ordinary_ones() -> None:
    model = models.build("recurrent-memory", d_model=96, seed=3)
    assert 0.8 < float((model.first_memory.std() / model.W_E.std()).detach()) < 1.2
