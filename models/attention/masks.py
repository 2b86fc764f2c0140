"""What queries may read besides the past: prefixes, blocks, documents, and the strided and fixed patterns of sparse transformers.

Positions are those of tokens in their own text, so that padding moves nothing. Every token may always read itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention.stages import Call, Mask, register_part


@dataclass(frozen=True)
class PrefixConfig:
    """The tokens of a prefix read each other in both directions; the others read the past (prefix language model, Raffel et al. 2020).

    Args: length: tokens of the prefix. None: the call says it, `facts={"prefix_length": n}`, a number or one per sequence [batch].
    optional: a call that does not say it has no prefix.
    """

    length: int | None = None
    optional: bool = False
    kind: str = "prefix"


@register_part(PrefixConfig)
class Prefix(Mask):
    """The prefix must be read within one call."""

    causal = False
    continues = True

    def visible(self, call: Call) -> Tensor:
        """[batch or 1, 1, query, key]."""
        context = call.context
        length = context.fact("prefix_length") if self.config.length is None else self.config.length
        if length is None and self.config.optional:
            length = 0
        if length is None:
            raise ValueError(
                "This model needs the length of the prefix. Expected facts={'prefix_length': n} in the call."
            )
        length = torch.as_tensor(length, device=context.positions.device).reshape(-1, 1, 1, 1)
        if context.offset and bool(
            (context.key_positions[:, context.offset - 1].reshape(-1, 1, 1, 1) + 1 < length).any()
        ):
            raise ValueError(
                f"The prefix of {int(length.max())} tokens must be read in one call; an earlier call ended within it."
            )
        past = context.once("past", lambda: stored_before(call))
        return past | (context.key_positions[:, None, None, :] < length)


def stored_before(call: Call) -> Tensor:
    """True where a key is not later than the query, by the order in which tokens were read. [1, 1, query, key]."""
    context, length = call.context, call.stream.shape[1]
    keys = torch.arange(context.key_positions.shape[-1], device=call.stream.device)
    return (keys <= keys[context.offset : context.offset + length, None])[None, None]


@dataclass(frozen=True)
class BlockCausalConfig:
    """Tokens read their own block of `size` in both directions, and all earlier blocks."""

    size: int
    kind: str = "block_causal"


@register_part(BlockCausalConfig)
class BlockCausal(Mask):
    """Block numbers count from the beginning of the text."""

    causal = False

    def visible(self, call: Call) -> Tensor:
        """[batch or 1, 1, query, key]."""
        queries, keys = (
            positions // self.config.size for positions in (call.context.positions, call.context.key_positions)
        )
        return keys[:, None, None, :] <= queries[:, None, :, None]


@dataclass(frozen=True)
class DocumentsConfig:
    """Several texts in one sequence that do not read each other: `facts={"documents": ids}`, [batch or 1, key], all tokens so far."""

    kind: str = "documents"


@register_part(DocumentsConfig)
class Documents(Mask):
    """Same id, same text."""

    def visible(self, call: Call) -> Tensor:
        """[batch or 1, 1, query, key]."""
        ids = call.context.fact("documents")
        if ids is None or ids.shape[-1] != call.context.key_positions.shape[-1]:
            raise ValueError(
                "This model needs the document of every token read so far. Expected facts={'documents': ids [batch or 1, key]} in the call."
            )
        return (ids[:, call.context.offset :, None] == ids[:, None, :])[:, None]


@dataclass(frozen=True)
class StridedConfig:
    """Sparse Transformer, strided (Child et al. 2019): the last `stride` tokens, and every stride-th token before.

    Args: split: even heads read the last tokens, odd heads every stride-th; False: every head reads both.
    """

    stride: int
    split: bool = True
    kind: str = "strided"


@dataclass(frozen=True)
class FixedConfig:
    """Sparse Transformer, fixed: the own block of `block` tokens, and the last `summary` tokens of every block.

    Args: split: even heads read the block, odd heads the summaries; False: every head reads both.
    """

    block: int
    summary: int = 1
    split: bool = True
    kind: str = "fixed"


class TwoPatterns(Mask):
    """Two patterns, either merged in every head or one for even and one for odd heads."""

    def patterns(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Both, [batch or 1, 1, query, key] each, of positions [batch or 1, 1, query, 1] and [batch or 1, 1, 1, key]."""
        raise TypeError(f"{type(self).__name__} does not say which patterns")

    def visible(self, call: Call) -> Tensor:
        """[batch or 1, head or 1, query, key]."""
        near, far = self.patterns(
            call.context.positions[:, None, :, None], call.context.key_positions[:, None, None, :]
        )
        if not self.config.split:
            return near | far
        odd = torch.arange(self.sizes.n_maps, device=near.device)[:, None, None] % 2 == 1
        return torch.where(odd, far, near)


@register_part(StridedConfig)
class Strided(TwoPatterns):
    """`stride` tokens with the query's own, as in the released code (the paper's formula has one more)."""

    def patterns(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        distance = queries - keys
        return (distance >= 0) & (distance < self.config.stride), distance % self.config.stride == 0


@register_part(FixedConfig)
class Fixed(TwoPatterns):
    """Blocks count from the beginning of the text."""

    def patterns(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        block = self.config.block
        return queries // block == keys // block, (keys % block >= block - self.config.summary).expand(
            -1, -1, queries.shape[2], -1
        )
