"""Experts move while a real server answers: no token changes, and what can be asked of it answers."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load

from tests.support.letters import ids_of, write_letters
from tests.support.server import Server, serving
from tests.support.tiny_model import tiny_model

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

KEY = "sesame"
VOCAB, LAYERS, EXPERTS = 131, 2, 10
INTERVAL = 32
LENGTHS = [1, 5, 17, 60, 33, 90, 8, 120]
WAYS = [
    pytest.param(2, "shuffle", 0, "torch_a2a", marks=pytest.mark.long),
    pytest.param(4, "shuffle", 4, "torch_padded", marks=pytest.mark.long),
    pytest.param(2, "sticky", 4, "torch_padded", marks=pytest.mark.long),
    pytest.param(4, "shuffle", 8, "allgather_reducescatter", marks=pytest.mark.long),
    pytest.param(4, "deepseek", 2, "naive", marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny_model(made, "qwen3_moe", seed=7)
    write_letters(made, VOCAB)
    return made


@pytest.fixture(scope="module")
def requests() -> list[list[int]]:
    numbers = random.Random(5)
    return [[numbers.randrange(3, VOCAB) for _ in range(length)] for length in LENGTHS * 2]


@pytest.fixture(scope="module")
def expected(folder: Path, requests: list[list[int]]) -> list[list[int]]:
    """The answers of a server that moves nothing."""
    with serving(str(folder), "--dtype", "float32", "-dp", "2", "-ep") as server:
        return answers(server, requests)


def answers(server: Server, prompts: list[list[int]]) -> list[list[int]]:
    def answer(prompt: list[int]) -> list[int]:
        return ids_of(server.complete(prompt, max_tokens=64, ignore_eos=True)["choices"][0]["text"])

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(answer, prompts))


def options(dp: int, policy: str, redundant: int, *, tp: int = 1, **more: object) -> list[str]:
    config = {
        "window_size": 30,
        "step_interval": INTERVAL,
        "num_redundant_experts": redundant,
        "policy": policy,
        "min_gain": 0,
        "max_bytes_per_step": 1 << 14,
        **more,
    }
    world = ["-dp", str(dp), "-tp", str(tp), "-ep"]
    return ["--dtype", "float32", *world, "--enable-eplb", "--eplb-config", json.dumps(config)]


def applied(server: Server) -> list[dict[str, Any]]:
    return [entry for entry in server.get("/eplb").json()["history"] if "epoch" in entry and not entry["failure"]]


def settle(server: Server, seconds: float = 20) -> None:
    """Until no rearrangement is under way."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not server.get("/eplb").json()["in_flight"]:
            return
        time.sleep(0.05)
    raise AssertionError(f"still rearranging after {seconds:g} s:\n{server.log()}")


@pytest.mark.parametrize(("dp", "policy", "redundant", "backend"), WAYS)
def test_answers_stay_the_same_through_rearrangements(
    folder: Path,
    requests: list[list[int]],
    expected: list[list[int]],
    dp: int,
    policy: str,
    redundant: int,
    backend: str,
) -> None:
    with serving(str(folder), *options(dp, policy, redundant), "--all2all-backend", backend) as server:
        least = 10 if policy == "shuffle" else 1  # the others stop once nothing gains
        for _ in range(40):
            assert answers(server, requests) == expected
            done = applied(server)
            if len(done) >= least:
                break
        assert len(done) >= least, server.log()
        assert sum(entry["moved_experts"] for entry in done) > 0
        before = len(applied(server))
        counted = re.search(r"eplb_rebalances_total\{[^}]*\} ([0-9.]+)", server.get("/metrics").text)
        assert counted is not None
        assert before <= float(counted.group(1)) <= len(applied(server)), "it may go on meanwhile"


STEP_SECONDS = 3.0


@pytest.mark.long
def test_engines_with_workers_rearrange_together_and_may_idle_afterwards(
    folder: Path, requests: list[list[int]], expected: list[list[int]]
) -> None:
    limit = ("--step-timeout-seconds", str(STEP_SECONDS))
    with serving(str(folder), *options(2, "shuffle", 3, tp=2, step_interval=16), *limit) as server:
        assert answers(server, requests[:8]) == expected[:8]
        assert len(applied(server)) >= 2, server.log()
        epoch = server.get("/eplb").json()["epoch"]
        server.post("/eplb/record/start", {})
        for _ in range(3):
            server.complete([5], max_tokens=50, ignore_eos=True)
        dump = server.get("/eplb/record/dump")
        commits = server.get("/eplb").json()["epoch"] - epoch
        rows_SL = load(dump.content)["logical_count"].sum(axis=2)
        assert set(rows_SL.flatten().tolist()) <= {0, 2}, "one row a step, counted by one of the workers"
        # Between two requests the sleeping world wakes for a commit, in a step without rows.
        empty = int((rows_SL == 0).all(axis=1).sum())
        assert empty <= commits
        assert (rows_SL == 2).all(axis=1).sum() == len(rows_SL) - empty > 100
        # Orders that reach workers of a sleeping world must not look like a step that never ends.
        time.sleep(STEP_SECONDS + 1.5)
        assert server.get("/health").status_code == 200, server.log()
        assert answers(server, requests[8:10]) == expected[8:10]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Two ranks with four redundant experts that move only when asked to, row by row."""
    with serving(
        str(folder), *options(2, "static", 4, step_interval=1_000_000, max_bytes_per_step=1), "--api-key", KEY
    ) as running:
        yield running


@pytest.mark.long
def test_a_plan_is_a_dry_run_and_what_is_applied_is_served_and_rolled_back(
    server: Server, requests: list[list[int]], expected: list[list[int]]
) -> None:
    assert answers(server, requests) == expected
    before = server.get("/eplb").json()
    assert set(before) >= {"placement", "epoch", "predicted", "history", "window_load", "balancedness"}
    plan = server.post("/eplb/plan", {"policy": "shuffle"}).json()
    assert plan["moved_experts"] > 0
    assert server.get("/eplb").json()["placement"] == before["placement"]

    applying = server.post("/eplb/apply", {"placement": plan["placement"]})
    assert applying.status_code == 202, applying.text
    settle(server)  # also while nobody asks for anything: the world wakes to commit
    assert server.post("/eplb/save", {}).json() == plan["placement"]
    assert answers(server, requests) == expected

    assert server.post("/eplb/rollback", {}).status_code == 202
    settle(server)
    assert server.get("/eplb").json()["placement"] == before["placement"]
    assert answers(server, requests) == expected
    assert [entry["why"] for entry in applied(server)] == ["request", "rollback"]
    assert server.get("/eplb").json()["history"][0]["moved_bytes"] > 0


@pytest.mark.long
def test_one_rearrangement_at_a_time(server: Server, requests: list[list[int]], expected: list[list[int]]) -> None:
    slow = server.member("engine.process", dp=1)
    slow.suspend()  # for less than what the others would take for its death
    try:
        assert server.post("/eplb/apply", {"policy": "shuffle"}).status_code == 202
        refused = [server.post(f"/eplb/{action}", {}) for action in ("apply", "rollback")]
    finally:
        slow.resume()
    assert [answer.status_code for answer in refused] == [409, 409]
    assert "under way" in refused[0].json()["error"]["message"]
    assert answers(server, requests) == expected
    settle(server)
    assert server.post("/eplb/rollback", {}).status_code == 202
    settle(server)


@pytest.mark.long
def test_without_the_key_nothing_about_balancing_is_told_or_changed(server: Server) -> None:
    before = server.get("/eplb").json()
    for action in ("apply", "rollback", "save", "plan", "record/start"):
        assert httpx.post(f"{server.base_url}/eplb/{action}", json={}).status_code == 401
    assert httpx.get(f"{server.base_url}/eplb").status_code == 401
    assert httpx.get(f"{server.base_url}/eplb/record/dump").status_code == 401
    assert server.get("/eplb").json() == before


@pytest.mark.long
def test_a_recording_holds_the_load_of_every_step(server: Server, requests: list[list[int]]) -> None:
    assert server.post("/eplb/record/start", {}).status_code == 200
    answers(server, requests[:4])
    stopped = server.post("/eplb/record/stop", {}).json()
    dump = server.get("/eplb/record/dump")
    assert dump.status_code == 200
    counts = load(dump.content)["logical_count"]
    assert counts.shape[1:] == (LAYERS, EXPERTS)
    assert counts.shape[0] >= min(64, stopped["steps"])
    assert (counts.sum(axis=2)[:, 0] == counts.sum(axis=2)[:, 1]).all(), "every layer sees the same rows"
    rows = sum(len(prompt) + 63 for prompt in requests[:4])
    top_k = 2
    assert counts[:, 0].sum() <= rows * top_k
    assert counts[:, 0].sum() > 0.8 * rows * top_k, "prefix hits and the first steps aside, every row is counted"


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("plan", {"policy": "no-such"}, 400, "no-such"),
        ("plan", {"policy": 7}, 400, "policy"),
        ("plan", {"placment": {}}, 400, "placment"),
        ("apply", {"placement": {"num_ranks": 2}}, 400, "placement"),
        ("apply", {"policy": "static"}, 400, "nothing"),
        ("apply", [1], 400, "JSON object"),
        ("save", {"path": "/etc/passwd"}, 400, "path"),
        ("rollback", {"to": 3}, 400, "to"),
    ],
)
def test_bad_requests_about_balancing_get_a_clear_refusal(
    server: Server, path: str, body: object, status: int, words: str
) -> None:
    answer = server.post(f"/eplb/{path}", body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


@pytest.mark.long
def test_answers_of_a_model_with_a_dense_layer_stay_the_same_through_a_rearrangement(
    tmp_path: Path, requests: list[list[int]]
) -> None:
    """Experts are counted where there are any: the placement has one layer of the model's two."""
    tiny_model(tmp_path, "qwen3_moe", seed=7, mlp_only_layers=[0], intermediate_size=45)
    write_letters(tmp_path, VOCAB)
    with serving(str(tmp_path), *options(2, "static", 4, step_interval=1_000_000)) as server:
        before = answers(server, requests[:4])
        applying = server.post("/eplb/apply", {"policy": "shuffle"})
        assert applying.status_code == 202, applying.text
        plan = applying.json()
        settle(server)
        assert answers(server, requests[:4]) == before
        assert len(applied(server)) == 1
        assert server.post("/eplb/save", {}).json() == plan["placement"]
        assert len(plan["placement"]["physical_to_logical"]) == 1
        assert plan["moved_experts"] > 0
        assert plan["moved_bytes"] == plan["moved_experts"] * 3 * 64 * 24 * 4, "what the workers say of an expert"


# --- placements from a file ------------------------------------------------------------------------------------------

TWICE = [0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9]
"""Twelve slots; experts 0 and 7 have two copies on one of two ranks each."""


def placement_file(folder: Path, rows: list[list[int]], num_ranks: int = 2) -> str:
    slots = len(rows[0])
    ranks = [slot * num_ranks // slots for slot in range(slots)]
    path = folder / "placement.json"
    path.write_text(json.dumps({"num_ranks": num_ranks, "physical_to_logical": rows, "rank_of_slot": ranks}))
    return str(path)


@pytest.mark.long
def test_a_server_starts_with_the_placement_of_a_file(
    folder: Path, tmp_path: Path, requests: list[list[int]], expected: list[list[int]]
) -> None:
    given = placement_file(tmp_path, [TWICE, TWICE[::-1]])
    with serving(str(folder), *options(2, "static", 2), "--expert-placement-file", given) as server:
        assert answers(server, requests) == expected
        assert server.get("/eplb").json()["placement"]["physical_to_logical"] == [TWICE, TWICE[::-1]]


def test_a_placement_that_does_not_fit_ends_the_start_with_one_sentence(folder: Path, tmp_path: Path) -> None:
    """All of them: tests/eplb/test_first_placement.py."""
    given = ("--expert-placement-file", placement_file(tmp_path, [TWICE] * 3))
    assert "has 3 layers, but this model has 2" in refusal(str(folder), *options(2, "static", 2), *given)


def test_a_placement_file_that_is_not_there_ends_the_start(folder: Path, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.json")
    assert "cannot be read" in refusal(str(folder), "-dp", "2", "-ep", "--expert-placement-file", absent)


def refusal(*arguments: str) -> str:
    """The one sentence a start ends with, exit code 2."""
    server = Server(*arguments)
    try:
        assert server.process.wait(60) == 2, server.log()
        lines = server.log().strip().splitlines()
        assert len(lines) == 1, server.log()
        return lines[0]
    finally:
        server.end()
