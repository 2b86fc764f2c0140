"""Wiring: in which order the blocks of a model run, and what each reads and hands on.

The default runs them one after the other, `loops` times. Another wiring is one file in `models/depth/`: a frozen configuration with a
unique `kind`, a `label` and `words` for diagrams, and a module under `@register_wiring(TheConfig)`, named in
`LanguageModelConfig.wiring`. A block that runs several times is addressed as `name@k`, k counting its own runs; so are the hook points of
a wiring that fire several times.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from models.attention.stages import register_nested
from models.context import Context
from workbench.discovery import import_all
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint

Visits = tuple[tuple[int, int], ...]
Notes = dict[str, Any]


class Wiring(nn.Module):
    """Base of all wirings.

    `visits` lists (layer, step) in the order in which blocks run. What a run must remember is in its `notes`, never on the module.
    """

    visits: Visits
    stream_is_all = True  # False: no run can begin between layers, because later layers read more than the stream

    def begin(self, x: Tensor, context: Context) -> Notes:
        """What a run remembers, given the first residual stream [batch, pos, d_model]."""
        return {}

    def entering(self, layer: int, step: int, x: Tensor, notes: Notes) -> Tensor:
        """What the block reads, given what the one before handed on."""
        return x

    def leaving(self, layer: int, step: int, x: Tensor, notes: Notes) -> Tensor:
        """What is handed on, given what the block gives."""
        return x

    def result(self, x: Tensor, notes: Notes) -> Tensor:
        """What is unembedded, given what was handed on last."""
        return x


def repeated(n_layers: int, loops: int) -> Visits:
    """All layers in order, `loops` times."""
    return tuple((layer, step) for step in range(loops) for layer in range(n_layers))


def several_times(point: HookPoint, steps: int) -> HookPoint:
    """A hook point that a run passes `steps` times."""
    point.steps = steps
    return point


_WIRINGS: dict[type, Callable[..., Wiring]] = {}
W = TypeVar("W", bound=type[Wiring])


def register_wiring(config: type) -> Callable[[W], W]:
    """Class decorator: the wiring that is built, as `Wiring(config, model_config)`, from configurations of this class."""
    register_nested(config)

    def register(module: W) -> W:
        _WIRINGS[config] = module
        return module

    return register


def build_wiring(config: Any, model_config: Any) -> Wiring:
    """The wiring of a configuration.

    Raises:
        TypeError: no configuration of a wiring. ValueError: `loops` besides a wiring.
    """
    import_all("models.depth")
    if type(config) not in _WIRINGS:
        known = [kind.__name__ for kind in _WIRINGS]
        raise TypeError(
            f"wiring={config!r} is no wiring.{suggestion(type(config).__name__, known)} Expected one of {', '.join(known)}."
        )
    if model_config.loops != 1:
        raise ValueError(
            f"loops is {model_config.loops} besides wiring={config!r}; expected loops=1: the wiring says what repeats."
        )
    return _WIRINGS[type(config)](config, model_config)
