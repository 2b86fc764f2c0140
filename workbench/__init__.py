"""The workbench: hook points, caches, interventions, patterns, states (`instrument`) and runs, corpora, training (`lab`).

The names below load on first use, so that `import workbench` costs nothing.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "HookPoint": "instrument.hook_points",
    "HookedModel": "instrument.hooked_model",
    "ActivationCache": "instrument.cache",
    "Select": "instrument.selection",
    "Pattern": "instrument.patterns",
    "ModelState": "instrument.states",
    "Ablate": "instrument.interventions",
    "Scale": "instrument.interventions",
    "Patch": "instrument.interventions",
    "Steer": "instrument.interventions",
    "Project": "instrument.interventions",
    "EditPattern": "instrument.interventions",
    "BlockEdge": "instrument.interventions",
    "EditState": "instrument.interventions",
    "FreezeNorm": "instrument.interventions",
    "Intervention": "instrument.interventions",
    "HookError": "instrument.errors",
    "RunStore": "lab.runs",
    "trace_run": "lab.trace",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"workbench.{_HOME[name]}"), name)
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
