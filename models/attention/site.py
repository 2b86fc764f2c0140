"""The attention site: project → rotate → score → bias → mask → normalise → reweight → mix → post, each stage readable and editable.

    q, k, v = W_Q x, W_K x, W_V x            hook_q, hook_k, hook_v
    q, k    = rotate(q), rotate(k)           hook_rot_q, hook_rot_k              where a part rotates
    c       = scale · q kᵀ                   hook_content_scores                 where something is made of it or added to it
    s       = c + Σ named terms              bias.<name>.hook_bias
    s       = s masked                       hook_mask (0 or −inf, on demand), hook_attn_scores
    a       = softmax(s)                     hook_raw_pattern                    where a part reweights it
    p       = reweighted a                   hook_pattern
    z       = p v                            hook_z; then the additions of `mix` and the parts of `post`, with hook points of their own
    out     = Σ_head W_O z                   hook_result (per head, on demand)

Which part fills a stage is said by `AttentionConfig`; the protocols are in `models.attention.stages`. The default is causal multi-head
softmax attention. With nobody watching between scores and z, and with parts that allow it, the fused kernel (SDPA) runs and no
query × key array exists, but for the mask that the kernel is handed where there is a window, padding, a term, or a text that goes on
after a carried state: one for the whole batch and, without terms, for all heads. Watching scores or pattern makes this layer explicit,
with the same result. Grouped-query attention (Ainslie et al. 2023): head h reads key/value group ⌊h·n_kv/n_heads⌋; one group is
multi-query attention (Shazeer 2019).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.config import AttentionConfig, several
from models.attention.stages import Call, Part, Projection, build_parts, part_class
from models.attention.weights import HeadWeights
from models.context import Context, allowed, to_add
from models.mixers import register_mixer
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta

__all__ = ["Attention", "AttentionConfig"]


@register_mixer(AttentionConfig)
class Attention(HeadWeights, nn.Module):
    """The attention site of one layer. Input and output [batch, pos, d_model]; see the module docstring for its stages."""

    reads_source = False  # True: keys and values are another sequence's, not the block's input

    # parts, in the order in which they are applied; `Any` because torch's module types say less than their names
    qk_norm: Any
    score: Any
    mask: Any
    normalise: Any
    _rotations: tuple[Any, ...]
    _terms: tuple[Any, ...]
    _reweights: tuple[Any, ...]
    _additions: tuple[Any, ...]
    _posts: tuple[Any, ...]

    def __init__(self, config: AttentionConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        self.config, self.switches = config, switches
        self.sizes = config.sizes(d_model)
        self.n_heads, self.n_kv, self.scale = self.sizes.n_heads, self.sizes.n_kv, self.sizes.scale
        self.n_maps, self.d_head, self.d_value = self.sizes.n_maps, self.sizes.d_head, self.sizes.d_value
        self.n_key_maps, self._grouped = self.sizes.n_key_maps, self.n_kv < self.n_heads
        self._build_projections(d_model)
        self._build_parts()
        self._declare_hook_points()

    def _build_projections(self, d_model: int) -> None:
        config, sizes = self.config, self.sizes
        maker: Any = Projection(None, sizes)
        if config.project is not None:
            maker = part_class(config.project, "project", ("project",))(config.project, sizes)
        for name, width in (
            ("query", sizes.n_maps * sizes.d_head),
            ("key", sizes.n_key_maps * sizes.d_head),
            ("value", sizes.n_kv * sizes.d_value),
        ):
            setattr(self, name, maker.linear(name, width, config.has_bias(name)) if name in maker.projects else None)
        self.matches = (
            "query" in maker.projects
        )  # otherwise no query meets a key: the score part looks at something else
        self.output = nn.Linear(sizes.n_heads * sizes.d_value, d_model, bias=config.has_bias("output"))

    def _build_parts(self) -> None:
        config = self.config

        def one(stage: str) -> Any:
            part = getattr(config, stage)
            return None if part is None else part_class(part, stage, (stage,))(part, self.sizes)

        def listed(stage: str) -> nn.ModuleDict:
            return build_parts(several(getattr(config, stage)), stage, (stage,), self.sizes)

        by_stage: dict[str, list[Any]] = {"rotate": [], "bias": []}
        for part in config.position_parts:
            by_stage[part_class(part, "position", ("rotate", "bias")).stage].append(part)
        self.rotate = build_parts(by_stage["rotate"], "position", ("rotate",), self.sizes)
        self.bias = build_parts(by_stage["bias"], "position", ("bias",), self.sizes)
        self.qk_norm, self.score, self.mask, self.normalise = map(one, ("qk_norm", "score", "mask", "normalise"))
        self.reweight, self.mix, self.post = listed("reweight"), listed("mix"), listed("post")
        # plain tuples, because going through module dictionaries would cost time in every call
        self._rotations, self._terms = tuple(self.rotate.values()), tuple(self.bias.values())
        self._reweights, self._additions, self._posts = (
            tuple(parts.values()) for parts in (self.reweight, self.mix, self.post)
        )
        self._turns = bool(self._rotations) or self.qk_norm is not None
        self.causal = self.sizes.causal
        self.continues = self.causal or (self.mask is not None and self.mask.continues)
        self.fusable = (
            self.matches
            and all(part is None for part in (self.score, self.normalise, config.softcap))
            and not (self._reweights or self._additions or any(term.needs_content for term in self._terms))
        )
        # whether anything happens between scaled scores and their mask, so that they are worth a hook point of their own
        self._plain_scores = not self._terms and self.score is None and config.softcap is None
        # whether the fused kernel needs no mask, but for padding and carried states
        self._maskless = self.fusable and not self._terms and self.mask is None and config.window is None
        own = ("key", "value") if self.matches else ("value",)
        self.slots: tuple[str, ...] = (*own, *(slot for part in self.parts for slot in part.slots))

    def _declare_hook_points(self) -> None:
        map_axis, key_axis = self.sizes.map_axis, self.sizes.key_axis
        if self.matches:
            self.hook_q = HookPoint("query", f"batch pos {map_axis} d_head")
            self.hook_k = HookPoint("key", f"batch pos {key_axis} d_head")
        width = "d_head" if self.d_value == self.d_head else "d_value"
        self.hook_v = HookPoint("value", f"batch pos {'head' if self.n_kv == self.n_heads else 'kv_head'} {width}")
        if self._rotations:
            self.hook_rot_q = HookPoint("rotated_query", f"batch pos {map_axis} d_head")
            self.hook_rot_k = HookPoint("rotated_key", f"batch pos {key_axis} d_head")
        if not self._plain_scores:
            self.hook_content_scores = HookPoint("content_scores", f"batch {map_axis} query key")
        self.hook_mask = HookPoint("mask", f"batch {map_axis} query key", on_demand=True)
        self.hook_attn_scores = HookPoint("scores", f"batch {map_axis} query key")
        meta = PatternMeta(causal="inclusive" if self.causal else "none")
        if self.normalise is not None:
            meta = self.normalise.meta(meta)
        if self._reweights:
            self.hook_raw_pattern = HookPoint("raw_pattern", f"batch {map_axis} query key")
            for part in self._reweights:
                meta = part.meta(meta)
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=meta)
        self.hook_z = HookPoint("z", f"batch pos head {width}")
        self.hook_result = HookPoint("result", "batch pos head d_model", on_demand=True, flag="use_attn_result")

    @property
    def parts(self) -> list[Part]:
        """All parts of this site."""
        return [module for module in self.modules() if isinstance(module, Part)]

    @property
    def maps_adjacent(self) -> bool:
        """Whether the maps of one head follow each other; see `Reweight`."""
        return all(part.adjacent for part in self._reweights)

    def placed(self, layer: int, earlier: list[Any]) -> None:
        """Tell the parts their layer, and which parts of the same name precede them in `earlier` mixers."""
        named = [dict(other.named_modules()) for other in earlier if isinstance(other, Attention)]
        for name, part in self.named_modules():
            if isinstance(part, Part):
                part.placed(layer, [other[name] for other in named if type(other.get(name)) is type(part)])

    # ------------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        x: tuple[Tensor, Tensor, Tensor],
        context: Context,
        carried: dict[str, Tensor] | None,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mix tokens.

        Args:
            x: inputs of queries, keys and values: [batch, pos, d_model] each (normally one tensor thrice), or [batch, pos, head, d_model]
                where heads have inputs of their own (split input). In a cross-attention context (`Context.of_source`) the inputs of keys
                and values are the source's, [batch, key, d_model]; their keys and values are made once and then carried.
            carried: the slots of earlier calls, `key` and `value` [batch, pos, kv_head, d_head] and those of the parts.
            stream: what parts other than the projections read, [batch, pos, d_model] (None: the queries' input).
        """
        if carried is not None and not (self.continues or context.cross):
            raise ValueError(
                "This attention reads the future, so a text cannot be continued from a state: earlier tokens would change. "
                "Expected the whole text in one call."
            )
        known = carried if context.cross else None  # a source is projected once
        q, k = None, None
        if self.matches:
            q = self.hook_q(self._project(x[0], self.query, self.n_maps))
            k = self.hook_k(self._project(x[1], self.key, self.n_key_maps)) if known is None else known["key"]
            if self._turns:
                q, k = self._turned(q, k, context, known is None)
        v = self.hook_v(self._project(x[2], self.value, self.n_kv)) if known is None else known["value"]
        if carried is not None and known is None:
            k = None if k is None else torch.cat([carried["key"], k], dim=1)
            v = torch.cat([carried["value"], v], dim=1)
        handed_on: dict[str, Tensor] = {}
        if context.keep_state:
            handed_on = {"value": v} if k is None else {"key": k, "value": v}
        length = x[0].shape[1]
        if self._fast(context, length):
            z = self._fused(q, k, v, None, length > 1 and self.causal and not context.cross)
        else:
            call = Call(x[0] if stream is None else stream, context, carried, handed_on, self.sizes)
            z = self._mix(q, k, v, call)
        if self._posts:
            for post in self._posts:
                z = post(z, x[0] if stream is None else stream)
        return self._out(z), handed_on

    def _turned(self, q: Tensor, k: Tensor, context: Context, new: bool) -> tuple[Tensor, Tensor]:
        """Rotated and normalised queries and keys, [batch, pos, map, d_head]; keys that are not `new` are so already."""
        early = self.qk_norm is not None and not self.qk_norm.config.after_rotation
        if early:
            q, k = self.qk_norm(q, "query"), self.qk_norm(k, "key") if new else k
        if self._rotations:
            for part in self._rotations:
                prepared = part.prepare(context.positions, context, q.dtype)
                q = part(q, prepared, "query")
                if new:
                    if context.cross:
                        prepared = part.prepare(context.key_positions, context, q.dtype)
                    k = part(k, prepared, "key")
            q, k = self.hook_rot_q(q), self.hook_rot_k(k) if new else k
        if self.qk_norm is not None and not early:
            q, k = self.qk_norm(q, "query"), self.qk_norm(k, "key") if new else k
        return q, k

    def _project(self, x: Tensor, linear: Any, heads: int) -> Tensor:
        """[batch, pos, d_model] -> [batch, pos, head, width]; with an input of its own for each head, [batch, pos, head, d_model] too."""
        if x.dim() == 3:
            batch, length, _ = x.shape
            return linear(x).view(batch, length, heads, -1)
        if hasattr(linear, "per_head"):
            return linear.per_head(x, heads)
        out = torch.einsum("bphm,hdm->bphd", x, linear.weight.unflatten(0, (heads, -1)))
        return out if linear.bias is None else out + linear.bias.unflatten(0, (heads, -1))

    def _fast(self, context: Context, length: int) -> bool:
        """Whether the fused kernel can run without being handed a mask."""
        if not self._maskless or context.key_mask is not None or (context.offset and self.causal and length > 1):
            return False
        return not self._watched()

    def _fused(self, q: Any, k: Any, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """[batch, pos, head, d_head], [batch, key, kv_head, ...] -> [batch, pos, head, d_value]."""
        z = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=self._grouped,
        )
        return self.hook_z(z.transpose(1, 2))

    def _mix(self, q: Tensor | None, k: Tensor | None, v: Tensor, call: Call) -> Tensor:
        """[batch, pos, map, d_head], [batch, key, kv_map, d_head], [batch, key, kv_head, d_value] -> [batch, pos, head, d_value]."""
        repeats, explicit = self.n_heads // self.n_kv, not self.fusable or self._watched()
        if q is not None and k is not None and (explicit or self._terms or self.mask is not None):
            call.q, call.k = q.transpose(1, 2), k.transpose(1, 2)
            call.k = call.k.repeat_interleave(repeats, dim=1) if repeats > 1 else call.k
        if explicit:
            call.v = v.transpose(1, 2)
            call.v = call.v.repeat_interleave(repeats, dim=1) if repeats > 1 else call.v
            return self._mix_explicitly(call)
        mask = self._mask(call, v.dtype)
        for term in self._terms:
            mask = mask + term(call)
        return self._fused(q, k, v, mask, False)

    def _watched(self) -> bool:
        """Whether somebody watches what the fused kernel does not form."""
        if self.hook_attn_scores.active or self.hook_pattern.active or self.hook_mask.active:
            return True
        if self._plain_scores:
            return False
        return self.hook_content_scores.active or any(term.hook_bias.active for term in self._terms)

    def _mix_explicitly(self, call: Call) -> Tensor:
        """Every stage as an array of its own. [batch, pos, head, d_value]."""
        mask = self._mask(call, call.v.dtype)
        if self.hook_mask.active:
            mask = self.hook_mask(mask.expand(call.v.shape[0], self.n_maps, -1, -1))
        if self._plain_scores:
            scores = torch.add(mask, call.q @ call.k.transpose(-1, -2), alpha=self.scale)
        else:
            scores = self._scores(call, mask) + mask
        scores = self.hook_attn_scores(scores)
        pattern = scores.softmax(-1) if self.normalise is None else self.normalise(scores, call)
        if self._reweights:
            pattern = self.hook_raw_pattern(pattern)
            for part in self._reweights:
                pattern = part(pattern, call)
        pattern = self.hook_pattern(pattern)
        z = self.hook_z((pattern @ call.v).transpose(1, 2))
        for addition in self._additions:
            z = z + addition(pattern, call)
        return z

    def _scores(self, call: Call, mask: Tensor) -> Tensor:
        """Content and every named term, before the mask."""
        content = call.q @ call.k.transpose(-1, -2) * self.scale if self.score is None else self.score(call)
        call.mask, call.content = mask, self.hook_content_scores(content)
        total = call.content
        for term in self._terms:
            total = total + term(call)
        cap = self.config.softcap
        return total if cap is None else cap * (total / cap).tanh()

    def _mask(self, call: Call, dtype: torch.dtype) -> Tensor:
        """What is added to the scores: −inf where a query may not read, else 0. [batch or 1, map or 1, query, key]."""
        context, window = call.context, self.config.window
        length, device = call.stream.shape[1], call.stream.device

        def make() -> Tensor:
            visible = allowed(context, length, device, window, self.causal)[:, None]
            if self.mask is not None:
                visible = visible & (self.mask.visible(call) | context.itself(length, device))
            return to_add(visible, dtype)

        if self.mask is not None and self.mask.depends_on_call:
            return make()
        return context.once((window, self.causal, self.config.mask, self.n_maps, dtype), make)

    def _out(self, z: Tensor) -> Tensor:
        if not self.hook_result.active:
            return self.output(z.flatten(-2))
        result = self.hook_result(torch.einsum("bphd,hdm->bphm", z, self.W_O))
        return result.sum(2) + self.b_O

    # ----------------------------------------------------------------------------------------- what it tells about itself

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The hook points that determine the pattern; the values alone where no single query meets a single key."""
        if not self.matches or self.sizes.maps_per_head > 1:
            return {"value": self.hook_v}
        q, k = (self.hook_rot_q, self.hook_rot_k) if self._rotations else (self.hook_q, self.hook_k)
        norm = self.qk_norm
        if norm is not None and norm.config.over == "head" and (norm.config.after_rotation or not self._rotations):
            q, k = norm.query.hook_normalized, norm.key.hook_normalized
        return {"query": q, "key": k, "value": self.hook_v}

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """What the parts want runs to keep per head and token."""
        return {name: signal for part in self.parts for name, signal in part.signals.items()}

    def constant_factors(self) -> dict[str, Tensor]:
        """None: every factor depends on the input."""
        return {}

    @property
    def form(self) -> str:
        """`"softmax"` if scaled products of queries and keys, ALiBi and a window determine the pattern; else `"dense"`."""
        norm = self.config.qk_norm
        factors_suffice = (
            self.fusable
            and self.causal
            and self.mask is None
            and set(self.bias.keys()) <= {"alibi"}
            and (norm is None or norm.over == "head" or (bool(self._rotations) and not norm.after_rotation))
        )
        return "softmax" if factors_suffice else "dense"

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        slopes = next((term.slopes.tolist() for term in self._terms if term.config.kind == "alibi"), None)
        return {
            "kind": "attention",
            "form": self.form,
            "n_heads": self.n_heads,
            "n_key_heads": self.n_kv,
            "n_value_heads": self.n_kv,
            "scale": self.scale,
            "strict": False,
            "alibi_slopes": slopes if self.form == "softmax" else None,
            "window": self.config.window,
            "pattern": self.hook_pattern.meta.as_dict(),
            "state": None,
            "signals": [],
            "parts": [f"{part.stage}: {part.config.kind}" for part in self.parts if part.config is not None],
        }
