"""The nonlinear cells as models: torch's modules, gates and Jacobians through hooks, Newton's residual, and what feedback is for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from models.context import Context
from models.decoder import Decoder
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.elman import Elman, ElmanConfig
from models.recurrent.gru import GRU, GRUConfig
from models.recurrent.lstm import LSTM, LSTMConfig
from models.recurrent.mamba2 import Mamba2Config
from models.recurrent.para import ParaRNN, ParaRNNConfig, unit_patterns
from models.recurrent.slstm import SLSTMConfig
from probes.state_tools import token_table
from workbench.instrument.errors import ReadOnlyHookPoint
from workbench.instrument.hook_points import HookPoint
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

LENGTH = 13
EXACT = 1e-10


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def lively(name: str) -> Decoder:
    """The tiny preset in float64 with larger weights."""
    model = models.build(name).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def context(length: int, offset: int = 0) -> Context:
    positions = torch.arange(offset, offset + length)[None]
    return Context(positions, torch.arange(offset + length)[None], None, None, offset, True)


TORCH = [
    (LSTM, LSTMConfig(), lambda: nn.LSTM(6, 6, batch_first=True)),
    (GRU, GRUConfig(), lambda: nn.GRU(6, 6, batch_first=True)),
    (Elman, ElmanConfig(), lambda: nn.RNN(6, 6, batch_first=True)),
    (Elman, ElmanConfig(activation="relu"), lambda: nn.RNN(6, 6, batch_first=True, nonlinearity="relu")),
]


@pytest.mark.parametrize(("kind", "config", "make"), TORCH)
def test_one_head_with_torch_s_weights_is_torch_s_module(kind: Any, config: Any, make: Any) -> None:
    """Outputs and carried state to 1e-12, also when continued."""
    torch.manual_seed(1)
    theirs, ours = make().double(), kind(config, 6, {}).double()
    ours.load_torch(theirs)
    with torch.no_grad():
        ours.output.weight.copy_(torch.eye(6))
        x = torch.randn(2, LENGTH, 6, dtype=torch.float64)
        expected, final = theirs(x)
        first, carried = ours(x[:, :5], context(5), None)
        second, carried = ours(x[:, 5:], context(LENGTH - 5, 5), carried)
    assert largest(torch.cat([first, second], 1) - expected) < 1e-12
    for name, state in zip(ours.slots, final if isinstance(final, tuple) else (final,), strict=True):
        assert largest(carried[name][:, 0] - state[0]) < 1e-12


def test_loading_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="have one head; this one has 2"):
        LSTM(LSTMConfig(2), 6, {}).load_torch(nn.LSTM(6, 6))
    with pytest.raises(ValueError, match=r"Expected one layer, one direction and weight_ih \(24, 6\)"):
        LSTM(LSTMConfig(), 6, {}).load_torch(nn.LSTM(5, 6))
    with pytest.raises(ValueError, match="Expected torch's counterpart of gru, got RNN"):
        GRU(GRUConfig(), 2, {}).load_torch(nn.RNN(2, 6))
    with pytest.raises(ValueError, match="Did you mean 'relu'"):
        Elman(ElmanConfig(activation="rleu"), 6, {})
    with pytest.raises(ValueError, match="Did you mean 'lstm'"):
        ParaRNN(ParaRNNConfig("lsmt"), 8, {})


@pytest.mark.parametrize("name", ["lstm", "gru", "xlstm", "paragru", "paralstm"])
def test_every_gate_of_every_step_is_alive(name: str, tokens: Tensor) -> None:
    """Reading all gates leaves the logits, their values lie in range, and halving one at token 6 changes logits from token 6 on."""
    model = lively(name)
    plain = model(tokens)
    gates = [p.name for p in model.hook_dict.values() if p.role == "gate" and p.per_position]
    watched, cache = model.run_with_cache(tokens, names=[f"{gate}[*]" for gate in gates])
    assert largest(watched - plain) < EXACT
    layer = 1
    mine = [gate for gate in gates if gate.startswith(f"blocks.{layer}.")]
    assert mine
    for gate in mine:
        values = cache[gate]
        assert values.shape[:2] == (2, LENGTH) and largest(values) <= 1
        assert float(values.min()) >= (-1 if "candidate" in gate else 0)
        changed = model.run_with_hooks(tokens, hooks=[(f"{gate}[6]", lambda x, hook: 0.5 * x)])
        assert largest((changed - plain)[:, :6]) < EXACT, gate
        assert largest((changed - plain)[:, 6]) > 1e-7, gate
        assert largest((changed - plain)[:, 7:]) > 1e-9, gate


@pytest.mark.parametrize("name", ["lstm", "gru", "xlstm", "paragru", "paralstm"])
def test_gates_of_all_steps_are_reported_at_once(name: str, tokens: Tensor) -> None:
    """They are the gates step by step, edits of states and gates included, behind padding too; and they only report."""
    model = lively(name)
    reports = [p for p in model.hook_dict.values() if p.role == "gates" and p.layer_index == 1]
    assert reports
    state = next(p.name for p in model.hook_dict.values() if p.role == "state" and p.layer_index == 1)
    each = {report.name: report.name.removesuffix("s") for report in reports}
    first = next(iter(each.values()))
    hooks = [(f"{state}[4]", lambda x, hook: 0.5 * x), (f"{first}[6,9]", lambda x, hook: 0.5 * x)]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :3] = False
    names = [*each, *(f"{gate}[*]" for gate in each.values())]
    _, cache = model.run_with_cache(tokens, names=names, hooks=hooks, mask=mask)
    _, alone = model.run_with_cache(tokens, names=list(each), hooks=hooks, mask=mask)  # whole pieces
    for report, gate in each.items():
        real = mask[:, :, None, None]
        assert cache[report].shape == cache[gate].shape
        assert largest((cache[report] - cache[gate]) * real) < EXACT
        assert largest((alone[report] - cache[gate]) * real) < EXACT
        with pytest.raises(ReadOnlyHookPoint):
            model.run_with_hooks(tokens, hooks=[(report, lambda x, hook: 0 * x)])


@pytest.mark.parametrize("name", ["lstm", "gru", "xlstm", "paragru", "paralstm"])
def test_runs_keep_the_gates(name: str, tmp_path: Path) -> None:
    """Signals of a run: the gates of every step, averaged over the units of a head, under names of their own."""
    model, text, layer = models.build(name), "one two one two", 1
    run = trace_run(model, text, RunStore(tmp_path))
    signals = {signal["name"]: signal for signal in run.layer(layer)["signals"]}
    assert len({signal["label"] for signal in signals.values()}) == len(signals)
    gates = [p for p in model.hook_dict.values() if p.role == "gate" and p.per_position and p.layer_index == layer]
    _, cache = model.run_with_cache(text, names=[f"{gate.name}[*]" for gate in gates])
    assert gates
    for gate in gates:
        signal = signals[gate.name.rsplit("hook_", 1)[-1]]
        expected = cache[gate.name][0].mean(-1).T
        assert largest(torch.tensor(run.array(signal["array"])) - expected) < 1e-6
    table = token_table(model, text, layer)
    assert (
        largest(table["candidate_gates"][0] - cache[f"blocks.{layer}.mixer.hook_candidate_gate"][0].mean(-1).T) < 1e-6
    )


def test_gates_are_hooked_while_generating(tokens: Tensor) -> None:
    """A clamped forget gate at every generated step equals re-reading with it clamped everywhere."""
    model = lively("lstm")

    def forget(gate: Tensor, hook: HookPoint) -> Tensor:
        return 0.2 * gate

    hooks = [("blocks.*.mixer.hook_forget_gate[*]", forget)]
    options: dict[str, Any] = {"temperature": 3.0, "seed": 4}
    got = model.generate(tokens[:, :5], 8, hooks=hooks, **options)
    assert torch.equal(got, model.generate(tokens[:, :5], 8, hooks=hooks, use_state=False, **options))
    assert largest(model.run_with_hooks(got, hooks=hooks) - model(got)) > 1e-3


@pytest.mark.parametrize("name", ["lstm", "gru", "elman", "paragru", "paralstm", "xlstm"])
def test_the_pattern_is_the_jacobian_of_z_by_the_drives(name: str, tokens: Tensor) -> None:
    """‖∂ hook_z_i / ∂ hook_input_j‖ by autograd through the model's own hook points, for a few rows of every head."""
    model, layer = lively(name), 1
    pattern = model.patterns(tokens)[layer]
    assert pattern.meta.kind == "jacobian" and not pattern.meta.exact
    kept: dict[str, Tensor] = {}

    def leaf(x: Tensor, hook: HookPoint) -> Tensor:
        kept["drives"] = x.detach().requires_grad_()
        return kept["drives"]

    def keep(z: Tensor, hook: HookPoint) -> None:
        kept["z"] = z

    prefix = f"blocks.{layer}.mixer"
    _, cache = model.run_with_cache(
        tokens, names=f"{prefix}.hook_z", detach=False, hooks=[(f"{prefix}.hook_input", leaf)]
    )
    z = cache[f"{prefix}.hook_z"]
    for query in (0, 5, LENGTH - 1):
        for head in range(z.shape[2]):
            squares = torch.zeros(2, LENGTH, dtype=torch.float64)
            for unit in range(z.shape[3]):
                (gradient,) = torch.autograd.grad(z[:, query, head, unit].sum(), kept["drives"], retain_graph=True)
                squares += gradient[:, :, head].square().sum((-1, -2))
            got = pattern.values[:, head, query]
            assert largest(got - squares.sqrt()) < 1e-9 * max(1.0, largest(got))


def test_a_jacobian_pattern_cannot_be_edited(tokens: Tensor) -> None:
    from workbench.instrument.interventions import Ablate

    with pytest.raises(ReadOnlyHookPoint, match="only reports"):
        lively("lstm").run_with_hooks(tokens, hooks=[Ablate("blocks.0.mixer.hook_pattern")])


@pytest.mark.parametrize("name", ["paragru", "paralstm"])
def test_residual_and_iterations(name: str, tokens: Tensor) -> None:
    """With free iterations the residual is rounding; with one it is not, and it tells that the logits are off."""
    model = lively(name)
    exact = model(tokens)
    points = [f"blocks.{layer}.mixer.hook_residual" for layer in range(model.n_layers)]
    _, cache = model.run_with_cache(tokens, names=points)
    assert all(largest(cache[point]) < 1e-13 for point in points)
    for mixer in model.mixers:
        mixer.core.iterations = 1  # type: ignore[attr-defined]
    rough, cache = model.run_with_cache(tokens, names=points)
    assert largest(rough - exact) > 1e-4 and all(largest(cache[point]) > 1e-6 for point in points)
    model.set_mode("recurrent")
    looped, cache = model.run_with_cache(tokens, names=points)
    assert largest(looped - exact) < EXACT and all(largest(cache[point]) == 0 for point in points)


def test_unit_patterns_are_signed_derivatives(tokens: Tensor) -> None:
    """∂h_i / ∂x_j of one unit by finite differences of its drive."""
    model, layer, step = lively("paralstm"), 1, 1e-5
    got = unit_patterns(model, tokens, layer, "candidate", units=[2, 0])
    name = f"blocks.{layer}.mixer"
    drive = model.mixers[layer].drives.index("candidate")  # type: ignore[attr-defined]
    for number, unit in enumerate([2, 0]):
        sides = []
        for sign in (1, -1):

            def nudge(x: Tensor, hook: HookPoint, unit: int = unit, sign: int = sign) -> None:
                x[:, 4, 1, drive, unit] += sign * step

            _, cache = model.run_with_cache(tokens, names=f"{name}.hook_z", hooks=[(f"{name}.hook_input", nudge)])
            sides.append(cache[f"{name}.hook_z"][:, :, 1, unit])
        assert largest((sides[0] - sides[1]) / (2 * step) - got[:, 1, number, :, 4]) < 1e-8
    with pytest.raises(ValueError, match="Did you mean 'forget'"):
        unit_patterns(model, tokens, layer, "forgot")
    with pytest.raises(ValueError, match="ParaRNN layers only"):
        unit_patterns(lively("lstm"), tokens, 0, "candidate")


# ------------------------------------------------------------------------------------------------ state tracking


def parity_accuracy(mixer: Any, steps: int, seed: int = 0) -> tuple[float, float]:
    """Train one layer to tell the parity of the bits so far; accuracy at lengths trained on (≤ 16) and on the tokens after 32 of 96."""
    torch.manual_seed(seed)
    model = LanguageModel(LanguageModelConfig(1, 32, 2, None, mixer, MLPConfig(64), init_std=0.2, seed=seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def batch(length: int) -> tuple[Tensor, Tensor]:
        bits = torch.randint(0, 2, (64, length))
        return bits, bits.cumsum(1) % 2

    for number in range(steps):
        bits, parity = batch(2 + number % 15)
        loss = nn.functional.cross_entropy(model(bits).transpose(1, 2), parity)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        bits, parity = batch(96)
        right = (model(bits).argmax(-1) == parity).double()
    return float(right[:, :16].mean()), float(right[:, 32:].mean())


@pytest.mark.slow
def test_feedback_tracks_parity_beyond_the_trained_length() -> None:
    """Trained on at most 16 bits, read at 33 … 96: LSTM and sLSTM are right, one layer of linear memory is at chance."""
    for mixer in (LSTMConfig(n_heads=2), SLSTMConfig(n_heads=2, d_conv=1, recurrent_bound=0.5, forget_power=1.0)):
        near, far = parity_accuracy(mixer, 1500)
        assert near > 0.99 and far > 0.95, (mixer, near, far)
    near, far = parity_accuracy(Mamba2Config(d_state=16, d_head=16, d_conv=1), 1500)
    assert far < 0.65, (near, far)
