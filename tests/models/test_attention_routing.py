"""Token types, factorised attention and clusters against their definitions, cell by cell in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.combiner import CombinerConfig
from models.attention.nats import NatsConfig, keep_cost
from models.attention.routing import RoutingConfig
from models.attention.site import AttentionConfig
from models.language_model import LanguageModel, LanguageModelConfig

AT = "blocks.0.attn."


def build(**site: object) -> LanguageModel:
    model = LanguageModel(
        LanguageModelConfig(1, 24, mixer=AttentionConfig(n_heads=4, position="none", **site))  # type: ignore[arg-type]
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).detach().abs().max()) < 1e-10


# -------------------------------------------------------------------------------------------------------------- NAtS


def nats() -> LanguageModel:
    return build(n_key_value_heads=2, normalise=NatsConfig(window=3))


def ends(types: Tensor) -> list[int]:
    """The first global token from each token on, else the last token. types [pos]."""
    return [next((t for t in range(j, len(types)) if types[t] == 0), len(types)) for j in range(len(types))]


def test_types_say_how_long_a_token_is_read(tokens: Tensor) -> None:
    model = nats()
    _, cache = model.run_with_cache(tokens)
    chosen, scores = cache[AT + "normalise.hook_type"].argmax(-1), cache[AT + "hook_attn_scores"]
    assert len(chosen.unique()) == 3 and (chosen[:, 0] == 0).all()
    for b in range(2):
        for h in range(4):
            types = chosen[b, :, h // 2]
            end = ends(types)
            for i in range(17):
                row = scores[b, h, i].clone()
                for j in range(17):
                    kept = {0: True, 1: i <= end[j], 2: i <= j + 3}[int(types[j])]
                    row[j] = row[j] if kept else float("-inf")
                assert close(cache[AT + "hook_pattern"][b, h, i], row.softmax(0))


def test_forcing_a_type(tokens: Tensor) -> None:
    """A token made sliding by a hook is read by nobody more than `window` later; made global, by everybody."""
    model = nats()
    for kind, read in ((2, False), (0, True)):

        def force(types: Tensor, hook: object, kind: int = kind) -> Tensor:
            types[:, 4] = F.one_hot(torch.tensor(kind), 3).to(types)
            return types

        with model.hooks([(AT + "normalise.hook_type", force)]):
            _, cache = model.run_with_cache(tokens, role="pattern")
        assert bool((cache[AT + "hook_pattern"][:, :, 8:, 4] > 0).all()) == read


def test_types_learn_through_the_mask(tokens: Tensor) -> None:
    """Although the mask is hard, types get gradients; the first token, which has no choice, gets none."""
    model = nats()
    _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    gradient = cache.gradients[AT + "normalise.hook_type_logits"]
    assert float(gradient[:, 1:-1].abs().max()) > 0
    assert float(gradient[:, 0].abs().max()) == 0


def test_keeping_a_token_costs_what_is_read_of_it() -> None:
    types = torch.tensor([0, 1, 2, 1, 0, 1, 1])
    onehot = F.one_hot(types, 3)[None, :, None].double()
    cost = keep_cost(onehot)[0, :, 0]
    end = [min(e, 6) for e in ends(types)]
    expected = [{0: (7 - end[j]) / 7, 1: (end[j] - j) / 7, 2: 0.0}[int(t)] for j, t in enumerate(types)]
    assert close(cost, torch.tensor(expected, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------- Combiner


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_combiner_is_its_factorisation(pool: str, tokens: Tensor) -> None:
    model = build(normalise=CombinerConfig(segment=4, pool=pool))
    _, cache = model.run_with_cache(tokens)
    q, k = cache[AT + "hook_q"], cache[AT + "hook_k"]
    pooled = (lambda x: x.mean(0)) if pool == "mean" else (lambda x: x.amax(0))
    for b in range(2):
        for h in range(4):
            for i in range(17):
                own, start = i // 4, i // 4 * 4
                asked = q[b, i, h] / 6**0.5
                blocks = [slice(4 * r, 4 * r + 4) for r in range(own)]
                scores = [asked @ k[b, j, h] for j in range(start, i + 1)]
                scores += [asked @ pooled(k[b, block, h]) for block in blocks]
                first = torch.stack(scores).softmax(0)
                expected = torch.zeros(17, dtype=torch.float64)
                expected[start : i + 1] = first[: i + 1 - start]
                for r, block in enumerate(blocks):
                    inside = (k[b, block, h] @ pooled(q[b, block, h]) / 6**0.5).softmax(0)
                    expected[block] = first[i + 1 - start + r] * inside
                assert close(cache[AT + "hook_pattern"][b, h, i], expected)
    pattern = cache[AT + "hook_pattern"]
    assert close(pattern.sum(-1), torch.ones(2, 4, 17).double()) and bool((pattern[..., -1, :] > 0).all())


def test_one_segment_is_ordinary_attention(tokens: Tensor) -> None:
    combined, plain = build(normalise=CombinerConfig(segment=17)), build()
    assert close(combined(tokens), plain(tokens))


# ----------------------------------------------------------------------------------------------------------- Routing


def test_clusters_read_each_other(tokens: Tensor) -> None:
    model = build(mask=RoutingConfig(clusters=3))
    _, cache = model.run_with_cache(tokens)
    means = model.blocks[0].attn.mask.centroids
    asked, found = (
        torch.einsum("bphd,hcd->bhpc", F.normalize(cache[AT + f"hook_{name}"], dim=-1), means).argmax(-1)
        for name in "qk"
    )
    for i in range(17):
        for j in range(i + 1):
            seen = (asked[:, :, i] == found[:, :, j]) | (i == j)
            assert torch.equal(cache[AT + "hook_pattern"][:, :, i, j] > 0, seen)


def test_one_cluster_is_ordinary_attention(tokens: Tensor) -> None:
    assert close(build(mask=RoutingConfig(clusters=1))(tokens), build()(tokens))


def test_moving_a_token_to_another_cluster(tokens: Tensor) -> None:
    """A key moved to a cluster is read by the later queries of that cluster and by no other."""
    model = build(mask=RoutingConfig(clusters=3))

    def move(affinity: Tensor, hook: object) -> Tensor:
        affinity[:, :, 2] = torch.tensor([0.0, 9.0, 0.0])
        return affinity

    _, cache = model.run_with_cache(tokens, names=AT + "mask.hook_query_affinity")
    asked = cache[AT + "mask.hook_query_affinity"].argmax(-1)
    with model.hooks([(AT + "mask.hook_key_affinity", move)]):
        _, cache = model.run_with_cache(tokens, role="pattern")
    assert torch.equal(cache[AT + "hook_pattern"][:, :, 3:, 2] > 0, asked[:, :, 3:] == 1)


def test_centroids_follow_tokens_in_training_only(tokens: Tensor) -> None:
    """One training call moves each centroid to the normalised mix with its members' mean; watching and evaluating leave it."""
    model = build(mask=RoutingConfig(clusters=3, decay=0.5))
    mask = model.blocks[0].attn.mask
    _, cache = model.run_with_cache(tokens)
    before = mask.centroids.clone()
    model.train()
    model.run_with_cache(tokens)
    assert torch.equal(mask.centroids, before)
    expected = before.clone()
    clusters = {}
    for name in "qk":  # both are assigned by the centroids of before
        clusters[name] = torch.einsum("bphd,hcd->bhpc", F.normalize(cache[AT + f"hook_{name}"], dim=-1), before).argmax(
            -1
        )
    for name in "qk":
        x = F.normalize(cache[AT + f"hook_{name}"], dim=-1).transpose(1, 2)
        for h in range(4):
            for c in range(3):
                members = x[:, h][clusters[name][:, h] == c]
                if len(members):
                    expected[h, c] = F.normalize(0.5 * expected[h, c] + 0.5 * members.mean(0), dim=-1)
                else:
                    expected[h, c] = F.normalize(expected[h, c], dim=-1)
    model(tokens)
    assert close(mask.centroids, expected) and not close(mask.centroids, before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NatsConfig(window=0), "at least 1"),
        (lambda: CombinerConfig(segment=4, pool="maks"), "'max'"),
        (lambda: CombinerConfig(segment=0), "at least 1"),
        (lambda: RoutingConfig(clusters=0), "at least 1"),
    ],
)
def test_impossible_settings_are_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]
