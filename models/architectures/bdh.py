"""BDH, the Dragon Hatchling (Kosowski et al. 2025): the published code's model, the paper's equation 8, and one whose memory fades."""

from dataclasses import replace

from models.architecture_record import Architecture, register_architecture
from models.bdh.model import BDH, BDHConfig

_TINY = BDHConfig(n_layers=3, d_model=12, n_heads=2, n_neurons=32, dropout=0.0, init_std=0.2)
_DEMO = BDHConfig(n_layers=4, d_model=64, n_heads=4, n_neurons=2048, dropout=0.05)

register_architecture(
    Architecture(
        name="bdh",
        title="BDH (Dragon Hatchling)",
        paper="bdh",
        family="bdh",
        config=BDHConfig,
        module=BDH,
        presets={
            "tiny": _TINY,
            "demo": _DEMO,
            "concepts": BDHConfig(n_layers=4, d_model=128, n_heads=4, n_neurons=4096, dropout=0.05),
            "published": BDHConfig(),
        },
        description="One set of weights for all layers, sparse positive neurons, strictly past linear attention: synapses as state.",
        shows=("pattern", "state", "neurons"),
    )
)
register_architecture(
    Architecture(
        name="bdh-paper",
        title="BDH, the paper's equation 8",
        paper="bdh",
        family="bdh",
        config=BDHConfig,
        module=BDH,
        presets={"tiny": replace(_TINY, residual="neuron"), "demo": replace(_DEMO, residual="neuron")},
        description="BDH as the paper's equations have it: positive activity accumulates in neuron space from layer to layer.",
        shows=("pattern", "state", "neurons"),
        fidelity="reconstructed",
        notes="What stands before the first layer is not in the paper; x = 0 and v = LN(embedding) is a choice, with which the first "
        "n_layers tokens of a text predict nothing.",
    )
)
register_architecture(
    Architecture(
        name="bdh-decay",
        title="BDH with a fading memory",
        paper="bdh",
        family="bdh",
        config=BDHConfig,
        module=BDH,
        presets={"tiny": replace(_TINY, decay=1.0), "demo": replace(_DEMO, decay=1.0)},
        description="BDH whose synapses fade at one rate per head, ALiBi's slopes for a linear read, as the paper advises for long texts.",
        shows=("pattern", "state", "neurons", "decay"),
        fidelity="reconstructed",
        notes="The paper advises ALiBi's damping beside the rotation without giving an equation.",
    )
)
