"""Ranks started as a manifest says, and the image's own start line: the real commands, without a cluster.

What a cluster would give is put in here: to each pod an address of its own (on the loopback interface), to rank 0 a
name that resolves, to secrets a value, to mounted files a place.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from moe_serve.cli.serve import parse_serve
from moe_serve.deploy.pod import USER
from tests.support.manifests import ROOT, Objects, as_kubelet, objects_of
from tests.support.server import READY_SECONDS, Server
from tests.support.supervised import free_ports

DOCKERFILE = ROOT / "Dockerfile"


def several_processes(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.long(pytest.mark.ranks(pytest.mark.slow(test)))  # type: ignore[no-any-return]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def pod(objects: Objects, index: int, *, token: str, folder: Path) -> Server:
    """A pod's container, as close to a kubelet's as one machine allows."""
    command, environment = as_kubelet(objects, index, token)
    assert command[:2] == ["moe-serve", "serve"]
    here = {"--host": f"127.0.0.{index + 1}", "--data-parallel-address": "127.0.0.1"}
    arguments = []
    for argument in command[2:]:
        flag, _, value = argument.partition("=")
        value = here.get(flag, value.replace("/etc/moe-serve", str(folder)))
        arguments += [flag, value] if value else [flag]
    return Server(*arguments, environment=environment, token=token)


@several_processes
def test_ranks_start_from_the_command_lines_of_the_rendered_stateful_set(tmp_path: Path) -> None:
    options = f"--device cpu --dtype float32 --port {free_port()} --data-parallel-rpc-port {free_port()}"
    objects = objects_of(f"--name demo --image moe-serve:test -dp 2 -ep {options} --kv-cache-memory-bytes 16777216")
    for name, text in objects.one("ConfigMap")["data"].items():
        (tmp_path / name).write_text(text)
    token = secrets.token_hex(16)
    with ExitStack() as stack:
        pods = []
        for rank in range(objects.one("StatefulSet")["spec"]["replicas"]):
            pods.append(pod(objects, rank, token=token, folder=tmp_path))
            stack.callback(pods[-1].end)
        texts = set()
        for rank, server in enumerate(pods):
            server.wait_ready()
            assert_probes_pass(objects, f"127.0.0.{rank + 1}")
            answer = server.post("/v1/completions", {"prompt": "In the", "max_tokens": 8, "temperature": 0})
            assert answer.headers["X-Data-Parallel-Rank"] == str(rank)
            texts.add(answer.json()["choices"][0]["text"])
            assert server.get("/config").json()["cache"]["kv_cache_memory_bytes"] == 16777216
        assert len(texts) == 1


@several_processes
def test_nodes_start_from_the_command_lines_of_the_rendered_stateful_set(tmp_path: Path) -> None:
    first = free_ports(4)
    ports = f"--port {first} --data-parallel-supervisor-port {first + 2} --data-parallel-rpc-port {first + 3}"
    options = f"--device cpu --dtype float32 {ports} --max-model-len 512 --kv-cache-memory-bytes 16777216"
    objects = objects_of(f"--name demo --image moe-serve:test -dp 4 -dpl 2 --shape node -ep {options}")
    for name, text in objects.one("ConfigMap")["data"].items():
        (tmp_path / name).write_text(text)
    token = secrets.token_hex(16)
    with ExitStack() as stack:
        pods = []
        for index in range(objects.one("StatefulSet")["spec"]["replicas"]):
            pods.append(pod(objects, index, token=token, folder=tmp_path))
            stack.callback(pods[-1].end)
        texts = set()
        for index, server in enumerate(pods):
            until_ready(objects, f"127.0.0.{index + 1}", server)
            assert_probes_pass(objects, f"127.0.0.{index + 1}")
            for place, port in enumerate(objects.deployment.http_ports.values()):
                server.base_url = f"http://127.0.0.{index + 1}:{port}"
                answer = server.post("/v1/completions", {"prompt": "In the", "max_tokens": 8, "temperature": 0})
                assert answer.headers["X-Data-Parallel-Rank"] == str(2 * index + place)
                texts.add(answer.json()["choices"][0]["text"])
        assert len(pods) == 2
        assert len(texts) == 1


def until_ready(objects: Objects, host: str, server: Server) -> None:
    """As a kubelet finds out."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        assert server.process.poll() is None, server.log()
        assert time.monotonic() < deadline, server.log()
        with contextlib.suppress(httpx.TransportError):
            if probe(objects, host, "startup").status_code == 200:
                return
        time.sleep(0.2)


def probe(objects: Objects, host: str, name: str) -> httpx.Response:
    ports = {port["name"]: port["containerPort"] for port in objects.container["ports"]}
    asked = objects.container[f"{name}Probe"]
    url = f"http://{host}:{ports[asked['httpGet']['port']]}{asked['httpGet']['path']}"
    return httpx.get(url, timeout=asked["timeoutSeconds"])


def assert_probes_pass(objects: Objects, host: str) -> None:
    for name in ("startup", "liveness", "readiness"):
        assert probe(objects, host, name).status_code == 200
    ports = {port["name"]: port["containerPort"] for port in objects.container["ports"]}
    endpoints = objects.one("PodMonitor")["spec"]["podMetricsEndpoints"]
    for endpoint in endpoints:
        url = f"http://{host}:{ports[endpoint['port']]}{endpoint['path']}"
        assert "moe_serve:steps_total" in httpx.get(url, timeout=10).text


def start_line() -> list[str]:
    """What a container of the image runs."""
    words = dict(re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", DOCKERFILE.read_text(), re.MULTILINE))
    line: list[str] = json.loads(words["ENTRYPOINT"]) + json.loads(words["CMD"])
    return line


def test_the_images_start_line_is_a_command_that_serve_understands() -> None:
    line = start_line()
    assert line[:2] == ["moe-serve", "serve"]
    config = parse_serve(line[2:])
    assert (config.server.host, config.server.port) == ("0.0.0.0", 8000)
    assert "EXPOSE 8000\n" in DOCKERFILE.read_text()


def test_the_images_user_is_the_one_of_the_manifests() -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE.read_text(), re.MULTILINE) == [f"{USER}:{USER}"]
    security = objects_of("--name w --image i -dp 2").template["spec"]["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"]) == (USER, USER)


def test_what_the_image_copies_is_there_and_passes_the_ignore_file() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists()
            assert name in allowed


@several_processes
def test_the_images_start_line_serves_with_this_interpreter() -> None:
    server = Server(*start_line()[2:])
    try:
        server.wait_ready()
        assert server.complete("In the beginning", max_tokens=4)["choices"][0]["text"]
    finally:
        server.end()
