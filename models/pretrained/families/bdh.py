"""BDH in the layout of the published code (`pathwaycom/bdh`): a state dict, which tells everything but the number of layers.

Its settings are called `n_layer`, `n_embd`, `n_head`, `mlp_internal_dim_multiplier`, `vocab_size` and `dropout`. Weights of a compiled
module have `_orig_mod.` before every name.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from models.bdh.model import BDHConfig
from models.bdh.official import FREQUENCIES, NAMES, paired_frequencies
from models.pretrained.family import Conversion, Fields, Shapes, UnsupportedCheckpoint, register_bare, register_family
from models.pretrained.stored import stored

COMPILED = "_orig_mod."


@register_bare
def bare_bdh(record: Mapping[str, Any], shapes: Shapes) -> dict[str, Any] | None:
    """The published settings, from the shapes of a published state dict or its own file of settings."""
    plain = {name.removeprefix(COMPILED): shape for name, shape in shapes.items()}
    if not set(NAMES) <= set(plain) and not {"n_layer", "n_embd", "mlp_internal_dim_multiplier"} <= set(record):
        return None
    told: dict[str, Any] = {"model_type": "bdh", "n_layer": None, "dropout": None, "mlp_internal_dim_multiplier": None}
    told |= sizes_of(plain)
    return told


def sizes_of(shapes: Shapes) -> dict[str, int]:
    """What the shapes of published tensors tell, `n_neurons` over all heads; nothing if they are not there."""
    heads, width, neurons = shapes.get("encoder", ()) if len(shapes.get("encoder", ())) == 3 else (None, None, None)
    vocab = shapes.get("embed.weight", (None,))[0]
    sizes = {"n_head": heads, "n_embd": width, "vocab_size": vocab, "n_neurons": heads and neurons and heads * neurons}
    return {name: size for name, size in sizes.items() if size}


@register_family("bdh")
def bdh(fields: Fields) -> Conversion:
    layers = fields.record.get("n_layer")
    if layers is None:
        raise UnsupportedCheckpoint(
            "The weights of a BDH do not tell how many layers it has, as all share them. Expected config={'n_layer': ...}, or n_layer in a "
            "config.json."
        )
    heads, width = fields["n_head"], fields["n_embd"]
    multiplier = fields.get("mlp_internal_dim_multiplier", None)
    each = fields["n_neurons"] // heads if multiplier is None else multiplier * width // heads
    config = BDHConfig(layers, width, heads, heads * each, fields["vocab_size"], dropout=fields.get("dropout", 0.1))
    conversion = Conversion("bdh", config, prefix=COMPILED)
    conversion["weights.D_x"], conversion["weights.D_y"] = "encoder", "encoder_v"
    conversion["weights.E"] = stored("decoder").then(partial(by_head, heads=heads))
    conversion["embed.W_E"] = "embed.weight"
    conversion["unembed.weight"] = stored("lm_head").transposed
    if any(name.endswith(FREQUENCIES) for name in fields.names):
        conversion["weights.frequencies"] = stored(FREQUENCIES).then(partial(paired_frequencies, neurons=each))
    return conversion


def by_head(decoder: Tensor, heads: int) -> Tensor:
    """[head · neuron, d_model] -> [head, neuron, d_model]."""
    return decoder.unflatten(0, (heads, -1))
