"""Statistics through hooks equal those of the model's own patterns, on every registered architecture, with padding, by head and layer."""

from typing import Any

import pytest
import torch
from torch import Tensor

import models
from kernels.attention_statistics import AttentionStatistics
from kernels.attention_statistics.reference import statistics_of
from kernels.attention_statistics.visibility import Visibility
from models.decoder import Decoder
from models.registry import ARCHITECTURES
from probes.statistics import NEEDED, attention_statistics
from workbench.instrument.errors import RefusedByPattern
from workbench.instrument.interventions import Ablate

models.architecture("bdh")  # registers all
LENGTH = 19
NAMES = list(ARCHITECTURES)


def lively(name: str) -> Decoder:
    """The tiny preset in float64 with weights large enough for patterns that differ."""
    model = models.build(name).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(2)
    return model


def tokens_and_mask(side: str | None) -> tuple[Tensor, Tensor | None]:
    tokens = torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    if side is None:
        return tokens, None
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, slice(0, 4) if side == "left" else slice(LENGTH - 4, None)] = False
    return tokens, mask


def assert_equal(found: AttentionStatistics, wanted: AttentionStatistics) -> None:
    for name in (
        "entropy",
        "largest",
        "first",
        "self_weight",
        "previous",
        "distance",
        "received",
        "received_largest",
        "profile",
        "map",
    ):
        a, b = getattr(found, name), getattr(wanted, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert torch.equal(a.isnan(), b.isnan()), name
            assert (a - b).nan_to_num().abs().max() < 1e-8 * max(1.0, float(b.nan_to_num().abs().max())), name


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_patterns(name: str, side: str | None) -> None:
    model = lively(name)
    tokens, mask = tokens_and_mask(side)
    forms = {model.mixers[layer].describe()["form"] for layer in range(model.n_layers)}
    padding = {} if mask is None else {"mask": mask}
    patterns = model.patterns(tokens, **padding)
    usable = all(
        pattern.meta.columns == "token" and pattern.values.shape[-1] == LENGTH for pattern in patterns.values()
    )
    if not patterns or not usable:
        with pytest.raises(RefusedByPattern, match=r"no pattern|about tokens|not determined"):
            attention_statistics(model, tokens, mask=mask)
        return
    if not forms <= set(NEEDED):
        with pytest.raises(RefusedByPattern, match=r"not determined by queries, keys and decays.*whole_patterns=True"):
            attention_statistics(model, tokens, mask=mask)
    for weights in ("share", "absolute"):
        found = attention_statistics(model, tokens, mask=mask, weights=weights, map_size=6, whole_patterns=True)
        assert list(found) == list(patterns)
        for key, pattern in patterns.items():
            assert pattern.values.isfinite().all()
            layer = key if isinstance(key, int) else key[0]
            window = model.mixers[layer].describe().get("window")
            see = Visibility(LENGTH, LENGTH, pattern.meta.causal, window if window else None, mask)
            kind = "share" if pattern.meta.is_distribution else weights
            wanted = statistics_of(pattern.values, see, weights=kind, map_size=6)
            if model.mixers[layer].describe()["form"] not in NEEDED and window:
                continue  # a whole pattern does not tell its window, so readers are counted without it
            assert_equal(found[key], wanted)
            if mask is None and kind == "absolute":
                assert torch.allclose(found[key].received.nan_to_num(), pattern.received())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["llama", "alibi", "retnet", "mamba2"])
def test_some_layers_and_heads(name: str) -> None:
    """The numbers of a selection are those of the whole."""
    model = lively(name)
    tokens, _ = tokens_and_mask(None)
    everything = attention_statistics(model, tokens)
    some = attention_statistics(model, tokens, layers=[-1, 1], heads=[2, 0], statistics=["entropy", "received"])
    assert list(some) == [1, 2]
    for layer, found in some.items():
        assert found.profile is None
        for field in ("entropy", "received"):
            wanted = everything[layer].need(field)[:, [2, 0]]
            assert torch.allclose(found.need(field), wanted, equal_nan=True)


def test_no_pattern_and_no_score_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused path stays in use: the points between scores and output are never active, and the fused kernel runs in every layer."""
    model = lively("llama")
    tokens, _ = tokens_and_mask(None)
    seen: list[bool] = []
    site = model.mixers[0]
    fused = torch.nn.functional.scaled_dot_product_attention

    def watching(*arguments: Any, **named: Any) -> Any:
        seen.append(site.hook_pattern.active or site.hook_attn_scores.active)
        return fused(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watching)
    attention_statistics(model, tokens)
    assert len(seen) == model.n_layers and not any(seen)


def test_interventions_are_in_place() -> None:
    """What layer 1 attends to after layer 0 was silenced equals the pattern of that run."""
    model = lively("gpt")
    tokens, _ = tokens_and_mask(None)
    edit = (
        Ablate("blocks.0.hook_attn_out")
        if "blocks.0.hook_attn_out" in model.hook_dict
        else Ablate("blocks.0.hook_mixer_out")
    )
    found = attention_statistics(model, tokens, layers=1, hooks=[edit])
    pattern = model.patterns(tokens, layers=1, hooks=[edit])[1]
    assert torch.allclose(found[1].need("entropy"), pattern.entropy())
    assert not torch.allclose(
        found[1].need("entropy"), attention_statistics(model, tokens, layers=1)[1].need("entropy")
    )


def test_text_and_mistakes() -> None:
    model = models.build("gpt")
    assert attention_statistics(model, "abcabc")[0].need("entropy").shape == (1, 4, 6)
    with pytest.raises(ValueError, match=r"Layer 7 is out of range: this model has layers 0\.\.2"):
        attention_statistics(model, "abc", layers=7)
    with pytest.raises(ValueError, match=r"Head 9 is out of range: layer 0 has heads 0\.\.3"):
        attention_statistics(model, "abc", heads=[9])
    with pytest.raises(ValueError, match="list of layers is empty"):
        attention_statistics(model, "abc", layers=[])
    with pytest.raises(ValueError, match="Did you mean 'entropy'"):
        attention_statistics(model, "abc", statistics=["entropie"])
