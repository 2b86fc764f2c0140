"""Weight processing: the same function by weights that are easier to read. An option, on a copy, never a default.

    process_weights(model, fold_norms=True, centre_writing=True, centre_unembedding=True)

Fold norms: a norm's gain w and bias b move into the linear maps that read it, W (w ⊙ n + b) = (W diag w) n + W b, which leaves a norm with
w = 1 and b = 0. Centre writing: a layer norm removes the mean over d_model of what it reads, so the mean of everything that is written to
the stream can be taken out beforehand. Centre unembedding: a constant added to all logits of a token leaves log-softmax as it is (the
logits themselves change). After Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", and TransformerLens.

Which maps read a norm is seen in a run, not guessed from names; that nothing else reads it is checked on a second copy with noise on all
parameters (no weight is then accidentally neutral), in float64: a norm whose folding changes the logits there is not folded. Norms
that write to the stream (behind a sublayer, behind the embedding), and those inside a mixer, are left as they are.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.language_model import LanguageModel, Unembed
from models.parts.norms import Norm

SAME = 1e-9  # largest change of a float64 logit, over the largest logit


class CannotProcess(ValueError):
    """A model that the processing would turn into another function, or on which it would do nothing."""


@dataclass(frozen=True)
class Processing:
    """What was done. folded: norm -> the modules that took its weights. left: norm -> why it stayed. centred: what was centred."""

    folded: dict[str, tuple[str, ...]]
    left: dict[str, str]
    centred: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "folded": {name: list(readers) for name, readers in self.folded.items()},
            "left": dict(self.left),
            "centred": list(self.centred),
        }


@torch.no_grad()
def process_weights(
    model: Any,
    *,
    fold_norms: bool = False,
    centre_writing: bool = False,
    centre_unembedding: bool = False,
    partial: bool = False,
) -> Any:
    """A processed copy of a model; the model itself is not touched. The copy's `processing` says what was done.

    Args:
        fold_norms: gains and biases of the norms in front of sublayers and of the unembedding move into the maps that read them.
        centre_writing: remove the mean over d_model from embeddings and from what sublayers add (models with layer norms in front).
        centre_unembedding: remove the mean over the vocabulary from W_U and b_U; log-probabilities stay, logits do not.
        partial: fold the norms that can be and leave the others, instead of refusing the model.

    Returns:
        A model of the same class, dtype and hook points, whose embedding and unembedding are no longer tied where either changed. It
        may have biases that its configuration does not name, so that it is not saved: `models.save` refuses it.

    Raises:
        CannotProcess: nothing was asked for; a norm that cannot be folded (unless `partial`) or none to fold; RMS norms, norms after
        sums, or a reader without a norm with `centre_writing`; a cap on the logits, or none of them, with `centre_unembedding`.
    """
    if not (fold_norms or centre_writing or centre_unembedding):
        raise CannotProcess("Nothing to do. Expected fold_norms, centre_writing or centre_unembedding.")
    if getattr(model, "processing", None) is not None:
        raise CannotProcess(f"{model.name} is a processed copy. Expected the model that it was made of.")
    made, trial = copy.deepcopy(model), _noisy(model)
    plan, left = _plan_folding(trial) if fold_norms else ({}, {})
    if left and not partial:
        raise CannotProcess(
            f"{model.name}: {'; '.join(f'{name} cannot be folded ({why})' for name, why in left.items())}. Expected norms "
            "whose output only linear maps read; partial=True folds the others."
        )
    if fold_norms and not plan:
        why = "".join(f" {name}: {reason}." for name, reason in left.items())
        raise CannotProcess(f"{model.name} has no norm with weights in front of linear maps, so nothing to fold.{why}")
    centred: list[str] = []
    if centre_writing:
        _check_centrable(trial)
        _keeps_output(trial, lambda: _centre_writing(trial), "something reads the stream without removing its mean")
        _check_centred(trial)
    if centre_unembedding:
        _check_unembedding(model)
    for norm, readers in plan.items():
        _fold(made, norm, readers)
    if centre_writing:
        centred += _centre_writing(made)
    if centre_unembedding:
        centred += _centre_unembedding(made)
    made.processing = Processing({name: tuple(readers) for name, readers in plan.items()}, left, tuple(centred))
    made.origin = {**made.origin, "processing": made.processing.to_json()}
    return made


# --------------------------------------------------------------------------------------------------------- trial runs


def _noisy(model: Any) -> Any:
    """A float64 copy with noise on every parameter."""
    trial = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
        parameter += (0.1 if parameter.dim() < 2 else 0.02) * noise
    return trial


def _run(model: Any) -> Tensor:
    length = min(8, model.n_ctx or 8) + getattr(model, "segment", 0)  # what a memory hands on must matter as well
    tokens = torch.arange(2 * length, device=model.device).view(2, length) * 7 % model.vocab_size
    return model(tokens)  # type: ignore[no-any-return]


def _differs(model: Any, before: Tensor) -> bool:
    after = _run(model)
    return bool((after - before).abs().max() > SAME * before.abs().max())


def _keeps_output(trial: Any, change: Callable[[], Any], reason: str) -> None:
    before = _run(trial)
    change()
    if _differs(trial, before):
        raise CannotProcess(f"{trial.name}: {reason}.")


# ------------------------------------------------------------------------------------------------------------ folding


def reading_norms(model: Any) -> dict[str, Norm]:
    """The norms with weights that stand between the stream, or a head that predicts masked tokens, and linear maps, by name."""
    places = {"ln_final": (model, "ln_final"), "mlm_head.ln": (getattr(model, "mlm_head", None), "ln")}
    if (
        getattr(getattr(model, "config", None), "norm_placement", "before") != "after"
    ):  # else their output is the stream itself
        places |= {
            f"blocks.{layer}.{name}": (block, name)
            for layer, block in enumerate(model.blocks)
            for name in ("ln1", "ln2")
        }
    norms = {place: getattr(owner, name, None) for place, (owner, name) in places.items()}
    return {place: norm for place, norm in norms.items() if isinstance(norm, Norm) and norm.w is not None}


def _plan_folding(trial: Any) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Which norms can be folded and into what, and why the others cannot. The trial ends up folded as planned."""
    plan: dict[str, list[str]] = {}
    left: dict[str, str] = {}
    before = _run(trial)
    for name, readers in _readers(trial).items():
        if not readers:
            left[name] = "no linear map reads it"
            continue
        saved = copy.deepcopy([trial.get_submodule(part) for part in (name, *readers)])
        problem = _fold(trial, name, readers)
        if problem is None and _differs(trial, before):
            problem = "something besides linear maps reads it"
        if problem is None:
            plan[name] = readers
        else:
            left[name] = problem
            for part, old in zip((name, *readers), saved, strict=True):
                _restore(trial.get_submodule(part), old)
    return plan, left


def _readers(model: Any) -> dict[str, list[str]]:
    """Norm -> the modules with linear maps that are called with its very output, seen in one run."""
    norms = reading_norms(model)
    found: dict[str, list[str]] = {name: [] for name in norms}
    outputs: dict[str, list[Tensor]] = {name: [] for name in norms}  # kept, so that no address is used twice

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs[name].append(output)

    def look(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                for norm, made in outputs.items():
                    if name not in found[norm] and any(
                        inputs[0].data_ptr() == x.data_ptr() and inputs[0].numel() == x.numel() for x in made
                    ):
                        found[norm].append(name)

        return see

    with _watching() as handles:
        for name, module in model.named_modules():
            if name in norms:
                handles.append(module.register_forward_hook(keep(name)))
            elif _is_reader(module):
                handles.append(module.register_forward_pre_hook(look(name)))
        _run(model)
    return found


@contextmanager
def _watching() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _is_reader(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Unembed) or bool(getattr(module, "reads_with", ()))


def _fold(model: Any, name: str, readers: list[str]) -> str | None:
    """Move a norm's weights into its readers. Gives the reason if one of them has no place for the norm's bias."""
    norm = model.get_submodule(name)
    w, b = norm.w, norm.b
    for reader in readers:
        module = model.get_submodule(reader)
        for field in getattr(module, "reads_with", ()):  # [..., d_model] parameters without biases
            if b is not None and bool(b.any()):
                return f"{reader} has no bias that could take the norm's"
            parameter = getattr(module, field)
            parameter.copy_(_scaled(parameter, w))
        if isinstance(module, Unembed):
            _untie(model)
            _fold_into(module, module.weight, "b_U", w, b)
        elif isinstance(module, nn.Linear):
            _fold_into(module, module.weight, "bias", w, b)
    norm.w.fill_(1)
    if b is not None:
        norm.b.zero_()
    return None


def _scaled(weight: Tensor, gain: Tensor) -> Tensor:
    return (weight.double() * gain.double()).to(weight.dtype)


def _fold_into(module: Any, weight: Any, bias: str, w: Tensor, b: Tensor | None) -> None:
    """weight [out, d_model] and the bias called `bias`, which is made where there is none and the norm has one."""
    if b is not None and (getattr(module, bias) is not None or bool(b.any())):
        added = weight.double() @ b.double()
        old = getattr(module, bias)
        total = (added if old is None else old.double() + added).to(weight.dtype)
        setattr(module, bias, nn.Parameter(total, requires_grad=weight.requires_grad))
    weight.copy_(_scaled(weight, w))


def _untie(model: Any) -> None:
    """Give the unembedding weights of its own."""
    unembed = model.unembed
    if unembed.weight is None:
        unembed.weight = nn.Parameter(unembed.W_U.T.clone(), requires_grad=model.W_E.requires_grad)
        unembed.tied = []
        model.config = replace(model.config, tie_embeddings=False)


def _restore(module: nn.Module, old: nn.Module) -> None:
    """Give a module the parameters of its copy; an unembedding that was untied meanwhile stays so."""
    if isinstance(module, Unembed) and isinstance(old, Unembed) and module.weight is not None:
        module.weight.copy_(old.W_U.T)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if isinstance(module, Unembed) and name == "weight":
            continue
        kept = dict(old.named_parameters(recurse=False)).get(name)
        setattr(
            module, name, None if kept is None else parameter.copy_(kept) if kept.shape == parameter.shape else kept
        )


# ---------------------------------------------------------------------------------------------------------- centring


def _check_centrable(model: Any) -> None:
    config = getattr(model, "config", None)
    if not isinstance(model, LanguageModel) or config is None:
        reason = "it is no model of blocks between layer norms"
    elif config.norm != "layer":
        reason = "its RMS norms do not remove the mean of the stream, so that the mean matters"
    elif config.norm_placement != "before":
        reason = f"norms stand {config.norm_placement!r}, so that norms write to the stream"
    elif config.embed_norm:
        reason = "a norm behind the embedding writes to the stream"
    else:
        return
    raise CannotProcess(
        f"{model.name} cannot have its writing weights centred: {reason}. Expected layer norms in front of sublayers."
    )


def _centre_writing(model: Any) -> list[str]:
    """Subtract means over d_model in place; the names of what was centred."""
    _untie(model)
    done = ["embed"]
    model.embed.W_E.copy_(_centred(model.W_E, -1))
    if isinstance(getattr(getattr(model, "pos_embed", None), "W_pos", None), nn.Parameter):
        model.pos_embed.W_pos.copy_(_centred(model.W_pos, -1))
        done.append("pos_embed")
    for layer, block in enumerate(model.blocks):
        writers = {f"blocks.{layer}.{'attn' if block.is_attention else 'mixer'}.output": block.sequence_mixer}
        if block.has_mlp:
            writers[f"blocks.{layer}.mlp.outward"] = block.mlp
        for name, owner in writers.items():
            linear = getattr(owner, name.rsplit(".", 1)[1], None)
            if not isinstance(linear, nn.Linear):
                raise CannotProcess(f"{model.name}: {name} is no linear map to the stream, so it cannot be centred.")
            linear.weight.copy_(_centred(linear.weight, 0))
            if linear.bias is not None:
                linear.bias.copy_(_centred(linear.bias, 0))
            done.append(name)
    return done


def _check_centred(trial: Any) -> None:
    """Whether the stream now has mean 0 over d_model everywhere: a writer that was overlooked shows here."""
    length = min(8, trial.n_ctx or 8)
    _, cache = trial.run_with_cache(
        torch.arange(length, device=trial.device)[None] % trial.vocab_size, role="resid_post"
    )
    for address, stream in cache.items():
        if stream.mean(-1).abs().max() > SAME * stream.abs().max():
            raise CannotProcess(
                f"{trial.name}: something else is written to the stream before {address}, with a mean of its own."
            )


def _check_unembedding(model: Any) -> None:
    unembed = getattr(model, "unembed", None)
    if not isinstance(unembed, Unembed):
        raise CannotProcess(f"{model.name} has no unembedding to logits that could be centred.")
    if unembed.softcap is not None:
        raise CannotProcess(
            f"{model.name} caps its logits with tanh, so that a constant added to all of them changes their differences. Expected no cap."
        )


def _centre_unembedding(model: Any) -> list[str]:
    _untie(model)
    unembed = model.unembed
    unembed.weight.copy_(_centred(unembed.weight, 0))
    if unembed.b_U is not None:
        unembed.b_U.copy_(_centred(unembed.b_U, 0))
    return ["unembed"]


def _centred(x: Tensor, axis: int) -> Tensor:
    precise = x.double()
    return (precise - precise.mean(axis, keepdim=True)).to(x.dtype)
