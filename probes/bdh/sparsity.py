"""How sparse BDH is, where, and when: the share of active neurons by layer, head, token and time scale, and its tie to surprisal.

x is what a neuron sees, gate what the memory opens, y = x ⊙ gate what fires: the paper's 5 % are about y (section 6.4 and figure 14), and
gate alone stays near one half. Position 0 reads nothing, so gate and y are empty there; it is left out of everything (nan), x included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from probes.bdh.capture import neurons_per_head, require_bdh, token_strings
from probes.bdh.sparse import POINTS
from probes.bdh.timescales import N_OCTILES, octiles
from workbench.instrument.errors import suggestion
from workbench.lab.catalogue import implements

SHIFTS = 200


@dataclass(frozen=True)
class Correlation:
    """Between the share of active neurons and surprisal, over tokens.

    value [layer]. null [layer]: 95th percentile of |value| when the surprisals of each sequence are shifted round by random amounts, which
    keeps both series as they are and breaks only their alignment. tokens: how many were compared.
    """

    value: Tensor
    null: Tensor
    tokens: int

    def __repr__(self) -> str:
        layers = ", ".join(
            f"layer {n} {float(v):+.3f} (null {float(z):.3f})"
            for n, (v, z) in enumerate(zip(self.value, self.null, strict=True))
        )
        return f"Correlation over {self.tokens} tokens: {layers}"


@dataclass(frozen=True)
class Sparsity:
    """Shares of active neurons, 0 … 1, nan at the first token of a sequence and at padding.

    active: by "x", "gate", "y": [batch, layer, head, pos]. by_octile: the same by time scale (octile 0 fastest) over all heads,
    [batch, layer, octile, pos], nan for an octile without neurons. ever [layer, head, neuron]: whether a neuron fired at any counted token.
    surprisal: −log p(token | tokens before it) in nats, [batch, pos].
    """

    active: dict[str, Tensor]
    by_octile: dict[str, Tensor]
    ever: dict[str, Tensor]
    surprisal: Tensor
    tokens: tuple[tuple[str, ...], ...]

    def of(self, name: str) -> Tensor:
        """Share of active neurons of `"x"`, `"gate"` or `"y"`, [batch, layer, head, pos]."""
        if name not in self.active:
            raise ValueError(
                f"Unknown activity {name!r}.{suggestion(name, self.active)} Expected one of {', '.join(self.active)}."
            )
        return self.active[name]

    def mean(self, name: str) -> Tensor:
        """Mean over all counted tokens, [layer, head]."""
        return self.of(name).nanmean((0, 3))

    def octile_means(self, name: str) -> Tensor:
        """Mean over all counted tokens by time scale, [layer, octile]; nan for an octile without neurons."""
        self.of(name)
        return self.by_octile[name].nanmean((0, 3))

    def dead(self, name: str) -> Tensor:
        """Neurons that never fired at any counted token, [layer, head]. A longer text can wake them."""
        self.of(name)
        return (~self.ever[name]).sum(-1)

    def dead_everywhere(self, name: str) -> list[tuple[int, int]]:
        """(head, neuron) of the neurons that fired at no token of no layer: all layers share one set of weights."""
        self.of(name)
        return [(int(head), int(neuron)) for head, neuron in (~self.ever[name].any(0)).nonzero()]

    def correlation(self, name: str = "y", token: str = "read", method: str = "pearson", seed: int = 0) -> Correlation:
        """Correlate the share of active neurons (over all heads) with surprisal, over all counted tokens.

        Args:
            token: `"read"`: activity while reading a token with how surprising that token was (figure 14a); `"next"`: with how surprising
                the following token will be. method: `"pearson"` or `"spearman"`. seed: of the shifts of the null.

        Raises ValueError for unknown words and for fewer than three tokens.
        """
        for word, known, what in ((token, ("read", "next"), "token"), (method, ("pearson", "spearman"), "method")):
            if word not in known:
                raise ValueError(f"{what} is {word!r}.{suggestion(word, known)} Expected one of {', '.join(known)}.")
        share = self.of(name).mean(2)  # heads have equally many neurons
        surprisal = self.surprisal
        if token == "next":
            share, surprisal = share[..., :-1], surprisal[:, 1:]
        rows = []  # per sequence: share [layer, counted token] and surprisal [counted token]
        for activity, nats in zip(share, surprisal, strict=True):
            counted = ~(activity[0].isnan() | nats.isnan())
            rows.append((activity[:, counted].double(), nats[counted].double()))
        total = sum(nats.shape[0] for _, nats in rows)
        if total < 3:
            raise ValueError(f"Only {total} tokens can be compared; expected at least 3. Position 0 does not count.")
        measured = torch.cat([activity for activity, _ in rows], 1)
        value = correlate(measured, torch.cat([nats for _, nats in rows]), method)
        generator = torch.Generator().manual_seed(seed)
        shifted = []
        for _ in range(SHIFTS):
            moved = [nats.roll(int(torch.randint(1, max(2, len(nats)), (1,), generator=generator))) for _, nats in rows]
            shifted.append(correlate(measured, torch.cat(moved), method).abs())
        return Correlation(value, torch.stack(shifted).nanquantile(0.95, dim=0), total)

    def __repr__(self) -> str:
        means = "; ".join(
            f"{name} " + " ".join(f"{float(v):.1%}" for v in self.mean(name).mean(1)) for name in self.active
        )
        return f"Sparsity(active by layer: {means})"

    def _repr_html_(self) -> str:
        layers = next(iter(self.active.values())).shape[1]
        head = "".join(f"<th>layer {layer}</th>" for layer in range(layers))
        rows = ""
        for name in self.active:
            shares = "".join(f"<td>{float(v):.1%}</td>" for v in self.mean(name).mean(1))
            silent = "".join(f"<td>{int(v)}</td>" for v in self.dead(name).sum(1))
            rows += (
                f"<tr><th>{escape(name)} active</th>{shares}</tr><tr><th>{escape(name)} never active</th>{silent}</tr>"
            )
        caption = "<caption>Active neurons, position 0 left out</caption>"
        return f"<table>{caption}<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def correlate(activity: Tensor, surprisal: Tensor, method: str) -> Tensor:
    """Correlation of each row [layer, token] with surprisal [token]: [layer]; nan where one does not vary."""
    if method == "spearman":
        activity, surprisal = torch.stack([ranks(row) for row in activity]), ranks(surprisal)
    a = activity - activity.mean(-1, keepdim=True)
    b = surprisal - surprisal.mean()
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm())


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 with ties sharing their mean rank, float64 [token]."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]


@implements(
    "bdh", "probe", "measure_sparsity", note="figure 14 with a shift null; time scales read off the frequencies"
)
@torch.no_grad()
def measure_sparsity(model: Any, tokens: Any, *, mask: Tensor | None = None, hooks: Sequence[Any] = ()) -> Sparsity:
    """Count active neurons of a batch in one run; one dense layer exists at a time.

    Args:
        tokens: ids [batch, pos] or text, at least two tokens. mask: True at real tokens [batch, pos].
    """
    model = require_bdh(model, variants=True)
    tokens = model.to_tokens(tokens)
    batch, length = tokens.shape
    if length < 2:
        raise ValueError("The text has one token, and the first token is left out. Expected at least two.")
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device).bool()
    counted = real & (real.cumsum(1) > 1)
    groups = octiles(model)
    sizes = torch.bincount(groups, minlength=N_OCTILES) * model.config.n_heads
    shape = (model.n_layers, model.config.n_heads, neurons_per_head(model))
    blank = {"device": tokens.device, "dtype": torch.float32}
    active = {name: torch.full((batch, shape[0], shape[1], length), torch.nan, **blank) for name in POINTS}
    by_octile = {name: torch.full((batch, shape[0], N_OCTILES, length), torch.nan, **blank) for name in POINTS}
    ever = {name: torch.zeros(shape, dtype=torch.bool, device=tokens.device) for name in POINTS}

    def count(name: str) -> Any:
        def hook_function(activity: Tensor, hook: Any) -> None:
            layer = hook.layer()
            fires = (activity != 0) & counted[:, None, :, None]
            silent = ~counted[:, None]
            active[name][:, layer] = fires.float().mean(-1).masked_fill(silent, torch.nan)
            together = fires.sum(1).float()  # over heads, [batch, pos, neuron]
            per_octile = torch.zeros(batch, length, N_OCTILES, **blank).index_add_(-1, groups, together) / sizes
            by_octile[name][:, layer] = per_octile.mT.masked_fill(silent, torch.nan)
            ever[name][layer] = fires.any(2).any(0)

        return hook_function

    own = [(f"blocks.*.{point}", count(name)) for name, point in POINTS.items()]
    logits = model.run_with_hooks(tokens, mask=mask, hooks=[*hooks, *own])
    surprisal = torch.full((batch, length), torch.nan, **blank)
    log_probs = logits[:, :-1].float().log_softmax(-1)
    surprisal[:, 1:] = -log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
    surprisal[~counted] = torch.nan
    return Sparsity(active, by_octile, ever, surprisal, tuple(tuple(token_strings(model, row)) for row in tokens))
