"""Nothing silently does nothing: every mistake is an error that names the hook point, says what was expected, and suggests the nearest."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.decoder import Decoder
from tests.instrument.tiny_models import gpt2, largest, lively, nothing_attached, some_tokens
from workbench.instrument.errors import (
    HookError,
    HookNeverReached,
    HookReturnError,
    HookSignatureError,
    ReadOnlyHookPoint,
    UnknownHookPoint,
)
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import HookedModel
from workbench.instrument.interventions import Ablate, BlockEdge, EditPattern, EditState, Patch, Scale, Steer
from workbench.instrument.selection import Select

TOKENS = some_tokens()
POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> Decoder:
    return lively("gpt2")


@pytest.fixture(scope="module")
def retnet() -> Decoder:
    return lively("retnet")


def double(x: Tensor, hook: HookPoint) -> Tensor:
    return 2 * x


def every_way(model: Decoder, selection: Any) -> list[Callable[[], Any]]:
    """The ways to name hook points: reading, editing, a block, permanently, backward, by an intervention."""

    def block() -> None:
        with model.hooks([(selection, double)]):
            pass

    ways: list[Callable[[], Any]] = [
        lambda: model.run_with_cache(TOKENS, names=selection),
        lambda: model.run_with_hooks(TOKENS, hooks=[(selection, double)]),
        block,
        lambda: model.add_hook(selection, double),
        lambda: model.run_with_hooks(TOKENS, bwd_hooks=[(selection, double)]),
        lambda: model.generate(TOKENS, 1, hooks=[(selection, double)]),
    ]
    if isinstance(selection, str):
        ways.append(lambda: model.run_with_hooks(TOKENS, hooks=[Scale(selection, factor=2.0)]))
    return ways


# ------------------------------------------------------------------------------------------ names that select nothing

UNKNOWN: dict[str, tuple[Any, str]] = {
    "misspelt": ("blocks.0.attn.hook_patern", r"'blocks.0.attn.hook_patern'.* Did you mean 'blocks.0.attn.hook_pattern'"),
    "another module": ("blocks.0.mlp.hook_z", r"Did you mean .*'blocks.0.attn.hook_z'|Did you mean 'blocks.0.mlp"),
    "nothing like it": ("nonsense", r"Unknown hook point 'nonsense'\.$"),
    "layer too high": ("blocks.7.hook_resid_post",
        r"'blocks.7.hook_resid_post': layer 7 is out of range; this model has layers 0..2. Did you mean 'blocks.\d"),
    "negative layer": ("blocks.-1.hook_resid_post", r"layer -1 is out of range"),
    "one bad name in a list": ([POINT, "blocks.1.hook_resid_pst"], r"'blocks.1.hook_resid_pst'.* Did you mean 'blocks.1.hook_resid_post'"),
    "one bad glob in a list": ([POINT, "blocks.*.hook_nothing"], r"'blocks.\*.hook_nothing' matches none of the \d+ hook points"),
    "glob that matches nothing": ("blocks.*.attn.hook_patern", r"hook_patern' matches none.* Did you mean 'blocks.0.attn.hook_pattern'"),
    "predicate that matches nothing": (lambda name: name == "x",
        r"predicate '<lambda>' matches none.* Expected a function of the hook name"),
    "empty list": ([], "An empty list selects no hook point. Expected at least one"),
    "role": (Select(role="patern"), r"Unknown role 'patern' on this model. Did you mean 'pattern'.* Its roles are: .*resid"),
    "role of another family": (Select(role="state"), r"Unknown role 'state'.*Its roles are"),
    "layer of a Select": (Select(role="pattern", layer=3), r"Layer 3 is out of range: this model has layers 0..2"),
    "no layers": (Select(role="pattern", layer=[]), "empty list of layers"),
    "empty Select": (Select(), r"Select\(\) is empty. Expected a role, a layer or a name glob"),
    "role and glob that exclude each other": (Select(role="pattern", name="*.mlp.*"), r"Select\(.*mlp.*\) matches no hook point"),
    "step on an unshared model": ("blocks.0.hook_resid_post@1",
        r"hook_resid_post' has no steps: .* the bare name 'blocks.0.hook_resid_post'"),
    "step of a glob": ("blocks.*.hook_resid_post@1", r"'blocks.0.hook_resid_post' has no steps"),
    "positions of an ordinary point": ("blocks.0.hook_resid_post[3]", r"holds all positions in one tensor \(axes batch pos d_model\)"),
    "a number": (3, "Cannot select hook points by int. Expected a name, a glob"),
    "not an address": ("blocks.0.hook_resid_post]3[", "is not a hook address. Expected name, name@step or name"),
    "gated while its switch is off": ("blocks.0.hook_q_input",
        r"'blocks.0.hook_q_input' does not exist while use_split_qkv_input is off.*model.set_use_split_"),
    "gated role while its switch is off": (Select(role="query_input"), r"Switch it on first: model.set_use_split_qkv_input\(True\)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", UNKNOWN)
def test_a_selection_that_means_nothing_is_an_error_everywhere(model: Decoder, mistake: str) -> None:
    selection, message = UNKNOWN[mistake]
    for way in every_way(model, selection):
        with pytest.raises(UnknownHookPoint) as caught:
            way()
        assert re.search(message, str(caught.value)), str(caught.value)
    assert nothing_attached(model)


def test_strict_does_not_forgive_names(model: Decoder) -> None:
    """strict=False is about hooks that are not reached; an unknown name is a mistake all the same."""
    for way in (
        lambda: model.run_with_hooks(TOKENS, hooks=[("blocks.0.hook_x", double)], strict=False),
        lambda: model.run_with_cache(TOKENS, names="blocks.0.hook_x", strict=False),
    ):
        with pytest.raises(UnknownHookPoint):
            way()


def test_a_hook_point_of_another_model(model: Decoder) -> None:
    with pytest.raises(UnknownHookPoint, match="belongs to another model"):
        model.run_with_hooks(TOKENS, hooks=[(gpt2().hook_dict[POINT], double)])


def test_steps_out_of_range() -> None:
    looped = lively("looped")
    for address in ("blocks.0.hook_resid_post@2", "blocks.*.hook_resid_post@-1"):
        with pytest.raises(UnknownHookPoint, match=r"'blocks.0.hook_resid_post' has steps 0..1, not"):
            looped.run_with_hooks(TOKENS, hooks=[(address, double)])


@pytest.mark.parametrize("written", ["[x]", "[]", "[1;2]", "[1.5]", "[-]", "[3:x]"])
def test_positions_that_cannot_be_read(retnet: Decoder, written: str) -> None:
    with pytest.raises(UnknownHookPoint, match=r"Cannot read the positions in .*Expected e.g. \[12\]"):
        retnet.run_with_cache(TOKENS, names=f"blocks.0.mixer.hook_state{written}")


def test_two_words_for_one_argument(model: Decoder) -> None:
    with pytest.raises(HookError, match="names and names_filter mean the same"):
        model.run_with_cache(TOKENS, names=POINT, names_filter=POINT)
    with pytest.raises(HookError, match="positions and pos_slice mean the same"):
        model.run_with_cache(TOKENS, names=POINT, positions=1, pos_slice=1)


# -------------------------------------------------------------------------------------------- what was never reached


def test_hooks_that_the_run_does_not_reach(model: Decoder, retnet: Decoder) -> None:
    late = "blocks.2.hook_resid_post"
    expected = rf"hook on '{late}' was attached to '{late}', but no run reached it.*stop_at_layer.*strict=False"
    ways: list[Callable[..., Any]] = [
        lambda **how: model.run_with_hooks(TOKENS, stop_at_layer=1, hooks=[(late, double)], **how),
        lambda **how: model.run_with_hooks(TOKENS, stop_at_layer=1, hooks=[Scale(late, factor=2.0)], **how),
        lambda **how: model.run_with_cache(TOKENS, stop_at_layer=1, names=[POINT.replace("1", "0"), late], **how),
        lambda **how: model.run_with_cache(TOKENS, stop_at_layer=1, hooks=[(late, double)], **how),
        lambda **how: model.run_with_hooks(TOKENS, stop_at_layer=1, bwd_hooks=[(late, double)], **how),
    ]
    for way in ways:
        with pytest.raises(HookNeverReached, match=expected):
            way()
        way(strict=False)
    with pytest.raises(HookNeverReached, match="hook_embed"):
        model.run_with_hooks(
            torch.zeros(1, 4, 24, dtype=torch.float64), start_at_layer=1, hooks=[("hook_embed", double)]
        )
    with pytest.raises(HookNeverReached, match=r"position 30"):
        retnet.run_with_hooks(TOKENS, hooks=[("blocks.0.mixer.hook_state[30]", double)])
    with pytest.raises(HookNeverReached, match=r"position 8:30"):
        retnet.run_with_hooks(TOKENS, hooks=[("blocks.0.mixer.hook_state[8:30]", double)])
    assert nothing_attached(model)


def test_a_block_in_which_nothing_runs(model: Decoder) -> None:
    """The block attached a hook and ended: it never fired."""
    with pytest.raises(HookNeverReached), model.hooks([(POINT, double)]):
        pass
    with model.hooks([(POINT, double)], strict=False):
        pass
    with model.hooks([]):
        pass


def test_a_block_in_which_another_model_runs(model: Decoder) -> None:
    with pytest.raises(HookNeverReached, match=POINT), model.hooks([(POINT, double)]):
        lively("gpt2")(TOKENS)


def test_every_item_of_a_list_must_be_reached_but_a_glob_only_somewhere(model: Decoder) -> None:
    model.run_with_hooks(TOKENS, stop_at_layer=1, hooks=[("blocks.*.hook_resid_post", double)])
    with pytest.raises(HookNeverReached, match=r"'blocks.1.hook_resid_post'"):
        model.run_with_hooks(TOKENS, stop_at_layer=1, hooks=[(["blocks.0.hook_resid_post", POINT], double)])


@pytest.mark.parametrize("where", [{"positions": 30}, {"positions": [2, 30]}, {"positions": [-9]}])
def test_positions_that_never_occur(model: Decoder, where: dict[str, Any]) -> None:
    """All of the chosen positions must occur, not just one of them; over several decoding steps each must occur once."""
    number = 30 if where["positions"] != [-9] else -9
    with pytest.raises(HookNeverReached, match=rf"'{POINT}', pos \[.*pos {number}"):
        model.run_with_hooks(TOKENS, hooks=[Ablate(POINT, **where)])
    assert largest(model.run_with_hooks(TOKENS, hooks=[Ablate(POINT, **where)], strict=False) - model(TOKENS)) >= 0


def test_positions_in_generation_occur_step_by_step(model: Decoder) -> None:
    model.generate(TOKENS, 4, hooks=[Ablate(POINT, positions=[2, 8, 10])])
    with pytest.raises(HookNeverReached, match="pos 12"):
        model.generate(TOKENS, 4, hooks=[Ablate(POINT, positions=[2, 8, 12])])


def test_states_after_positions_that_never_occur(retnet: Decoder) -> None:
    for after in (8, [3, 8]):
        with pytest.raises(HookNeverReached, match="position 8"):
            retnet.run_with_hooks(TOKENS, hooks=[EditState(layer=0, after=after)])
    with pytest.raises(HookNeverReached, match="position 30 never occurred"):
        retnet.run_with_hooks(TOKENS, hooks=[("blocks.0.mixer.hook_state[3,30]", double)])


def test_pattern_entries_that_never_occur(model: Decoder) -> None:
    with pytest.raises(HookNeverReached, match="key 9"):
        model.run_with_hooks(TOKENS, hooks=[BlockEdge(layer=0, queries=[3], keys=[9])])


# ----------------------------------------------------------------------------------------------- what hooks return

RETURNS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "batch": (lambda x: x[:1], r"\(batch: got 1, expected 2\). Expected \(batch=2, pos=8, d_model=24\); shapes are never broadcast"),
    "sequence": (lambda x: x[:, :1], r"\(pos: got 1, expected 8\)"),
    "width": (lambda x: x[..., :5], r"\(d_model: got 5, expected 24\)"),
    "two axes": (lambda x: x[:1, :3], r"\(batch: got 1, expected 2, pos: got 3, expected 8\)"),
    "rank": (lambda x: x[0], r"\(got \(8, 24\)\)"),
    "a number": (lambda x: x.sum(), r"\(got \(\)\)"),
    "lower precision": (lambda x: x.float(), r"returned dtype torch.float32. Expected torch.float64; convert with .to\(activation.dtype\)"),
    "whole numbers": (lambda x: x.long(), r"returned dtype torch.int64. Expected torch.float64"),
    "another device": (lambda x: x.to("meta"), r"on device meta. Expected cpu; convert with .to\(activation.device\)"),
    "numpy": (lambda x: x.numpy(), r"returned ndarray. Expected a torch.Tensor of shape \(batch=2, pos=8, d_model=24\), or None"),
    "a float": (lambda x: 0.0, "returned float. Expected a torch.Tensor"),
    "a tuple": (lambda x: (x, x), "returned tuple. Expected a torch.Tensor"),
    "a list": (lambda x: [1.0], "returned list. Expected a torch.Tensor"),
    "False": (lambda x: False, "returned bool. Expected a torch.Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", RETURNS)
def test_a_hook_must_return_what_can_take_the_place(model: Decoder, mistake: str) -> None:
    make, message = RETURNS[mistake]
    with pytest.raises(HookReturnError) as caught:
        model.run_with_hooks(TOKENS, hooks=[(POINT, lambda x, hook: make(x))])
    assert re.search(rf"'{POINT}' returned .*{message}|'{POINT}' {message}|'{POINT}'.*{message}", str(caught.value)), (
        str(caught.value)
    )
    assert nothing_attached(model)


def test_a_backward_hook_must_return_a_gradient_of_the_same_form() -> None:
    ordinary = gpt2()
    for make in (lambda g: g[:1], lambda g: g.double(), lambda g: 1.0):
        with (
            pytest.raises(HookReturnError, match=f"backward hook on '{POINT}'"),
            ordinary.hooks(bwd_hooks=[(POINT, lambda g, hook, make=make: make(g))]),
        ):
            ordinary(TOKENS, return_type="loss").backward()


def test_a_backward_hook_where_no_gradient_flows(model: Decoder) -> None:
    with pytest.raises(
        HookError, match=rf"'{POINT}' can never fire: no gradient flows there. Expected gradients to be enabled"
    ):
        model.run_with_hooks(TOKENS, bwd_hooks=[(POINT, double)])
    with pytest.raises(HookError, match="can never fire"), torch.no_grad():
        gpt2().run_with_hooks(TOKENS, bwd_hooks=[(POINT, double)])


def test_a_state_hook_must_return_a_state(retnet: Decoder) -> None:
    with pytest.raises(
        HookReturnError, match=r"'blocks.0.mixer.hook_state' returned the wrong shape \(batch: got 1, expected 2\)"
    ):
        retnet.run_with_hooks(TOKENS, hooks=[("blocks.0.mixer.hook_state[3]", lambda s, hook: s[:1])])


# -------------------------------------------------------------------------------------------------- signatures


def no_argument() -> None: ...
def one_argument(x: Tensor) -> None: ...
def three_arguments(x: Tensor, y: Tensor, hook: HookPoint) -> None: ...
def three_and_default(x: Tensor, y: Tensor, hook: HookPoint | None = None) -> None: ...
def other_keyword(x: Tensor, *, point: HookPoint) -> None: ...
def needs_more(x: Tensor, hook: HookPoint, *, strength: float) -> None: ...


class Whatever:
    pass


@pytest.mark.parametrize(
    "function",
    [
        no_argument,
        one_argument,
        three_arguments,
        three_and_default,
        other_keyword,
        needs_more,
        lambda: None,
        lambda x: x,
    ],
    ids=lambda f: f.__name__,
)
def test_a_hook_takes_an_activation_and_a_hook_point(model: Decoder, function: Any) -> None:
    """Found before anything runs, and the signature is in the message."""
    for attach in (
        lambda: model.run_with_hooks(TOKENS + 9999, hooks=[(POINT, function)]),
        lambda: model.run_with_hooks(TOKENS, bwd_hooks=[(POINT, function)]),
        lambda: model.add_hook(POINT, function),
    ):
        with pytest.raises(
            HookSignatureError,
            match=rf"hook for '{POINT}' has the signature \(.*Expected two arguments: hook\(activation, hook\)",
        ):
            attach()
    assert nothing_attached(model)


@pytest.mark.parametrize("thing", [None, 3, "double", Whatever(), torch.zeros(3)], ids=lambda t: type(t).__name__)
def test_a_hook_is_a_function(model: Decoder, thing: Any) -> None:
    with pytest.raises(
        HookSignatureError,
        match=rf"hook for '{POINT}' is {type(thing).__name__}, not a function. Expected two arguments",
    ):
        model.run_with_hooks(TOKENS, hooks=[(POINT, thing)])


def test_builtins_do_not_tell_their_signature(model: Decoder) -> None:
    with pytest.raises(HookSignatureError, match=r"does not tell its signature.*Wrap it: lambda x, hook"):
        model.run_with_hooks(TOKENS, hooks=[(POINT, torch.relu)])


@pytest.mark.parametrize("item", [POINT, (POINT,), (POINT, double, 1), double, 7, {"name": POINT}])
def test_a_hook_is_written_as_a_pair(model: Decoder, item: Any) -> None:
    for hooks in ([item], item if isinstance(item, tuple) else [item]):
        with pytest.raises(HookSignatureError, match="Expected an intervention or a pair"):
            model.run_with_hooks(TOKENS, hooks=hooks)


def test_an_intervention_is_no_backward_hook(model: Decoder) -> None:
    with pytest.raises(HookError, match="Ablate changes activations; backward hooks take"):
        model.run_with_hooks(TOKENS, bwd_hooks=[Ablate(POINT)])


# ------------------------------------------------------------------------------------------- points that only report


class Reporting(HookedModel):
    """x -> 3x + 1, with a point in the computation and one beside it that only reports the squared input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])
        self.hook_x = HookPoint("resid", "batch pos d_model")
        self.hook_energy = HookPoint("energy", "batch pos d_model", editable=False)
        self.name_hook_points()

    @property
    def n_layers(self) -> int:
        return 1

    def forward(self, x: Tensor) -> Tensor:
        self.hook_energy(x.square())
        return 3 * self.hook_x(x) + 1


def test_reading_a_reporting_point() -> None:
    model, x = Reporting(), torch.randn(1, 2, 3)
    seen: list[Tensor] = []
    out, cache = model.run_with_cache(x, hooks=[("hook_energy", lambda e, hook: seen.append(e))])
    assert (
        torch.equal(out, 3 * x + 1) and torch.equal(seen[0], x.square()) and torch.equal(cache["hook_energy"], seen[0])
    )


def returns_another(x: Tensor, hook: HookPoint) -> Tensor:
    return x + 1


def edits_in_place(x: Tensor, hook: HookPoint) -> None:
    x[0].zero_()


def edits_and_returns(x: Tensor, hook: HookPoint) -> Tensor:
    return x.mul_(2)


@pytest.mark.parametrize("edit", [returns_another, edits_in_place, edits_and_returns])
def test_editing_a_reporting_point_by_a_function(edit: Any) -> None:
    model = Reporting()
    with pytest.raises(ReadOnlyHookPoint, match="'hook_energy' only reports: the hook must return None"):
        model.run_with_hooks(torch.randn(1, 2, 3), hooks=[("hook_energy", edit)])
    handle = model.add_hook("hook_energy", edit)
    with pytest.raises(ReadOnlyHookPoint):
        model(torch.randn(1, 2, 3))
    handle.remove()


def test_editing_a_reporting_point_by_an_intervention() -> None:
    with pytest.raises(
        ReadOnlyHookPoint,
        match=r"Ablate cannot edit 'hook_energy': it only reports. Did you mean 'hook_x'. Editable hook points",
    ):
        Reporting().run_with_hooks(torch.randn(1, 2, 3), hooks=[Ablate("hook_energy")])


def test_a_model_of_ones_own_is_as_strict() -> None:
    """Nothing but hook points and a forward: unreached hooks, wrong names and shapes are found all the same."""
    model = Reporting()
    with pytest.raises(UnknownHookPoint, match="Did you mean 'hook_energy'"):
        model.run_with_cache(torch.randn(1, 2, 3), names="hook_enrgy")
    with pytest.raises(HookReturnError, match="batch: got 1, expected 2"):
        model.run_with_hooks(torch.randn(2, 2, 3), hooks=[("hook_x", lambda x, hook: x[:1])])
    with pytest.raises(HookNeverReached), model.hooks([("hook_x", double)]):
        pass


# ------------------------------------------------------------------------------------------------ cache look-ups


def test_cache_keys(model: Decoder) -> None:
    _, cache = model.run_with_cache(TOKENS, names="*.hook_pattern")
    cases: list[tuple[Any, str]] = [
        ("blocks.0.attn.hook_patern", r"neither cached nor a hook point. Did you mean 'blocks.0.attn.hook_pattern'"),
        ("blocks.0.hook_resid_post", r"is a hook point of the model but was not cached in this run"),
        (("patern", 0), r"Nothing cached for \('patern', 0\).*Did you mean 'pattern'"),
        (("pattern", 3), r"Layer 3 is out of range: this model has layers 0..2"),
        (("pattern", "0"), "Cannot look up"),
        (0, r"Cannot look up 0. Expected an address such as"),
    ]
    for key, message in cases:
        with pytest.raises(UnknownHookPoint) as caught:
            cache[key]
        assert re.search(message, str(caught.value)), str(caught.value)
    with pytest.raises(UnknownHookPoint, match=r"Unknown role 'patern'. Did you mean 'pattern'"):
        cache.by_role("patern")
    with pytest.raises(UnknownHookPoint, match="No hook point of role 'z' was cached"):
        cache.by_role("z")
    assert cache.get("nothing") is None


# ----------------------------------------------------------------------------- heads and positions that concern nothing


def test_heads_and_positions_that_concern_nothing(model: Decoder) -> None:
    with pytest.raises(
        HookError, match=rf"heads=\[0\] concerns none of the selected hook points: none has a 'head' axis \('{POINT}'"
    ):
        model.run_with_cache(TOKENS, names=POINT, heads=[0])
    reporting = Reporting()
    reporting.hook_x.axes = ("batch", "time", "d_model")
    with pytest.raises(HookError, match=r"positions=\[0\] concerns none of the selected hook points"):
        reporting.run_with_cache(torch.randn(1, 2, 3), names="hook_x", positions=[0])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"heads": 4}, r"Cannot keep head 4 of 'blocks.0.attn.hook_pattern': this run has head 0..3"),
        ({"heads": [0, -5]}, r"Cannot keep head -5 of"),
        ({"positions": [7, 8]}, r"Cannot keep query 8 of 'blocks.0.attn.hook_pattern': this run has query 0..7"),
        ({"positions": slice(8, 12)}, r"Cannot keep query 8:12 of"),
        ({"heads": []}, "heads is empty, which selects nothing"),
        ({"positions": []}, "positions is empty, which selects nothing"),
        ({"heads": [True, False]}, r"heads is \[True, False\]. Expected a number or a list of numbers"),
        ({"heads": 1.5}, r"heads is 1.5. Expected a number"),
        ({"positions": torch.tensor([True, False])}, "positions is tensor"),
        ({"positions": "last"}, "positions is 'last'. Expected a number"),
    ],
)
def test_parts_that_do_not_exist(model: Decoder, where: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        model.run_with_cache(TOKENS, role="pattern", **where)
    assert nothing_attached(model)


# ------------------------------------------------------------------------------------------------- interventions


def test_interventions_at_places_where_they_mean_nothing(model: Decoder, retnet: Decoder) -> None:
    cases: list[tuple[Decoder, Callable[[], Any], str]] = [
        (model, lambda: EditState(layer=0, after=3), r"EditState: this model has no recurrent state to edit .*Its roles are: "),
        (model, lambda: EditState("blocks.0.attn.hook_z", after=3), r"EditState edits states after a token; 'blocks.0.attn.hook_z'"),
        (retnet, lambda: EditState("blocks.0.mixer.hook_state[2]", after=3), "has both after=3 and the positions"),
        (model, lambda: EditPattern(POINT), rf"EditPattern edits patterns \(axes batch head query key\); '{POINT}' has axes"),
        (model, lambda: BlockEdge("blocks.0.attn.hook_q", queries=1, keys=0), "selects by 'query', but its axes are batch pos head d_head"),
        (model, lambda: Ablate(POINT, heads=[0]), rf"Ablate on '{POINT}' selects by 'head', but its axes are batch pos d_model"),
        (model, lambda: Ablate("blocks.0.mlp.hook_post", at={"d_mpl": 3}),
            r"'d_mpl', but its axes are batch pos d_mlp. Did you mean 'd_mlp'"),
        (model, lambda: Ablate("blocks.0.attn.hook_z", heads=4), r"Ablate on 'blocks.0.attn.hook_z': head \[4\] is out of range 0..3"),
        (model, lambda: Ablate("blocks.0.attn.hook_z", heads=[0, -5]), r"head \[-5\] is out of range 0..3"),
        (model, lambda: Scale("blocks.0.mlp.hook_post", factor=2.0, at={"d_mlp": [1, 999]}), r"d_mlp \[999\] is out of range"),
        (model, lambda: Steer(POINT, direction=torch.zeros(7)),
            rf"Steer on '{POINT}': a value of shape \(7,\) does not fit the activation, \(2, 8, 24\)"),
        (model, lambda: Steer(POINT, direction=torch.zeros(3, 2, 8, 24)), "does not fit"),
        (model, lambda: Patch(POINT, value=torch.zeros(2, 9, 24)), rf"Patch on '{POINT}': a value of shape \(2, 9, 24\) does not fit"),
        (model, lambda: Ablate(POINT, value=torch.zeros(5)), rf"Ablate on '{POINT}': a value of shape \(5,\) does not fit"),
        (model, lambda: Scale(POINT, factor=torch.ones(5)), rf"Scale on '{POINT}'"),
    ]  # fmt: skip
    for target, make, message in cases:
        with pytest.raises(HookError) as caught:
            target.run_with_hooks(TOKENS, hooks=[make()])
        assert re.search(message, str(caught.value)), str(caught.value)
    assert nothing_attached(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patch(POINT), rf"Patch on '{POINT}' has no value. Expected a tensor, e.g. clean_cache\['{POINT}'\]"),
        (lambda: Steer(POINT), "Steer has no direction"),
        (lambda: Ablate(POINT, value="zeros"), "Ablate: value is 'zeros'; expected 'zero', 'mean' or a tensor"),
        (lambda: EditState(operation="scael"), "unknown operation 'scael'. Did you mean 'scale'"),
        (lambda: Ablate(POINT, heads=[]), "Ablate: the choice of head is empty"),
        (lambda: Ablate(POINT, heads=[0], at={"head": 1}), r"chooses head twice: \[0\] and \[1\]"),
        (lambda: Ablate(POINT, positions="all"), "the choice of pos is 'all'. Expected a number"),
        (lambda: EditState(layer=0, after=[]), "EditState: after is empty"),
        (lambda: Ablate(POINT, heads=np.array([0.5])), "Expected a number"),
    ],
)
def test_interventions_that_cannot_be_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        make()


def test_patterns_refuse_what_the_state_has_swallowed(retnet: Decoder) -> None:
    """A recurrent decoding step has no earlier columns: reading them or blocking an edge to them is refused in words, not dropped."""
    edge = BlockEdge(layer=0, queries=[9], keys=[2])
    with pytest.raises(
        HookError, match=r"'blocks.0.mixer.hook_pattern' is watched in a call that continues a state.*use_state=False"
    ):
        retnet.generate(TOKENS, 3, hooks=[edge])
    assert retnet.generate(TOKENS, 3, hooks=[edge], use_state=False).shape == (2, 11)
    _, state = retnet(TOKENS, return_state=True)
    with pytest.raises(HookError, match="does not keep the 8 earlier tokens apart"):
        retnet.run_with_cache(TOKENS, state=state, role="pattern")


# ----------------------------------------------------------------------------------------- models that are built wrongly


class Forgetful(HookedModel):
    """Owns a hook point and never names it."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_x = HookPoint("resid", "batch pos d_model")

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_x(x)


def test_a_model_that_never_named_its_hook_points() -> None:
    for run in (
        lambda m: m.run_with_cache(torch.zeros(1, 2, 3)),
        lambda m: m.run_with_cache(torch.zeros(1, 2, 3), names=lambda name: True),
        lambda m: m.run_with_hooks(torch.zeros(1, 2, 3), hooks=[("hook_x", double)]),
    ):
        with pytest.raises(UnknownHookPoint, match=r"has no hook points. Expected .* name_hook_points\(\) at the end"):
            run(Forgetful())


def test_hook_points_that_cannot_be_named() -> None:
    """One object at two places, and hook points in a list: both would be dead or mixed up."""
    twice = Reporting()
    twice.hook_again = twice.hook_x
    with pytest.raises(HookError, match="'hook_again' of Reporting is there twice"):
        twice.name_hook_points()
    for kept in ([HookPoint("z", "batch")], {"a": HookPoint("z", "batch")}):
        listed = Reporting()
        listed.hooks_of_heads = kept  # type: ignore[assignment]
        with pytest.raises(HookError, match=r"Reporting.hooks_of_heads holds hook points, which get no name there"):
            listed.name_hook_points()
