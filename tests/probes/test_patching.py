"""Activation patching against single interventions, attribution patching where it is exact, and the shipped circuit."""

import json
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from probes.heads import head_scores
from probes.objectives import LogitDifference
from probes.patching import activation_patching, attribution_patching, correlation
from probes.progress import MeasurementCancelled
from tests.probes.attribution_cases import ARCHITECTURES, circuit_prompts, left_padded, perturbed, random_tokens
from workbench import EditState, FreezeNorm, Patch
from workbench.instrument.errors import UnknownHookPoint
from workbench.lab.corpora import MissingData
from workbench.lab.stimuli import load_prompt_pairs
from workbench.lab.tasks import make_task

ANSWER, WRONG = torch.tensor([3, 8, 21]), torch.tensor([5, 1, 30])
OBJECTIVE = LogitDifference(ANSWER, WRONG)


def prompts(model: Any) -> tuple[Tensor, Tensor]:
    """Three pairs that differ at positions 2 and 5."""
    clean = random_tokens(model)
    corrupted = clean.clone()
    corrupted[:, [2, 5]] = (clean[:, [2, 5]] + 7) % model.vocab_size
    return clean, corrupted


CELLS = [
    ("gpt2", "resid", ("pos",)),
    ("gpt2", "z", ("head", "pos")),
    ("gpt2", "mlp_out", ()),
    ("gpt2", "pattern", ("pos", "head")),
    ("llama", "key", ("head",)),
    ("retnet", "z", ("head", "pos")),
    ("mamba2", "mixer_out", ("pos",)),
    ("bdh", "neuron", ("head", "pos")),
    ("looped", "z", ("head",)),
]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(("name", "role", "by"), CELLS)
def test_every_cell_is_one_intervention(name: str, role: str, by: tuple[str, ...], direction: str) -> None:
    model = perturbed(name)
    clean, corrupted = prompts(model)
    grid = activation_patching(model, clean, corrupted, OBJECTIVE, role=role, by=by, direction=direction, sequences=7)
    source, base = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    _, cache = model.run_with_cache(source, role=role)
    places = [tuple(p) for p in torch.ones(grid.values.shape[:-1]).nonzero().tolist()]
    for place in places[::5]:
        address, where = grid.names[place[0]], dict(zip(by, place[1:], strict=True))
        options: dict[str, Any] = {"heads": where["head"]} if "head" in where else {}
        if "pos" in where and role == "pattern":
            options["at"] = {"query": where["pos"]}
        elif "pos" in where:
            options["positions"] = where["pos"]
        axes = cache.point(address).axes
        if "heads" in options and "head" not in axes:
            options["at"] = {next(axis for axis in axes if axis in ("kv_head", "group")): options.pop("heads")}
        edited = model.run_with_hooks(base, hooks=[(address, Patch(address, value=cache[address], **options))])
        torch.testing.assert_close(grid.values[place], OBJECTIVE(edited).detach(), atol=1e-11, rtol=0)
    assert grid.effects().abs().max() > 1e-6


@pytest.mark.parametrize("name", ["retnet", "mamba2", "bdh"])
def test_states_are_patched_after_a_token(name: str) -> None:
    model = perturbed(name)
    clean, corrupted = prompts(model)
    grid = activation_patching(model, clean, corrupted, OBJECTIVE, role="state", by=("pos", "head"))
    reading = model.states(clean, positions=[6])
    edit = EditState(layer=1, after=6, operation="set", value=reading[1][:, 0], heads=1)
    expected = OBJECTIVE(model.run_with_hooks(corrupted, hooks=[edit]))
    torch.testing.assert_close(grid.values[1, 6, 1], expected.detach(), atol=1e-11, rtol=0)
    assert grid.effects()[:, -1].abs().max() < 1e-12  # after the last token nothing reads it
    guess = attribution_patching(model, clean, corrupted, OBJECTIVE, role="state", by=("pos", "head"))
    change = (reading[1] - model.states(corrupted, positions=[6])[1])[:, 0]
    nudge = EditState(layer=1, after=6, operation="add", value=1e-6 * change, heads=1)
    slope = (OBJECTIVE(model.run_with_hooks(corrupted, hooks=[nudge])) - grid.corrupted) / 1e-6
    torch.testing.assert_close(guess.values[1, 6, 1] - guess.corrupted, slope.detach(), atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_stream_carries_everything(name: str) -> None:
    """Patching all positions of the first stream is running the other prompt; before the prompts differ, patching does nothing."""
    model = perturbed(name)
    clean, corrupted = prompts(model)
    whole = activation_patching(model, clean, corrupted, OBJECTIVE, by=())
    torch.testing.assert_close(whole.normalised(), torch.ones(model.n_layers, dtype=torch.float64))
    grid = activation_patching(model, clean, corrupted, OBJECTIVE)
    assert grid.normalised()[:, :2].abs().max() < 1e-9  # tokens 0 and 1 are the same in both
    assert grid.normalised()[0, [3, 4, 6, 7]].abs().max() < 1e-9


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_estimates_agree_for_small_changes(name: str) -> None:
    """First order: the error of the estimate falls with the square of the change, on the embedding of one token."""
    model = perturbed(name, scale=0.2)
    tokens = random_tokens(model)
    change = 0.1 * torch.randn(model.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def error(size: float) -> float:
        with torch.no_grad():
            model.W_E[:2] = model.W_E[2]
            model.W_E[1] += size * change
        clean, corrupted = tokens.clone(), tokens.clone()
        clean[:, 4], corrupted[:, 4] = 0, 1
        exact = activation_patching(model, clean, corrupted, OBJECTIVE)
        guess = attribution_patching(model, clean, corrupted, OBJECTIVE)
        return float((exact.values - guess.values)[0, 4].abs().max())

    assert error(0.001) < error(0.01) / 50  # a hundredth, but for higher orders


def test_estimates_are_exact_where_the_model_is_linear() -> None:
    """The last stream reaches the logits through a norm alone; with its scale frozen the estimate is the patch."""
    model = perturbed("llama")
    clean, corrupted = prompts(model)
    _, scales = model.run_with_cache(corrupted, names="ln_final.hook_scale")
    with model.hooks([FreezeNorm.from_cache(scales)]):
        exact = activation_patching(model, clean, corrupted, OBJECTIVE, role="resid_post", layers=[-1], sequences=3)
        guess = attribution_patching(model, clean, corrupted, OBJECTIVE, role="resid_post", layers=[-1])
    torch.testing.assert_close(guess.values, exact.values, atol=1e-12, rtol=1e-9)
    assert exact.effects().abs().max() > 1e-4


def test_the_shipped_circuit_is_found() -> None:
    """The induction heads of layer 1 restore the answer; the estimate ranks the cells as the runs do."""
    model, clean, corrupted, objective = circuit_prompts()
    heads = activation_patching(model, clean, corrupted, objective, role="z", by=("head",))
    scores = head_scores(model, make_task("induction", vocab_size=128, length=65, seed=3).batch(8), ("induction",))
    share = heads.normalised()
    readers = scores["induction"][1] > 0.2
    assert share[1][torch.from_numpy(readers)].sum() > 0.8
    assert float(share[1][torch.from_numpy(~readers)].abs().sum()) < 0.2
    exact = activation_patching(model, clean, corrupted, objective, role="z", by=("head", "pos"))
    guess = attribution_patching(model, clean, corrupted, objective, role="z", by=("head", "pos"))
    r = correlation(guess, exact)
    print(f"attribution patching of {exact.values[..., 0].numel()} cells (head × position): Pearson {r:.3f}")
    assert r > 0.7


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_and_order_change_nothing(name: str) -> None:
    model = perturbed(name)
    clean, corrupted = prompts(model)
    grid = activation_patching(model, clean, corrupted, OBJECTIVE)
    padded = [left_padded(tokens) for tokens in (clean, corrupted)]
    again = activation_patching(model, padded[0][0], padded[1][0], OBJECTIVE, mask=padded[0][1])
    torch.testing.assert_close(again.values[:, 2:], grid.values, atol=1e-10, rtol=1e-8)
    turned = LogitDifference(ANSWER.flip(0), WRONG.flip(0))
    guess = attribution_patching(model, clean, corrupted, OBJECTIVE)
    other = attribution_patching(model, clean.flip(0), corrupted.flip(0), turned)
    torch.testing.assert_close(other.values.flip(-1), guess.values, atol=1e-11, rtol=1e-8)


@pytest.mark.parametrize("task", ["ioi", "greater_than"])
def test_published_prompt_pairs_run(task: str) -> None:
    """Plumbing only: a byte model knows neither names nor years."""
    try:
        published = load_prompt_pairs(task)
    except MissingData as error:
        pytest.skip(str(error))
    pairs = [p for p in published if len(p.clean.encode()) == len(p.corrupted.encode())][:40]
    length = max({len(p.clean.encode()) for p in pairs}, key=[len(p.clean.encode()) for p in pairs].count)
    pairs = [p for p in pairs if len(p.clean.encode()) == length][:4]
    model = models.load("gpt-english")
    answer = torch.tensor([p.answer.strip().encode()[0] for p in pairs])
    clean, corrupted = [p.clean for p in pairs], [p.corrupted for p in pairs]
    guess = attribution_patching(model, clean, corrupted, LogitDifference(answer), role="resid_post")
    assert guess.values.shape == (model.n_layers, length, len(pairs)) and guess.effects().abs().max() > 0


def test_progress_and_cancel() -> None:
    model = perturbed("gpt2")
    clean, corrupted = prompts(model)
    told: list[float] = []
    stop = threading.Event()

    def report(fraction: float, message: str) -> None:
        told.append(fraction)
        if len(told) == 3:
            stop.set()

    activation_patching(model, clean, corrupted, OBJECTIVE, by=(), progress=lambda f, m: told.append(f))
    assert told[0] == 0 and told[-1] == 1 and told == sorted(told)
    told.clear()
    with pytest.raises(MeasurementCancelled, match=r"patching resid, 3 of"):
        activation_patching(model, clean, corrupted, OBJECTIVE, sequences=3, progress=report, cancel=stop)
    assert len(told) == 3


def test_mistakes_are_named() -> None:
    model = perturbed("gpt2")
    clean, corrupted = prompts(model)
    with pytest.raises(ValueError, match=r"equal length, position for position"):
        activation_patching(model, clean, corrupted[:, :-1], OBJECTIVE)
    with pytest.raises(ValueError, match=r"Unknown direction 'denoised'. Did you mean 'denoise'"):
        activation_patching(model, clean, corrupted, OBJECTIVE, direction="denoised")
    with pytest.raises(ValueError, match=r"'heads' is unknown or there twice. Did you mean 'head'"):
        activation_patching(model, clean, corrupted, OBJECTIVE, by=("heads",))
    with pytest.raises(ValueError, match=r"by names 'head', which 'resid' lacks"):
        activation_patching(model, clean, corrupted, OBJECTIVE, by=("head",))
    with pytest.raises(UnknownHookPoint, match=r"Unknown role 'state'"):
        activation_patching(model, clean, corrupted, OBJECTIVE, role="state")
    with pytest.raises(ValueError, match=r"one number for each of 3 sequences"):
        activation_patching(model, clean, corrupted, lambda logits: logits.sum())
    with pytest.raises(ValueError, match=r"no difference to restore"):
        activation_patching(model, clean, clean, OBJECTIVE).normalised()
    record = json.loads(json.dumps(attribution_patching(model, clean, corrupted, OBJECTIVE).to_json()))
    assert record["method"] == "estimated" and len(record["values"]) == model.n_layers
