"""Who may give orders (POST /eplb/...), and which web pages may use the server at all."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from moe_serve.api.orders import _is_loopback
from tests.support.http_server import make_state, serving

JSON = {"Content-Type": "application/json"}


class Obedient:
    """Balance that does whatever is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def ask(self, action: str, body: bytes = b"") -> tuple[int, bytes]:
        """See Balance."""
        self.asked.append(action)
        return 200, b"{}"


@pytest.fixture(scope="module")
def keyless(model_folder: Path) -> Iterator[str]:
    state = make_state(model_folder, allowed_origins=("https://desk.example",))
    state.balance = Obedient()
    with serving(state) as url:
        yield url


def order(url: str, body: bytes = b"{}", **headers: str) -> int:
    return httpx.post(url + "/eplb/rollback", content=body, headers=JSON | headers).status_code


@pytest.mark.parametrize("declared", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
@pytest.mark.parametrize("body", [b"{}", b""])
def test_an_order_that_is_not_declared_as_json_is_refused(keyless: str, declared: str, body: bytes) -> None:
    assert order(keyless, body, **{"Content-Type": declared}) == 415
    if not declared:
        assert httpx.post(keyless + "/eplb/rollback", content=body).status_code == 415


def test_without_a_key_orders_come_from_this_machine_and_from_no_foreign_page(keyless: str) -> None:
    host = keyless.removeprefix("http://")
    assert order(keyless) == 200
    assert order(keyless, Origin=keyless) == 200
    assert order(keyless, Origin="https://desk.example") == 200
    for origin in ("https://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "x", "http://[", ""):
        expected = 200 if not origin else 403
        assert order(keyless, Origin=origin) == expected, origin
    # A name of the stranger's own that points here.
    assert order(keyless, Origin="http://rebound.example:80", Host="rebound.example:80") == 403
    assert httpx.get(f"http://{host}/eplb", headers={"Origin": "https://evil.example"}).status_code == 200


def test_without_a_key_orders_of_another_machine_are_refused(model_folder: Path) -> None:
    state = make_state(model_folder)
    state.balance = Obedient()
    with serving(state) as url:
        # What a proxy on this machine says of its client counts.
        answer = httpx.post(url + "/eplb/rollback", headers=JSON | {"X-Forwarded-For": "203.0.113.7"}, content=b"{}")
        assert answer.status_code == 403
        assert "--admin-api-key" in answer.json()["error"]["message"]
        assert httpx.get(url + "/eplb", headers={"X-Forwarded-For": "203.0.113.7"}).status_code == 200


def test_this_machine_is_known_by_its_loopback_addresses() -> None:
    assert all(map(_is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1")))
    assert not any(map(_is_loopback, ("10.0.0.1", "::", "::ffff:10.0.0.1", "0.0.0.0", "localhost", "")))


def test_orders_have_a_key_of_their_own(model_folder: Path) -> None:
    state = make_state(model_folder, api_key="sesame", admin_api_key="open")
    state.balance = Obedient()
    with serving(state) as url:
        keys = [{"Authorization": f"Bearer {key}"} for key in ("sesame", "open", "no")]
        assert [order(url, **key) for key in keys] == [401, 200, 401]
        assert [httpx.get(url + "/eplb", headers=key).status_code for key in keys] == [200, 401, 401]
        shown = httpx.get(url + "/config", headers=keys[0])
        assert (shown.status_code, "open" in shown.json()["server"]["admin_api_key"]) == (200, False)


def test_the_api_key_is_the_key_for_orders_where_there_is_no_other(model_folder: Path) -> None:
    state = make_state(model_folder, api_key="sesame")
    state.balance = Obedient()
    with serving(state) as url:
        assert order(url) == 401
        assert order(url, Authorization="Bearer sesame", Origin="https://evil.example") == 200


def test_a_key_for_orders_alone_leaves_the_rest_open(model_folder: Path) -> None:
    state = make_state(model_folder, admin_api_key="open")
    state.balance = Obedient()
    with serving(state) as url:
        assert order(url) == 401
        assert order(url, Authorization="Bearer open") == 200
        assert httpx.get(url + "/v1/models").status_code == 200


def test_a_path_in_another_spelling_gives_no_orders(keyless: str) -> None:
    for target in (
        b"/eplb//rollback",
        b"//eplb/rollback",
        b"/%65plb/rollback",
        b"/EPLB/rollback",
        b"/x/../eplb/rollback",
    ):
        request = httpx.Request(
            "POST",
            keyless,
            headers=JSON | {"Origin": "https://evil.example"},
            content=b"{}",
            extensions={"target": target},
        )
        with httpx.Client() as client:
            assert client.send(request).status_code in (403, 404)


def test_an_order_has_a_smaller_body(keyless: str) -> None:
    assert order(keyless, b" " * (8 * 2**20 + 1)) == 413
    assert order(keyless, b" " * 2**20) == 200


def test_a_get_has_hardly_a_body_at_all(keyless: str) -> None:
    host, port = keyless.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        assert b" 413 " in line.recv(4096)


def test_pages_of_other_origins_may_read_answers_only_where_they_are_allowed(keyless: str, model_folder: Path) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    allowed = httpx.options(keyless + "/v1/completions", headers=asked | {"Origin": "https://desk.example"})
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://desk.example"
    stranger = httpx.options(keyless + "/v1/completions", headers=asked | {"Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in stranger.headers
    with serving(make_state(model_folder)) as url:
        for origin in ("https://desk.example", "null", url):
            answer = httpx.options(url + "/v1/completions", headers=asked | {"Origin": origin})
            assert "Access-Control-Allow-Origin" not in answer.headers
            assert answer.status_code == 405
