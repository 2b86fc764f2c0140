"""The trainer: exact resumption, what it optimises, and what it leaves on disk whatever happens."""

import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from workbench.lab import training_record
from workbench.lab.checkpoints import CheckpointError, read_tensors
from workbench.lab.corpora import Corpus
from workbench.lab.ngram import NgramModel
from workbench.lab.tasks import make_task
from workbench.lab.training import (
    CurvePoint,
    TaskBatches,
    TextBatches,
    TrainingConfig,
    TrainingDiverged,
    TrainingResult,
    evaluate,
    learning_rate_at,
    train,
)

CONFIG = TrainingConfig(steps=24, warmup=4, learning_rate=1e-2, eval_every=6, checkpoint_every=5)


class TinyModel(nn.Module):
    """A GRU with dropout, a norm, tied embeddings and a buffer: one of each thing that a checkpoint must carry."""

    calls: Tensor

    def __init__(self, vocab: int = 256, width: int = 12, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocab, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.head(self.dropout(self.norm(self.recurrent(self.embed(tokens))[0])))


def corpus(split: str, sentences: int) -> Corpus:
    text = "".join(f"The {n % 7} cats saw {n * n % 11} dogs.\n" for n in range(sentences))
    return Corpus("cats", split, text.encode(), "none", "made here", "")


def text_batches(seed: int = 0) -> TextBatches:
    return TextBatches(corpus("train", 200), 16, 4, seed, validation=corpus("validation", 60), validation_windows=10)


def silent(point: CurvePoint, steps: int) -> None:
    pass


def run(model: nn.Module, folder: Path, config: TrainingConfig = CONFIG, **options) -> TrainingResult:
    return train(model, options.pop("data", text_batches()), config, folder, **{"progress": silent, **options})


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def numbers(curve: list[CurvePoint]) -> list[tuple]:
    return [(p.step, p.train_loss, p.validation_loss, p.learning_rate, p.gradient_norm, p.tokens) for p in curve]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, TrainingResult]:
    """The run that was never interrupted."""
    model = TinyModel()
    return model, run(model, tmp_path_factory.mktemp("reference"))


# ----------------------------------------------------------------------------------------------------------------------
# Resumption


@pytest.mark.parametrize("stop", [1, 5, 13, 23])
def test_a_cancelled_and_resumed_run_has_the_same_bits(stop: int, reference, tmp_path: Path) -> None:
    cancel = threading.Event()

    def stop_here(point: CurvePoint, steps: int) -> None:
        if point.step == stop:
            cancel.set()

    first = run(TinyModel(), tmp_path, progress=stop_here, cancel=cancel)
    assert not first.completed and len(first.curve) == stop and not (tmp_path / "metrics.json").exists()
    torch.manual_seed(99)  # neither the caller's random state nor the new model's weights may matter
    model = TinyModel(seed=7)
    result = run(model, tmp_path)
    assert result.completed and same_bits(model, reference[0])
    assert numbers(result.curve) == numbers(reference[1].curve)
    assert (result.train_loss, result.validation_loss) == (reference[1].train_loss, reference[1].validation_loss)
    assert [json.loads(line)["step"] for line in (tmp_path / "curve.jsonl").read_text().splitlines()] == list(
        range(1, 25)
    )
    assert json.loads((tmp_path / "curve.json").read_text())[-1]["tokens"] == 24 * 4 * 16 == result.tokens


def test_a_run_whose_progress_raises_keeps_its_steps(reference, tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    def stop_here(point: CurvePoint, steps: int) -> None:
        if point.step == 8:
            raise Stop

    with pytest.raises(Stop):
        run(TinyModel(), tmp_path, progress=stop_here)
    model, seen = TinyModel(seed=7), []
    run(model, tmp_path, progress=lambda point, steps: seen.append((point.step, steps)))
    assert seen == [(step, 24) for step in range(9, 25)] and same_bits(model, reference[0])


@pytest.mark.parametrize("broken_call", ["save_file", "fsync", "replace"])
def test_a_crash_while_writing_a_checkpoint_leaves_the_one_before(
    broken_call: str, reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.lab import checkpoints

    class Crash(BaseException):
        pass

    calls = 0
    module = checkpoints if broken_call == "save_file" else os
    original = getattr(module, broken_call)

    def crash_at_the_second(*arguments, **options):
        nonlocal calls
        is_checkpoint = broken_call == "fsync" or "checkpoint" in str(arguments)
        calls += is_checkpoint
        if calls == 2 and is_checkpoint:
            if broken_call == "save_file":
                Path(arguments[1]).write_bytes(b"half a file")
            raise Crash
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, broken_call, crash_at_the_second)
        with pytest.raises(Crash):
            run(TinyModel(), tmp_path)
    assert read_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == 5
    model = TinyModel(seed=7)
    result = run(model, tmp_path)
    assert same_bits(model, reference[0]) and numbers(result.curve) == numbers(reference[1].curve)


def test_a_killed_process_is_resumed_exactly(reference, tmp_path: Path) -> None:
    """kill -9 during a run that writes a checkpoint at every step, with a torn last line of the curve on top."""
    code = (
        "import sys, time, torch; from pathlib import Path; from dataclasses import replace; torch.set_num_threads(1)\n"
        "from tests.lab.test_training import CONFIG, TinyModel, run\n"
        "wait = lambda point, steps: time.sleep(0.02 if point.step < 20 else 60)\n"
        "run(TinyModel(), Path(sys.argv[1]), replace(CONFIG, checkpoint_every=1), progress=wait)\n"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root)
    curve = tmp_path / "curve.jsonl"
    deadline = time.monotonic() + 60
    while not curve.exists() or len(curve.read_text().splitlines()) < 7:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = read_tensors(tmp_path / "checkpoint.safetensors")[1]["step"]
    assert 6 <= done < 24
    with open(curve, "a") as file:
        file.write('{"step": 9')
    (tmp_path / ".checkpoint.safetensors.1.tmp").write_bytes(b"left over")
    model = TinyModel(seed=7)
    result = run(model, tmp_path)
    assert same_bits(model, reference[0]) and numbers(result.curve) == numbers(reference[1].curve)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_complete_run_is_read_not_repeated(tmp_path: Path) -> None:
    first = TinyModel()
    run(first, tmp_path, command="first")
    written = (tmp_path / "metrics.json").read_bytes()
    second, steps = TinyModel(seed=7), []
    result = run(second, tmp_path, progress=lambda point, n: steps.append(point), command="second")
    assert not steps and same_bits(first, second)
    assert (tmp_path / "metrics.json").read_bytes() == written and result.metrics["command"] == "first"
    third = TinyModel(seed=7)
    assert run(third, tmp_path, resume=False, command="third").metrics["command"] == "third"
    assert not same_bits(first, third)


def test_resuming_something_else_is_refused(tmp_path: Path) -> None:
    run(TinyModel(), tmp_path)
    changed = TrainingConfig(**{**vars(CONFIG), "learning_rate": 2e-2})
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.01, now 0\.02"):
        run(TinyModel(), tmp_path, changed)
    with pytest.raises(CheckpointError, match="another data: seed was 0, now 1"):
        run(TinyModel(), tmp_path, data=text_batches(seed=1))
    with pytest.raises(CheckpointError, match=r"another model: embed\.weight was"):
        run(TinyModel(width=8), tmp_path)
    free = TrainingConfig(**{**vars(CONFIG), "eval_every": 3, "checkpoint_every": 2, "threads": 1})
    assert run(TinyModel(), tmp_path, free).completed
    (tmp_path / "curve.jsonl").unlink()
    with pytest.raises(CheckpointError, match="does not hold the 24 steps"):
        run(TinyModel(), tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# What is optimised


def test_one_step_is_adamw_on_the_masked_loss(tmp_path: Path) -> None:
    """The first update against AdamW written out (Loshchilov & Hutter 2019), with clipping, on the task's mask."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Parameter(torch.randn(16, 16, dtype=torch.float64))
            self.kept = nn.Parameter(torch.randn(16, 16, dtype=torch.float64))
            self.kept._no_weight_decay = True  # type: ignore[attr-defined]
            self.bias = nn.Parameter(torch.randn(16, dtype=torch.float64))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table[tokens] + self.kept[tokens] + self.bias

    config = TrainingConfig(
        steps=1, warmup=0, schedule="constant", learning_rate=0.1, weight_decay=0.5, betas=(0.8, 0.9), clip=0.05
    )
    data = TaskBatches(make_task("copy", vocab_size=16, length=20), batch_size=3, validation_batches=1)
    model, start = Linear(), Linear()
    result = run(model, tmp_path, config, data=data)
    tokens, mask = data.next_batch(0)
    terms = []
    for row in range(3):
        for t in range(1, 20):
            if mask[row, t]:
                terms.append(-torch.log_softmax(start(tokens[row : row + 1, :t]), -1)[0, -1, tokens[row, t]])
    loss = torch.stack(terms).mean()
    loss.backward()
    assert result.curve[0].train_loss == pytest.approx(loss.item(), rel=1e-12)
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in start.parameters() if p.grad is not None))
    assert result.curve[0].gradient_norm == pytest.approx(norm, rel=1e-12) and norm > 0.05
    for (name, before), after in zip(start.named_parameters(), model.parameters(), strict=True):
        assert before.grad is not None
        gradient = before.grad * 0.05 / (norm + 1e-6)
        decay = 0.5 if name == "table" else 0.0
        # at the first step both bias-corrected moments are those of this one gradient
        expected = before * (1 - 0.1 * decay) - 0.1 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-12)


def test_evaluation_is_the_mean_over_counted_tokens_whatever_the_batches() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    data = text_batches()
    batches = list(data.validation_batches())
    assert [len(tokens) for tokens, _ in batches] == [4, 4, 2]  # an uneven last batch must not weigh more
    found = evaluate(model, batches)
    assert model.training  # given back in the mode it had
    model.eval()
    tokens = torch.cat([tokens for tokens, _ in batches])
    logits = model(tokens[:, :-1])
    expected = nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6) and found["tokens"] == 10 * 16
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == tokens[:, 1:]).double().mean().item())


def test_learning_rates() -> None:
    def rates(**options) -> list[float]:
        config = TrainingConfig(steps=11, learning_rate=1.0, **options)
        return [learning_rate_at(config, step) for step in range(11)]

    constant = rates(schedule="constant", warmup=4)
    assert constant == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 7])
    linear = rates(schedule="linear", warmup=0, final_rate=0.0)
    assert linear == pytest.approx([1 - step / 10 for step in range(11)])
    half = rates(schedule="linear", warmup=0, final_rate=0.5, decay_from=5 / 11)
    assert half == pytest.approx([*[1.0] * 6, 0.9, 0.8, 0.7, 0.6, 0.5])
    cosine = rates(schedule="cosine", warmup=0, final_rate=0.2)
    assert cosine == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)])
    assert rates(schedule="cosine", warmup=11) == pytest.approx([(step + 1) / 12 for step in range(11)])


def test_the_model_learns(reference) -> None:
    result = reference[1]
    assert result.validation_loss < result.curve[0].train_loss - 1
    assert result.train_loss == pytest.approx(sum(p.train_loss for p in result.curve) / 24)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_text_windows_come_from_the_corpus_and_depend_on_seed_and_step_alone() -> None:
    data = text_batches(seed=5)
    tokens, mask = data.next_batch(3)
    assert tokens.shape == mask.shape == (4, 17) and tokens.dtype == torch.int64
    assert all(bytes(row.tolist()) in data.corpus.data for row in tokens)
    assert bool(mask[:, 1:].all()) and not bool(mask[:, 0].any())
    assert torch.equal(tokens, text_batches(seed=5).next_batch(3)[0])
    assert not torch.equal(tokens, data.next_batch(4)[0]) and not torch.equal(tokens, text_batches(6).next_batch(3)[0])
    # every byte of the corpus can be drawn, the last one included
    short = TextBatches(corpus("train", 1), 16, 64, validation=corpus("validation", 2))
    starts = {short.corpus.data.index(bytes(row.tolist())) for row in short.next_batch(0)[0]}
    assert starts == set(range(len(short.corpus) - 16))


def test_validation_windows_spread_over_the_held_out_text_without_overlap() -> None:
    data = text_batches()
    windows = [bytes(row.tolist()) for tokens, _ in data.validation_batches() for row in tokens]
    text, position = data.validation.data, 0
    assert len(windows) == 10
    for window in windows:
        position = text.index(window, position) + len(window)
    assert text.startswith(windows[0]) and text.endswith(windows[-1])


def test_the_trigram_reference_sees_only_what_the_window_holds() -> None:
    data = text_batches()
    references = data.references()
    model = NgramModel(3).fit(data.corpus.data)
    losses = []
    for tokens, _ in data.validation_batches():
        for row in tokens.tolist():
            losses += [-math.log(model.distribution(bytes(row[:t]))[row[t]]) for t in range(1, 17)]
    assert references["trigram_same_windows"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert references["trigram_whole_text"] == pytest.approx(model.losses(data.validation.data).mean())


def test_task_batches_use_other_rows_for_validation() -> None:
    task = make_task("induction", length=40)
    data = TaskBatches(task, batch_size=4, validation_batches=3)
    assert data.context == 39 and len(data.validation_batches()) == 3
    assert torch.equal(data.next_batch(2)[0], task.batch(4, 2).tokens)
    assert not any(
        torch.equal(held_out, data.next_batch(step)[0])
        for step in range(3)
        for held_out, _ in data.validation_batches()
    )
    assert data.references() == {"chance": task.chance_loss}


# ----------------------------------------------------------------------------------------------------------------------
# Records, surroundings and errors


def test_metrics_say_what_was_done(reference) -> None:
    metrics = json.loads((reference[1].path / "metrics.json").read_text())
    assert metrics["validation_loss"] == reference[1].validation_loss == metrics["validation"]["loss"]
    assert metrics["references"]["trigram_same_windows"] > 0 and metrics["unit"] == "nats per token"
    assert [part["sha256"] for part in metrics["data"]["corpora"]] == [
        corpus("train", 200).sha256,
        corpus("validation", 60).sha256,
    ]
    assert metrics["parameters"] == sum(p.numel() for p in reference[0].parameters())
    assert metrics["config"]["batch_size"] == 4 and metrics["config"]["context"] == 16
    assert metrics["versions"]["torch"] and metrics["versions"]["code"] and metrics["machine"] and metrics["command"]
    assert platform.node() not in metrics["machine"]


def test_the_recorded_command_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/someone/tool.py", "--text", "a b", "/data/x.txt"])
    assert training_record.command_line() == "python tool.py --text 'a b' x.txt"


def test_the_caller_gets_its_surroundings_back(tmp_path: Path) -> None:
    model = TinyModel().eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(model, tmp_path, TrainingConfig(steps=2, threads=2))
    assert torch.equal(torch.rand(3), expected)
    assert not model.training and torch.get_num_threads() == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    class Breaks(TinyModel):
        def forward(self, tokens: Tensor) -> Tensor:
            logits = super().forward(tokens)
            return logits * math.nan if self.calls == 8 else logits

    with pytest.raises(TrainingDiverged, match="step 8: loss nan"):
        run(Breaks(), tmp_path)
    tensors, record = read_tensors(tmp_path / "checkpoint.safetensors")
    assert record["step"] == 5
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_bfloat16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    seen = []

    class Watched(TinyModel):
        def forward(self, tokens: Tensor) -> Tensor:
            logits = self.head(self.norm(self.embed(tokens)))
            seen.append(logits.dtype)
            return logits

    model = Watched()
    result = run(model, tmp_path, TrainingConfig(steps=3, autocast="bfloat16"))
    assert set(seen) == {torch.bfloat16} and model.embed.weight.dtype == torch.float32
    assert result.validation_loss is not None and math.isfinite(result.validation_loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"autocast": "float16"}, "expected one of None, 'bfloat16'"),
        ({"steps": 0}, "steps = 0 is out of range"),
        ({"betas": (0.9, 1.0)}, "betas = "),
        ({"decay_from": 1.5}, "decay_from = 1.5"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)


def test_data_and_model_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config says context = 32, the data makes batches with context = 16"):
        run(TinyModel(), tmp_path, TrainingConfig(context=32))
    with pytest.raises(ValueError, match=r"token ids up to \d+, more than the model's embedding"):
        run(TinyModel(vocab=50), tmp_path / "embedding")
    with pytest.raises(ValueError, match=r"token id \d+ does not fit the model's vocabulary of 50"):
        run(nn.Embedding(256, 50), tmp_path / "head")
    with pytest.raises(ValueError, match=r"must give logits .* = \[4, 16, vocab\], got \[4, 16\]"):
        run(nn.Sequential(nn.Embedding(256, 1), nn.Flatten()), tmp_path / "shape")
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        run(TinyModel().requires_grad_(False), tmp_path / "frozen")
    with pytest.raises(ValueError, match="a window of context 5000 needs 5001"):
        TextBatches(corpus("train", 9), 5000, 1, validation=corpus("validation", 9))
    with pytest.raises(ValueError, match="give the held-out Corpus"):
        TextBatches(corpus("train", 9), 16, 1)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        TextBatches(corpus("train", 9), 16, 0, validation=corpus("validation", 9))
    with pytest.raises(ValueError, match="never the first"):
        evaluate(TinyModel(), [(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool))])
    with pytest.raises(ValueError, match="no batches"):
        evaluate(TinyModel(), [])


def test_a_bar_is_drawn_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    run(TinyModel(), tmp_path, TrainingConfig(steps=3), progress=None)
    assert "3/3" in capsys.readouterr().err


def test_answers_beside_the_sequence_are_what_is_learned() -> None:
    """A model that always says 1 is right where the parity is 1, whatever token follows."""

    class One(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0, 5.0, 0.0, 0.0]).expand(*tokens.shape, 4)

    task = make_task("parity")
    batches = TaskBatches(task, 8, validation_batches=2).validation_batches()
    found = evaluate(One(), batches)
    share = torch.cat([batch[2][batch[1]] for batch in batches]).double().mean().item()
    assert found["accuracy"] == pytest.approx(share) and found["tokens"] == 2 * 8 * 40
