"""The published sizes of large families, without memory: every tensor that transformers makes has its place in our model, and it fits."""

from typing import Any

import pytest
import torch

from models.pretrained.family import Fields, family
from models.pretrained.loader import NO_WEIGHTS, weightless
from models.registry import architecture

# sizes of the published checkpoints where they are not the defaults of the configuration's class
PUBLISHED = {
    "Qwen3NextForCausalLM": ({}, 79_674_391_296),  # Qwen3-Next-80B-A3B without its heads for further tokens
    "RecurrentGemmaForCausalLM": (
        {"num_key_value_heads": 1, "intermediate_size": 15360},
        2_682_862_080,
    ),  # recurrentgemma-2b
    "xLSTMForCausalLM": ({}, 6_865_424_896),  # xLSTM-7b
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_has_its_place(name: str) -> None:
    import transformers

    kind, (settings, parameters) = getattr(transformers, name), PUBLISHED[name]
    config = kind.config_class(**settings)
    with torch.device("meta"):
        theirs: Any = kind(config)
    stored = {key: tensor for key, tensor in theirs.state_dict().items() if not any(part in key for part in NO_WEIGHTS)}
    conversion = family(config.model_type)(Fields(config.to_dict(), stored))
    with weightless():
        ours = architecture(conversion.architecture).module(conversion.config)
    own, used = dict(ours.named_parameters()), set()
    for weight, parameter in own.items():
        source = conversion.weights[weight]
        tensors = [stored[part] for part in source.names]
        made = tensors[0] if source.make is None else source.make(*tensors)
        assert made.shape == parameter.shape, weight
        used |= set(source.names)
    left = set(stored) - used - ({"lm_head.weight"} if conversion.config.tie_embeddings else set())
    assert not left
    assert ours.n_parameters() == parameters
