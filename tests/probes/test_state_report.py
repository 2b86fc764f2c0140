"""The report of a layer's memory: its numbers are those of its parts, Mamba's keys included."""

from __future__ import annotations

import pytest
import torch

import models
from probes.state_report import first_with_state, memory_report
from probes.state_tools import retention_matrix, state_spectrum, token_table
from probes.state_tools_edits import implant, reset
from workbench.instrument.errors import HookError, UnknownHookPoint

TEXT = "one two one"


@pytest.mark.parametrize("name", ["mamba", "falcon-mamba"])
def test_mambas_state_is_asked_by_b_for_x(name: str) -> None:
    """Against the scan as a loop: h ← exp(Δ A) h + Δ x B, asked with B_j, compared with x_j in groups of channels."""
    model = models.build(name).double()
    mixer, tokens = model.mixers[1], model.to_tokens(TEXT)
    points = {key: f"blocks.1.mixer.hook_{key}" for key in ("v", "k", "dt")}
    _, cache = model.run_with_cache(tokens, names=list(points.values()))
    x, b, dt = (cache[points[key]][0] for key in ("v", "k", "dt"))
    a = -mixer.A_log.detach().exp()
    state, expected = torch.zeros_like(a), []
    for t in range(len(x)):
        state = torch.exp(dt[t][:, None] * a) * state + dt[t][:, None] * x[t][:, None] * b[t]
        answers = (state @ b.mT).mT.unflatten(1, (mixer.n_heads, -1))  # [key, head, channel]
        expected.append(torch.cosine_similarity(answers, x.unflatten(1, (mixer.n_heads, -1)), dim=-1))
    found = retention_matrix(model, tokens, 1).cosine[0]
    written = torch.ones(len(x), len(x)).tril().bool()
    assert torch.allclose(found[:, written], torch.stack(expected).permute(2, 0, 1)[:, written], atol=1e-10)
    assert found[:, ~written].isnan().all()
    spectrum = state_spectrum(model, tokens, 1, [len(x) - 1])
    assert torch.allclose(spectrum.singular_values[0, 0], torch.linalg.svdvals(state).to(spectrum.singular_values))
    norm = token_table(model, tokens, 1)["state norm"]
    assert norm.shape == (1, 1, len(x)) and torch.allclose(norm[0, 0, -1], state.norm())


def test_a_report_is_its_parts_under_the_same_edits() -> None:
    model = models.build("gated-deltanet").double()
    tokens = model.to_tokens(TEXT)
    hooks = reset(model, 1, after=4)
    report = memory_report(model, TEXT, -2, hooks=hooks, positions=[3, -1])
    assert report.layer == 1 and report.kind == "delta" and isinstance(report.table["kept"], torch.Tensor)
    parts = retention_matrix(model, tokens, 1, hooks=reset(model, 1, after=4))
    assert report.retention is not None and torch.equal(
        report.retention.cosine.nan_to_num(9), parts.cosine.nan_to_num(9)
    )
    assert report.forgetting is not None and torch.allclose(
        report.forgetting[:, 0], parts.cosine[0].diagonal(0, 1, 2).mean(-1)
    )
    assert report.spectrum is not None and report.spectrum.positions == (3, len(TEXT) - 1)
    plain, edited = model(tokens)[0], model.run_with_hooks(tokens, hooks=reset(model, 1, after=4))[0]
    expected = torch.nn.functional.kl_div(edited.log_softmax(-1), plain.softmax(-1), reduction="none").sum(-1)
    assert report.divergence is not None and torch.allclose(report.divergence, expected, atol=1e-12)
    assert float(expected[:5].abs().max()) < 1e-12 and float(expected[5:].min()) > 1e-9  # later tokens only
    nats = torch.nn.functional.cross_entropy(edited[:-1], tokens[0, 1:], reduction="none")
    assert torch.allclose(report.loss[1:], nats) and report.loss[0].isnan()
    assert not report.table["state norm"][0, :, 4].any()
    untouched = memory_report(model, TEXT, 1)
    assert untouched.divergence is None and untouched.table["state norm"][0, :, 4].all()


def test_an_implant_is_seen_by_the_report() -> None:
    model = models.build("gated-deltanet")
    factors = model.state_factors(TEXT, 1)
    hooks = implant(model, 1, factors["key"][0, :, 2], factors["value"][0, :, 2], after=6)
    cosine = memory_report(model, TEXT, 1, hooks=hooks).retention.cosine  # type: ignore[union-attr]
    assert torch.allclose(cosine[0, :, 6, 2], torch.ones(4), atol=1e-5)


def test_vectors_networks_and_layers_without_a_state() -> None:
    cell = memory_report(models.build("lstm"), TEXT, 0)
    assert cell.spectrum is None and cell.retention is None and "does not store values under keys" in cell.no_retention
    assert cell.to_json()["retention"] is None and len(cell.to_json()["tokens"]["forget_gates"][0]) == len(TEXT)
    network = memory_report(models.build("titans"), "one", 0)
    assert network.retention is not None and network.spectrum is not None
    hybrid = models.build("samba")
    assert first_with_state(hybrid) == 0
    with pytest.raises(UnknownHookPoint, match="No layer of this model has one"):
        first_with_state(models.build("gpt2"))
    with pytest.raises(ValueError, match="A report reads one text"):
        memory_report(hybrid, torch.zeros(2, 3, dtype=torch.long), 0)
    with pytest.raises(HookError, match="'h' of layer 0 is no matrix: batch head unit"):
        state_spectrum(models.build("lstm"), TEXT, 0, 2, slot="h")
