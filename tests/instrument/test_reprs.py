"""What a notebook shows: every object says what it is, and nothing that a name may hold is taken for HTML."""

import base64
import io
import re

import pytest
import torch
from PIL import Image

from models.decoder import Decoder
from tests.instrument.tiny_models import lively, some_tokens
from workbench.instrument.cache import ActivationCache
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import Pattern, PatternMeta
from workbench.instrument.states import ModelState

TOKENS = some_tokens()
EVIL = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def model() -> Decoder:
    return lively("retnet")


def cells(html: str) -> list[str]:
    return re.findall(r"<td[^>]*>(.*?)</td>", html)


def test_cache(model: Decoder) -> None:
    _, cache = model.run_with_cache(TOKENS)
    assert re.fullmatch(r"ActivationCache\(\d+ activations, \d+\.\d MB: hook_embed, .* … \d+ more\)", repr(cache))
    _, small = model.run_with_cache(TOKENS, names="blocks.0.hook_resid_pre")
    assert repr(small) == "ActivationCache(1 activations, 0.0 MB: blocks.0.hook_resid_pre)"
    html = small._repr_html_()
    assert cells(html) == ["blocks.0.hook_resid_pre", "resid", "batch pos d_model", "2×8×24", "float64"]
    assert len(cells(cache._repr_html_())) == 5 * len(cache)


def test_hook_point() -> None:
    looped = lively("looped").hook_dict["blocks.0.attn.hook_result"]
    assert (
        repr(looped)
        == "HookPoint(blocks.0.attn.hook_result: result; batch pos head d_model; needs use_attn_result; 2 steps)"
    )
    state = lively("retnet").hook_dict["blocks.0.mixer.hook_state"]
    assert repr(state) == "HookPoint(blocks.0.mixer.hook_state: state; batch head state_k state_v; per position)"
    assert repr(HookPoint("energy", "batch", editable=False)) == "HookPoint((unnamed): energy; batch; report only)"
    assert {"blocks.0.mixer.hook_state", "batch head state_k state_v", "True"} <= set(cells(state._repr_html_()))


def test_states(model: Decoder) -> None:
    _, state = model(TOKENS, return_state=True)
    assert re.fullmatch(r"ModelState\(after 8 tokens, 3 layers, slots \['state'\], 0\.\d\d MB\)", repr(state))
    assert cells(state._repr_html_())[:4] == ["0", "state", "2×3×8×16", "float64"]
    reading = model.states(TOKENS, [3, -1])
    assert "positions [3, 7]" in repr(reading)
    norms = [float(x) for x in cells(reading._repr_html_())[1:3]]
    assert norms == pytest.approx(reading.norms(0)[0].amax(-1).tolist(), rel=1e-3)


def test_model(model: Decoder) -> None:
    assert re.fullmatch(
        r"retnet-random \(retnet\): 3 layers, d_model 24, [\d,]+ parameters, \d+ hook points", repr(model)
    )
    html = model._repr_html_()
    shown = cells(html)
    roles = shown[0::4]
    assert roles == model.hook_points.roles
    assert sum(int(count) for count in shown[1::4]) == len(model.hook_dict)
    assert "blocks.0.mixer.hook_state" in shown


def decode(url: str) -> Image.Image:
    head, data = url.split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_pattern(model: Decoder) -> None:
    pattern = model.patterns(TOKENS)[1]
    assert repr(pattern) == (
        "Pattern(blocks.1.mixer.hook_pattern: batch=2, head=3, query=8, key=8; effective, exact; signed; rows do not sum to 1; "
        "a token sees itself and the past; columns are tokens)"
    )
    html = pattern._repr_html_()
    assert html.count("<img") == 3 and "head 2" in html
    picture = decode(re.findall(r"src='([^']*)'", html)[0])
    assert picture.size == (8, 8)
    assert picture.getpixel((7, 0)) == (255, 255, 255), "the future is white"
    for query, key in ((7, 0), (5, 5), (6, 2)):  # row = query, column = key; blue is positive, orange negative
        red, _, blue = picture.getpixel((key, query))
        value = float(pattern.values[0, 0, query, key])
        assert abs(value) < 1e-3 or (blue > red) == (value > 0)


def test_large_patterns_become_small_pictures() -> None:
    """A thousand tokens: pooled by magnitude, so that one strong entry, even a negative one, is seen."""
    values = torch.zeros(1, 1, 1000, 1000)
    values[0, 0, 700, 300] = -1.0
    html = Pattern(values, PatternMeta(signed=True, rows_sum_to="free"), 0, "p")._repr_html_()
    assert len(html) < 50_000
    picture = decode(re.findall(r"src='([^']*)'", html)[0])
    assert picture.size == (250, 250)
    red, _, blue = picture.getpixel((75, 175))
    assert red > blue and picture.getpixel((74, 175)) == (255, 255, 255)


def test_everything_is_escaped(model: Decoder) -> None:
    """Names come from files and users; none of them may become markup."""
    point = HookPoint(f"role{EVIL}", f"batch {EVIL.replace(' ', '')}")
    point.name = EVIL
    twin = lively("retnet")
    twin.name = EVIL
    shown = [
        point._repr_html_(),
        ActivationCache({EVIL: torch.zeros(1)}, {EVIL: point}, 1)._repr_html_(),
        ModelState(1, [{EVIL: torch.zeros(1)}])._repr_html_(),
        Pattern(torch.zeros(1, 1, 2, 2), PatternMeta(columns=EVIL), 0, EVIL)._repr_html_(),
        twin._repr_html_(),
    ]
    for html in shown:
        assert "<script" not in html and "&lt;script" in html
