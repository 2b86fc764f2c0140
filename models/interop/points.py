"""The hook points of a wrapped transformers model: those of a layer's attention, and those where its block begins and ends."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.interop.attention_interface import LayerCall, attend
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta


class SubjectMixer(nn.Module):
    """The hook points of one layer's attention, and what is known of it."""

    slots: tuple[str, ...] = ()
    reads_source = False

    def __init__(self, seen: LayerCall, rotates: bool) -> None:
        super().__init__()
        self.n_heads, self.n_kv, self.d_head, self.scale = seen.n_heads, seen.n_kv, seen.d_head, seen.scale
        key_head = "head" if self.n_kv == self.n_heads else "kv_head"
        width = "d_head" if seen.d_value == seen.d_head else "d_value"
        query, key = HookPoint("query", "batch pos head d_head"), HookPoint("key", f"batch pos {key_head} d_head")
        if rotates:
            query.role, key.role = "rotated_query", "rotated_key"
            self.hook_rot_q, self.hook_rot_k = query, key
        else:
            self.hook_q, self.hook_k = query, key
        self.rotates = rotates
        self.hook_v = HookPoint("value", f"batch pos {key_head} {width}")
        self.hook_attn_scores = HookPoint("scores", "batch head query key")
        meta = PatternMeta(causal="inclusive" if seen.causal else "none")
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=meta)
        self.hook_z = HookPoint("z", f"batch pos head {width}")

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The values only: what is added to scores, theirs alone know."""
        return {"value": self.hook_v}

    def constant_factors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return {
            "kind": "attention", "form": "dense", "n_heads": self.n_heads, "n_key_heads": self.n_kv,
            "n_value_heads": self.n_kv, "scale": self.scale, "strict": False, "alibi_slopes": None, "window": None,
            "pattern": self.hook_pattern.meta.as_dict(), "state": None, "signals": [],
        }  # fmt: skip

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extra: Mapping[str, Any]) -> Any:
        """Query [batch, head, pos, d_head], key and value [batch, kv_head, key, ...] -> z [batch, pos, head, d_value] and the pattern."""
        ask, meet = (self.hook_rot_q, self.hook_rot_k) if self.rotates else (self.hook_q, self.hook_k)
        query, key, value = (
            point(x.transpose(1, 2)).transpose(1, 2) for point, x in ((ask, query), (meet, key), (self.hook_v, value))
        )
        return attend(query, key, value, mask, self.scale, extra, self.hook_attn_scores, self.hook_pattern, self.hook_z)


class SubjectBlock(nn.Module):
    """The hook points of one block."""

    def __init__(self, attn: SubjectMixer) -> None:
        super().__init__()
        self.attn = attn
        self.hook_resid_pre = HookPoint("resid", "batch pos d_model")
        self.hook_resid_post = HookPoint("resid_post", "batch pos d_model")
