"""What is measured over texts depends neither on their order nor, where numbers are per text, on which others are read with them.

The probes of the battery are in `test_probe_invariances`; those with such tests of their own are named in the table of `docs/probes.md`.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from probes.ablation import ablate_set, ablation_effects
from probes.circuits import acdc, faithfulness_curve
from probes.context_order import context_mass, slot_profile
from probes.edges import EdgeGraph, edge_attribution, edge_effects
from probes.erasure import fit_eraser
from probes.features import JumpReLU, TopK, build_dictionary, evaluate
from probes.objectives import LogitDifference
from probes.path_patching import Site, heads_of, path_patching
from probes.reading_edits import CalibrateSinks
from probes.relevance import integrated_gradients, logit_of, perturbation_curve
from probes.state_tools import retention_matrix, token_table
from probes.statistics import attention_statistics
from probes.steering import mean_difference, steering_curve
from probes.tuned_lens import TunedLens
from tests.probes.attribution_cases import left_padded, perturbed, random_tokens

ORDER = [3, 0, 4, 1, 2]


@pytest.fixture(scope="module")
def model() -> Any:
    return perturbed("gpt", scale=0.3)


@pytest.fixture(scope="module")
def texts(model: Any) -> Tensor:
    return random_tokens(model, batch=5)


@pytest.mark.parametrize("method", ["zero", "mean"])
def test_ablation(model: Any, texts: Tensor, method: str) -> None:
    found, turned = (ablation_effects(model, x, method=method, batch_size=2) for x in (texts, texts[ORDER]))
    np.testing.assert_allclose(turned.ablated, found.ablated[:, ORDER], atol=1e-9)
    assert np.ptp(found.deltas) > 1e-3
    sets = [ablate_set(model, x, "head", [(0, 1), (1, 0)], method=method, controls=2) for x in (texts, texts[ORDER])]
    assert sets[0].delta == pytest.approx(sets[1].delta, abs=1e-9)
    np.testing.assert_allclose(sets[0].controls, sets[1].controls, atol=1e-9)


def test_edges_and_circuits(model: Any, texts: Tensor) -> None:
    other = texts.clone()
    other[:, 3] = (other[:, 3] + 1) % model.vocab_size
    answers = torch.tensor([5, 6, 7, 8, 9])
    found = []
    for order in (list(range(5)), ORDER):
        objective = LogitDifference(answers[order], answers[order] + 20)
        graph = EdgeGraph(model, texts[order], other[order])
        exact = edge_effects(graph, objective)
        circuit = acdc(graph, threshold=1e-3)
        curve = faithfulness_curve(graph, objective, exact, shares=(0.1, 0.5))
        senders, receivers = heads_of(model)[:2], [Site("value", 1, 0)]
        paths = path_patching(model, texts[order], other[order], objective, senders=senders, receivers=receivers)
        found.append((exact.scores, edge_attribution(graph, objective, steps=2).scores, circuit.kept, curve, paths))
    (exact, guess, kept, curve, paths), (exact_, guess_, kept_, curve_, paths_) = found
    torch.testing.assert_close(exact, exact_)
    torch.testing.assert_close(guess, guess_)
    assert torch.equal(kept, kept_) and 0 < int(kept.sum()) < kept.numel()
    np.testing.assert_allclose(curve.faithfulness, curve_.faithfulness, atol=1e-9)
    torch.testing.assert_close(paths.values[:, ORDER], paths_.values)


def test_relevance_and_its_curve(model: Any, texts: Tensor) -> None:
    metric = logit_of(3, against=5)
    found, turned = (integrated_gradients(model, x, metric, steps=3) for x in (texts, texts[ORDER]))
    torch.testing.assert_close(turned.scores, found.scores[ORDER])
    curves = [
        perturbation_curve(model, x, each, metric, controls=0, shares=(0.2, 0.6)).metric
        for x, each in ((texts, found), (texts[ORDER], turned))
    ]
    np.testing.assert_allclose(curves[0], curves[1], atol=1e-9)
    padded, mask = left_padded(texts)
    scores = integrated_gradients(model, padded, metric, steps=3, mask=mask)
    torch.testing.assert_close(scores.scores[:, 2:], found.scores)
    curve = perturbation_curve(model, padded, scores, metric, controls=0, shares=(0.2, 0.6), mask=mask).metric
    np.testing.assert_allclose(curve, curves[0], atol=1e-9)


@pytest.mark.parametrize("name", ["gpt", "retnet", "bdh"])
def test_statistics(name: str) -> None:
    model = perturbed(name, scale=0.3)
    x = random_tokens(model, batch=5)
    padded, mask = left_padded(x)
    found, turned = attention_statistics(model, x), attention_statistics(model, x[ORDER])
    behind = attention_statistics(model, padded, mask=mask)
    for layer, whole in found.items():
        for field in ("largest", "distance", "first", "previous"):
            values = whole.need(field)
            torch.testing.assert_close(turned[layer].need(field), values[ORDER], equal_nan=True)
            torch.testing.assert_close(behind[layer].need(field)[..., 2:], values, equal_nan=True)


def test_steering(model: Any) -> None:
    up, down, site = ["good day", "what a joy", "fine"], ["bad", "how awful it is"], "blocks.1.hook_resid_post"
    found, turned = mean_difference(model, up, down, site), mean_difference(model, up[::-1], down[::-1], site)
    torch.testing.assert_close(found.vector, turned.vector)
    alone = [mean_difference(model, [text], down, site).vector for text in up]
    torch.testing.assert_close(found.vector, torch.stack(alone).mean(0))
    metric, x = logit_of(3), random_tokens(model, batch=5)
    curves = [steering_curve(model, texts, found, metric, coefficients=(0, 2), controls=2) for texts in (x, x[ORDER])]
    np.testing.assert_allclose(curves[1].metric, curves[0].metric[:, ORDER], atol=1e-9)
    np.testing.assert_allclose(curves[1].controls, curves[0].controls, atol=1e-9)


def test_erasure() -> None:
    rng = np.random.default_rng(0)
    concept = np.repeat([0, 1, 2], 20)
    rows = rng.normal(size=(60, 6)) + concept[:, None] * rng.normal(size=6)
    order = rng.permutation(60)
    found, turned = fit_eraser(rows, concept), fit_eraser(rows[order], concept[order])
    x = torch.from_numpy(rows)
    torch.testing.assert_close(found(x), turned(x))
    torch.testing.assert_close(found(x)[order], found(x[order]))


def test_tuned_lenses_read_each_text_by_itself(model: Any, texts: Tensor) -> None:
    lens = TunedLens(model.n_layers, model.d_model).double()
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    found, turned, alone = (lens.read(model, x) for x in (texts, texts[ORDER], texts[:1]))
    torch.testing.assert_close(turned.divergence, found.divergence[:, ORDER])
    torch.testing.assert_close(alone.divergence, found.divergence[:, :1])


def test_documents_in_a_context(model: Any, texts: Tensor) -> None:
    spans = [(0, 3), (3, 7)]
    found = context_mass(model, texts, spans)
    torch.testing.assert_close(context_mass(model, texts[ORDER], spans), found[ORDER])
    prompts = [([row[:3].tolist(), row[3:6].tolist()], row[6:].tolist()) for row in texts]
    torch.testing.assert_close(slot_profile(model, prompts), slot_profile(model, prompts[::-1]))


def test_calibrated_sinks(model: Any, texts: Tensor) -> None:
    edit = CalibrateSinks("blocks.*.attn.hook_pattern", beta=0.4, threshold=0.05)
    with torch.no_grad():
        found, turned, alone = (model.run_with_hooks(x, hooks=[edit]) for x in (texts, texts[ORDER], texts[:1]))
        assert not torch.allclose(found, model(texts))
    torch.testing.assert_close(turned, found[ORDER])
    torch.testing.assert_close(alone, found[:1])


@pytest.mark.parametrize("name", ["retnet", "gated-deltanet"])
def test_state_tools(name: str) -> None:
    model = perturbed(name)
    x = random_tokens(model, batch=5, length=6)
    found, turned = token_table(model, x, 1), token_table(model, x[ORDER], 1)
    for column, values in found.items():
        torch.testing.assert_close(turned[column], values[ORDER], equal_nan=True)
    kept = retention_matrix(model, x[:2], 1).by_age(), retention_matrix(model, x[:1], 1).by_age()
    torch.testing.assert_close(kept[0][:1], kept[1], equal_nan=True)


@pytest.mark.parametrize("config", [TopK(24, k=4), JumpReLU(24)])
def test_evaluation_of_dictionaries(config: Any) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    dictionary = build_dictionary(config, 8)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    found, turned = evaluate(dictionary, x, batch_size=7), evaluate(dictionary, x[order], batch_size=20)
    for name, value in found.to_json().items():
        assert turned.to_json()[name] == pytest.approx(value, rel=1e-5), name
