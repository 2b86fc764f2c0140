"""Interventions in words, on any model: a language of one line each, what this model supports, effects beside matched random controls.

intervene(model, "the cat sat on the mat", "zero head 1.3")
Executor(model, [text]).hooks(parse("scale mlp 0 by 0.5"), 0)        hooks for `run_with_hooks`
offers(points)                                                       which kinds of line a model takes, and why not the others
"""

from workbench.lazy import lazy_names

_HOME = {
    "KINDS": "kinds",
    "Kind": "kinds",
    "InterventionError": "language",
    "Operation": "language",
    "in_python": "language",
    "parse": "language",
    "parse_line": "language",
    "Executor": "executor",
    "NoTwin": "twins",
    "twins_of": "twins",
    "Change": "effects",
    "InterventionEffects": "effects",
    "intervene": "effects",
    "store_effects": "effects",
    "Offer": "offers",
    "offered_operations": "offers",
}

__all__ = sorted(_HOME)

__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
