"""Memories that learn while they read: blocks = token by token = automatic differentiation of the loss, for every loss, link and shape."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.delta_rule import delta_rule
from kernels.fast_weight_memory import Carry, Link, Loss, Memory, as_delta_rule, fast_weight_memory, values_pattern

EXACT = 1e-12
MEMORIES = {
    "matrix": Memory(5, 4),
    "matrix_residual": Memory(4, 4, output="norm_residual"),
    "mlp2": Memory(5, 4, depth=2, hidden=7),
    "mlp2_norm": Memory(4, 4, depth=2, hidden=7, output="norm_residual"),
    "mlp3_residual": Memory(4, 4, depth=3, hidden=6, activation="silu", output="residual"),
}
RULES: dict[str, tuple[Loss, Link]] = {
    "titans": (Loss(), Link()),
    "moneta": (Loss("lp", p=3.0), Link("lq_printed")),
    "moneta_mirror": (Loss("lp", p=3.0), Link("lq_mirror")),
    "yaad": (Loss("huber"), Link()),
    "yaad_coordinate": (Loss("huber_coordinate"), Link()),
    "memora": (Loss(), Link("softmax", total=2.0)),
}


def inputs(
    memory: Memory, pos: int, rule: str = "titans", momentum: bool = True, batch: int = 2, seed: int = 0
) -> tuple[list[Any], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(batch, 3, pos, memory.state_k), dim=-1) for _ in range(2))
    v, step = normal(batch, 3, pos, memory.state_v), 0.3 * normal(batch, 3, pos).sigmoid()
    options: dict[str, Any] = {"log_decay": -0.2 * normal(batch, 3, pos).abs()}
    if momentum:
        options["log_momentum"] = F.logsigmoid(normal(batch, 3, pos))
    loss, link = RULES[rule]
    if loss.needs_threshold:
        options["threshold"] = 1.5 + 0.5 * normal(batch, 3, pos).sigmoid()
    weights = normal(batch, 3, *memory.shape) / memory.shape[0] ** 0.5
    return [q, k, v, step, memory, weights], {**options, "loss": loss, "link": link}


def linked(layers: list[Tensor], link: Link) -> list[Tensor]:
    """The links, written once more."""
    if link.kind == "identity":
        return layers
    if link.kind == "softmax":
        return [link.total * w.exp() / w.exp().sum(0, keepdim=True) for w in layers]
    size = [torch.linalg.vector_norm(w, ord=link.q) ** (link.q - 2) for w in layers]
    if link.kind == "lq_printed":
        return [w / s for w, s in zip(layers, size, strict=True)]
    return [w.sign() * w.abs() ** (link.q - 1) / s for w, s in zip(layers, size, strict=True)]


def network(layers: list[Tensor], x: Tensor, memory: Memory) -> Tensor:
    h = x
    for number, weight in enumerate(layers):
        h = h @ weight
        if number < len(layers) - 1:
            h = F.gelu(h) if memory.activation == "gelu" else F.silu(h)
    if memory.output == "norm_residual":
        h = F.layer_norm(h, h.shape, eps=1e-6)
    return h if memory.output == "plain" else x + h


def true_loss(e: Tensor, loss: Loss, threshold: Tensor | None) -> Tensor:
    if loss.kind == "lp":  # the smooth one whose slope the paper uses
        return e
    if loss.kind == "huber":
        assert threshold is not None
        return 0.5 * e.square().sum() if e.norm() <= threshold else threshold * e.abs().sum()
    if loss.kind == "huber_coordinate":
        return F.huber_loss(e, torch.zeros_like(e), delta=float(threshold), reduction="sum")  # type: ignore[arg-type]
    return 0.5 * e.square().sum()


def by_autograd(
    q: Tensor, k: Tensor, v: Tensor, step: Tensor, memory: Memory, weights: Tensor, every: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequence by sequence, head by head, token by token, with autograd's gradient. (output, final state, loss, surprise)."""
    loss, link = options["loss"], options["link"]
    batch, head, pos, _ = k.shape
    out, state = torch.zeros(batch, head, pos, memory.state_v, dtype=k.dtype), torch.zeros_like(weights)
    losses, surprise = torch.zeros(batch, head, pos, dtype=k.dtype), torch.zeros(batch, head, pos, dtype=k.dtype)
    for b in range(batch):
        for h in range(head):
            current = [w.clone() for w in memory.unpack(weights[b, h])]
            momentum = [torch.zeros_like(w) for w in current]
            for t in range(pos):
                if t % every == 0:
                    anchor = [w.detach() for w in linked(current, link)]
                leaves = [w.clone().requires_grad_() for w in anchor]
                bound = options["threshold"][b, h, t] if "threshold" in options else None
                e = network(leaves, k[b, h, t], memory) - v[b, h, t]
                if loss.kind == "lp":
                    slope = 3 * torch.tanh(10 * e.detach()) * (e.detach().square() + 1e-6)
                    grads = torch.autograd.grad(e, leaves, slope)
                    losses[b, h, t] = e.detach().abs().pow(3).sum()
                else:
                    value = true_loss(e, loss, bound)
                    grads = torch.autograd.grad(value, leaves)
                    losses[b, h, t] = value.detach()
                surprise[b, h, t] = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
                for layer, g in enumerate(grads):
                    written = -step[b, h, t] * g
                    if "log_momentum" in options:
                        momentum[layer] = options["log_momentum"][b, h, t].exp() * momentum[layer] + written
                        written = momentum[layer]
                    current[layer] = options["log_decay"][b, h, t].exp() * current[layer] + written
                out[b, h, t] = network(linked(current, link), q[b, h, t], memory)
            state[b, h] = memory.pack(current)
    return out, state, losses, surprise


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1.0))


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("every", [1, 4])
def test_titans_equals_automatic_differentiation(name: str, every: int) -> None:
    for momentum in (True, False):
        args, options = inputs(MEMORIES[name], 9, momentum=momentum, batch=1)
        expected, state, losses, surprise = by_autograd(*args, every=every, **options)
        for mode in ("recurrent", "chunked"):
            got, signals, carry = fast_weight_memory(*args, **options, every=every, mode=mode)
            assert error(got, expected) < EXACT and error(carry.state, state) < EXACT
            assert error(signals.loss, losses) < EXACT and error(signals.surprise, surprise) < EXACT


@pytest.mark.parametrize("rule", [name for name in RULES if name != "titans"])
@pytest.mark.parametrize("name", ["matrix", "mlp2_norm"])
def test_miras_equals_automatic_differentiation(rule: str, name: str) -> None:
    """Other losses and links; of the vector Huber loss both branches occur."""
    args, options = inputs(MEMORIES[name], 9, rule, momentum=False, batch=1)
    # softmax weights make the outputs of a layer nearly equal, so that its norm divides by little
    tolerance = 1e-9 if (rule, name) == ("memora", "mlp2_norm") else EXACT
    for every in (1, 4):
        expected, state, losses, surprise = by_autograd(*args, every=every, **options)
        for mode in ("recurrent", "chunked"):
            got, signals, carry = fast_weight_memory(*args, **options, every=every, mode=mode)
            assert error(got, expected) < tolerance and error(carry.state, state) < tolerance, (every, mode)
            assert error(signals.loss, losses) < tolerance and error(signals.surprise, surprise) < tolerance
    if rule == "yaad":
        e = network(MEMORIES[name].unpack(args[5][0, 0]), args[1][0, 0], MEMORIES[name]) - args[2][0, 0]
        inside = e.norm(dim=-1) <= options["threshold"][0, 0]
        assert (inside.any() and not inside.all()) or name == "mlp2_norm"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("momentum", [True, False])
def test_blocks_equal_the_loop(rule: str, momentum: bool) -> None:
    """Blocks that fill the text, do not fill it, and are longer than it."""
    for every in (1, 5, 16, 64):
        args, options = inputs(MEMORIES["mlp2"], 23, rule, momentum)
        expected, signals, carry = fast_weight_memory(*args, **options, every=every, mode="recurrent")
        got, same_signals, same = fast_weight_memory(*args, **options, every=every)
        assert error(got, expected) < EXACT
        for a, b in zip((*same, *same_signals), (*carry, *signals), strict=True):
            assert (a is None and b is None) or error(a, b) < EXACT


@pytest.mark.parametrize("rule", ["titans", "moneta", "memora"])
@pytest.mark.parametrize("mode", ["chunked", "recurrent"])
def test_going_on_editing_and_padding(rule: str, mode: str) -> None:
    """Cuts inside blocks give the whole; an edit equals going on from the edited carry; padding is not there."""
    args, options = inputs(MEMORIES["mlp2"], 19, rule)
    whole, _, last = fast_weight_memory(*args, **options, every=4, mode=mode)

    def piece(start: int, stop: int, carry: Any, rows: slice = slice(None), places: Any = None) -> Any:
        cut = slice(start, stop) if places is None else places
        own = {n: x[rows][:, :, cut] if isinstance(x, Tensor) else x for n, x in options.items()}
        begin = start if places is None else 0
        tensors = [x[rows][:, :, cut] for x in args[:4]]
        return fast_weight_memory(*tensors, args[4], carry, **own, every=4, mode=mode, start=begin)

    carry, outputs, start = args[5], [], 0
    for stop in (3, 4, 10, 19):
        out, _, carry = piece(start, stop, carry)
        outputs.append(out)
        start = stop
    assert error(torch.cat(outputs, 2), whole) < EXACT and error(carry.state, last.state) < EXACT

    def edit(t: int, carry: Carry) -> Carry | None:
        return carry._replace(state=0.5 * carry.state + 0.1) if t == 9 else None

    edited, _, _ = fast_weight_memory(*args, **options, every=4, mode=mode, stops=[2, 9], on_carry=edit)
    before, _, then = piece(0, 10, args[5])
    after, _, _ = piece(10, 19, edit(9, then))
    assert error(edited, torch.cat([before, after], 2)) < EXACT and error(edited[:, :, 10:], whole[:, :, 10:]) > 1e-3

    real = torch.ones(2, 19, dtype=torch.bool)
    real[0, :6] = False
    real[1, 7:9] = False
    padded, _, end = fast_weight_memory(*args, **options, every=4, mode=mode, real=real)
    for b in range(2):
        kept = real[b].nonzero().squeeze(-1)
        expected, _, expected_end = piece(0, 19, args[5][b : b + 1], slice(b, b + 1), kept)
        assert error(padded[b : b + 1][:, :, kept], expected) < EXACT
        assert error(end.state[b : b + 1], expected_end.state) < EXACT


@pytest.mark.parametrize("rule", ["titans", "moneta", "memora", "yaad_coordinate"])
def test_outer_gradients_agree(rule: str) -> None:
    """Gradients through the learning, of every input and the first weights: blocks against the loop."""
    args, options = inputs(MEMORIES["mlp2_norm"], 11, rule)
    names = [n for n, x in options.items() if isinstance(x, Tensor)]
    grads = []
    for mode in ("chunked", "recurrent"):
        leaves = [x.clone().requires_grad_() for x in (*args[:4], args[5], *(options[n] for n in names))]
        own = {**options, **dict(zip(names, leaves[5:], strict=True))}
        out, signals, _ = fast_weight_memory(*leaves[:4], args[4], leaves[4], **own, every=4, mode=mode)
        grads.append(torch.autograd.grad(out.sin().sum() + signals.surprise.sum(), leaves))
    for a, b in zip(*grads, strict=True):
        assert error(a, b) < 1e-10 and b.abs().max() > 0


def test_a_matrix_without_momentum_is_the_gated_delta_rule() -> None:
    args, options = inputs(MEMORIES["matrix"], 31, momentum=False)
    q, k, v, step, _, weights = args
    got, _, carry = fast_weight_memory(*args, **options, every=1)
    values, beta = as_delta_rule(v, step, options["log_decay"])
    expected, state = delta_rule(q, k, values, beta, log_decay=options["log_decay"], initial_state=weights)
    assert error(got, expected) < EXACT and error(carry.state, state) < EXACT


@pytest.mark.parametrize("every", [1, 4, 16])
def test_the_pattern_of_a_matrix_is_exact(every: int) -> None:
    """alpha @ v is the output, and alpha is the derivative by the values, with momentum, decay and any block."""
    args, options = inputs(MEMORIES["matrix"], 13)
    q, k, v, step, memory, _ = args
    out, _, _ = fast_weight_memory(q, k, v, step, memory, **options, every=every)
    alpha = values_pattern(q, k, step, **options, every=every)
    assert error(alpha @ v, out) < EXACT
    assert alpha.triu(1).abs().max() == 0
    v = v.requires_grad_()
    out, _, _ = fast_weight_memory(q, k, v, step, memory, **options, every=every)
    (row,) = torch.autograd.grad(out[1, 2, 9, 3], v)
    assert error(row[1, 2, :, 3], alpha[1, 2, 9]) < EXACT and row[1, 2, :, :3].abs().max() == 0


def test_links_say_what_the_paper_and_the_mathematics_say() -> None:
    """Mirror: the gradient of the dual norm's half square; printed: degree 3 - q; softmax: the KL step's minimiser."""
    memory = Memory(5, 4)
    a = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    half = 0.5 * torch.linalg.vector_norm(a, ord=4) ** 2
    (gradient,) = torch.autograd.grad(half, a)
    a = a.detach()
    assert error(Link("lq_mirror", q=4.0).weights(a, memory), gradient) < EXACT
    printed = Link("lq_printed", q=4.0)
    assert error(printed.weights(3 * a, memory), printed.weights(a, memory) / 3) < EXACT
    assert error(Link("lq_printed", q=2.0).weights(a, memory), Link("lq_mirror", q=2.0).weights(a, memory)) < EXACT
    # one step from W0 on gradient g minimises <W, g> + (1/step) KL(W | W0) among columns that sum to 1
    w0, g, size = Link("softmax").weights(a, memory), torch.randn_like(a), 0.7
    stepped = Link("softmax").weights(a - size * g, memory)
    slope = g + (stepped / w0).log() / size  # at the minimum it is the same for all entries that share a sum
    assert error(slope, slope.mean(0, keepdim=True).expand_as(slope)) < EXACT
    assert error(stepped.sum(0), torch.ones(4, dtype=torch.float64)) < EXACT


def test_the_gradient_through_a_norm_needs_its_parentheses() -> None:
    """flash-linear-attention 0.6.0 (ops/titans/naive.py) divides two of the three terms of the gradient of a layer norm by its scale and
    width, and not the first. Ours is the derivative; that formula is off by a factor of the order of the width."""
    memory = Memory(64, 64, output="norm_residual")
    generator = torch.Generator().manual_seed(0)
    w, k, v = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (64, 10, 10))
    w, k = w / 8, F.normalize(k, dim=-1)
    y = (k @ w).requires_grad_()
    normal = F.layer_norm(y, (64,), eps=1e-6)
    (true,) = torch.autograd.grad(0.5 * (k + normal - v).square().sum(), y)
    _, (ours,), _ = memory.write_factors(w, k, lambda m: m - v)
    assert error(ours, true) < EXACT
    scale, e, n = (
        (y.detach().var(-1, correction=0, keepdim=True) + 1e-6).sqrt(),
        (k + normal - v).detach(),
        normal.detach(),
    )
    published = 64 * e - e.sum(-1, keepdim=True) / (64 * scale) - n * (e * n).sum(-1, keepdim=True) / (64 * scale)
    relative = float((published - true).norm() / true.norm())
    assert 5 < relative < 64


def test_sixteen_bit_inputs_are_summed_in_float32() -> None:
    args, options = inputs(MEMORIES["mlp2"], 20)
    half = [x.to(torch.bfloat16) for x in args[:4]]
    own = {n: x.float() if isinstance(x, Tensor) else x for n, x in options.items()}
    out, _, carry = fast_weight_memory(*half, args[4], args[5].float(), **own, every=4)
    wide, _, _ = fast_weight_memory(*(x.double() for x in half), args[4], args[5], **options, every=4)
    assert out.dtype == torch.bfloat16 and carry.state.dtype == torch.float32 and error(out.double(), wide) < 0.02


def test_mistakes_are_named() -> None:
    args, options = inputs(MEMORIES["mlp2"], 6)
    with pytest.raises(ValueError, match="memory: expected widths"):
        fast_weight_memory(*args[:4], Memory(5, 5), **options)
    with pytest.raises(ValueError, match=r"initial: expected \[batch, head, row, column\]"):
        fast_weight_memory(*args[:5], torch.zeros(2, 3, 5, 4, dtype=torch.float64), **options)
    with pytest.raises(ValueError, match="threshold: is needed"):
        fast_weight_memory(*args, **{**options, "loss": Loss("huber")})
    with pytest.raises(ValueError, match="every: expected a positive"):
        fast_weight_memory(*args, **options, every=0)
    with pytest.raises(ValueError, match="carry with momentum"):
        fast_weight_memory(*args[:5], Carry(args[5], None, args[5]), **options)
    mistakes = [({"depth": 2}, "hidden"), ({"depth": 0}, "depth"), ({"output": "residuals"}, "output")]
    for wrong, message in [*mistakes, ({"output": "residual"}, "state_k = state_v")]:
        with pytest.raises(ValueError, match=message):
            Memory(5, 4, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss: expected"):
        Loss("l1")
    with pytest.raises(ValueError, match="link: expected"):
        Link("kl")
