"""Hooks of one call are invisible to other calls, other threads, calls from inside a hook, copies, and after an exception."""

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from models.decoder import Decoder
from tests.instrument.tiny_models import largest, lively, nothing_attached, some_tokens
from workbench.instrument import hook_points
from workbench.instrument.errors import HookNeverReached, UnknownHookPoint
from workbench.instrument.hook_points import ACTIVE, HookPoint
from workbench.instrument.interventions import Ablate, Scale

TOKENS = some_tokens()
POINT = "blocks.1.hook_resid_post"


@pytest.fixture
def model() -> Decoder:
    return lively("gpt2")


def double(x: Tensor, hook: HookPoint) -> Tensor:
    return 2 * x


# -------------------------------------------------------------------------------------------------- exceptions


class Planned(Exception):
    pass


@pytest.mark.parametrize("error", [Planned, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_in_a_hook_leaves_nothing(model: Decoder, error: type[BaseException]) -> None:
    plain = model(TOKENS)

    def fail(x: Tensor, hook: HookPoint) -> None:
        raise error("on purpose")

    for run in (model.run_with_hooks, model.run_with_cache):
        with pytest.raises(error):
            run(TOKENS, hooks=[("blocks.0.hook_attn_out", double), (POINT, fail)])
        assert nothing_attached(model) and ACTIVE.step == ACTIVE.offset == 0
        assert torch.equal(model(TOKENS), plain)
    with pytest.raises(error):
        model.generate(TOKENS, 2, hooks=[(POINT, fail)])
    assert nothing_attached(model) and torch.equal(model(TOKENS), plain)


def test_an_exception_in_a_hook_names_the_hook_point(model: Decoder) -> None:
    def fail(x: Tensor, hook: HookPoint) -> Tensor:
        return x + torch.zeros(5)

    with pytest.raises(RuntimeError) as caught:
        model.run_with_hooks(TOKENS, hooks=[("blocks.*.hook_resid_mid", fail)])
    assert "blocks.0.hook_resid_mid" in "".join(caught.value.__notes__)


def test_an_exception_in_the_model_leaves_nothing(model: Decoder) -> None:
    """Also in a decoding step, where the position is not 0, and in the second pass over shared weights."""
    with pytest.raises(ValueError, match="Token ids must lie in"):
        model.run_with_hooks(TOKENS + 1000, hooks=[(POINT, double)])
    assert nothing_attached(model)

    def fail_late(x: Tensor, hook: HookPoint) -> None:
        if hook.offset > 0 or hook.step > 0:
            raise Planned

    with pytest.raises(Planned):
        model.generate(TOKENS, 3, hooks=[(POINT, fail_late)])
    looped = lively("looped")
    with pytest.raises(Planned):
        looped.run_with_hooks(TOKENS, hooks=[(POINT, fail_late)])
    assert ACTIVE.step == ACTIVE.offset == 0 and nothing_attached(model)


def test_a_refused_hook_attaches_none_of_its_list(model: Decoder) -> None:
    bad = [POINT, "blocks.0.hook_nonsense"]
    with pytest.raises(UnknownHookPoint), model.hooks([(name, double) for name in bad]):
        pass
    with pytest.raises(UnknownHookPoint):
        model.add_hook(bad, double)
    assert nothing_attached(model)


def test_the_count_of_attached_hooks_returns_to_zero(model: Decoder) -> None:
    """The one number that the fast path looks at: whatever happened, it is back where it was, and never below."""
    start = hook_points._attached
    test_an_exception_in_a_hook_leaves_nothing(model, KeyboardInterrupt)
    handle = model.add_hook("blocks.*.hook_resid_pre", double)
    assert hook_points._attached == start + 3 and hook_points._anything
    model.reset_hooks()
    handle.remove()
    model.reset_hooks()
    assert hook_points._attached == start
    with model.hooks([(POINT, double)], strict=False), model.hooks([(POINT, double)], strict=False):
        assert hook_points._attached == start + 2
    assert hook_points._attached == start


# ------------------------------------------------------------------------------------- blocks left in another order


def test_generators_that_interleave(model: Decoder) -> None:
    """Two generators hold a block open each and finish in the order they began: each leaves with its own hooks only."""
    plain, doubled = model(TOKENS), model.run_with_hooks(TOKENS, hooks=[(POINT, double)])

    def hooked(point: str) -> Iterator[None]:
        with model.hooks([(point, double)]):
            yield
            model(TOKENS)

    first, second = hooked("blocks.0.hook_attn_out"), hooked(POINT)
    next(first), next(second)
    assert list(first) == []
    assert torch.equal(model(TOKENS), doubled)
    assert list(second) == []
    assert torch.equal(model(TOKENS), plain) and nothing_attached(model)


def test_exit_stacks_closed_in_any_order(model: Decoder) -> None:
    plain = model(TOKENS, stop_at_layer=0)
    stacks = {factor: ExitStack() for factor in (2.0, 3.0, 5.0)}
    for factor, stack in stacks.items():
        stack.enter_context(model.hooks([Scale("blocks.0.hook_resid_pre", factor=factor)]))
    for closed, left in ((3.0, 10.0), (2.0, 5.0), (5.0, 1.0)):
        model(TOKENS)
        stacks[closed].close()
        _, cache = model.run_with_cache(TOKENS, names="blocks.0.hook_resid_pre")
        assert largest(cache["resid_pre", 0] - left * plain) < 1e-12
    assert nothing_attached(model)


# ------------------------------------------------------------------------------------------ calls inside hooks


def test_a_call_from_inside_a_hook_runs_without_the_hooks_around_it(model: Decoder) -> None:
    plain = model(TOKENS)
    inner: list[Tensor] = []

    def call(x: Tensor, hook: HookPoint) -> None:
        inner.append(model(TOKENS))
        _, cache = model.run_with_cache(TOKENS, names=POINT, hooks=[("hook_embed", lambda e, hook: 3 * e)])
        inner.append(cache[POINT])

    hooks = [("hook_embed", double), (POINT, call)]
    outer, cache = model.run_with_cache(TOKENS, hooks=hooks)
    assert torch.equal(inner[0], plain)
    tripled = model.run_with_cache(TOKENS, names=POINT, hooks=[Scale("hook_embed", factor=3.0)])[1][POINT]
    assert largest(inner[1] - tripled) < 1e-12
    expected, expected_cache = model.run_with_cache(
        TOKENS, hooks=[("hook_embed", double), (POINT, lambda x, hook: None)]
    )
    assert torch.equal(outer, expected) and list(cache) == list(expected_cache)
    assert all(torch.equal(cache[name], expected_cache[name]) for name in cache)
    assert nothing_attached(model)


def test_an_inner_call_leaves_position_and_step_of_the_outer_one(model: Decoder) -> None:
    """A nested call at another position (a prompt of its own) does not shift the outer decoding step's absolute positions."""
    looped = lively("looped")
    seen: list[tuple[int, int]] = []

    def call(x: Tensor, hook: HookPoint) -> None:
        model.generate(TOKENS, 2)
        looped(TOKENS)
        seen.append((hook.offset, hook.step))

    edit = Scale("blocks.2.hook_resid_pre", factor=-1.0, positions=[9])
    with_call = model.generate(TOKENS, 4, hooks=[("blocks.0.hook_resid_pre", call), edit])
    assert torch.equal(with_call, model.generate(TOKENS, 4, hooks=[edit]))
    assert seen == [(0, 0), (8, 0), (9, 0), (10, 0)]
    seen.clear()
    looped.run_with_hooks(TOKENS, hooks=[("blocks.1.hook_resid_pre", call)])
    assert seen == [(0, 0), (0, 1)]


def test_an_inner_call_leaves_the_states_of_the_outer_one() -> None:
    """The end of the call, which negative positions count from, is the outer call's own after a longer inner call."""
    model = lively("retnet")
    fired: list[str] = []

    def call(x: Tensor, hook: HookPoint) -> None:
        model.states(some_tokens(length=13), [-1, 2])
        fired.append("called")

    with model.hooks(
        [
            ("blocks.0.mixer.hook_state[2]", call),
            ("blocks.0.mixer.hook_state[-1]", lambda s, hook: fired.append("last")),
        ]
    ):
        model(TOKENS)
    assert fired == ["called", "last"]


def test_a_permanent_hook_may_call_its_own_model(model: Decoder) -> None:
    """It does not fire inside itself (that would never end); other permanent hooks do."""
    norms: list[float] = []

    def call(x: Tensor, hook: HookPoint) -> None:
        norms.append(largest(model(TOKENS)))

    handle = model.add_hook(POINT, call)
    other = model.add_hook("hook_embed", Ablate("hook_embed"))
    model(TOKENS)
    handle.remove()
    assert norms == [largest(model(TOKENS))]
    other.remove()


def test_a_metric_may_run_the_model(model: Decoder) -> None:
    """gradients_of gets the output after the run: a reference run inside it is neither hooked nor cached."""
    edit = Scale(POINT, factor=2.0)
    plain = model(TOKENS)

    def distance(logits: Tensor) -> Tensor:
        reference = model(TOKENS)
        assert torch.equal(reference, plain)
        return (logits - reference).square().sum()

    _, cache = model.run_with_cache(TOKENS, names=["hook_embed", POINT], hooks=[edit], gradients_of=distance)
    _, expected = model.run_with_cache(
        TOKENS, names=["hook_embed", POINT], hooks=[edit], gradients_of=lambda logits: (logits - plain).square().sum()
    )
    for address in expected:
        assert torch.equal(cache[address], expected[address])
        assert (
            largest(cache.gradients[address] - expected.gradients[address])
            < 1e-12
            < largest(expected.gradients[address])
        )


def test_two_models_do_not_mix(model: Decoder) -> None:
    """Hooks on one model inside the block of another: equal names, different points."""
    other = lively("gpt2")
    with model.hooks([(POINT, double)]):
        assert torch.equal(other(TOKENS), other(TOKENS))
        expected = model(TOKENS)
        assert largest(other(TOKENS) - expected) > 1e-3, "the same weights, unhooked"
        with other.hooks([(POINT, double)]):
            assert torch.equal(other(TOKENS), expected)


# --------------------------------------------------------------------------------------------------- threads


def test_threads_that_hammer_one_model_get_serial_results(model: Decoder) -> None:
    """Eight threads, each with its own hooks, caches and errors: every result equals the serial one, and nothing is left."""

    def job(number: int) -> tuple[Tensor, Tensor]:
        layer = number % 3
        factor = 1.0 + number / 4
        hooks = [
            (f"blocks.{layer}.hook_resid_post", lambda x, hook: factor * x),
            Ablate("*.hook_z", heads=[number % 4]),
        ]
        logits, cache = model.run_with_cache(TOKENS, role="pattern", hooks=hooks)
        return logits, cache["pattern", 2]

    expected = [job(number) for number in range(8)]
    wrong: list[Any] = []
    begin = threading.Barrier(8)

    def hammer(number: int) -> None:
        begin.wait()
        for repeat in range(12):
            if repeat % 4 == 3:
                try:
                    model.run_with_hooks(TOKENS, hooks=[(POINT, double)], stop_at_layer=1)
                    wrong.append("a hook that is never reached went through")
                except HookNeverReached:
                    pass
            if not all(torch.equal(a, b) for a, b in zip(job(number), expected[number], strict=True)):
                wrong.append((number, repeat))
        if not nothing_attached(model):
            wrong.append((number, "left something"))

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and nothing_attached(model)


def test_a_block_is_invisible_to_other_threads(model: Decoder) -> None:
    plain = model(TOKENS)
    seen: list[Tensor] = []
    with model.hooks([(POINT, double)]):
        changed = model(TOKENS)
        thread = threading.Thread(target=lambda: seen.append(model(TOKENS)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], plain) and largest(changed - plain) > 1e-3


def test_permanent_hooks_are_for_every_thread(model: Decoder) -> None:
    handle = model.add_hook(POINT, double)
    expected = model(TOKENS)
    seen: list[Tensor] = []
    threads = [threading.Thread(target=lambda: seen.append(model(TOKENS))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert all(torch.equal(logits, expected) for logits in seen) and len(seen) == 3


def test_permanent_hooks_attached_by_many_threads_all_leave(model: Decoder) -> None:
    start = hook_points._attached

    def attach() -> None:
        for _ in range(50):
            model.add_hook("blocks.*.hook_resid_pre", double).remove()

    threads = [threading.Thread(target=attach) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nothing_attached(model) and hook_points._attached == start


# ---------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "deepcopy inside a block"])
def test_a_copy_has_hook_points_of_its_own(model: Decoder, how: str) -> None:
    """Hooks on the original do not fire in the copy and the other way round; names, switches and results are the same."""
    model.set_use_attn_result(True)
    plain = model(TOKENS)
    handle = model.add_hook(POINT, double)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        with model.hooks([("hook_embed", double)], strict=False):
            twin = copy.deepcopy(model)
            assert torch.equal(twin(TOKENS), plain)
    assert torch.equal(twin(TOKENS), plain) and not twin.list_hooks()
    handle.remove()
    with model.hooks([(POINT, double)]):
        assert torch.equal(twin(TOKENS), plain)
        model(TOKENS)
    with twin.hooks([(POINT, double)]):
        assert torch.equal(model(TOKENS), plain)
        assert largest(twin(TOKENS) - plain) > 1e-3
    assert list(twin.hook_dict) == list(model.hook_dict)
    ours, theirs = ({p.uid for p in m.hook_dict.values()} for m in (model, twin))
    assert not ours & theirs and len(ours) == len(theirs)
    twin.set_use_attn_result(False)
    assert "blocks.0.attn.hook_result" in model.run_with_cache(TOKENS)[1]
    assert "blocks.0.attn.hook_result" not in twin.run_with_cache(TOKENS)[1]
    assert [p.describe() for p in twin.hook_dict.values()] == [p.describe() for p in model.hook_dict.values()]


def test_hook_points_are_not_in_the_state_dict(model: Decoder) -> None:
    assert not [name for name in model.state_dict() if "hook" in name]
    assert not [name for name, _ in model.named_modules() if "hook" in name]
