"""Path patching: what does one component do *through* another? (Wang et al. 2022, "Interpretability in the Wild", arXiv 2211.00593)

    effects = path_patching(model, original, new, objective, senders=heads_of(model), receivers=[Site("query", 1, 3)])

1. The original prompt runs with the sender's output from the new prompt. Every other layer's mixer is held at what it wrote originally, so
   that the change travels along the stream only; MLPs and norms on the way are recomputed. What reaches the receivers is recorded.
2. The original prompt runs with the receivers' activations as recorded, and everything behind them is recomputed.

Without receivers the path ends at the logits and step 1 is all. `freeze_mlps=True` holds the MLPs too: then only the strict direct path
is left, which gives other numbers; the result says which was used. Holding the whole output of the other mixers is the same as holding
each of their heads, and means the same in mixers whose heads share a norm or a gate.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.direct_attribution import stream_writers
from probes.objectives import Objective, measured
from probes.patching import HEAD_AXES, pair, points_of
from probes.progress import Report, watched
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.interventions import Patch


@dataclass(frozen=True)
class Site:
    """A role in a layer, or one head of it: `Site("z", 0, 2)`, `Site("mlp_out", 1)`, `Site("embed")`. Heads count along the role's own axis
    (with grouped queries a key's "head" is its group).
    """

    role: str
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        return self.role + "".join(f"{mark}{n}" for mark, n in ((" ", self.layer), (".", self.head)) if n is not None)


@dataclass(frozen=True)
class PathEffects:
    """The objective with each sender's path patched, [sender, batch]; `original` and `new` are the whole runs', [batch]."""

    senders: tuple[Site, ...]
    receivers: tuple[Site, ...]
    freeze_mlps: bool
    values: Tensor
    original: Tensor
    new: Tensor

    def effects(self) -> Tensor:
        """What patching each path changed, mean over the batch, [sender]."""
        return (self.values - self.original).double().mean(-1)

    def top(self, n: int = 10) -> list[tuple[Site, float]]:
        """The n senders whose path matters most."""
        effects = self.effects()
        return [(self.senders[i], float(effects[i])) for i in effects.abs().argsort(descending=True)[:n].tolist()]

    def to_json(self) -> dict[str, Any]:
        """Means over the batch as plain numbers."""
        return {
            "senders": [str(site) for site in self.senders],
            "receivers": [str(site) for site in self.receivers] or ["logits"],
            "freeze_mlps": self.freeze_mlps,
            "effects": self.effects().tolist(),
            "original": float(self.original.double().mean()),
            "new": float(self.new.double().mean()),
        }

    def __repr__(self) -> str:
        to = ", ".join(map(str, self.receivers)) or "logits"
        mlps = "MLPs held" if self.freeze_mlps else "MLPs recomputed"
        return f"PathEffects(to {to}, {mlps}: {', '.join(f'{site} {change:+.3f}' for site, change in self.top(5))})"


def heads_of(model: Any, role: str = "z") -> list[Site]:
    """Every head of every layer, by a role that exists once per head. Raises ValueError if it has no head axis."""
    sites = []
    _, cache = model.run_with_cache(
        torch.zeros(1, 1, dtype=torch.long, device=model.device), names=[p.name for p in points_of(model, role)]
    )
    for address, value in cache.items():
        point = cache.point(address)
        sites += [Site(role, point.layer_index, head) for head in range(value.shape[_head_axis(point)])]
    return sites


@torch.no_grad()
def path_patching(
    model: Any,
    original: Any,
    new: Any,
    objective: Objective,
    *,
    senders: Sequence[Site] | None = None,
    receivers: Sequence[Site] = (),
    freeze_mlps: bool = False,
    mask: Tensor | None = None,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> PathEffects:
    """How the objective changes when one sender's output comes from the new prompt, along the paths to the receivers alone.

    Args:
        original, new: ids [batch, pos] or texts, equally long. objective: logits -> [batch].
        senders: what to patch, one at a time (default: every head). receivers: where the paths end, all at once; none: at the logits.
        freeze_mlps: hold the MLPs as well. mask: True at real tokens, [batch, pos]. progress, cancel: as for `activation_patching`.

    Raises:
        ValueError: no path (a receiver not above a sender), shared layers, a head that does not exist. UnknownHookPoint: no such role.
    """
    senders = tuple(heads_of(model) if senders is None else senders)
    receivers = tuple(receivers)
    tokens = pair(model, original, new)
    writers = stream_writers(model)
    if any(point.steps > 1 for point in writers):
        raise ValueError(
            "This model repeats its layers, so that a head sends at several depths at once. Expected unshared layers."
        )
    points = {site: _point(model, site) for site in (*senders, *receivers)}
    for sender in senders:
        for receiver in receivers:
            _check_path(sender, receiver)
    if not senders:
        raise ValueError("No senders given. Expected at least one Site.")
    kept = [point.name for point in writers]
    before, held = model.run_with_cache(tokens["clean"], names=kept, mask=mask)
    names = [points[site].name for site in senders]
    after, changed = model.run_with_cache(tokens["corrupted"], names=names, mask=mask)
    values = []
    for sender in watched(senders, "path patching", progress, cancel):
        hooks = [_patch(sender, points[sender], changed[points[sender].name])]
        # the mixer of the sender's own layer needs no holding: what its other heads read has not changed
        hooks += [
            Patch(writer.name, value=held[writer.name])
            for writer in writers
            if writer is not points[sender]
            and (freeze_mlps if writer.role == "mlp_out" else _is_mixer(writer) and not _inside(sender, writer))
        ]
        if not receivers:
            logits = model.run_with_hooks(tokens["clean"], mask=mask, hooks=hooks)
        else:
            wanted = list(dict.fromkeys(points[site].name for site in receivers))
            _, arrived = model.run_with_cache(tokens["clean"], names=wanted, mask=mask, hooks=hooks)
            patches = [_patch(site, points[site], arrived[points[site].name]) for site in receivers]
            logits = model.run_with_hooks(tokens["clean"], mask=mask, hooks=patches)
        values.append(measured(objective, logits)[0])
    scores = [measured(objective, logits)[0] for logits in (before, after)]
    return PathEffects(senders, receivers, freeze_mlps, torch.stack(values), *scores)


_ORDER = ("resid", "mixer", "mlp_out", "resid_post")  # within a layer: what lies inside the mixer counts as mixer


def _check_path(sender: Site, receiver: Site) -> None:
    """Raise ValueError unless the receiver comes after the sender."""

    def place(site: Site) -> tuple[int, int]:
        layer = -1 if site.layer is None else site.layer
        if site.role.startswith("mlp"):
            return layer, 2
        return layer, _ORDER.index(site.role) if site.role in _ORDER else 1

    if place(receiver) <= place(sender):
        raise ValueError(f"There is no path from {sender} to {receiver}. Expected a receiver above the sender.")


def _is_mixer(writer: HookPoint) -> bool:
    return writer.layer_index is not None and writer.role != "mlp_out"


def _inside(site: Site, writer: HookPoint) -> bool:
    """Whether a site is a part of the mixer that writes here."""
    return site.layer == writer.layer_index and not site.role.startswith(("mlp", "resid"))


def _point(model: Any, site: Site) -> HookPoint:
    """The hook point of a site; raises ValueError for one that holds a state."""
    (point,) = points_of(model, site.role, site.layer)[:1]
    if point.layer_index is not None and site.layer is None:
        raise ValueError(f"{site} names no layer. Expected e.g. Site({site.role!r}, 0).")
    if point.per_position:
        raise ValueError(f"{site} is a state, one tensor per token. Expected a role with all positions in one tensor.")
    if site.head is not None:
        _head_axis(point)
    return point


def _head_axis(point: HookPoint) -> int:
    for axis in HEAD_AXES:
        if axis in point.axes:
            return point.axes.index(axis)
    raise ValueError(f"{point.name!r} has the axes {' '.join(point.axes)}, so it has no single heads.")


def _patch(site: Site, point: HookPoint, value: Tensor) -> Patch:
    if site.head is None:
        return Patch(point.name, value=value)
    return Patch(point.name, value=value, at={point.axes[_head_axis(point)]: site.head})
