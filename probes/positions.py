"""Positions changed under a trained model while it reads: other places, another base of the rotations, places within a streaming cache.

    model.run_with_hooks(tokens, hooks=move(model, parallel_positions(n, spans)[0]))      every token at another position, in all layers
    model.run_with_hooks(tokens, hooks=rotation_base(model, 20000.0, layer=1))            one pass of Attention Buckets
    model.run_with_hooks(tokens, hooks=stream(model, sinks=4, window=64))                 StreamingLLM with its renumbering

Rotations (RoPE) compose, so a token at position p is moved to q by a further turn of q − p, whatever it was turned by before; ALiBi's
biases are told anew; positions that are added at the embedding are exchanged there. Other kinds of positions are refused in words. A text
is read in one call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.attention.alibi import Alibi
from models.attention.memory_slots import MemorySlots
from models.attention.rotary import Rope
from models.attention.site import Attention
from models.parts.positions import Rotary
from probes.reading_edits import streaming
from workbench.instrument.errors import HookError
from workbench.instrument.hook_points import HookPoint
from workbench.lab.catalogue import implements

Hooks = list[Any]
Places = int | Sequence[int] | None


def move(model: Any, positions: Tensor) -> Hooks:
    """Every token at another position, in all layers; equal to the call's `facts={"positions": positions[None]}`. positions [pos].

    Raises:
        HookError: a layer whose positions are of a kind that cannot be moved.
    """
    hooks: Hooks = []
    if getattr(model, "has_position_embedding", False):

        def exchange(x: Tensor, hook: HookPoint) -> Tensor:
            return model.pos_embed(_of_call(positions, x.shape[1], hook)[None]).expand_as(x).to(x.dtype)

        hooks.append(("hook_pos_embed", exchange))
    for layer in range(model.n_layers):
        site, at = _site(model, layer)
        for rope in site._rotations:
            turn = _further_turn(rope.rotary, lambda length, hook: _of_call(positions, length, hook) - _counted(length))
            hooks += [(f"{at}.hook_rot_q", turn), (f"{at}.hook_rot_k", turn)]
        for term in site._terms:

            def distances(bias: Tensor, hook: HookPoint, term: Any = term) -> Tensor:
                where = _of_call(positions, bias.shape[-1], hook)
                slopes = term.slopes.to(bias.dtype)[:, None, None]
                return (-slopes * (where[:, None] - where).abs().to(bias.dtype)).expand_as(bias)

            hooks.append((f"{at}.bias.alibi.hook_bias", distances))
    if not hooks:
        raise HookError(f"{model.name} knows no positions, so none can be moved.")
    return hooks


@implements("attention-buckets", "intervention", "rotation_base", note="one pass; attention_buckets combines several")
def rotation_base(model: Any, base: float, *, layer: int, heads: Places = None) -> Hooks:
    """Queries and keys of a layer rotated with another base. `heads` only where heads share no keys.

    Raises:
        HookError: a layer without rotations, with scaled ones, or a base that is not positive.
    """
    site, at = _site(model, layer)
    if base <= 0:
        raise HookError(f"base is {base}; expected a positive number.")
    if not site._rotations:
        raise HookError(f"Layer {layer} has no rotary positions, so there is no base to change.")
    old = site._rotations[0].rotary
    new = Rotary(site.d_head, base, interleaved=old.interleaved)
    new.d_rotary = old.d_rotary
    if old.scaling is not None:
        raise HookError(f"The rotations of layer {layer} are scaled; their base is not theirs alone.")
    if heads is not None and site.n_kv != site.n_heads:
        raise HookError(
            f"Heads of layer {layer} share keys, whose rotation cannot be changed for some of them. Expected all heads."
        )

    def turned(x: Tensor, hook: HookPoint) -> Tensor:
        where = _counted(x.shape[1])[None].to(x.device)
        cosine, sine = old.angles(where, x.dtype)
        again: Tensor = new(old(x, cosine, -sine), *new.angles(where, x.dtype))
        return again if heads is None else _only(x, again, heads, axis=2)

    return [(f"{at}.hook_rot_q", turned), (f"{at}.hook_rot_k", turned)]


def stream(model: Any, *, layer: int, sinks: int, window: int, heads: Places = None) -> Hooks:
    """StreamingLLM (Xiao et al. 2023) in one layer: a token reads the first `sinks` tokens and the last `window`,
    at their places in that cache.

    Among the last tokens distances are what they were. To a sink j the distance is min(i, sinks + window − 1) − j instead of i − j: the
    scores of the sinks are made of queries turned back, or their biases told anew. All layers together are the paper's cache.

    Raises:
        HookError: positions of another kind, or added at the embedding. ValueError: a negative number of sinks, an empty window.
    """
    site, at = _site(model, layer)
    if getattr(model, "has_position_embedding", False):
        raise HookError(
            f"{model.name} adds positions at the embedding, where a place within the cache of one layer cannot be told. Expected RoPE, "
            "ALiBi or no positions; ReadOnly(streaming(...)) is the mask alone."
        )

    def only_kept(x: Tensor, hook: HookPoint) -> Tensor:
        _one_call(x, hook)
        hidden = x.masked_fill(~streaming(x.shape[-2], sinks, window).to(x.device), float("-inf"))
        return hidden if heads is None else _only(x, hidden, heads, axis=1)

    streaming(1, sinks, window)  # raises for impossible sizes
    hooks: Hooks = [(f"{at}.hook_mask", only_kept)]
    most = sinks + window - 1
    if not sinks:
        return hooks
    for _ in site._terms:

        def nearer(bias: Tensor, hook: HookPoint) -> Tensor:
            _one_call(bias, hook)
            rows = torch.arange(bias.shape[-2], device=bias.device)
            slopes = site._terms[0].slopes.to(bias.dtype)[:, None, None]
            saved = (rows - rows.clamp(max=most)).to(bias.dtype)[:, None] * slopes
            new = torch.cat([bias[..., :sinks] + saved, bias[..., sinks:]], dim=-1)
            return new if heads is None else _only(bias, new, heads, axis=1)

        hooks.append((f"{at}.bias.alibi.hook_bias", nearer))
    if site._rotations:
        hooks += _turned_back(site, at, sinks, most, heads)
    return hooks


def _turned_back(site: Any, at: str, sinks: int, most: int, heads: Places) -> Hooks:
    """Scores of the sinks from queries at their place in the cache; queries and keys are kept from this layer's own run."""
    kept: dict[str, Tensor] = {}
    rotary = site._rotations[0].rotary

    def keep_query(x: Tensor, hook: HookPoint) -> None:
        kept["query"] = x

    def keep_key(x: Tensor, hook: HookPoint) -> None:
        kept["key"] = x[:, :sinks]

    def again(scores: Tensor, hook: HookPoint) -> Tensor:
        _one_call(scores, hook)
        query = _further_turn(rotary, lambda length, _: _counted(length).clamp(max=most) - _counted(length))(
            kept["query"], hook
        )
        key = kept["key"].repeat_interleave(site.n_heads // site.n_kv, dim=2)
        content = torch.einsum("bqhd,bkhd->bhqk", query, key) * site.scale
        if site.config.softcap is not None:
            content = site.config.softcap * (content / site.config.softcap).tanh()
        content = content.masked_fill(scores[..., :sinks].isinf(), float("-inf"))
        new = torch.cat([content, scores[..., sinks:]], dim=-1)
        return new if heads is None else _only(scores, new, heads, axis=1)

    return [(f"{at}.hook_rot_q", keep_query), (f"{at}.hook_rot_k", keep_key), (f"{at}.hook_attn_scores", again)]


# ------------------------------------------------------------------------------------------------------------- finding


def _site(model: Any, layer: int) -> tuple[Any, str]:
    """(attention site, its name) of a layer whose positions are rotations, ALiBi, or none. HookError for others."""
    layer = range(model.n_layers)[layer]
    site = model.mixers[layer]
    if not isinstance(site, Attention) or site.reads_source:
        raise HookError(
            f"Layer {layer} ({site.describe()['kind']}) is no self-attention, whose positions could be changed."
        )
    if isinstance(site, MemorySlots):
        raise HookError(
            f"The positions of layer {layer} begin anew with every segment. Expected positions that count the text."
        )
    parts = [*site._rotations, *site._terms]
    others = [part.config.kind for part in parts if not isinstance(part, (Rope, Alibi))]
    if len(site._rotations) > 1 or len(site._terms) > 1 or (site._rotations and site._terms):
        others = [part.config.kind for part in parts]
    if others:
        raise HookError(
            f"The positions of layer {layer} are {', '.join(others)}. Expected RoPE, ALiBi or none, one kind: only of these is it known "
            "what another position would be."
        )
    for part in site._rotations:
        if part.rotary.needs_length or site.score is not None:
            raise HookError(
                f"The rotations of layer {layer} depend on the length of the text, or its scores are no products."
            )
        if site.qk_norm is not None and site.qk_norm.config.after_rotation:
            raise HookError(f"Layer {layer} normalises after rotating, so that a further turn is no other position.")
    return site, f"blocks.{layer}.attn"


def _further_turn(rotary: Rotary, by: Callable[[int, HookPoint], Tensor]) -> Callable[[Tensor, HookPoint], Tensor]:
    """A hook that turns queries or keys [batch, pos, head, d_head] by so many positions more, [pos]."""

    def turn(x: Tensor, hook: HookPoint) -> Tensor:
        cosine, sine = rotary.angles(by(x.shape[1], hook)[None].to(x.device), x.dtype)
        amplitude = 1.0 if rotary.scaling is None else rotary.scaling.amplitude  # was applied before
        turned: Tensor = rotary(x, cosine / amplitude, sine / amplitude)
        return turned

    return turn


def _counted(length: int) -> Tensor:
    return torch.arange(length)


def _of_call(positions: Tensor, length: int, hook: HookPoint) -> Tensor:
    if hook.offset or positions.shape != (length,):
        raise HookError(
            f"positions is for {tuple(positions.shape)} tokens; this call reads {length} from {hook.offset} on. Expected one call with the "
            "whole text."
        )
    return positions


def _one_call(x: Tensor, hook: HookPoint) -> None:
    if hook.offset or x.shape[-1] != x.shape[-2]:
        raise HookError(
            f"{hook.name!r}: streaming needs the whole text in one call, got one that goes on from token {hook.offset}."
        )


def _only(x: Tensor, new: Tensor, heads: Places, axis: int) -> Tensor:
    """`new` at some heads, `x` at the others."""
    chosen = torch.zeros(x.shape[axis], dtype=torch.bool, device=x.device)
    chosen[[heads] if isinstance(heads, int) else list(heads or ())] = True
    shape = [1] * x.dim()
    shape[axis] = -1
    return torch.where(chosen.view(shape), new, x)
