"""What other sites and other machines may not do, checked with requests as they would send them."""

from __future__ import annotations

from pathlib import Path

import pytest
from dash import Dash
from flask.testing import FlaskClient

from app.dashboard import build_app, serve
from app.security import COOKIE, LARGEST_REQUEST, check_host_and_token, is_loopback
from tests.app.dashboard.conftest import RunIds
from tests.app.dashboard.fake_models import FakeModels
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore

TOKEN = "t0ken-of-more-than-sixteen"


def build(store: RunStore, **options: object) -> Dash:
    jobs = JobQueue()
    return build_app(store, jobs, FakeModels(store, jobs), **options)  # type: ignore[arg-type]


def callback_body(query: str = "") -> dict[str, object]:
    """A request of the page for its view, as the browser sends it."""
    return {
        "output": "..view.data...facts.data..",
        "outputs": [{"id": "view", "property": "data"}, {"id": "facts", "property": "data"}],
        "inputs": [
            {"id": "url", "property": "pathname", "value": "/"}, {"id": "url", "property": "search", "value": query},
            {"id": "runs-changed", "property": "data", "value": 0},
        ],
        "state": [{"id": "facts", "property": "data", "value": None}],
        "changedPropIds": ["url.search"],
    }  # fmt: skip


STRANGE_HOSTS = [
    "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "[::2]", "[", "127.0.0.1@evil", "",
]  # fmt: skip


@pytest.mark.parametrize("host", STRANGE_HOSTS)
@pytest.mark.parametrize("path", ["/", "/_dash-layout", "/img/pattern?v=1", "/export/run/abc.zip", "/assets/logo.svg"])
def test_another_host_name_is_refused(client: FlaskClient, host: str, path: str) -> None:
    assert client.get(path, headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8050", "localhost:1", "[::1]:8050"])
def test_this_machine_is_answered(client: FlaskClient, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:9999"},
        {"Origin": "file://localhost"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"},
    ],
)
def test_another_site_can_neither_call_nor_read(client: FlaskClient, run_ids: RunIds, headers: dict[str, str]) -> None:
    assert client.post("/_dash-update-component", json=callback_body(), headers=headers).status_code == 403
    for path in (f"/img/pattern?run={run_ids.softmax}", f"/value/pattern?run={run_ids.softmax}&x=0&y=0", "/export/pattern.csv"):
        assert client.get(path, headers=headers).status_code == 403


def test_the_page_itself_is_answered(client: FlaskClient, run_ids: RunIds) -> None:
    own = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    answer = client.post("/_dash-update-component", json=callback_body(f"?run={run_ids.bdh}"), headers=own)
    assert answer.status_code == 200
    assert answer.get_json()["response"]["view"]["data"]["run"] == run_ids.bdh
    assert client.get(f"/img/pattern?run={run_ids.softmax}", headers=own).status_code == 200
    assert client.get(f"/img/pattern?run={run_ids.softmax}", headers={"Sec-Fetch-Site": "none"}).status_code == 200


def test_a_form_cannot_stand_in_for_json(client: FlaskClient) -> None:
    answer = client.post("/_dash-update-component", data=b'{"output": "x"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


def test_no_answer_invites_other_origins(client: FlaskClient) -> None:
    assert not any("access-control" in name.lower() for name, _ in client.get("/").headers)


def test_an_oversized_request_is_refused(client: FlaskClient) -> None:
    big = {"x": "a" * (LARGEST_REQUEST + 10)}
    assert client.post("/_dash-update-component", json=big).status_code == 413


RUN_PATHS = ["../../etc/passwd", "%2e%2e%2fetc", "..", "A", "a_b", "a" * 65, "a%00b", "index.json", ".lock", "a/b"]


@pytest.mark.parametrize("run_id", RUN_PATHS)
def test_no_run_id_becomes_a_path(client: FlaskClient, run_store: RunStore, run_id: str) -> None:
    assert client.get(f"/export/run/{run_id}.zip").status_code == 404
    # An id that is not one is dropped from the view: the newest run is shown, never another file.
    answer = client.post("/_dash-update-component", json=callback_body(f"?run={run_id}"))
    shown = answer.get_json()["response"]["view"]["data"]["run"]
    assert answer.status_code == 200 and shown in {entry.id for entry in run_store.list()}


@pytest.mark.parametrize("path", ["/img/../security", "/img/nothing", "/value/nothing?x=1&y=1", "/export/nothing.csv", "/export/x.exe",
                                  "/assets/../security.py", "/assets/%2e%2e/security.py", "/assets/../../pyproject.toml"])  # fmt: skip
def test_unknown_names_are_not_found(client: FlaskClient, path: str) -> None:
    answer = client.get(path)
    # Dash answers any unknown page address with its (harmless) index page.
    assert answer.status_code == 404 or (answer.status_code == 200 and b"_dash-config" in answer.data)
    assert b"TRUSTED_HOSTS" not in answer.data and b"build-system" not in answer.data


def test_the_content_policy_forbids_what_the_page_does_not_need(client: FlaskClient) -> None:
    headers = client.get("/").headers
    policy = {part.split()[0]: part.split()[1:] for part in headers["Content-Security-Policy"].split("; ")}
    assert policy["default-src"] == ["'self'"] and policy["connect-src"] == ["'self'"] and policy["object-src"] == ["'none'"]
    assert "'unsafe-inline'" not in policy["script-src"] and "'unsafe-eval'" not in policy["script-src"]
    assert policy["frame-ancestors"] == ["'none'"] and policy["base-uri"] == ["'none'"]
    assert not any("http" in source for sources in policy.values() for source in sources)
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_the_page_names_no_address_elsewhere(client: FlaskClient) -> None:
    page = client.get("/").text
    assert "http://" not in page and "https://" not in page and 'src="//' not in page
    styles = Path(__file__).resolve().parents[3] / "app" / "assets"
    for file in [*styles.glob("*.css"), *styles.glob("*.js")]:
        text = file.read_text()
        assert "http:" not in text and "https:" not in text and "//cdn" not in text, file.name


def test_debugging_is_off(dashboard: Dash) -> None:
    assert dashboard.server.debug is False and dashboard.server.testing is False
    assert "hot_reload" not in dashboard.server.test_client().get("/").text


# ---- token -----------------------------------------------------------------------------------------------------------


def test_without_the_token_nothing_is_answered(run_store: RunStore, run_ids: RunIds) -> None:
    client = build(run_store, token=TOKEN).server.test_client()
    for path in ("/", "/_dash-layout", "/_dash-dependencies", f"/img/pattern?run={run_ids.softmax}", "/assets/logo.svg", "/export/x.csv"):
        assert client.get(path).status_code == 401, path
        assert client.get(path, headers={"Cookie": f"{COOKIE}=wrong"}).status_code == 401
    assert client.post("/_dash-update-component", json=callback_body()).status_code == 401
    assert client.get(f"/?token={TOKEN}x").status_code == 401
    assert client.post(f"/_dash-update-component?token={TOKEN}", json=callback_body()).status_code == 401


def test_the_token_is_taken_once_and_leaves_the_address(run_store: RunStore, run_ids: RunIds) -> None:
    client = build(run_store, token=TOKEN).server.test_client()
    answer = client.get(f"/attention?v=1&token={TOKEN}&layer=1")
    assert answer.status_code == 302 and answer.headers["Location"] == "/attention?v=1&layer=1"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN in cookie
    assert client.get("/attention?v=1").status_code == 200
    assert client.post("/_dash-update-component", json=callback_body()).status_code == 200
    assert client.get("/assets/logo.svg").status_code == 200


def test_the_redirect_stays_on_this_server(run_store: RunStore) -> None:
    client = build(run_store, token=TOKEN).server.test_client()
    answer = client.get(f"/?token={TOKEN}", environ_overrides={"PATH_INFO": "//evil.example/"})
    assert answer.status_code == 302 and not answer.headers["Location"].startswith("//")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "example.org", "", "127.0.0.1.example.org"])
def test_other_machines_are_not_served_without_a_token(run_store: RunStore, host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ValueError, match="token"):
        check_host_and_token(host, None)
    with pytest.raises(ValueError, match="token"):
        serve(run_store, JobQueue(), FakeModels(run_store, JobQueue()), host=host, port=0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.1"])
def test_this_machine_needs_no_token(host: str) -> None:
    check_host_and_token(host, None)


@pytest.mark.parametrize("token", ["", "short", "has space in it, and more", "a" * 300, "x\r\ny" * 8])
def test_a_weak_token_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="16 to 256"):
        check_host_and_token("127.0.0.1", token)


def test_serving_every_interface_needs_the_name_that_readers_type(run_store: RunStore) -> None:
    with pytest.raises(ValueError, match="allowed_hosts"):
        serve(run_store, JobQueue(), FakeModels(run_store, JobQueue()), host="0.0.0.0", port=0, token=TOKEN)
