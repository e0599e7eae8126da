"""A real server whose steps are cut in halves that take turns: transformers' tokens for all thresholds and layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_parity import Checkpoint, make_checkpoint, plain_answers, streamed_answers
from tests.e2e.test_rebalance import applied, options
from tests.support.server import serving

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen2_moe", num_key_value_heads=1)


@pytest.mark.parametrize(
    ("dp", "tp", "backend", "thresholds", "more"),
    [
        (2, 1, "shm", (1, 1), ["-ep"]),
        (1, 2, "torch_a2a", (4, 1), ["-ep", "--expert-placement-strategy", "round_robin"]),
        (2, 2, "shm", (1, 16), ["-ep", "-dcp", "2"]),
        (2, 2, "allgather_reducescatter", (2, 1000), []),
        (1, 2, "naive", (1, 1), ["-pp", "2"]),
    ],
)
def test_tokens_over_http_equal_those_of_transformers(
    checkpoint: Checkpoint, dp: int, tp: int, backend: str, thresholds: tuple[int, int], more: list[str]
) -> None:
    decode, prefill = map(str, thresholds)
    world = ("-dp", str(dp), "-tp", str(tp), "--all2all-backend", backend, "--dtype", "float32", *more)
    halving = ("--enable-dbo", "--dbo-decode-token-threshold", decode, "--dbo-prefill-token-threshold", prefill)
    with serving(str(checkpoint.folder), *world, *halving, "--max-num-batched-tokens", "96") as server:
        assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
        assert streamed_answers(server, checkpoint.prompts) == checkpoint.answers


def test_experts_move_and_no_token_changes(checkpoint: Checkpoint) -> None:
    halving = ("--enable-dbo", "--dbo-decode-token-threshold", "1", "--dbo-prefill-token-threshold", "1")
    with serving(str(checkpoint.folder), *options(2, "shuffle", redundant=2), *halving) as server:
        for _ in range(20):
            assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
            done = applied(server)
            if len(done) >= 5:
                break
        assert len(done) >= 5, server.log()
        assert sum(entry["moved_experts"] for entry in done) > 0


def test_a_trace_shows_one_half_computing_while_the_other_travels(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """By its own times: experts or attention of a half begin and end while rows of the other are on their way."""
    world = ("-dp", "2", "-ep", "--dtype", "float32", "--profile", str(tmp_path / "trace.json"))
    halving = ("--enable-dbo", "--dbo-decode-token-threshold", "1", "--dbo-prefill-token-threshold", "1")
    with serving(str(checkpoint.folder), *world, *halving) as server:
        assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
        server.terminate()
    for rank in (0, 1):
        events = json.loads((tmp_path / f"trace.rank{rank}.json").read_text().rstrip(",\n") + "]")
        tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        assert set(tracks.values()) > {f"{what} half {half}" for what in ("computes", "rows travel") for half in (0, 1)}
        spans = [event for event in events if event["ph"] == "X"]
        assert {(event["name"], tracks[event["tid"]].rsplit(" half")[0]) for event in spans} == {
            ("attention", "computes"),
            ("experts", "computes"),
            ("dispatch", "rows travel"),
            ("combine", "rows travel"),
        }
        within = dict.fromkeys(("attention", "experts"), 0)
        travels = [event for event in spans if tracks[event["tid"]].startswith("rows travel half")]
        for event in spans:
            track = tracks[event["tid"]]
            if not track.startswith("computes half"):
                continue
            for other in travels:
                same = other["args"]["step"] == event["args"]["step"]
                if same and tracks[other["tid"]][-1] != track[-1] and other["ts"] <= event["ts"]:
                    within[event["name"]] += event["ts"] + event["dur"] <= other["ts"] + other["dur"]
        assert all(count > 100 for count in within.values()), within
