"""The workbench: hook points, caches, interventions, patterns, states (`instrument`) and runs, corpora, training (`lab`).

The names below load on first use, so that `import workbench` costs nothing.
"""

from workbench.lazy import lazy_names

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


__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
