"""Attention statistics in strips against whole patterns in float64, over every way to see, bias and weigh; and on planted patterns."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention_statistics import (
    STATISTICS,
    AttentionStatistics,
    alibi_bias,
    attention_statistics,
    delta_rule_statistics,
    gated_linear_statistics,
    label_features,
    pattern_statistics,
    t5_bias,
)
from kernels.attention_statistics.reference import softmax_pattern, statistics_of, visible_cells
from kernels.attention_statistics.visibility import Visibility
from kernels.delta_rule import effective_pattern as delta_rule_pattern
from kernels.gated_linear_attention import effective_pattern

BATCH, HEADS, GROUPS, LENGTH, WIDTH = 2, 4, 2, 37, 6
OPTIONS: dict[str, Any] = {"top_k": 4, "map_size": 7}


def inputs(queries: int = LENGTH, dtype: torch.dtype = torch.float64, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length + queries)
    q = torch.randn(BATCH, HEADS, queries, WIDTH, generator=generator, dtype=torch.float64) * 2
    k = torch.randn(BATCH, GROUPS, length, WIDTH, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def padding(side: str) -> Tensor:
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    real[1, slice(0, 9) if side == "left" else slice(LENGTH - 9, None)] = False
    return real


FEATURES = torch.randn(BATCH, LENGTH, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
SEGMENTS = torch.tensor([[0] * 10 + [1] * 20 + [2] * 7, [4] * 25 + [1] * 12])


def assert_equal(found: AttentionStatistics, wanted: AttentionStatistics, tolerance: float) -> None:
    """Every field: nan in the same places, and no number further off than the tolerance (times the number, where that is above 1)."""
    assert found.weights == wanted.weights and found.first_distance == wanted.first_distance
    for name in AttentionStatistics.__dataclass_fields__:
        a, b = getattr(found, name), getattr(wanted, name)
        if not isinstance(a, Tensor):
            assert b is None or not isinstance(b, Tensor), name
            continue
        assert a.shape == b.shape, (name, a.shape, b.shape)
        if name in ("largest_at", "top_keys", "rows"):
            assert torch.equal(a, b), name
            continue
        a, b = a.double(), b.double()
        assert torch.equal(a.isnan(), b.isnan()), name
        error = (a - b).nan_to_num() / b.nan_to_num().abs().clamp(min=1)
        assert error.abs().max() <= tolerance, (name, float(error.abs().max()))


SEEING: dict[str, dict[str, Any]] = {
    "causal": {},
    "strict": {"causal": "strict"},
    "both ways": {"causal": "none"},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "window both ways": {"window": 6, "causal": "none"},
    "strict window": {"window": 6, "causal": "strict"},
    "padded left": {"mask": padding("left")},
    "padded right": {"mask": padding("right"), "window": 8},
    "padded both ways": {"mask": padding("right"), "causal": "none"},
    "segments": {"segments": SEGMENTS},
    "segments, padding, strict": {"segments": SEGMENTS, "mask": padding("left"), "causal": "strict"},
}


@pytest.mark.parametrize("cells", [40, 300, None])
@pytest.mark.parametrize("queries", [LENGTH, 11, 1])
@pytest.mark.parametrize("seeing", SEEING)
def test_softmax_statistics_are_those_of_the_whole_pattern(seeing: str, queries: int, cells: int | None) -> None:
    """Single rows, a few and all at once; all queries or the last ones only; grouped keys."""
    q, k = inputs(queries)
    options = SEEING[seeing]
    see = Visibility(
        queries,
        LENGTH,
        options.get("causal", "inclusive"),
        options.get("window"),
        options.get("mask"),
        options.get("segments"),
    )
    found = attention_statistics(q, k, **options, features=FEATURES, cells_per_strip=cells, **OPTIONS)
    pattern, normaliser = softmax_pattern(q, k, see, scale=WIDTH**-0.5)
    assert_equal(found, statistics_of(pattern, see, log_normaliser=normaliser, features=FEATURES, **OPTIONS), 1e-10)


@pytest.mark.parametrize("queries", [LENGTH, 9])
@pytest.mark.parametrize("causal", ["inclusive", "none"])
@pytest.mark.parametrize("kind", ["alibi", "t5", "softcap", "callable", "everything"])
def test_biases(kind: str, causal: str, queries: int) -> None:
    q, k = inputs(queries)
    see = Visibility(queries, LENGTH, causal)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.02], dtype=torch.float64)
    table = torch.randn(8, HEADS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    by_distance = t5_bias(table, see.distances, bidirectional=causal == "none", max_distance=20)
    dense = torch.randn(BATCH, HEADS, queries, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def function(item: int, head: int, rows: slice, keys: slice) -> Tensor:
        return dense[item, head, rows, keys]

    options: dict[str, Any] = {
        "alibi": {"alibi_slopes": slopes},
        "t5": {"distance_bias": by_distance},
        "softcap": {"softcap": 1.5},
        "callable": {"bias": function},
        "everything": {"softcap": 2.0, "distance_bias": by_distance, "bias": function},
    }[kind]
    plain = dict(options)
    if kind == "alibi":
        plain = {"distance_bias": alibi_bias(plain.pop("alibi_slopes"), see.distances)}
    pattern, normaliser = softmax_pattern(q, k, see, scale=0.7, **plain)
    wanted = statistics_of(pattern, see, log_normaliser=normaliser, **OPTIONS)
    for cells in (90, None):
        found = attention_statistics(q, k, scale=0.7, causal=causal, cells_per_strip=cells, **options, **OPTIONS)
        assert_equal(found, wanted, 1e-10)


def test_distance_biases_are_what_they_are_called() -> None:
    """ALiBi cell by cell; T5's buckets against the published rule: exact up to half, then logarithmic, the last shared."""
    bias = alibi_bias(torch.tensor([0.5]), range(-2, 4))
    assert bias.tolist() == [[-1.0, -0.5, 0.0, -0.5, -1.0, -1.5]]
    table = torch.arange(32, dtype=torch.float64)[:, None]
    one_way = t5_bias(table, range(200))[0]
    assert one_way[:16].tolist() == list(range(16))
    expected = [min(16 + int(math.log(d / 16) / math.log(128 / 16) * 16), 31) for d in range(16, 200)]
    assert one_way[16:].tolist() == expected
    both = t5_bias(table, range(-150, 150), bidirectional=True)[0]
    assert both[150:158].tolist() == list(range(8)) and both[149].item() == 17 and both[-1].item() == 15
    assert both[0].item() == 31


DECAYS = ("none", "constant", "scalar", "vector")


@pytest.mark.parametrize("weights", ["share", "absolute", "signed"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_gated_linear_statistics_are_those_of_the_effective_pattern(decay: str, strict: bool, weights: str) -> None:
    generator = torch.Generator().manual_seed(7)
    q, k = torch.randn(2, BATCH, HEADS, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    write = torch.rand(BATCH, HEADS, LENGTH, generator=generator, dtype=torch.float64)
    shapes = {"constant": (HEADS,), "scalar": (BATCH, HEADS, LENGTH), "vector": (BATCH, HEADS, LENGTH, WIDTH)}
    log_decay = None if decay == "none" else -torch.rand(shapes[decay], generator=generator, dtype=torch.float64)
    alpha = effective_pattern(q, k, log_decay=log_decay, write=write, scale=0.3, strict=strict)
    see = Visibility(LENGTH, LENGTH, "strict" if strict else "inclusive", None, padding("right"))
    wanted = statistics_of(alpha, see, weights=weights, features=FEATURES, **OPTIONS)
    for cells in (200, None):
        found = gated_linear_statistics(
            q,
            k,
            log_decay=log_decay,
            write=write,
            scale=0.3,
            strict=strict,
            mask=padding("right"),
            weights=weights,
            features=FEATURES,
            cells_per_strip=cells,
            **OPTIONS,
        )
        assert_equal(found, wanted, 1e-10)
        assert (found.entropy is None) == (weights != "share")


@pytest.mark.parametrize("weights", ["share", "absolute", "signed"])
@pytest.mark.parametrize("length", [37, 64, 150])
@pytest.mark.parametrize("decay", DECAYS)
def test_delta_rule_statistics_are_those_of_the_effective_pattern(decay: str, length: int, weights: str) -> None:
    generator = torch.Generator().manual_seed(7)
    q, k = torch.randn(2, BATCH, HEADS, length, WIDTH, generator=generator, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    beta = torch.rand(BATCH, HEADS, length, generator=generator, dtype=torch.float64)
    shapes = {"constant": (HEADS,), "scalar": (BATCH, HEADS, length), "vector": (BATCH, HEADS, length, WIDTH)}
    log_decay = None if decay == "none" else -torch.rand(shapes[decay], generator=generator, dtype=torch.float64)
    alpha = delta_rule_pattern(q, k, beta, log_decay=log_decay, scale=0.3)
    wanted = statistics_of(alpha, Visibility(length, length, "inclusive", None, None), weights=weights, map_size=6)
    for cells in (900, 7000, None):
        found = delta_rule_statistics(
            q, k, beta, log_decay=log_decay, scale=0.3, weights=weights, cells_per_strip=cells, map_size=6
        )
        assert_equal(found, wanted, 1e-9)


@pytest.mark.parametrize("weights", ["share", "absolute", "signed"])
@pytest.mark.parametrize("causal", ["inclusive", "none"])
def test_any_pattern_as_tensor_or_as_a_function_of_tiles(weights: str, causal: str) -> None:
    generator = torch.Generator().manual_seed(8)
    pattern = torch.randn(BATCH, HEADS, 23, LENGTH, generator=generator, dtype=torch.float64)
    see = Visibility(23, LENGTH, causal)
    wanted = statistics_of(pattern, see, weights=weights, **OPTIONS)
    assert_equal(pattern_statistics(pattern, causal=causal, weights=weights, **OPTIONS), wanted, 1e-10)
    asked: list[tuple[int, int]] = []

    def tiles(item: int, head: int, rows: slice, keys: slice) -> Tensor:
        cells = pattern[item, head, rows, keys]
        asked.append(tuple(cells.shape))  # type: ignore[arg-type]
        return cells

    found = pattern_statistics(
        tiles, pattern.shape, causal=causal, weights=weights, dtype=torch.float64, cells_per_strip=100, **OPTIONS
    )
    assert_equal(found, wanted, 1e-10)
    assert max(rows * columns for rows, columns in asked) <= 100


@pytest.mark.parametrize("length", [700, 1100])
def test_float32_is_within_1e_5_at_lengths_of_many_strips(length: int) -> None:
    """Flat and peaked rows, a sliding window and ALiBi, against float64."""
    for sharpness, options in (
        (0.5, {}),
        (6.0, {"window": 200}),
        (2.0, {"alibi_slopes": torch.tensor([2.0, 0.5, 0.1, 0.01])}),
    ):
        generator = torch.Generator().manual_seed(length)
        q = torch.randn(1, 4, length, 16, generator=generator) * sharpness
        k = torch.randn(1, 2, length, 16, generator=generator)
        see = Visibility(length, length, window=options.get("window"))  # type: ignore[arg-type]
        slopes = options.get("alibi_slopes")
        bias = None if slopes is None else alibi_bias(slopes, see.distances)  # type: ignore[arg-type]
        pattern, normaliser = softmax_pattern(q.double(), k.double(), see, scale=0.25, distance_bias=bias)
        wanted = statistics_of(pattern, see, log_normaliser=normaliser)
        found = attention_statistics(q, k, cells_per_strip=1 << 15, **options)  # type: ignore[arg-type]
        exact = {"largest_at": found.largest_at}  # a tie may fall either way in float32
        assert found.largest_at is not None and wanted.largest_at is not None
        at_found = pattern.gather(-1, found.largest_at[..., None])[..., 0]
        assert (at_found - wanted.largest).abs().max() < 1e-5  # type: ignore[operator]
        fields = {name: getattr(wanted, name) for name in AttentionStatistics.__dataclass_fields__}
        assert_equal(found, AttentionStatistics(**{**fields, **exact}), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    q, k = inputs(dtype=dtype)
    found = attention_statistics(q, k)
    exact = attention_statistics(q.double(), k.double())
    assert found.entropy is not None and found.entropy.dtype == torch.float32
    assert (found.entropy.double() - exact.entropy).abs().max() < 1e-5  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------------ closed forms


def test_uniform_attention_in_closed_form() -> None:
    """Row i of zero scores reads i + 1 tokens alike: entropy ln(i + 1), mean distance i / 2, mean square i(2i + 1)/6, received harmonic."""
    length = 300
    found = attention_statistics(torch.zeros(1, 1, length, 4), torch.randn(1, 1, length, 4), cells_per_strip=5000)
    i = torch.arange(length, dtype=torch.float64)
    assert (found.need("entropy")[0, 0] - (i + 1).log()).abs().max() < 1e-5
    assert ((found.need("distance")[0, 0] - i / 2) / (i + 1)).abs().max() < 1e-6
    assert ((found.need("distance_squared")[0, 0] - i * (2 * i + 1) / 6) / (i + 1) ** 2).abs().max() < 1e-6
    harmonic = (1 / (i + 1)).flip(0).cumsum(0).flip(0)  # Σ_{i ≥ j} 1 / (i + 1)
    assert (found.need("received")[0, 0] - harmonic / (length - i)).abs().max() < 1e-6
    assert (found.need("largest")[0, 0] - 1 / (i + 1)).abs().max() < 1e-6
    assert found.need("log_normaliser")[0, 0].double().sub((i + 1).log()).abs().max() < 1e-5


def test_a_previous_token_head_keeps_every_digit_of_its_distance() -> None:
    """Distance 1 at position 20,000: the difference of large squares would lose it."""
    length = 20_000
    found = pattern_statistics(
        lambda item, head, rows, keys: (
            (torch.arange(rows.start, rows.stop)[:, None] + length - 256) - torch.arange(keys.start, keys.stop) == 1
        ).float(),
        (1, 1, 256, length),
        statistics=["distance", "previous", "profile"],
    )
    assert (found.need("distance") - 1).abs().max() < 1e-6 and (found.need("distance_squared") - 1).abs().max() < 1e-6
    assert (found.need("previous") == 1).all()
    profile = found.need("profile")[0, 0]
    assert profile[1] == 1 and profile[2:].abs().sum() < 1e-30


def test_what_can_be_read_off_afterwards() -> None:
    """Sinks, their mass, value-weighted receipts, binned profiles and label masses, against the dense pattern."""
    q, k = inputs()
    k[:, :, 0] *= 0
    k[:, :, [0, 17]] += 3 * q.mean((1, 2))[:, None, None]
    labels = torch.full((1, LENGTH), -1)
    labels[0, :5], labels[0, 20:] = 0, 1
    found = attention_statistics(q, k, features=label_features(labels))
    pattern, _ = softmax_pattern(q, k, Visibility(LENGTH, LENGTH), scale=WIDTH**-0.5)
    assert torch.allclose(found.need("features")[..., 0].double(), pattern[..., :5].sum(-1))
    assert torch.allclose(found.need("features")[..., 1].double(), pattern[..., 20:].sum(-1))
    received = pattern.sum(-2) / (LENGTH - torch.arange(LENGTH))
    chosen = received > 0.1
    assert torch.equal(found.sinks(0.1), chosen) and chosen.any()
    mass = (pattern * chosen[:, :, None]).sum(-1).mean(-1)
    assert torch.allclose(found.sink_mass(0.1), mass)
    norms = torch.rand(BATCH, GROUPS, LENGTH, dtype=torch.float64)
    assert torch.allclose(found.received_by_value(norms), received * norms.repeat_interleave(2, 1))
    bins, means = found.binned_profile(4)
    assert bins == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 7), (8, 15), (16, 31), (32, 36)]
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    for number, (near, far) in enumerate(bins):
        cells = (i - j >= near) & (i - j <= far)
        assert torch.allclose(means[..., number], pattern[..., cells].mean(-1))
    assert torch.allclose(found.mean("first"), pattern[..., 0].mean(-1))


def test_only_what_is_asked_for_is_computed() -> None:
    q, k = inputs()
    everything = attention_statistics(q, k)
    for name in STATISTICS:
        found = attention_statistics(q, k, statistics=[name])
        field = "self_weight" if name == "self" else name
        assert torch.equal(found.need(field), everything.need(field))
        computed = {n for n in AttentionStatistics.__dataclass_fields__ if isinstance(getattr(found, n), Tensor)}
        extra = {"largest": {"largest_at"}, "distance": {"distance_squared"}}.get(name, set())
        assert computed == {"rows", "readers", "pairs", field} | extra
    with pytest.raises(ValueError, match="entropy was not computed"):
        attention_statistics(q, k, statistics=["map"]).need("entropy")


def test_nothing_of_query_times_key_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor made on the way has as many as a tenth of the cells of one pattern."""
    from torch.utils._python_dispatch import TorchDispatchMode

    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                most = max(most, result.untyped_storage().nbytes() // result.element_size())
            return result

    length = 2048
    q, k = torch.randn(2, 1, 1, length, 8)
    with Watch():
        attention_statistics(q, k, top_k=3, cells_per_strip=1 << 17, window=900)
    assert 0 < most < length**2 / 10


def test_rows_that_read_nothing_are_nan_and_count_for_nothing() -> None:
    """The first row of a strict pattern, padding rows, and a row of zero weights."""
    pattern = torch.rand(1, 1, 6, 6).tril(-1)
    pattern[0, 0, 3] = 0
    found = pattern_statistics(pattern, causal="strict", weights="share")
    assert found.need("entropy")[0, 0].isnan().tolist() == [True, False, False, True, False, False]
    assert found.need("largest_at")[0, 0, [0, 3]].tolist() == [-1, -1]
    assert found.need("received").isnan().tolist() == [[[False] * 5 + [True]]]
    share = pattern[0, 0] / pattern[0, 0].sum(-1, keepdim=True)
    total = share.nan_to_num().sum(0) / torch.tensor([5.0, 4, 3, 2, 1, 0])
    assert torch.allclose(found.need("received")[0, 0, :5], total[:5])


def test_shares_of_tiny_weights() -> None:
    """Rows whose weights are all near the end of float32 keep their proportions, and zeros stay next to nothing."""
    pattern = torch.tensor([[3e-30, 0.0, 1e-30], [0.0, 2e-37, 6e-37], [0.0, 0.0, 0.0]])[None, None]
    found = pattern_statistics(pattern, causal="none", top_k=3)
    assert torch.allclose(found.need("top_weights")[0, 0, 0], torch.tensor([0.75, 0.25, 0.0]), atol=1e-6)
    assert found.need("top_keys")[0, 0, :2, 0].tolist() == [0, 2]
    assert torch.allclose(found.need("largest")[0, 0, :2], torch.tensor([0.75, 0.75]), atol=1e-6)
    assert found.need("entropy")[0, 0, 2].isnan()


def test_visible_cells_are_the_rule_cell_by_cell() -> None:
    see = Visibility(5, 8, "inclusive", 3, None, torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]]))
    visible = visible_cells(see, 1)[0]
    for row in range(5):
        for key in range(8):
            position = row + 3
            assert bool(visible[row, key]) == (0 <= position - key < 3 and (position >= 5) == (key >= 5))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k: attention_statistics(q, k, statistics=["entrpy"]), "unknown 'entrpy'.*Did you mean 'entropy'"),
        (lambda q, k: attention_statistics(q, k, statistics="entropy"), "expected a list of names"),
        (lambda q, k: attention_statistics(q, k, causal="yes"), "causal: unknown 'yes'"),
        (lambda q, k: attention_statistics(q, k[:, :, :, :3]), "k: expected .*d=6"),
        (lambda q, k: attention_statistics(q, k[:, :, :9]), "q: expected between 1 and 9 queries"),
        (lambda q, k: attention_statistics(q, k, window=0), "window: expected a positive integer"),
        (lambda q, k: attention_statistics(q, k, mask=torch.ones(2, 3)), "mask: expected .batch=2, key=37"),
        (lambda q, k: attention_statistics(q, k, segments=torch.ones(2, 37)), "segments: expected whole numbers"),
        (lambda q, k: attention_statistics(q, k, features=torch.ones(2, 36, 1)), "features: expected"),
        (lambda q, k: attention_statistics(q, k, distance_bias=torch.ones(4, 36)), "distance=37"),
        (lambda q, k: attention_statistics(q, k, softcap=0.0), "softcap: expected a positive number"),
        (lambda q, k: attention_statistics(q, k, top_k=-1), "top_k: expected 0 or a positive"),
        (lambda q, k: gated_linear_statistics(q, q, weights="squared"), "weights: unknown 'squared'"),
        (lambda q, k: gated_linear_statistics(q, q, weights="signed", statistics=["entropy"]), "entropy needs rows"),
        (lambda q, k: pattern_statistics(lambda *a: q), "shape: expected"),
        (lambda q, k: label_features(torch.ones(3)), "labels: expected whole numbers"),
    ],
)
def test_mistakes_are_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(*inputs())
