"""Every intervention does what a hand-written hook does, at the chosen heads, positions and axes, and survives its file bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.decoder import Decoder
from tests.instrument.tiny_models import largest, lively, some_tokens
from workbench.instrument.errors import HookError, UnknownHookPoint
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.interventions import (
    KINDS,
    Ablate,
    BlockEdge,
    EditPattern,
    EditState,
    FreezeNorm,
    Intervention,
    Patch,
    Project,
    Scale,
    Steer,
    load_interventions,
    save_interventions,
)
from workbench.instrument.selection import Select

TOKENS = some_tokens()
Z = "blocks.1.attn.hook_z"
RESID = "blocks.1.hook_resid_post"
PATTERN = "blocks.1.attn.hook_pattern"


def numbers(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return lively("gpt2")


def at(x: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of x with x[index] = value."""
    x = x.clone()
    x[index] = value
    return x


def rows_to_one(pattern: Tensor) -> Tensor:
    """Rows rescaled to sum to 1."""
    return pattern / pattern.sum(-1, keepdim=True)


ALL = slice(None)
DIRECTIONS = numbers(2, 24)
# intervention, point, and the function of the activation that it must equal
EFFECTS: dict[str, tuple[Callable[[], Intervention], str, Callable[[Tensor], Tensor]]] = {
    "Ablate": (lambda: Ablate(RESID), RESID, torch.zeros_like),
    "Ablate heads": (lambda: Ablate(Z, heads=[1, 3]), Z, lambda z: at(z, (ALL, ALL, [1, 3]), 0)),
    "Ablate one head from the end": (lambda: Ablate(Z, heads=-1), Z, lambda z: at(z, (ALL, ALL, 3), 0)),
    "Ablate positions": (lambda: Ablate(RESID, positions=[2, -1]), RESID, lambda x: at(x, (ALL, [2, 7]), 0)),
    "Ablate heads at positions": (lambda: Ablate(Z, heads=2, positions=range(3)), Z, lambda z: at(z, (ALL, slice(0, 3), 2), 0)),
    "Ablate any axis": (lambda: Ablate("blocks.0.mlp.hook_post", at={"d_mlp": [7, 9], "batch": 1}), "blocks.0.mlp.hook_post",
                        lambda x: at(at(x, (1, ALL, 7), 0), (1, ALL, 9), 0)),
    "Ablate by the mean": (lambda: Ablate(Z, heads=[0], value="mean"), Z, lambda z: at(z, (ALL, ALL, 0), z.mean((0, 1))[0])),
    "Ablate by a tensor": (lambda: Ablate(RESID, value=numbers(24), positions=[3]), RESID, lambda x: at(x, (ALL, 3), numbers(24))),
    "Ablate everywhere by a tensor": (lambda: Ablate(RESID, value=numbers(24)), RESID, lambda x: numbers(24).expand_as(x)),
    "Scale": (lambda: Scale(Z, factor=-0.5, heads=[2]), Z, lambda z: at(z, (ALL, ALL, 2), -0.5 * z[:, :, 2])),
    "Scale by a tensor": (lambda: Scale(RESID, factor=numbers(8, 1)), RESID, lambda x: x * numbers(8, 1)),
    "Patch": (lambda: Patch(RESID, value=numbers(2, 8, 24)), RESID, lambda x: numbers(2, 8, 24)),
    "Patch a position": (lambda: Patch(RESID, value=numbers(2, 8, 24), positions=4), RESID,
                         lambda x: at(x, (ALL, 4), numbers(2, 8, 24)[:, 4])),
    "Steer": (lambda: Steer(RESID, direction=numbers(24), coefficient=0.3), RESID, lambda x: x + 0.3 * numbers(24)),
    "Steer at positions": (lambda: Steer(RESID, direction=numbers(24), positions=[0, 5]), RESID,
                           lambda x: at(x, (ALL, [0, 5]), x[:, [0, 5]] + numbers(24))),
    "Project": (lambda: Project(RESID, directions=DIRECTIONS), RESID, lambda x: x - x @ torch.linalg.pinv(DIRECTIONS) @ DIRECTIONS),
    "Project, keep": (lambda: Project(RESID, directions=DIRECTIONS, keep=True, positions=[1]), RESID,
                      lambda x: at(x, (ALL, 1), (x @ torch.linalg.pinv(DIRECTIONS) @ DIRECTIONS)[:, 1])),
    "EditPattern": (lambda: EditPattern(layer=1, heads=2, queries=[4, 5], keys=[1], value=0.1), PATTERN,
                    lambda p: at(p, (ALL, 2, [4, 5], 1), 0.1)),
    "EditPattern, renormalised": (lambda: EditPattern(layer=1, queries=5, keys=[0, 2], value=0.1, renormalise=True), PATTERN,
                                  lambda p: rows_to_one(at(p, (ALL, ALL, 5, slice(0, 3, 2)), 0.1))),
    "EditPattern by a tensor": (lambda: EditPattern(PATTERN, value=numbers(8, 8)), PATTERN, lambda p: numbers(8, 8).expand_as(p)),
    "BlockEdge": (lambda: BlockEdge(layer=1, heads=[0, 1], queries=[6, -1], keys=[0, 3]), PATTERN,
                  lambda p: rows_to_one(at(at(p, (ALL, slice(0, 2), slice(6, 8), 0), 0), (ALL, slice(0, 2), slice(6, 8), 3), 0))),
}  # fmt: skip


@pytest.mark.parametrize("case", EFFECTS)
def test_effect_of_a_hand_written_hook(model: Decoder, case: str) -> None:
    make, point, function = EFFECTS[case]
    logits, cache = model.run_with_cache(TOKENS, names=point, hooks=[make()])
    expected, expected_cache = model.run_with_cache(
        TOKENS, names=point, hooks=[(point, lambda x, hook: function(x).contiguous())]
    )
    assert largest(cache[point] - expected_cache[point]) < 1e-12
    assert largest(logits - expected) < 1e-12 < largest(logits - model(TOKENS))


def test_every_kind_is_tested() -> None:
    tested = {type(make()).__name__ for make, _, _ in EFFECTS.values()} | {"EditState", "FreezeNorm"}
    assert tested == {
        name for name, kind in KINDS.items() if kind.__module__.startswith("workbench.")
    }  # probes add their own


def test_choosing_everything_is_choosing_nothing(model: Decoder) -> None:
    whole = model.run_with_hooks(TOKENS, hooks=[Ablate(Z)])
    assert torch.equal(model.run_with_hooks(TOKENS, hooks=[Ablate(Z, heads=range(4), positions=range(8))]), whole)


def test_a_glob_and_a_role_choose_the_same_points(model: Decoder) -> None:
    by_glob = model.run_with_hooks(TOKENS, hooks=[Scale("blocks.*.attn.hook_z", factor=0.5)])
    assert torch.equal(model.run_with_hooks(TOKENS, hooks=[Scale(Select(role="z"), factor=0.5)]), by_glob)
    assert torch.equal(model.run_with_hooks(TOKENS, hooks=[("*.hook_z", Scale("anything", factor=0.5))]), by_glob)
    assert torch.equal(model.run_with_hooks(TOKENS, hooks=Scale("*.hook_z", factor=0.5)), by_glob), (
        "one alone needs no list"
    )


def test_interventions_compose_in_the_order_written(model: Decoder) -> None:
    first, second = Scale(RESID, factor=2.0), Steer(RESID, direction=numbers(24))
    _, cache = model.run_with_cache(TOKENS, names=RESID, hooks=[first, second])
    _, plain = model.run_with_cache(TOKENS, names=RESID)
    assert largest(cache[RESID] - (2 * plain[RESID] + numbers(24))) < 1e-12


def test_patching_from_another_run(model: Decoder) -> None:
    """Patching the stream at one layer from the clean run restores the clean logits; a run's own cache changes nothing."""
    clean, corrupted = TOKENS, some_tokens(seed=9)
    clean_logits, cache = model.run_with_cache(clean)
    restored = model.run_with_hooks(corrupted, hooks=[Patch(RESID, value=cache[RESID])])
    assert largest(restored - clean_logits) < 1e-12
    for address in cache:
        assert (
            largest(model.run_with_hooks(clean, hooks=[Patch(address, value=cache[address])]) - clean_logits) < 1e-12
        ), address


def test_projecting_twice_is_projecting_once(model: Decoder) -> None:
    project = Project(RESID, directions=DIRECTIONS)
    _, once = model.run_with_cache(TOKENS, names=RESID, hooks=[project])
    _, twice = model.run_with_cache(TOKENS, names=RESID, hooks=[project, project])
    assert largest(once[RESID] - twice[RESID]) < 1e-12
    assert largest(once[RESID] @ DIRECTIONS.T) < 1e-12
    _, kept = model.run_with_cache(TOKENS, names=RESID, hooks=[Project(RESID, directions=DIRECTIONS, keep=True)])
    _, plain = model.run_with_cache(TOKENS, names=RESID)
    assert largest(once[RESID] + kept[RESID] - plain[RESID]) < 1e-12
    for dependent in (torch.stack([DIRECTIONS[0], 2 * DIRECTIONS[0]]), torch.zeros(24), numbers(30, 24)):
        with pytest.raises(HookError, match="not linearly independent"):
            Project(RESID, directions=dependent)


# -------------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi", "looped"])
def test_blocking_an_edge_is_masking_its_score(name: str) -> None:
    """On softmax attention: the pattern with entries cut and renormalised == softmax with those scores at −inf (1e-12)."""
    model = lively(name)
    edge = BlockEdge(layer=[0, 2], heads=[1], queries=[3, 6, 7], keys=[0, 2])

    def mask(scores: Tensor, hook: HookPoint) -> Tensor:
        scores = scores.clone()
        for query in (3, 6, 7):
            scores[:, 1, query, [0, 2]] = -torch.inf
        return scores

    blocked = model.run_with_hooks(TOKENS, hooks=[edge])
    masked = model.run_with_hooks(TOKENS, hooks=[(Select(role="scores", layer=[0, 2]), mask)])
    assert largest(blocked - masked) < 1e-12 < 1e-6 < largest(blocked - model(TOKENS))


@pytest.mark.parametrize("name", ["retnet", "mamba2", "bdh"])
def test_blocking_an_edge_of_an_effective_pattern_is_zeroing_the_entry(name: str) -> None:
    """Signed rows share nothing out; the mixer's output loses exactly that source's contribution, α_qk v_k."""
    model = lively(name)
    point = model.hook_points.resolve(Select(role="pattern", layer=1))[0][1][0].point.name
    zeroed = model.run_with_hooks(TOKENS, hooks=[(point, lambda p, hook: at(p, (ALL, 0, 6, [1, 2]), 0))])
    blocked, cache = model.run_with_cache(
        TOKENS, names=point, hooks=[BlockEdge(layer=1, heads=0, queries=6, keys=[1, 2])]
    )
    assert largest(blocked - zeroed) < 1e-12 < 1e-6 < largest(blocked - model(TOKENS))
    assert largest(cache[point][:, 0, 6, [1, 2]]) == 0
    assert largest(blocked[:, :6] - model(TOKENS)[:, :6]) < 1e-12, "earlier tokens are untouched"


def test_a_row_without_sources_reads_nothing(model: Decoder) -> None:
    _, cache = model.run_with_cache(TOKENS, names=[PATTERN, Z], hooks=[BlockEdge(layer=1, queries=3)])
    assert largest(cache[Z][:, 3]) == 0 and largest(cache[Z][:, 4]) > 0
    assert largest(cache[PATTERN][:, :, 4].sum(-1) - 1) < 1e-12


# ---------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("name", ["retnet", "mamba2", "bdh"])
@pytest.mark.parametrize("operation", ["scale", "set", "add"])
def test_editing_a_state_is_stopping_editing_and_going_on(name: str, operation: str) -> None:
    """EditState(after=t) == run to t, change the carried state by hand, run on: to 1e-10, at one head, in the middle layer."""
    model = lively(name)
    _, state = model(TOKENS[:, :4], return_state=True)
    old = state.slot(1, "state")
    value = numbers(*old.shape[-2:])
    new = old.clone()
    new[:, 1] = {"scale": old[:, 1] * value, "set": value.expand_as(old[:, 1]), "add": old[:, 1] + value}[operation]
    expected = model(TOKENS[:, 4:], state=state.replaced(1, state=new))
    edit = EditState(layer=1, after=3, heads=[1], operation=operation, value=value)
    for mode in ("chunked", "recurrent", "parallel"):
        model.set_mode(mode)
        changed = model.run_with_hooks(TOKENS, hooks=[edit])
        assert largest(changed[:, 4:] - expected) < 1e-10, mode
        assert largest(changed[:, :4] - model(TOKENS)[:, :4]) < 1e-12
        assert largest(changed - model(TOKENS)) > 1e-6


@pytest.mark.parametrize("name", ["retnet", "mamba2", "bdh"])
def test_state_edits_after_several_tokens(name: str) -> None:
    """Several positions, negative ones and every token: the same as splitting the run at each."""
    model = lively(name)
    for after, stops in (([2, 5], [2, 5]), (-3, [5]), (None, list(range(8)))):
        state, pieces, start = None, [], 0
        for stop in [*stops, 7]:
            if stop >= start:
                logits, state = model(TOKENS[:, start : stop + 1], state=state, return_state=True)
                pieces.append(logits)
                if stop in stops:
                    for layer in range(3):
                        state = state.replaced(layer, state=0.5 * state.slot(layer, "state") + 0.1)
                start = stop + 1
        edit = [EditState(after=after, value=0.5), EditState(after=after, operation="add", value=0.1)]
        assert largest(model.run_with_hooks(TOKENS, hooks=edit) - torch.cat(pieces, 1)) < 1e-10


# ------------------------------------------------------------------------------------------------ frozen norms


@pytest.mark.parametrize("name", ["gpt2", "llama", "attention-only", "mamba2"])
def test_frozen_norms_make_the_last_norm_and_the_unembedding_additive(name: str) -> None:
    """With frozen scales the logits are affine in what is added to the final residual stream: superposition holds, else it does not."""
    model = lively(name)
    _, cache = model.run_with_cache(TOKENS, role="norm_scale")
    point = "blocks.2.hook_resid_post"
    a, b = (Steer(point, direction=numbers(24, seed=seed), coefficient=2.0) for seed in (1, 2))

    def curvature(frozen: list[Intervention]) -> float:
        zero, one, other, both = (
            model.run_with_hooks(TOKENS, hooks=[*frozen, *added]) for added in ([], [a], [b], [a, b])
        )
        return largest(both - one - other + zero)

    assert curvature([FreezeNorm.from_cache(cache)]) < 1e-10 < 1e-3 < curvature([])


def test_frozen_norms_leave_their_own_run_alone_and_another_one_not() -> None:
    model = lively("gpt2")
    logits, cache = model.run_with_cache(TOKENS, role="norm_scale")
    freeze = FreezeNorm.from_cache(cache)
    assert freeze.in_words() == "FreezeNorm of 7 normalisations"
    assert largest(model.run_with_hooks(TOKENS, hooks=[freeze]) - logits) < 1e-12
    other = some_tokens(seed=9)
    assert largest(model.run_with_hooks(other, hooks=[freeze]) - model(other)) > 1e-3
    _, kept = model.run_with_cache(other, role="norm_scale", hooks=[freeze])
    assert all(torch.equal(kept[name], cache[name]) for name in cache)
    _, without = model.run_with_cache(TOKENS, role="resid_post")
    with pytest.raises(
        UnknownHookPoint, match=r"holds no norm scales. Cache them: run_with_cache\(tokens, names=Select"
    ):
        FreezeNorm.from_cache(without)
    with pytest.raises(HookError, match="FreezeNorm has no values"):
        FreezeNorm()
    with pytest.raises(
        HookError, match=r"FreezeNorm on 'blocks.0.ln1.hook_scale': a value of shape \(2, 8, 1\) does not fit"
    ):
        model.run_with_hooks(some_tokens(length=6), hooks=[freeze])


def test_frozen_norms_of_shared_depth() -> None:
    """Each pass has a scale of its own."""
    model = lively("looped")
    logits, cache = model.run_with_cache(TOKENS, role="norm_scale")
    assert largest(cache["scale@0", 0, "ln1"] - cache["scale@1", 0, "ln1"]) > 1e-3
    freeze = FreezeNorm.from_cache(cache)
    assert largest(model.run_with_hooks(TOKENS, hooks=[freeze]) - logits) < 1e-12
    _, kept = model.run_with_cache(some_tokens(seed=9), role="norm_scale", hooks=[freeze])
    assert all(torch.equal(kept[name], cache[name]) for name in cache)


# -------------------------------------------------------------------------------------- files, words, purity


def every_kind() -> list[Intervention]:
    model = lively("gpt2")
    _, cache = model.run_with_cache(TOKENS, role="norm_scale", layers=1)
    return [make() for make, _, _ in EFFECTS.values()] + [
        FreezeNorm.from_cache(cache),
        Scale(Select(role="z", layer=[0, 2]), factor=numbers(6)),
        Ablate(Select(name="*.hook_mlp_out"), positions=torch.tensor([1, 2])),
    ]


def test_files_bring_back_the_same_effect_bit_for_bit(model: Decoder, tmp_path: Path) -> None:
    originals = every_kind()
    text, data = save_interventions(originals, tmp_path / "edits")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edits.json", "edits.safetensors"] == [text.name, data.name]
    restored = load_interventions(tmp_path / "edits")
    assert [type(item) for item in restored] == [type(item) for item in originals]
    for old, new in zip(originals, restored, strict=True):
        assert new.in_words() == old.in_words()
        assert torch.equal(model.run_with_hooks(TOKENS, hooks=[new]), model.run_with_hooks(TOKENS, hooks=[old])), (
            old.in_words()
        )


def test_state_edits_come_back_from_files(tmp_path: Path) -> None:
    retnet = lively("retnet")
    edits: list[Intervention] = [
        EditState(layer=1, after=[2, 5], heads=[0], operation="add", value=numbers(8, 16)),
        EditState(after=-1),
        EditState("blocks.0.mixer.hook_state[3]", operation="set", value=0.5),
    ]
    save_interventions(edits, tmp_path / "edits")
    for old, new in zip(edits, load_interventions(tmp_path / "edits"), strict=True):
        assert torch.equal(retnet.run_with_hooks(TOKENS, hooks=[new]), retnet.run_with_hooks(TOKENS, hooks=[old]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_files_keep_the_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    shared = numbers(24).to(dtype)
    save_interventions([Steer(RESID, direction=shared), Steer(Z, direction=shared[:16])], tmp_path / "edits")
    first, second = load_interventions(tmp_path / "edits")
    assert torch.equal(first.direction, shared) and torch.equal(second.direction, shared[:16])  # type: ignore[attr-defined]
    assert first.direction.dtype == dtype  # type: ignore[attr-defined]


def test_json_alone_holds_small_tensors(model: Decoder) -> None:
    """Run manifests and the dashboard's `--json` hold interventions without a second file: still exact."""
    for item in every_kind():
        record = json.loads(json.dumps(item.to_json()))
        restored = Intervention.from_json(record)
        assert torch.equal(
            model.run_with_hooks(TOKENS, hooks=[restored]), model.run_with_hooks(TOKENS, hooks=[item])
        ), item.in_words()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"type": "Ablte", "point": Z}, r"Unknown intervention type 'Ablte'. Did you mean 'Ablate'.* Known: Ablate, BlockEdge"),
        ({"point": Z}, "Unknown intervention type None"),
        ({"type": "Ablate", "point": Z, "head": [1]}, r"Ablate has no field 'head'. Did you mean 'heads'.* Its fields are: at, heads"),
        ({"type": "Ablate"}, "This record of Ablate is not complete: .*point"),
        ({"type": "Steer", "point": Z}, "Steer has no direction"),
        ({"type": "Steer", "point": Z, "direction": {"stored": "0.directoin"}},
         "tensor '0.directoin' of this intervention is missing. Did you mean '0.direction'"),
        ({"type": "Ablate", "point": {"select": {"rol": "z"}}}, "Select has no field 'rol'. Expected role, layer or name"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_read(record: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        Intervention.from_json(record, {"0.direction": numbers(16)})


def test_files_of_another_format(tmp_path: Path) -> None:
    save_file({}, tmp_path / "edits.safetensors")
    (tmp_path / "edits.json").write_text(json.dumps({"format": 2, "interventions": []}))
    with pytest.raises(HookError, match="format 2; expected 1"):
        load_interventions(tmp_path / "edits")
    save_interventions([], tmp_path / "none")
    assert load_interventions(tmp_path / "none") == []


def test_in_words() -> None:
    words = {item.in_words() for item in every_kind()} | {EditState(layer=1, after=[2, 5]).in_words()}
    assert "Ablate blocks.1.attn.hook_z, head [1, 3]" in words
    assert "Steer blocks.1.hook_resid_post, pos [0, 5]" in words
    assert "BlockEdge Select(role='pattern', layer=1), head [0, 1], query [6, -1], key [0, 3]" in words
    assert "EditState Select(role='state', layer=1) scale after [2, 5]" in words
    assert all(text.startswith(tuple(KINDS)) and "\n" not in text for text in words)


def test_interventions_are_pure(model: Decoder) -> None:
    """They write into no activation and into none of their own tensors, and can be used again."""
    for item in every_kind():
        before = {name: value.clone() for name, value in vars(item).items() if isinstance(value, Tensor)}
        first = model.run_with_hooks(TOKENS, hooks=[item])
        assert torch.equal(model.run_with_hooks(TOKENS, hooks=[item]), first)
        assert all(torch.equal(getattr(item, name), value) for name, value in before.items())


def test_fields_follow_the_activation(model: Decoder) -> None:
    """float32 fields on a float64 model: converted, never a change of the model's dtype."""
    single = Steer(RESID, direction=numbers(24).float(), coefficient=2.0)
    assert (
        largest(
            model.run_with_hooks(TOKENS, hooks=[single])
            - model.run_with_hooks(TOKENS, hooks=[Steer(RESID, direction=numbers(24), coefficient=2.0)])
        )
        < 1e-6
    )
    half = lively("gpt2").bfloat16()
    for item in every_kind():
        assert half.run_with_hooks(TOKENS, hooks=[item]).dtype == torch.bfloat16


def test_fields_from_arrays_and_lists(model: Decoder) -> None:
    """numpy arrays keep their dtype, lists and numbers are exact; what is no number is refused by name."""
    vector = numbers(24)
    expected = model.run_with_hooks(TOKENS, hooks=[Steer(RESID, direction=vector)])
    for same in (vector.numpy(), vector.tolist()):
        assert torch.equal(model.run_with_hooks(TOKENS, hooks=[Steer(RESID, direction=same)]), expected)  # type: ignore[arg-type]
    for make in (
        lambda: Steer(RESID, direction="up"),
        lambda: Patch(RESID, value=object()),
        lambda: Scale(RESID, factor=None),
    ):  # type: ignore[arg-type]
        with pytest.raises(
            HookError, match=r"(direction|value|factor) is (str|object|NoneType). Expected a tensor or a number"
        ):
            make()


def test_a_steering_vector_can_be_learned(model: Decoder) -> None:
    """Gradients flow into the tensor fields: they are those of finite differences."""
    direction = numbers(24).requires_grad_()
    loss = model.run_with_hooks(TOKENS, hooks=[Steer(RESID, direction=direction, positions=[2])])[:, 2:].square().sum()
    (gradient,) = torch.autograd.grad(loss, direction)
    step = 1e-6 * numbers(24, seed=8)
    ends = [
        model.run_with_hooks(TOKENS, hooks=[Steer(RESID, direction=direction.detach() + s * step, positions=[2])])[
            :, 2:
        ]
        .square()
        .sum()
        for s in (1, -1)
    ]
    assert float(gradient @ step) == pytest.approx(float(ends[0] - ends[1]) / 2, rel=1e-5)
