"""RecurrentGemma checkpoints: the settings that its layers follow from, and what is refused. Parity: `test_families`."""

import pytest

from models.attention.site import AttentionConfig
from models.pretrained.family import Fields, UnsupportedCheckpoint, family
from models.recurrent.rg_lru import RGLRUConfig

# the sizes of the published 2B model, under the names of its file
PUBLISHED = {
    "model_type": "recurrent_gemma",
    "num_hidden_layers": 26,
    "hidden_size": 2560,
    "vocab_size": 256000,
    "intermediate_size": 15360,
    "num_attention_heads": 10,
    "num_key_value_heads": 1,
    "lru_width": 2560,
    "attention_window_size": 2048,
    "logits_soft_cap": 30.0,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "embeddings_scale_by_sqrt_dim": True,
}


def test_published_settings() -> None:
    config = family("recurrent_gemma")(Fields(PUBLISHED)).config
    assert [type(mixer) for mixer in config.mixers[:4]] == [RGLRUConfig, RGLRUConfig, AttentionConfig, RGLRUConfig]
    attention = config.mixers[2]
    assert (attention.n_key_value_heads, attention.d_head, attention.window) == (1, 256, 2048)
    assert attention.position.fraction == 0.5 and attention.bias == ("output",)
    assert config.mlp.d_mlp == 7680 and config.tie_embeddings
    assert config.embed_scale == 50.5, "√2560 = 50.596 as bfloat16 has it"


def test_refused_settings() -> None:
    for change, message in (
        ({"block_types": ["recurrent", "full"]}, "block_types holds 'full'. Expected 'recurrent' and 'attention' only"),
        ({"hidden_activation": "tanh"}, "hidden_activation = 'tanh' is not supported"),
        ({"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim = False is not supported"),
    ):
        with pytest.raises(UnsupportedCheckpoint, match=message):
            family("recurrent_gemma")(Fields(PUBLISHED | change))
