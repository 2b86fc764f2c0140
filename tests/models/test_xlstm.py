"""xLSTM: the mLSTM against its equations without stabiliser, against Hugging Face's xLSTM and, where installed, the authors' package.

Parity with the package needs xlstm==2.0.6 (group `parity`). Its sLSTM layer hands its gate projections on under swapped names:
the projection called `fgate` becomes the cell's *input* gate and `igate` its forget gate, so a checkpoint's names must be swapped. The
cell's own recurrent weights and biases have the right order (input, forget, candidate, output).
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from models.architecture_record import ARCHITECTURES
from models.architectures.xlstm import xlstm
from models.context import Context
from models.decoder import Decoder
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.mlstm import MLSTM, MLSTMConfig, MLSTMCore, stabiliser
from models.recurrent.mlstm_block import MLSTMBlock, MLSTMBlockConfig
from models.recurrent.slstm import SLSTM, SLSTMConfig
from workbench.lab.factors import LayerFactors
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

BATCH, LENGTH, HEAD, WIDTH = 2, 23, 3, 5
EXACT = 1e-10


def context(length: int, mask: Tensor | None = None, offset: int = 0) -> Context:
    positions = torch.arange(offset, offset + length)[None]
    return Context(positions, torch.arange(offset + length)[None], mask, mask, offset, True)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def factors(scale: float = 1.0) -> tuple[Tensor, ...]:
    """q, k, v [batch, pos, head, width] and the gates [batch, pos, head]; q and k large enough for the denominator to matter."""
    q, k, v = (random(BATCH, LENGTH, HEAD, WIDTH, seed=seed) * 1.5 for seed in (1, 2, 3))
    return q, k, v, scale * random(BATCH, LENGTH, HEAD, seed=4), 2 + random(BATCH, LENGTH, HEAD, seed=5)


def without_stabiliser(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 19 to 27 of the paper token by token, with plain exponentials: h, and C and n after the last token."""
    c = q.new_zeros(BATCH, HEAD, WIDTH, WIDTH)
    n = q.new_zeros(BATCH, HEAD, WIDTH)
    outputs = []
    for t in range(q.shape[1]):
        kept, write = torch.sigmoid(f[:, t]), torch.exp(i[:, t])
        c = kept[..., None, None] * c + write[..., None, None] * torch.einsum("bhi,bhj->bhij", k[:, t], v[:, t])
        n = kept[..., None] * n + write[..., None] * k[:, t]
        query = q[:, t] / WIDTH**0.5
        below = torch.einsum("bhi,bhi->bh", n, query).abs().clamp(min=1)
        outputs.append(torch.einsum("bhij,bhi->bhj", c, query) / below[..., None])
    return torch.stack(outputs, 1), c, n


@pytest.mark.parametrize("mode", ["chunked", "parallel", "recurrent"])
def test_the_memory_is_the_paper_s(mode: str) -> None:
    """h, and C and n carried, which are divided by exp(m). Both branches of the denominator occur."""
    inputs = factors()
    core = MLSTMCore(WIDTH, eps=0.0)
    core.mode = mode
    h, slots = core(*inputs, context(LENGTH), None)
    expected, c, n = without_stabiliser(*inputs)
    scale = slots["stabiliser"].exp()
    assert largest(h - expected) < EXACT * largest(expected)
    assert largest(slots["state"] * scale[..., None, None] - c) < EXACT * largest(c)
    assert largest(slots["normaliser"] * scale[..., None] - n) < EXACT * largest(n)
    active = torch.einsum("bthi,bthi->bth", inputs[0], inputs[1]).abs()
    assert bool((active < 1).any()) and bool((active > 2).any())


def test_the_pattern_is_the_closed_form() -> None:
    """α_ij = (q_i·k_j/√d) exp(Σ log f + ĩ_j) / max(|Σ_j ·|, 1), written out from the gates, and h = α v."""
    model = models.build("mlstm").double()
    tokens = torch.randint(0, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    core = model.blocks[1].mixer.core
    points = (core.hook_q, core.hook_k, core.hook_v, core.hook_input_gate, core.hook_forget_gate, core.hook_z)
    core.eps = 0.0
    _, cache = model.run_with_cache(tokens, names=[*(p.name for p in points), core.hook_pattern.name])
    q, k, v, i, f, z = (cache[point.name].transpose(1, 2) for point in points)
    g = torch.nn.functional.logsigmoid(f).cumsum(-1)
    weight = (g[..., :, None] - g[..., None, :] + i[..., None, :]).exp().tril()
    unnormalised = (q @ k.mT) * q.shape[-1] ** -0.5 * weight
    expected = unnormalised / unnormalised.sum(-1, keepdim=True).abs().clamp(min=1)
    got = cache[core.hook_pattern.name]
    assert largest(got - expected) < EXACT * largest(expected)
    assert largest(got @ v - z) < EXACT


def test_stabiliser_is_its_recurrence() -> None:
    _, _, _, i, f = factors(scale=3.0)
    log_f = torch.nn.functional.logsigmoid(f)
    m, expected = random(BATCH, HEAD, seed=8), []
    got = stabiliser(i, log_f, m)
    for t in range(LENGTH):
        m = torch.maximum(log_f[:, t] + m, i[:, t])
        expected.append(m)
    assert largest(got - torch.stack(expected, 1)) < 1e-12


def test_gates_that_overflow_an_exponential() -> None:
    """Input gates of ± 300 in float32: finite outputs and gradients, near float64."""
    q, k, v, i, f = factors()
    i[:, 4], i[:, 9] = 300.0, -300.0
    core = MLSTMCore(WIDTH)
    expected, _ = core(q, k, v, i, f, context(LENGTH), None)
    single = [x.float().requires_grad_() for x in (q, k, v, i, f)]
    h, _ = core(*single, context(LENGTH), None)
    h.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in single)
    assert largest(h.double() - expected) < 1e-3 * largest(expected)


def test_gradients_do_not_need_the_stabiliser_s_own() -> None:
    """m is a constant to autograd; since h does not depend on it, every gradient is that of the equations without it."""
    leaves = [x.requires_grad_() for x in factors()]
    core = MLSTMCore(WIDTH, eps=0.0)
    h, _ = core(*leaves, context(LENGTH), None)
    expected, _, _ = without_stabiliser(*leaves)
    weight = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)
    ours = torch.autograd.grad((h * weight).sum(), leaves)
    for a, b in zip(ours, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        assert largest(a - b) < 1e-9 * max(1.0, largest(b))


def test_the_carried_normaliser_matters_by_itself() -> None:
    """A run cut in two is the whole run; with n doubled in between and C left alone it is another one."""
    inputs, core = factors(), MLSTMCore(WIDTH)
    first, rest = [x[:, :9] for x in inputs], [x[:, 9:] for x in inputs]
    _, slots = core(*first, context(9), None)
    plain, _ = core(*rest, context(LENGTH - 9, offset=9), slots)
    changed, _ = core(*rest, context(LENGTH - 9, offset=9), {**slots, "normaliser": 2 * slots["normaliser"]})
    whole, _ = core(*inputs, context(LENGTH), None)
    assert largest(plain - whole[:, 9:]) < EXACT
    assert largest(changed - plain) > 1e-3


@pytest.mark.parametrize("name", ["xlstm", "mlstm", "lstm", "gru", "paragru", "paralstm"])
def test_a_trace_opens_with_factors_or_dense(name: str, tmp_path: Any) -> None:
    """A run stores pattern and state of every layer; what the run evaluates is what the model's hooks say."""
    model = models.build(name)
    tokens = torch.randint(0, 256, (1, 17), generator=torch.Generator().manual_seed(0))
    store = RunStore(tmp_path)
    run = trace_run(model, tokens, store)
    patterns = model.patterns(tokens)
    for record in run.manifest["layers"]:
        layer = record["layer"]
        pattern = patterns[layer].values[0].float()
        stored = LayerFactors.from_run(run, layer)
        for head in range(record["n_heads"]):
            difference = torch.from_numpy(stored.pattern(head)) - pattern[head]
            assert largest(difference) < 1e-5 * max(1.0, largest(pattern)), (layer, head)
        if record["kind"] == "mlstm":
            point = f"blocks.{layer}.mixer.hook_denominator"
            _, cache = model.run_with_cache(tokens, names=point)
            array = next(signal["array"] for signal in record["signals"] if signal["name"] == "denominator")
            assert largest(torch.from_numpy(run.array(array)) - cache[point][0].T) < 1e-5
        assert record["pattern"]["exact"] == (record["kind"] == "mlstm")
        assert record["pattern"]["kind"] == ("weights" if record["kind"] == "mlstm" else "jacobian")
        slot = "state" if record["kind"] in ("mlstm", "gru", "paragru") else "h"
        reading = model.states(tokens, [16], layers=layer, slot=slot)[layer][0, 0, 1]
        state = torch.from_numpy(stored.state(1, 16)).view_as(reading)
        assert largest(state - reading) < 1e-4 * max(1.0, largest(reading))


# ----------------------------------------------------------------------------------------------- Hugging Face


def spread(module: nn.Module, gates: bool = True) -> None:
    """Every parameter random; forget gates open, so that memory is long."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            one_plus = name.endswith("weight") and "norm" in name
            parameter.copy_(1 + 0.3 * noise if one_plus else (0.5 if parameter.dim() == 1 else 0.35) * noise)


@pytest.mark.parametrize(("width", "qk_factor"), [(64, 1.0), (128, 0.5)])
@pytest.mark.parametrize("length", [9, 64 + 9])
def test_parity_with_hugging_face(length: int, width: int, qk_factor: float) -> None:
    """Logits of transformers' xLSTM in float32 ≤ 2e-5.

    Its configuration rounds the widths of its states up to multiples of 64, its projections do not: with other widths (qk_dim_factor
    = 0.5 of 64, say) its own code stops with an error about shapes. If `xlstm` is installed, it runs that package's blocks.
    """
    from transformers import xLSTMConfig, xLSTMForCausalLM

    config = xLSTMConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=2,
        num_heads=4,
        qk_dim_factor=qk_factor,
        v_dim_factor=1.0,
        ffn_round_up_to_multiple_of=8,
        output_logit_soft_cap=1e9,
        chunk_size=64,
        autocast_kernel_dtype="float32",
        inference_state_dtype="float32",
    )
    theirs = xLSTMForCausalLM(config).eval()
    spread(theirs)
    d_mlp = theirs.backbone.blocks[0].ffn.proj_up.weight.shape[0]
    mixer = MLSTMConfig(4, qk_factor, 1.0, config.gate_soft_cap)
    ours = LanguageModel(
        LanguageModelConfig(2, width, 50, None, mixer, MLPConfig(d_mlp, "silu", True, False), norm="rms", norm_eps=1e-6)
    )
    with torch.no_grad():
        ours.embed.W_E.copy_(theirs.backbone.embeddings.weight)
        ours.unembed.weight.copy_(theirs.lm_head.weight)
        ours.ln_final.w.copy_(theirs.backbone.out_norm.weight)
        for block, source in zip(ours.blocks, theirs.backbone.blocks, strict=True):
            layer, cell = source.mlstm_layer, block.mixer
            assert isinstance(cell, MLSTM)
            for own, other in (
                (block.ln1.w, source.norm_mlstm.weight),
                (block.ln2.w, source.norm_ffn.weight),
                (cell.query.weight, layer.q.weight),
                (cell.key.weight, layer.k.weight),
                (cell.value.weight, layer.v.weight),
                (cell.gate.weight, layer.ogate_preact.weight),
                (cell.input_gate.weight, layer.igate_preact.weight),
                (cell.input_gate.bias, layer.igate_preact.bias),
                (cell.forget_gate.weight, layer.fgate_preact.weight),
                (cell.forget_gate.bias, layer.fgate_preact.bias),
                (cell.norm.norm_weight, layer.multihead_norm.weight.flatten()),
                (cell.output.weight, layer.out_proj.weight),
                (block.mlp.gate.weight, source.ffn.proj_up_gate.weight),
                (block.mlp.inward.weight, source.ffn.proj_up.weight),
                (block.mlp.outward.weight, source.ffn.proj_down.weight),
            ):
                own.copy_(other)
    tokens = torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
        got = ours(tokens)
    assert largest(got - expected) < 2e-5 * max(1.0, largest(expected))


# --------------------------------------------------------------------------------------------- the authors' package


def authors_model(slstm_at: list[int]) -> Any:
    package = pytest.importorskip("xlstm", reason="needs pip install xlstm==2.0.6 (group parity)")
    config = package.xLSTMLMModelConfig(
        vocab_size=50,
        embedding_dim=64,
        num_blocks=3,
        context_length=32,
        slstm_at=slstm_at,
        mlstm_block=package.mLSTMBlockConfig(mlstm=package.mLSTMLayerConfig(num_heads=4)),
        slstm_block=package.sLSTMBlockConfig(
            slstm=package.sLSTMLayerConfig(num_heads=4, backend="vanilla"),
            feedforward=package.FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
        ),
    )
    model = package.xLSTMLMModel(config).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * (0.3 if parameter.dim() == 1 else 0.15))
    return model


def take_authors_weights(ours: Decoder, theirs: Any) -> None:
    """Their norms multiply by 1 + weight; their blocks of weights are [block, out, in]."""
    with torch.no_grad():
        ours.embed.W_E.copy_(theirs.token_embedding.weight)  # type: ignore[union-attr]
        ours.unembed.weight.copy_(theirs.lm_head.weight)  # type: ignore[union-attr]
        ours.ln_final.w.copy_(1 + theirs.xlstm_block_stack.post_blocks_norm.weight)  # type: ignore[union-attr]
        for block, source in zip(ours.blocks, theirs.xlstm_block_stack.blocks, strict=True):
            layer, mixer = source.xlstm, block.mixer
            block.ln1.w.copy_(1 + source.xlstm_norm.weight)
            mixer.conv.copy_(layer.conv1d.conv.weight[:, 0])
            mixer.conv_bias.copy_(layer.conv1d.conv.bias)
            if isinstance(mixer, MLSTMBlock):
                mixer.up.weight.copy_(layer.proj_up.weight)
                for own, other in ((mixer.query, layer.q_proj), (mixer.key, layer.k_proj), (mixer.value, layer.v_proj)):
                    own.copy_(other.weight.transpose(1, 2))
                for own, other in (
                    (mixer.input_gate, layer.mlstm_cell.igate),
                    (mixer.forget_gate, layer.mlstm_cell.fgate),
                    (mixer.output, layer.proj_down),
                ):
                    own.weight.copy_(other.weight)
                    if own.bias is not None:
                        own.bias.copy_(other.bias)
                mixer.norm.norm_weight.copy_(1 + layer.mlstm_cell.outnorm.weight)
                mixer.skip.copy_(layer.learnable_skip)
                continue
            assert isinstance(mixer, SLSTM)
            # in the order of our drives: input (theirs is called fgate), forget (igate), output, candidate
            for number, projection in enumerate((layer.fgate, layer.igate, layer.ogate, layer.zgate)):
                mixer.W[number].copy_(projection.weight.transpose(1, 2))
            cell = layer.slstm_cell
            take = [0, 1, 3, 2]  # theirs: input, forget, candidate, output
            recurrent = cell._recurrent_kernel_int2ext(cell._recurrent_kernel_)  # [head, in, drive, out]
            mixer.R.copy_(recurrent.permute(0, 2, 1, 3)[:, take])
            mixer.b.copy_(cell._bias_int2ext(cell._bias_)[:, take])
            mixer.norm.norm_weight.copy_(1 + layer.group_norm.weight)
            block.ln2.w.copy_(1 + source.ffn_norm.weight)
            gate, inward = source.ffn.proj_up.weight.chunk(2)
            block.mlp.gate.weight.copy_(gate)
            block.mlp.inward.weight.copy_(inward)
            block.mlp.outward.weight.copy_(source.ffn.proj_down.weight)


@pytest.mark.parametrize("slstm_at", [[], [1], [0, 1, 2]])
def test_parity_with_the_authors_package(slstm_at: list[int]) -> None:
    """Logits of xlstm 2.0.6 in float64 ≤ 1e-9, whole and token by token."""
    theirs = authors_model(slstm_at)
    ours = LanguageModel(xlstm(3, 64, slstm_at, 50, MLSTMBlockConfig(4), SLSTMConfig(4))).double()
    take_authors_weights(ours, theirs)
    tokens = torch.randint(0, 50, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens)
        got = ours(tokens)
        assert largest(got - expected) < 1e-9 * max(1.0, largest(expected))
        state, steps, last = {}, [], None
        for t in range(8):
            logits, state = theirs.step(tokens[:, t : t + 1], state=state)
            steps.append(logits)
            logits, last = ours(tokens[:, t : t + 1], state=last, return_state=True)
            assert largest(logits - steps[-1]) < 1e-5 * max(1.0, largest(expected))  # their step starts from m = 0


# ------------------------------------------------------------------------------------------------ Bio-xLSTM


@pytest.mark.parametrize("rope", ["head", "inner"])
def test_rotated_queries_make_patterns_depend_on_distance_alone(rope: str) -> None:
    """One repeated token, gates blind: α_ij before the denominator is a function of i − j; without rotation of q·k alone it is constant."""
    mixer = MLSTMBlock(MLSTMBlockConfig(n_heads=3, multiple_of=1, d_conv=1, rope=rope, rope_base=50.0), 24, {}).double()
    with torch.no_grad():
        for parameter in (mixer.up.weight, mixer.output.weight):
            parameter.copy_(random(*parameter.shape, seed=3))
        mixer.initialise_own()
        x = random(1, 1, 24, seed=9).expand(1, 12, 24)
        scores = []
        mixer.core.forward = lambda q, k, *rest: scores.append((q, k)) or (q, {})  # type: ignore[method-assign, func-returns-value]
        mixer(x, context(12), None)
    q, k = scores[0]
    match = torch.einsum("bihd,bjhd->bhij", q, k)[0]
    for distance in range(11):
        along = match.diagonal(distance, 1, 2)
        assert largest(along - along[:, :1]) < 1e-9 * largest(match)
    assert largest(match[:, 0] - match[:, 0, :1]) > 1e-3 * largest(match)


def test_presets_are_the_published_sizes() -> None:
    """Chem-xLSTM has 14.8 million parameters (Schmidinger et al. 2024)."""
    chem = LanguageModel(ARCHITECTURES["bio-xlstm"].presets["chem"])
    assert abs(chem.n_parameters() / 1e6 - 14.8) < 0.3


@pytest.mark.parametrize("asked", ["bidirectional", "rcps", "reverse_complement"])
def test_reading_both_ways_is_refused_with_the_reason(asked: str) -> None:
    """The published modes that are left out are no unknown fields: why, and what to use instead."""
    with pytest.raises(
        ValueError,
        match=rf"'bio-xlstm' cannot be built with {asked}=True\. .*no state after token t.*'bert', 't5-encoder'",
    ):
        models.build("bio-xlstm", **{asked: True})
    with pytest.raises(ValueError, match="has no field 'bidirectionl'"):
        models.build("bio-xlstm", bidirectionl=True)
