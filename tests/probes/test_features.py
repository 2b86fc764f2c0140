"""Sparse features: every kind against its equations, planted dictionaries recovered, measures by definition, edits exact."""

import math
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from probes.features import (
    BatchTopK,
    Dictionary,
    FeatureTraining,
    Gated,
    JumpReLU,
    PlantedFeatures,
    Standard,
    TopK,
    ablate_features,
    build_dictionary,
    clamp_features,
    evaluate,
    feature_contexts,
    load_dictionary,
    match_dictionaries,
    reconstruct,
    recovered,
    save_dictionary,
    steer_feature,
    train_dictionary,
)  # fmt: skip
from probes.features.dictionaries import DictionaryConfig
from workbench.lab.activation_store import Site, harvest
from workbench.lab.checkpoints import CheckpointError

SMALL = [
    Standard(20, sparsity=0.3),
    TopK(20, k=3),
    BatchTopK(20, k=3),
    BatchTopK(20, k=3, prefixes=(5, 12)),
    JumpReLU(20, sparsity=0.2, threshold=0.3, bandwidth=0.4),
    Gated(20, sparsity=0.3),
]
POINT = "blocks.1.hook_resid_post"


def lively(config: DictionaryConfig, d_in: int = 7) -> Dictionary:
    """An untrained dictionary in float64 with every parameter away from its special initial value."""
    dictionary = build_dictionary(config, d_in).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            if name != "log_threshold":
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        dictionary.scale.fill_(1.7)
        dictionary.out_scale.fill_(1.7 if config.d_out is None else 0.6)
    return dictionary


def rows(count: int = 11, d: int = 7, seed: int = 5) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_codes(dictionary: Dictionary, x: Tensor) -> Tensor:
    """Codes in training, straight from the papers' equations; no function of the package."""
    p = dict(dictionary.named_parameters())
    config = dictionary.config
    inner = x / dictionary.scale - (p["b_dec"] if config.d_out is None else 0)
    z = inner @ p["W_enc"].T + p["b_enc"]
    if isinstance(config, BatchTopK):
        limit = z.flatten().sort(descending=True).values[config.k * len(x) - 1]
        return torch.where(z >= limit, z, 0).relu()
    if isinstance(config, TopK):
        limit = z.sort(descending=True, dim=-1).values[:, config.k - 1, None]
        return torch.where(z >= limit, z, 0).relu()
    if isinstance(config, JumpReLU):
        return torch.where(z > p["log_threshold"].exp(), z, 0)
    if isinstance(config, Gated):
        return (z > 0) * (inner @ p["W_enc"].T * p["r_mag"].exp() + p["b_mag"]).relu()
    return z.relu()


# ------------------------------------------------------------------------------------------------------------- the kinds


@pytest.mark.parametrize("config", SMALL, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("transcoder", [False, True])
def test_losses_are_those_of_the_equations(config: DictionaryConfig, transcoder: bool) -> None:
    if transcoder:
        config = type(config)(**{**vars(config), "d_out": 4})
    dictionary, x = lively(config), rows()
    target = rows(d=4, seed=6) if transcoder else x
    terms, fired = dictionary.losses(x, target, torch.zeros(20, dtype=torch.bool))
    codes = dense_codes(dictionary, x)
    p = dict(dictionary.named_parameters())

    def error(f: Tensor, frozen: bool = False) -> Tensor:
        weight, bias = (p["W_dec"].detach(), p["b_dec"].detach()) if frozen else (p["W_dec"], p["b_dec"])
        return ((f @ weight + bias - target / dictionary.out_scale) ** 2).sum(-1).mean()

    expected = {"reconstruction": error(codes)}
    inner = x / dictionary.scale - (0 if transcoder else p["b_dec"])
    z = inner @ p["W_enc"].T + p["b_enc"]
    if isinstance(config, Standard):
        expected["sparsity"] = 0.3 * codes.sum(-1).mean()
    if isinstance(config, JumpReLU):
        expected["sparsity"] = 0.2 * (codes > 0).double().sum(-1).mean()
    if isinstance(config, Gated):
        expected |= {"sparsity": 0.3 * z.relu().sum(-1).mean(), "gate": error(z.relu(), frozen=True)}
    if isinstance(config, BatchTopK):
        expected |= {f"first {n}": error(codes * (torch.arange(20) < n)) for n in config.prefixes}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), abs=1e-12), name
    assert torch.equal(fired, (codes > 0).any(0)) and 0 < int(fired.sum()) <= 20
    if not isinstance(config, JumpReLU):  # its threshold has a gradient by convention, tested below
        ours = torch.autograd.grad(sum(terms.values()), list(p.values()), allow_unused=True)
        theirs = torch.autograd.grad(sum(expected.values()), list(p.values()), allow_unused=True)
        for (name, _), a, b in zip(p.items(), ours, theirs, strict=True):
            a, b = (torch.zeros(()) if g is None else g for g in (a, b))
            assert torch.allclose(a, b, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("config", SMALL, ids=lambda c: type(c).__name__)
def test_a_trained_dictionary_encodes_as_its_equations_say(config: DictionaryConfig) -> None:
    dictionary, x = lively(config), rows()
    if isinstance(config, BatchTopK):
        with pytest.raises(ValueError, match="no threshold yet"):
            dictionary.eval().encode(x)
        for _ in range(3):
            dictionary.train().losses(x, x, torch.zeros(20, dtype=torch.bool))
        dictionary.eval()  # the same batch each time: the threshold is its smallest code, which is not above itself
        codes = dense_codes(dictionary, x)
        expected = torch.where(codes > codes[codes > 0].min() + 1e-12, codes, 0)
    else:
        expected = dense_codes(dictionary.eval(), x)
    codes = dictionary.encode(x)
    assert torch.allclose(codes, expected, rtol=0, atol=1e-12)
    assert torch.allclose(dictionary(x), 1.7 * (codes @ dictionary.W_dec + dictionary.b_dec), rtol=0, atol=1e-12)
    shaped = dictionary.encode(x.view(1, 11, 7))
    assert shaped.shape == (1, 11, 20)
    with pytest.raises(ValueError, match="5 numbers per row; this dictionary reads 7"):
        dictionary.encode(x[:, :5])


def test_jumprelu_thresholds_get_the_rectangle_kernels_gradient() -> None:
    """arXiv 2407.14435, equations 11 and 12, summed over rows by hand."""
    config = JumpReLU(20, sparsity=0.2, threshold=0.3, bandwidth=0.4)
    dictionary, x = lively(config), rows(200)
    terms, _ = dictionary.losses(x, x, torch.zeros(20, dtype=torch.bool))
    gradient = torch.autograd.grad(sum(terms.values()), dictionary.log_threshold)[0]
    with torch.no_grad():
        z = dictionary.pre_activations(dictionary.centred(x)).relu()
        codes = dense_codes(dictionary, x)
        to_codes = 2 * (codes @ dictionary.W_dec + dictionary.b_dec - x / 1.7) @ dictionary.W_dec.T / len(x)
        threshold = dictionary.log_threshold.exp()
        near = ((z - threshold).abs() < 0.2).double() / 0.4
        to_threshold = -(near * (threshold * to_codes + 0.2 / len(x))).sum(0)
    assert torch.allclose(gradient, to_threshold * threshold, rtol=0, atol=1e-12)  # θ = exp(log θ)


def test_only_dead_features_learn_the_residual() -> None:
    dictionary, x = lively(TopK(20, k=2, aux_k=3)), rows()
    dead = torch.zeros(20, dtype=torch.bool)
    plain, _ = dictionary.losses(x, x, dead)
    assert "dead features" not in plain
    dead[[4, 9, 15, 16]] = True
    terms, _ = dictionary.losses(x, x, dead)
    gradient = torch.autograd.grad(terms["dead features"], [dictionary.W_enc, dictionary.W_dec])
    for g in gradient:
        assert set(g.abs().sum(-1).nonzero()[:, 0].tolist()) <= {4, 9, 15, 16} and float(g.abs().sum()) > 0
    codes = dense_codes(dictionary, x)
    residual = (x / 1.7 - codes @ dictionary.W_dec - dictionary.b_dec).detach()
    z = dictionary.pre_activations(dictionary.centred(x))[:, dead]
    best = torch.where(z >= z.sort(descending=True, dim=-1).values[:, 2, None], z, 0).relu()
    error = (best @ dictionary.W_dec[dead] - residual).pow(2).sum(-1).mean()
    expected = error / residual.var(0, correction=0).sum() / 32
    assert terms["dead features"].item() == pytest.approx(expected.item(), abs=1e-12)


# -------------------------------------------------------------------------------------------------------------- training

PLANTED = PlantedFeatures(n_features=32, d=24, active=2.0, noise=0.01)
KINDS: list[DictionaryConfig] = [
    Standard(40, sparsity=2.0),
    TopK(40, k=3),
    BatchTopK(40, k=2),
    JumpReLU(40, sparsity=2.0, threshold=0.5, bandwidth=1.0),
    Gated(40, sparsity=2.0),
]


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c.kind)
def test_every_kind_finds_the_planted_directions(config: DictionaryConfig) -> None:
    x, _ = PLANTED.rows(20_000)
    held_out, _ = PLANTED.rows(4000, seed=1)
    settings = FeatureTraining(steps=800, batch_size=256, learning_rate=1e-2, sparsity_warmup=200, dead_after=5000)
    trained = train_dictionary(x, None, config, settings)
    found = evaluate(trained.dictionary, held_out)
    match = match_dictionaries(trained.dictionary.W_dec[found.density > 1e-3], PLANTED.directions)
    control = match_dictionaries(build_dictionary(config, 24).W_dec, PLANTED.directions)
    print(f"{config.kind}: {match.f1:.3f} (untrained {control.f1:.3f}), FVU {found.fvu:.3f}, L0 {found.l0:.2f}")
    assert match.recall > 0.9 and match.mean_cosine > 0.95 and match.f1 > 0.85 and control.f1 < 0.1
    assert found.fvu < 0.2 and 1.5 < found.l0 < 6
    assert trained.completed and trained.curve[-1]["step"] == 800
    assert torch.allclose(trained.dictionary.W_dec.norm(dim=-1), torch.ones(40), atol=1e-5)


def test_matching_counts_signs_limits_and_multiplicity() -> None:
    true = torch.eye(4)
    learned = torch.stack([2 * true[0], true[0], -true[1], 0.8 * true[2] + 0.6 * true[3]])
    match = match_dictionaries(learned, true, limit=0.9)
    assert match.recall == 0.25 and match.precision == 0.5 and match.f1 == pytest.approx(1 / 3)
    assert match.mean_cosine == pytest.approx((1 + 0 + 0.8 + 0.6) / 4)
    assert match_dictionaries(torch.zeros(0, 4), true).f1 == 0


@pytest.mark.parametrize("config", [TopK(30, k=2), BatchTopK(30, k=2), Gated(30)], ids=lambda c: c.kind)
def test_a_stopped_training_ends_with_the_same_bits(config: DictionaryConfig, tmp_path: Path) -> None:
    x, _ = PLANTED.rows(600)
    settings = FeatureTraining(steps=40, batch_size=64, report_every=5, checkpoint_every=7, dead_after=128)
    whole = train_dictionary(x, None, config, settings, out=tmp_path / "whole")
    cancel = Event()

    def stop(fraction: float, message: str) -> None:
        if fraction > 0.4:
            cancel.set()

    first = train_dictionary(x, None, config, settings, out=tmp_path / "cut", progress=stop, cancel=cancel)
    assert not first.completed and not (tmp_path / "cut" / "dictionary.safetensors").exists()
    second = train_dictionary(x, None, config, settings, out=tmp_path / "cut")
    assert second.curve == whole.curve
    for name, tensor in whole.dictionary.state_dict().items():
        assert torch.equal(tensor, second.dictionary.state_dict()[name]), name
    assert (tmp_path / "cut" / "dictionary.safetensors").read_bytes() == (
        tmp_path / "whole" / "dictionary.safetensors"
    ).read_bytes()
    opened = load_dictionary(tmp_path / "cut")
    assert opened.config == config and torch.equal(opened(x[:9]), whole.dictionary(x[:9]))
    with pytest.raises(CheckpointError, match="another training"):
        train_dictionary(x, None, config, FeatureTraining(steps=41, batch_size=64), out=tmp_path / "cut")


def test_a_transcoder_learns_another_site() -> None:
    x, codes = PLANTED.rows(8000)
    target = codes[:, :10] @ torch.randn(10, 5, generator=torch.Generator().manual_seed(1))
    settings = FeatureTraining(steps=500, batch_size=256, learning_rate=3e-3)
    trained = train_dictionary(x, None, TopK(64, d_out=5, k=4), settings, target=target)
    assert evaluate(trained.dictionary, x[:2000], target[:2000]).fvu < 0.3
    with pytest.raises(ValueError, match="both `d_out`"):
        train_dictionary(x, None, TopK(64, k=4), settings, target=target)
    with pytest.raises(ValueError, match="writes another"):
        reconstruct(trained.dictionary, POINT)


# ------------------------------------------------------------------------------------------------------------ evaluation


def identity(d: int) -> Dictionary:
    """Reconstructs everything: each dimension once with either sign."""
    dictionary = build_dictionary(Standard(2 * d), d)
    with torch.no_grad():
        both = torch.cat([torch.eye(d), -torch.eye(d)])
        dictionary.W_enc.copy_(both)
        dictionary.W_dec.copy_(both)
    return dictionary.eval()


def test_unexplained_variance_is_its_definition_and_the_other_number_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20000, 64, generator=generator)

    class Half(Dictionary):
        def activate(self, z: Tensor) -> Tensor:
            return z

        def encode(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 2)

        def decode(self, codes: Tensor) -> Tensor:
            return self.given

    for mean, compat in ((1.0, 0.871), (5.0, 0.984)):
        x = noise + mean
        half = Half(Standard(2), 64)
        half.given = mean + 0.5 * noise
        found = evaluate(half, x, batch_size=len(x))
        assert found.fvu == pytest.approx(0.25, abs=1e-4)
        assert found.compat_explained_variance == pytest.approx(compat, abs=0.003)
    perfect = evaluate(identity(64), noise)
    assert perfect.fvu < 1e-12 and perfect.l0 == 64 and perfect.cosine == pytest.approx(1) and perfect.alive == 1
    assert perfect.norm_ratio == pytest.approx(1) and perfect.dense_10 == 1 and perfect.nearest == 0
    assert "fvu" in repr(perfect) and "<table" in perfect._repr_html_() and len(perfect.to_json()["density"]) == 128
    with pytest.raises(ValueError, match="at least two rows"):
        evaluate(identity(64), noise[:1])


@pytest.fixture(scope="module")
def model() -> models.LanguageModel:
    return models.load("gpt-english")


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    text = b"The parser reads the file and returns a list of names; the names are strings, and the list may be empty."
    return torch.tensor(list(text[:96])).view(4, 24)


def test_recovered_loss_is_all_or_nothing_at_the_ends(model: Any, tokens: Tensor) -> None:
    kept = recovered(model, tokens, POINT, identity(128))
    assert kept.tokens == 4 * 22
    assert kept.ce_score == pytest.approx(1, abs=1e-4) and kept.kl_reconstructed < 1e-9 < kept.kl_ablated
    nothing = build_dictionary(TopK(4, k=1), 128).eval()
    with torch.no_grad():
        nothing.b_enc.fill_(-1e9)
    lost = recovered(model, tokens, POINT, nothing, ablation="zero")
    assert lost.ce_score == pytest.approx(0, abs=1e-6) and lost.kl_score == pytest.approx(0, abs=1e-6)
    logits = model(tokens).log_softmax(-1)
    clean = -logits[:, 1:-1].gather(-1, tokens[:, 2:, None]).mean()
    assert kept.ce_clean == pytest.approx(clean.item(), abs=1e-5) and kept.to_json()["ce_score"] == kept.ce_score
    by_head = recovered(model, tokens, "blocks.1.attn.hook_z", identity(32), head=2)
    assert by_head.ce_score == pytest.approx(1, abs=1e-4) and by_head.kl_ablated > 1e-6
    with pytest.raises(ValueError, match="'mean' or 'zero'"):
        recovered(model, tokens, POINT, nothing, ablation="resample")


# --------------------------------------------------------------------------------------------------------- interventions


def trained(model: Any, tokens: Tensor, tmp_path: Path, site: Site) -> tuple[Any, Dictionary]:
    store = harvest(model, tokens, [site], tmp_path / "store", dtype="float32")
    settings = FeatureTraining(steps=60, batch_size=16, warmup=5)
    return store, train_dictionary(store, site.name, TopK(40, k=4), settings).dictionary


def test_ablating_and_clamping_change_exactly_the_features_part(model: Any, tokens: Tensor, tmp_path: Path) -> None:
    _, dictionary = trained(model, tokens, tmp_path, Site(POINT))
    _, cache = model.run_with_cache(tokens, names=POINT)
    codes = dictionary.encode(cache[POINT])
    feature = int(codes[:, 1:].sum((0, 1)).argmax())

    def after(*hooks: Any) -> Tensor:
        return model.run_with_cache(tokens, names=POINT, hooks=list(hooks))[1][POINT]

    part = codes[..., feature, None] * dictionary.directions[feature]
    assert float(part.detach().abs().max()) > 0.1
    assert torch.allclose(after(ablate_features(dictionary, POINT, [feature])), cache[POINT] - part, atol=1e-5)
    held = after(clamp_features(dictionary, POINT, {feature: 2.0}, skip=3))
    expected = cache[POINT] - part + 2 * dictionary.directions[feature]
    assert torch.equal(held[:, :3], cache[POINT][:, :3]) and torch.allclose(held[:, 3:], expected[:, 3:], atol=1e-5)
    steered = after(steer_feature(dictionary, POINT, feature, 1.5))
    assert torch.allclose(steered, cache[POINT] + 1.5 * dictionary.directions[feature], atol=1e-5)
    assert torch.allclose(after(reconstruct(dictionary, POINT)), dictionary(cache[POINT]), atol=1e-5)
    for call in (
        lambda: ablate_features(dictionary, POINT, [40]),
        lambda: clamp_features(dictionary, POINT, {-1: 0.0}),
        lambda: steer_feature(dictionary, POINT, 99, 1.0),
    ):
        with pytest.raises(ValueError, match=r"features 0\.\.39"):
            call()
    with pytest.raises(ValueError, match="at least one feature"):
        ablate_features(dictionary, POINT, [])
    with pytest.raises(ValueError, match="the dictionary reads 128"):
        model.run_with_hooks(tokens, hooks=[reconstruct(dictionary, "blocks.1.mlp.hook_post")])


@pytest.mark.parametrize("head", [None, 1])
def test_sites_with_heads_before_positions(tokens: Tensor, head: int | None) -> None:
    """BDH's y is [batch, head, pos, neuron]: a dictionary reads a token's neurons, never a neuron's tokens."""
    model, point = models.build("bdh"), "blocks.1.hook_y"
    y = model.run_with_cache(tokens, names=[point])[1][point]
    width = y.shape[-1] * (y.shape[1] if head is None else 1)
    dictionary = build_dictionary(Standard(7), width)
    after = model.run_with_cache(
        tokens, names=[point], hooks=[ablate_features(dictionary, point, [2], head=head, skip=1)]
    )[1][point]
    expected = y.clone()
    for b in range(y.shape[0]):
        for t in range(1, y.shape[2]):
            row = y[b, :, t].flatten() if head is None else y[b, head, t]
            row = row - dictionary.encode(row)[2] * dictionary.directions[2]
            if head is None:
                expected[b, :, t] = row.view(y.shape[1], -1)
            else:
                expected[b, head, t] = row
    assert torch.allclose(after, expected, atol=1e-5) and not torch.allclose(after, y, atol=1e-3)
    kept = recovered(model, tokens, point, identity(width), head=head)
    assert kept.ce_score == pytest.approx(1, abs=1e-4) and kept.kl_ablated > 1e-9


def test_states_have_features_too(tokens: Tensor, tmp_path: Path) -> None:
    """A dictionary of one head's recurrent state: trained, measured, and used to edit the state with the edit propagating."""
    model = models.build("retnet")
    site = Site("blocks.0.mixer.hook_state", head=1, every=2)
    store, dictionary = trained(model, tokens, tmp_path, site)
    assert dictionary.d_in == store.width(site.name) == math.prod(model.mixers[0].describe()["state"]["shape"][1:])
    assert evaluate(dictionary, store.rows(site.name)).fvu < 1
    _, _ = store, dictionary


# -------------------------------------------------------------------------------------------------------------- contexts


def test_contexts_are_the_occurrences(model: Any, tmp_path: Path) -> None:
    text = b"abcabcabd " * 60
    tokens = torch.tensor(list(text[:576])).view(12, 48)
    store = harvest(model, tokens, ["hook_embed"], tmp_path / "store", dtype="float32", batch_size=5)
    dictionary = build_dictionary(Standard(256), 128)
    with torch.no_grad():  # feature i fires on byte i alone
        rows = model.W_E / model.W_E.norm(dim=-1, keepdim=True)
        dictionary.W_enc.copy_(rows)
        dictionary.W_dec.copy_(rows)
        dictionary.b_enc.copy_(-0.98 * model.W_E.norm(dim=-1))
    found, silent = feature_contexts(
        store, "hook_embed", dictionary.eval(), tokens, [ord("d"), ord("z")], top=4, before=3, after=2
    )
    assert found.feature == ord("d") and len(found.top) == 4 and len({c.sequence for c in found.top}) == 4
    assert found.density == pytest.approx(float((tokens[:, 1:] == ord("d")).double().mean()))
    for context in [*found.top, *(c for band in found.bands for c in band)]:
        assert context.tokens[context.focus] == ord("d") == int(tokens[context.sequence, context.position])
        assert context.tokens == tokens[context.sequence, max(0, context.position - 3) : context.position + 3].tolist()
        assert context.values[context.focus] == context.value > 0
        firing = [v > 0 for v in context.values if not math.isnan(v)]
        assert firing == [
            t == ord("d") for t, v in zip(context.tokens, context.values, strict=True) if not math.isnan(v)
        ]
    assert found.largest == max(c.value for c in found.top)
    assert silent.top == [] and silent.density == 0 and silent.bands == [[], [], [], []]
    with pytest.raises(ValueError, match="harvested from"):
        feature_contexts(store, "hook_embed", dictionary, tokens[:3], [0])


# -------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TopK(10, k=11), "between 1 and n_features"),
        (lambda: Standard(10, sparsity=0.0), "sparsity must be positive"),
        (lambda: BatchTopK(10, k=2, prefixes=(5, 3)), "prefixes must rise"),
        (lambda: build_dictionary(TopK(4, k=1), 0), "d_in must be at least 1"),
        (lambda: train_dictionary(torch.zeros(50, 4), None, TopK(8, k=2)), "all zero"),
        (lambda: train_dictionary(torch.ones(50, 4), "site", TopK(8, k=2)), "no site names"),
        (lambda: train_dictionary(torch.ones(50), None, TopK(8, k=2)), "expected"),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_file_of_something_else_is_no_dictionary(tmp_path: Path) -> None:
    from workbench.lab.checkpoints import write_tensors

    write_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="no dictionary of this workbench"):
        load_dictionary(tmp_path / "other.safetensors")
    saved = save_dictionary(identity(5), tmp_path / "own.safetensors")
    assert torch.equal(load_dictionary(saved)(rows(d=5).float()), identity(5)(rows(d=5).float()))
    with pytest.raises(TypeError, match="Known: Standard, TopK"):
        build_dictionary(DictionaryConfig(4), 3)
