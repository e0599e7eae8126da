"""The API key, what stays open without it, and what must never be shown."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from tests.api.conftest import Served
from tests.support.http_server import make_state, serving

OPEN = ("/livez", "/readyz", "/health", "/metrics", "/version")
CLOSED = (
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake-model"),
    ("GET", "/config"),
    ("GET", "/world"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/no/such/path"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
)


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_metrics_need_no_key(served: Served, path: str) -> None:
    assert httpx.get(served.url + path).status_code == 200


@pytest.mark.parametrize(("method", "path"), CLOSED)
@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", "Bearer sesam", "Bearer sesamee", "sesame", "Basic sesame"],
)
def test_everything_else_needs_the_key(served: Served, method: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = httpx.request(method, served.url + path, headers=headers, json={} if method == "POST" else None)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "sesame" not in answer.text


def test_the_right_key_opens_whatever_the_case_of_its_scheme(served: Served) -> None:
    for header in ("Bearer sesame", "bearer sesame", "BEARER  sesame"):
        assert httpx.get(served.url + "/v1/models", headers={"Authorization": header}).status_code == 200


def test_bytes_that_are_no_text_are_a_wrong_key(served: Served) -> None:
    assert httpx.get(served.url + "/config", headers={"Authorization": b"Bearer \xff\xfe"}).status_code == 401


def test_a_path_in_another_spelling_is_not_open(served: Served) -> None:
    for path in ("/v1/../health", "/health/", "//health", "/health/../config", "/%68ealth/../config", "/LIVEZ"):
        request = httpx.Request("GET", served.url, extensions={"target": path.encode()})
        with httpx.Client() as client:
            assert client.send(request).status_code in (401, 404)


def test_the_configuration_never_shows_the_key(served: Served) -> None:
    shown = httpx.get(served.url + "/config", headers=served.headers)
    assert shown.status_code == 200
    assert shown.json()["server"]["api_key"] == "**********"
    assert "sesame" not in shown.text
    assert shown.json()["parallel"]["data_parallel_size"] == 2


def test_without_a_key_everything_is_open(model_folder: Path) -> None:
    with serving(make_state(model_folder)) as url:
        assert httpx.get(url + "/v1/models").status_code == 200
        assert httpx.get(url + "/v1/models", headers={"Authorization": "Bearer any"}).status_code == 200
        assert httpx.get(url + "/config").json()["server"]["api_key"] is None


def test_a_key_of_other_letters_works(model_folder: Path) -> None:
    with serving(make_state(model_folder, api_key="schlüssel")) as url:
        right = {"Authorization": "Bearer schlüssel".encode()}
        assert httpx.get(url + "/v1/models", headers=right).status_code == 200
        assert httpx.get(url + "/v1/models").status_code == 401


def test_an_empty_key_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="api_key"):
        Config.from_flat({"api_key": ""})


def test_errors_of_paths_and_methods_have_the_usual_shape(served: Served) -> None:
    for method, path, status in (("GET", "/no/such", 404), ("PUT", "/v1/models", 405), ("POST", "/livez", 405)):
        answer = httpx.request(method, served.url + path, headers=served.headers)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert path in answer.json()["error"]["message"]
