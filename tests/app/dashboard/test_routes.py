"""Pictures, values and downloads, through the server."""

from __future__ import annotations

import csv
import io
import json
import zipfile

import numpy as np
import pytest
from flask.testing import FlaskClient
from PIL import Image

from app.services import Services
from tests.app.dashboard.conftest import TOKENS, RunIds
from workbench.lab.factors import LayerFactors


def test_a_picture_has_a_tag_and_is_not_drawn_twice(client: FlaskClient, run_ids: RunIds) -> None:
    path = f"/img/pattern?v=1&run={run_ids.softmax}&head=1&rows=3-40&cols=0-20&scheme=dark&px=256"
    first = client.get(path)
    assert first.status_code == 200 and first.mimetype == "image/png"
    assert Image.open(io.BytesIO(first.data)).size == (20, 37)
    again = client.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert again.status_code == 304 and again.data == b""
    other = client.get(path.replace("head=1", "head=2"), headers={"If-None-Match": first.headers["ETag"]})
    assert other.status_code == 200 and other.headers["ETag"] != first.headers["ETag"]


def test_the_size_of_a_picture_is_one_of_a_few(client: FlaskClient, run_ids: RunIds) -> None:
    for asked, got in (("256", 256), ("512", 512), ("100000", 512), ("-1", 512), ("x", 512)):
        answer = client.get(f"/img/pattern?run={run_ids.long}&rows=0-600&cols=0-600&px={asked}")
        assert Image.open(io.BytesIO(answer.data)).size == (got, got)


def test_values_are_exact(client: FlaskClient, services: Services, run_ids: RunIds) -> None:
    factors = LayerFactors.from_run(services.store.open(run_ids.gated), 1)
    answer = client.get(f"/value/pattern?run={run_ids.gated}&layer=1&head=1&x=7&y=33").get_json()
    assert np.float32(answer["value"]) == np.float32(factors.value(1, 33, 7))
    assert float(answer["text"]) == pytest.approx(answer["value"], rel=1e-5)
    hidden = client.get(f"/value/pattern?run={run_ids.gated}&layer=1&x=33&y=7").get_json()
    assert hidden["value"] is None and hidden["text"] == "not visible"


@pytest.mark.parametrize("query", ["", "x=1", "x=a&y=1", f"x={TOKENS}&y=1", "x=-1&y=0", "x=1.5&y=2", "x=1e3&y=1"])
def test_a_value_elsewhere_is_not_found_in_words(client: FlaskClient, run_ids: RunIds, query: str) -> None:
    answer = client.get(f"/value/pattern?run={run_ids.softmax}&{query}")
    assert answer.status_code == 404 and answer.mimetype == "text/plain" and "<" not in answer.text


def test_panels_without_a_picture_say_so(client: FlaskClient, run_ids: RunIds) -> None:
    assert client.get(f"/img/received?run={run_ids.softmax}").status_code == 404
    assert client.get(f"/value/received?run={run_ids.softmax}&x=1&y=1").status_code == 404
    answer = client.get(f"/img/state?run={run_ids.softmax}")
    assert answer.status_code == 404 and "KV cache" in answer.text


def test_a_csv_file_holds_the_exact_numbers(client: FlaskClient, services: Services, run_ids: RunIds) -> None:
    answer = client.get(f"/export/pattern.csv?run={run_ids.softmax}&head=2&rows=5-9&cols=0-8")
    assert answer.mimetype == "text/csv" and f'{run_ids.softmax}-pattern.csv"' in answer.headers["Content-Disposition"]
    lines = list(csv.reader(io.StringIO(answer.text)))
    assert lines[0] == ["", *map(str, range(8))] and [line[0] for line in lines[1:]] == ["5", "6", "7", "8"]
    exact = LayerFactors.from_run(services.store.open(run_ids.softmax), 0).pattern(2, slice(5, 9), slice(0, 8))
    for row, line in enumerate(lines[1:]):
        for column, cell in enumerate(line[1:]):
            if column > row + 5:
                assert cell == ""  # a masked cell is empty, not zero
            else:
                assert np.float32(cell) == exact[row, column]


def test_a_token_cannot_be_a_spreadsheet_formula(client: FlaskClient, run_ids: RunIds) -> None:
    found = []
    for query in range(TOKENS):
        text = client.get(f"/export/next-tokens.csv?run={run_ids.softmax}&q={query}").text
        found += [line[0] for line in list(csv.reader(io.StringIO(text)))[1:]]
    assert not any(cell[:1] in ("=", "+", "-", "@") for cell in found)
    assert any(cell[:2] in ("'=", "'+", "'-", "'@") for cell in found)  # the synthetic predictions do contain such tokens


def test_too_large_a_csv_file_is_refused(client: FlaskClient, run_ids: RunIds) -> None:
    answer = client.get(f"/export/pattern.csv?run={run_ids.long}")
    assert answer.status_code == 413 and "zoom in" in answer.text


def test_bare_pixels(client: FlaskClient, run_ids: RunIds) -> None:
    answer = client.get(f"/export/pattern.png?run={run_ids.softmax}&scheme=light")
    assert Image.open(io.BytesIO(answer.data)).size == (TOKENS, TOKENS)
    assert "attachment" in answer.headers["Content-Disposition"]


def test_a_run_as_zip(client: FlaskClient, services: Services, run_ids: RunIds) -> None:
    answer = client.get(f"/export/run/{run_ids.bdh}.zip")
    assert answer.mimetype == "application/zip" and f"{run_ids.bdh}.zip" in answer.headers["Content-Disposition"]
    with zipfile.ZipFile(io.BytesIO(answer.data)) as archive:
        assert archive.testzip() is None
        manifest = json.loads(archive.read(f"{run_ids.bdh}/manifest.json"))
        arrays = archive.read(f"{run_ids.bdh}/arrays.safetensors")
    assert manifest == services.store.open(run_ids.bdh).manifest
    assert arrays == (services.store.root / run_ids.bdh / "arrays.safetensors").read_bytes()


def test_a_run_that_is_gone_is_not_found(client: FlaskClient) -> None:
    for path in ("/export/run/20200101-gone-123456.zip", "/img/pattern?run=20200101-gone-123456", "/export/pattern.csv?run=gone-1"):
        answer = client.get(path)
        assert answer.status_code == 404 and "Traceback" not in answer.text and str(answer.data).count("/") < 3


def test_errors_are_one_line_of_text(client: FlaskClient) -> None:
    answer = client.delete("/img/pattern")
    assert answer.status_code == 405 and answer.mimetype == "text/plain" and len(answer.text.splitlines()) == 1
