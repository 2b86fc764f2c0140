"""What a trace run keeps of the scores of a layer that no factors determine: scores before the softmax, their content, each named term.

They are the hook points of the roles `scores`, `content_scores` and those of biases, found beside the layer's pattern; no kind of attention
is named here. `workbench.lab.score_maps` reads what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from workbench.instrument.hook_points import HookPoint
from workbench.lab.dense_layers import last_step
from workbench.lab.quantities import BIASES
from workbench.lab.quantity_arrays import maps_of_heads
from workbench.lab.score_maps import CONTENT, TOTAL
from workbench.lab.stacks import ArraysOf

LARGEST_SCORES = 2**21  # cells of one map of one layer that a run keeps


def score_points(
    points: Sequence[HookPoint], role_of: Callable[[HookPoint], str], pattern: HookPoint | None
) -> dict[str, HookPoint]:
    """{`"scores"`, `"content"`, `"bias.<name>"`: hook point} of what a layer's `pattern` is made, among its `points`; {} without scores."""
    if pattern is None:
        return {}
    owner = pattern.name.rpartition(".")[0] + "."
    beside = {point: role_of(point) for point in points if point.name.startswith(owner)}
    found = {name: point for point, role in beside.items() for name in [_name(point, role, owner)] if name}
    if TOTAL not in found:
        return {}
    return {name: found[name] for name in sorted(found, key=lambda name: (name != TOTAL, name != CONTENT))}


def _name(point: HookPoint, role: str, owner: str) -> str:
    """What a score map is called: `bias.alibi` for the bias `….attn.bias.alibi.hook_bias`; "" for other points."""
    if role in BIASES:
        return point.name.removeprefix(owner).rpartition(".")[0]
    return {"scores": TOTAL, "content_scores": CONTENT}.get(role, "")


def add_scores(
    run: ArraysOf, layer: int, points: dict[str, HookPoint], cache: Any, n_heads: int, adjacent: bool
) -> dict[str, Any]:
    """Store the layer's score maps and give the record of them, `{maps: [{name, label, array}], difference}`.

    `difference` is the largest |Σ terms − scores| over the pairs that can be seen, None where the scores are all of one piece. Where it is
    more than rounding, something follows the sum, such as a soft cap.
    """
    values = {name: cache[last_step(point)][0].float() for name, point in points.items()}
    hidden = ~values[TOTAL].isfinite()
    summands = [value for name, value in values.items() if name != TOTAL]
    difference = None
    if summands:
        apart = (torch.stack(summands).sum(0) - values[TOTAL]).abs().masked_fill(hidden, 0.0)
        difference = float(apart.max())
    records = []
    for name, value in values.items():
        kept = maps_of_heads(value.masked_fill(hidden, float("nan")), len(value) // n_heads, adjacent)
        for number, maps in enumerate(kept):
            several = len(kept) > 1
            called, label = (f"{name}~{number}", f"{name} (map {number})") if several else (name, name)
            array = f"layer.{layer}.scores.{called}"
            run.add_array(array, maps.cpu().numpy().astype(np.float32), axes=("head", "query", "key"))
            records.append({"name": called, "label": label, "array": array})
    return {"maps": records, "difference": difference}
