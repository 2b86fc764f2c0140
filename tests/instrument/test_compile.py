"""torch.compile: one graph without breaks, hooks honoured whenever attached, interventions that share a graph, other threads apart."""

import threading
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import models
from models.decoder import Decoder
from tests.instrument.tiny_models import largest, nothing_attached, some_tokens
from workbench.instrument.errors import HookError, HookNeverReached, HookReturnError
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.interventions import Ablate, BlockEdge, EditState, Intervention, Patch, Project, Scale, Steer

TOKENS = some_tokens()
POINT = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def small(name: str) -> Decoder:
    return models.build(name, n_layers=2).double().requires_grad_(False)


def double(x: Tensor, hook: HookPoint) -> Tensor:
    return 2 * x


def numbers(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["gpt2", "llama", "retnet", "mamba2", "bdh"])
def test_a_whole_model_is_one_graph_that_honours_hooks(name: str) -> None:
    """fullgraph=True raises at any break. Idle, then hooked, then idle again, then steered by five vectors, with another thread at work."""
    model = small(name)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    plain = model(TOKENS)
    assert largest(compiled(TOKENS) - plain) < 1e-12
    assert counter.frame_count == 1

    with model.hooks([(POINT, double)]):
        assert largest(compiled(TOKENS) - model(TOKENS)) < 1e-12 < largest(compiled(TOKENS) - plain)
    assert counter.frame_count == 2
    assert largest(compiled(TOKENS) - plain) < 1e-12, "removing the hook restores the model"
    assert counter.frame_count == 2

    for seed in range(5):
        with model.hooks([Steer(POINT, direction=numbers(model.d_model, seed=seed))]):
            assert largest(compiled(TOKENS) - model(TOKENS)) < 1e-12 < largest(compiled(TOKENS) - plain)
    assert counter.frame_count <= 4, "one graph for five vectors, and one more for the second call of a block"

    attached, finished = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with model.hooks([(POINT, double)], strict=False):
            attached.set()
            finished.wait()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    attached.wait()
    try:
        assert largest(compiled(TOKENS) - plain) < 1e-12, "another thread's hooks do not appear"
    finally:
        finished.set()
        thread.join()
    assert nothing_attached(model)


def five_of(make: Callable[[Tensor], Intervention], *shape: int) -> list[Intervention]:
    return [make(numbers(*shape, seed=seed)) for seed in range(5)]


SHARING: dict[str, list[Intervention]] = {
    "Steer": five_of(lambda v: Steer(POINT, direction=v, coefficient=v[0], positions=[1, -1]), 24),
    "Scale": five_of(lambda v: Scale("blocks.*.attn.hook_z", factor=v, heads=[0, 2]), 6),
    "Patch": five_of(lambda v: Patch("blocks.0.attn.hook_pattern", value=v.softmax(-1)), 2, 4, 8, 8),
    "Ablate": five_of(lambda v: Ablate("blocks.0.mlp.hook_post", value=v), 40),
    "Project": five_of(lambda v: Project(POINT, directions=v), 2, 24),
    "other heads": [Ablate("blocks.0.attn.hook_z", heads=[head]) for head in (0, 1, 2, 3, -1)],
    "other edges": [BlockEdge(layer=1, queries=[query], keys=[0]) for query in (1, 2, 3, 4, -1)],
}


@pytest.mark.parametrize("kind", SHARING)
def test_interventions_of_one_form_share_a_graph(kind: str) -> None:
    """Five interventions that differ in their tensors (or chosen indices) compile once, and each equals its uncompiled effect."""
    model = small("gpt2")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    seen: list[Tensor] = []
    for intervention in SHARING[kind]:
        expected = model.run_with_hooks(TOKENS, hooks=[intervention])
        with model.hooks([intervention]):
            seen.append(compiled(TOKENS))
        assert largest(seen[-1] - expected) < 1e-12
    assert counter.frame_count == 1
    assert kind.startswith("other") or all(largest(a - b) > 1e-9 for a, b in pairwise(seen))


def test_state_edits_share_a_graph() -> None:
    model = small("retnet")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(5):
        edit = EditState(layer=0, after=3, operation="add", value=numbers(8, 16, seed=seed))
        expected = model.run_with_hooks(TOKENS, hooks=[edit])
        with model.hooks([edit]):
            assert largest(compiled(TOKENS) - expected) < 1e-12
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["gpt2", "mamba2"])
def test_ahead_of_time_functionalisation(name: str) -> None:
    """aot_eager traces through autograd's machinery and makes everything functional: same logits, same hooks, same cache."""
    model = small(name)
    plain, cache = model.run_with_cache(TOKENS)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    assert largest(model(TOKENS) - plain) < 1e-12
    for _ in range(2):
        logits, compiled_cache = model.run_with_cache(TOKENS)
        assert list(compiled_cache) == list(cache) and largest(logits - plain) < 1e-12
        for address in cache:
            assert largest((compiled_cache[address] - cache[address]).nan_to_num(0, 0, 0)) < 1e-12, address
    assert counter.frame_count == 2, "idle, and caching"
    with model.hooks([(POINT, double), Scale("blocks.0.hook_resid_pre", factor=3.0)]):
        changed = model(TOKENS)
    twin = small(name)
    assert (
        largest(
            changed - twin.run_with_hooks(TOKENS, hooks=[Scale("blocks.0.hook_resid_pre", factor=3.0), (POINT, double)])
        )
        < 1e-12
    )
    assert nothing_attached(model)


def test_caching_a_part_and_permanent_hooks() -> None:
    model = small("gpt2")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    _, expected = model.run_with_cache(TOKENS, role="pattern", heads=[1], positions=[-1], dtype=torch.float32)
    plain = compiled(TOKENS)
    model.compile(backend="eager", fullgraph=True)
    _, cache = model.run_with_cache(TOKENS, role="pattern", heads=[1], positions=[-1], dtype=torch.float32)
    assert all(torch.equal(cache[address], expected[address]) for address in expected)
    handle = model.add_hook(POINT, double)
    changed = compiled(TOKENS)
    handle.remove()
    assert largest(changed - plain) > 1e-6 and torch.equal(compiled(TOKENS), plain)


def test_training_through_a_compiled_hooked_model() -> None:
    """Parameter gradients with a hook attached are those of the uncompiled model."""
    model = models.build("gpt2", n_layers=2).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients: list[list[Tensor]] = []
    with torch.enable_grad():
        for run in (model, compiled):
            with model.hooks([(POINT, double), Ablate("blocks.0.attn.hook_z", heads=[1])]):
                loss = run(TOKENS, return_type="loss")
            gradients.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    assert all(largest(a - b) < 1e-12 for a, b in zip(*gradients, strict=True))


def test_mistakes_are_found_in_compiled_code_too() -> None:
    model = small("gpt2")
    compiled = torch.compile(model, backend="eager")
    cases: list[tuple[Any, type[Exception], str]] = [
        ((POINT, lambda x, hook: x[:1]), HookReturnError, "batch: got 1, expected 2"),
        (Steer(POINT, direction=numbers(24), positions=[2, 99]), HookNeverReached, "pos 99 never occurred"),
        (Ablate("blocks.0.attn.hook_z", heads=[9]), HookError, r"head \[9\] is out of range 0..3"),
    ]
    for hook, error, message in cases:
        with pytest.raises(error, match=message), model.hooks([hook]):
            compiled(TOKENS)
        assert nothing_attached(model)
    with pytest.raises(HookNeverReached), model.hooks([(POINT, double)]):
        compiled(TOKENS, stop_at_layer=1)
    assert nothing_attached(model)
