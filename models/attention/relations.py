"""Dual attention (Altabaa & Lafferty 2024): some heads carry what tokens are, others how tokens relate.

The last `heads` heads are relational. Where an ordinary head mixes values W_v x_j, a relational one mixes, with softmax weights of its own,

    Σ_j p_ij (W_s s_j + W_r r_ij),   r_ij[ℓ] = ⟨W_q^ℓ x_i, W_k^ℓ x_j⟩ / √d_relation

where the symbol s_j is looked up for token j in a learned library, by attention of x_j over the library's templates. The two summands are
`hook_z` (symbols) and `hook_z_relations`, an exact split. Of the paper's ways to give symbols this is the learned library; one output
projection serves all heads, of which the paper's two are a special case.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.stages import Addition, Call, Projection, Sizes, register_part
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class SymbolValuesConfig:
    """Values of relational heads are symbols. Args: heads: how many. symbols: in the library. symbol_heads: of the look-up."""

    heads: int
    symbols: int = 16
    symbol_heads: int = 2
    kind: str = "symbol_values"


@dataclass(frozen=True)
class RelationsConfig:
    """Args: heads: how many relational heads. relations: how many kinds of relation. d_relation: width of each. symmetric: W_k = W_q."""

    heads: int
    relations: int = 4
    d_relation: int = 8
    symmetric: bool = False
    kind: str = "relations"


@register_part(SymbolValuesConfig)
class SymbolValues(Projection):
    """Replaces the map of the values."""

    def linear(self, name: str, width: int, bias: bool) -> nn.Module:
        if name != "value":
            return super().linear(name, width, bias)
        if self.sizes.n_kv != self.sizes.n_heads or not 0 < self.config.heads <= self.sizes.n_heads:
            raise ValueError(
                f"{self.config.heads} of {self.sizes.n_heads} heads, {self.sizes.n_kv} values: relational heads need values of their own."
            )
        return ValuesAndSymbols(self.sizes, self.config, width, bias)


class ValuesAndSymbols(nn.Module):
    """W_v x for ordinary heads, W_s s(x) for the relational ones behind them; `weight` and `bias` hold both."""

    def __init__(self, sizes: Sizes, config: SymbolValuesConfig, width: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.relational = config.symbol_heads, config.heads * sizes.d_value
        self.weight = nn.Parameter(torch.empty(width, sizes.d_model))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.look_up = nn.Linear(sizes.d_model, sizes.d_model)
        self.templates = nn.Parameter(torch.empty(config.symbols, sizes.d_model))
        self.library = nn.Parameter(torch.empty(config.symbols, sizes.d_model))
        self.hook_symbol_pattern = HookPoint("symbol_pattern", "batch pos symbol_head symbol")
        self.hook_symbols = HookPoint("symbols", "batch pos d_model")

    def symbols(self, x: Tensor) -> Tensor:
        """The symbol of every token, [batch, pos, d_model] -> same."""
        templates, library = (table.unflatten(1, (self.heads, -1)) for table in (self.templates, self.library))
        match = torch.einsum("...hd,shd->...hs", self.look_up(x).unflatten(-1, (self.heads, -1)), templates)
        weights = (match * templates.shape[-1] ** -0.5).softmax(-1)
        if x.dim() > 3:  # heads with inputs of their own have symbols of their own
            return torch.einsum("...hs,shd->...hd", weights, library).flatten(-2)
        weights = self.hook_symbol_pattern(weights)
        return self.hook_symbols(torch.einsum("...hs,shd->...hd", weights, library).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] -> [batch, pos, head · d_value]."""
        first = self.weight.shape[0] - self.relational
        out = torch.cat([x @ self.weight[:first].T, self.symbols(x) @ self.weight[first:].T], dim=-1)
        return out if self.bias is None else out + self.bias

    def per_head(self, x: Tensor, heads: int) -> Tensor:
        """The same with an input for each head, [batch, pos, head, d_model] -> [batch, pos, head, d_value]."""
        weight = self.weight.unflatten(0, (heads, -1))
        first = heads - self.relational // weight.shape[1]
        x = torch.cat([x[:, :, :first], self.symbols(x[:, :, first:])], dim=2)
        out = torch.einsum("bphm,hdm->bphd", x, weight)
        return out if self.bias is None else out + self.bias.unflatten(0, (heads, -1))


@register_part(RelationsConfig)
class Relations(Addition):
    """Adds Σ_j p_ij W_r r_ij to the relational heads."""

    slots = ("relation_key",)

    def __init__(self, config: RelationsConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        width = config.relations * config.d_relation
        self.query = nn.Linear(sizes.d_model, width, bias=False)
        self.key = None if config.symmetric else nn.Linear(sizes.d_model, width, bias=False)
        self.combine = nn.Parameter(torch.empty(config.heads, config.relations, sizes.d_value))
        self.hook_relations = HookPoint("relations", "batch relation query key")
        self.hook_z_relations = HookPoint("z_relations", "batch pos relational_head d_value")

    def forward(self, pattern: Tensor, call: Call) -> Tensor:
        shape = (self.config.relations, self.config.d_relation)
        q = self.query(call.stream).unflatten(-1, shape)
        k = (self.key or self.query)(call.stream).unflatten(-1, shape)
        k = call.carry("relation_key", k)
        relations = self.hook_relations(torch.einsum("bqrd,bkrd->brqk", q, k) * self.config.d_relation**-0.5)
        read = torch.einsum("bhqk,brqk->bqhr", pattern[:, -self.config.heads :], relations)
        z = self.hook_z_relations(torch.einsum("bqhr,hrd->bqhd", read, self.combine))
        return torch.cat([z.new_zeros(*z.shape[:2], self.sizes.n_heads - z.shape[2], z.shape[3]), z], dim=2)
