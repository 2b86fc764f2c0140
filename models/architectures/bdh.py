"""BDH, the Dragon Hatchling (Kosowski et al. 2025)."""

from models.architecture_record import Architecture, register_architecture
from models.bdh.model import BDH, BDHConfig

register_architecture(
    Architecture(
        name="bdh",
        title="BDH (Dragon Hatchling)",
        paper="bdh",
        family="bdh",
        config=BDHConfig,
        module=BDH,
        presets={
            "tiny": BDHConfig(n_layers=3, d_model=12, n_heads=2, n_neurons=32, dropout=0.0, init_std=0.2),
            "demo": BDHConfig(n_layers=4, d_model=64, n_heads=4, n_neurons=2048, dropout=0.05),
            "concepts": BDHConfig(n_layers=4, d_model=128, n_heads=4, n_neurons=4096, dropout=0.05),
            "published": BDHConfig(),
        },
        description="One set of weights for all layers, sparse positive neurons, strictly past linear attention: synapses as state.",
        shows=("pattern", "state", "neurons"),
    )
)
