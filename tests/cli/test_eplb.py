"""`moe-serve eplb` as one types it: what it prints where, what it writes, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bench.traces import lognormal, trace
from moe_serve.cli.main import main
from moe_serve.eplb.desk.loads import Trace, write_trace
from moe_serve.eplb.placement_file import read_placement

PLAN_KEYS = [
    "policy",
    "solve_seconds",
    "balancedness_before",
    "balancedness_after",
    "balancedness_min_layer",
    "moved_experts",
    "moved_share",
    "cross_node_moves",
    "duplicate_slots",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trace.safetensors: 4 windows of 10 steps, 3 layers, 32 experts."""
    folder = tmp_path_factory.mktemp("eplb")
    generator = np.random.default_rng(0)
    counts = trace(generator, lognormal(generator, 4, 3, 32), steps=10, tokens=2048)
    write_trace(folder / "trace.safetensors", Trace(counts))
    np.save(folder / "load.npy", counts.sum(axis=0))
    return folder


def eplb(folder: Path, *arguments: str, hide: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`, in a process that cannot import what is in `hide`."""
    program = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {list(hide)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
from moe_serve.cli.main import main
sys.exit(main(["eplb", *sys.argv[1:]]))
"""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_plan_is_one_line_of_json_and_a_file(folder: Path) -> None:
    world = ("--ranks", "8", "--nodes", "2", "--groups", "4", "--redundant", "8")
    done = eplb(folder, "plan", "trace.safetensors", *world, "--out", "p.json", "--json", hide=["torch", "matplotlib"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    report = json.loads(done.stdout)
    assert list(report) == PLAN_KEYS
    assert report["policy"] == "sticky"
    assert report["balancedness_after"] > 0.98 > report["balancedness_before"]
    assert report["duplicate_slots"] == 0
    assert "planning 3 layers of 32 experts on 40 slots of 8 ranks" in done.stderr
    document = json.loads((folder / "p.json").read_text())
    assert list(document) == ["num_ranks", "num_nodes", "physical_to_logical", "rank_of_slot"]
    assert (document["num_ranks"], document["num_nodes"]) == (8, 2)
    read_placement(folder / "p.json", num_layers=3, num_experts=32, num_ranks=8, num_redundant=8)

    again = eplb(folder, "plan", "load.npy", *world, "--current", "p.json", "--out", "q.json", "--json")
    report = json.loads(again.stdout)
    assert report["moved_experts"] == 0
    assert report["balancedness_before"] == report["balancedness_after"]
    assert json.loads((folder / "q.json").read_text()) == document


def test_every_policy_plans_and_people_get_a_list(folder: Path) -> None:
    for policy in ("deepseek", "static", "shuffle"):
        done = eplb(folder, "plan", "load.npy", "--ranks", "4", "--redundant", "4", "--policy", policy)
        assert done.returncode == 0, done.stderr
        names, values = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
        assert list(names) == PLAN_KEYS
        assert values[0] == policy


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], "required: LOAD, --ranks"),
        (["dance"], "invalid choice"),
        ([], "required: COMMAND"),
        (["plan", "absent.npy", "--ranks", "4"], "does not exist"),
        (["plan", "load.npy", "--ranks", "four"], "invalid int value: 'four'"),
        (["plan", "load.npy", "--ranks", "0"], "must be at least 1"),
        (["plan", "load.npy", "--ranks", "4", "--redundant", "-1"], "must not be negative"),
        (["plan", "load.npy", "--ranks", "4", "--redundant", "97"], "97 redundant experts cannot fit"),
        (["plan", "load.npy", "--ranks", "4", "--nodes", "5"], "number of nodes"),
        (["plan", "load.npy", "--ranks", "4", "--groups", "5"], "must divide the 32 experts"),
        (["plan", "load.npy", "--ranks", "4", "--policy", "best"], "known are: sticky, deepseek, static, shuffle"),
        (["plan", "load.npy", "--ranks", "4", "--out", "no/p.json"], "there is no folder no"),
        (["plan", "load.npy", "--ranks", "4", "--current", "load.npy"], "is not JSON"),
        (["plan", "load.npy", "--ranks", "4", "--current", "other.json"], "is for 2 ranks"),
        (["replay", "load.npy", "--ranks", "4"], "at least 2 are needed"),
        (["replay", "trace.safetensors", "--ranks", "4", "--redundant", "1,x"], "whole numbers"),
        (["replay", "trace.safetensors", "--ranks", "4", "--policies", "sticky,best"], "unknown EPLB policy 'best'"),
        (["redundancy", "trace.safetensors", "--ranks", "4", "--window-steps", "0"], "at least 1 step"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(
    folder: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    document = {"num_ranks": 2, "num_nodes": 1, "physical_to_logical": [[0, 1]], "rank_of_slot": [0, 1]}
    (folder / "other.json").write_text(json.dumps(document))
    assert main(["eplb", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *_, complaint = printed.err.splitlines()
    assert complaint.startswith("moe-serve: ")
    assert words in complaint


def test_a_replay_compares_policies_and_draws(folder: Path) -> None:
    done = eplb(
        folder,
        *("replay", "trace.safetensors", "--ranks", "8", "--redundant", "0,8", "--policies", "sticky,static"),
        *("--window-steps", "10", "--out", "r.json", "--pictures", "pictures"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sticky") == 2
    outcomes = json.loads((folder / "r.json").read_text())["outcomes"]
    assert [(outcome["policy"], outcome["num_redundant"]) for outcome in outcomes] == [
        ("sticky", 0),
        ("static", 0),
        ("sticky", 8),
        ("static", 8),
    ]
    assert (folder / "pictures" / "replay.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "pictures" / "replay.svg").read_text()


def test_the_curve_of_redundancy_names_what_pays(folder: Path) -> None:
    done = eplb(
        folder,
        *(
            "redundancy",
            "trace.safetensors",
            "--ranks",
            "8",
            "--window-steps",
            "10",
            "--expert-bytes",
            "1000",
            "--json",
        ),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [point["num_redundant"] for point in document["curve"]] == [0, 2, 4, 8, 16, 24, 32]
    assert document["worthwhile"] in (2, 4, 8, 16, 24, 32)
    assert document["curve"][3]["bytes_per_rank"] == 8 * 3 * 1000 / 8


def test_pictures_without_matplotlib_name_the_extra(folder: Path) -> None:
    for arguments in (["plan", "load.npy"], ["replay", "trace.safetensors", "--window-steps", "10"]):
        done = eplb(folder, *arguments, "--ranks", "4", "--pictures", "pictures", hide=["matplotlib"])
        assert done.returncode == 1
        assert "pip install 'moe-serve[plot]'" in done.stderr
        assert "Traceback" not in done.stderr


def test_torch_files_without_torch_say_what_is_missing(folder: Path) -> None:
    (folder / "t.pt").write_bytes(b"x")
    done = eplb(folder, "plan", "t.pt", "--ranks", "4", hide=["torch"])
    assert done.returncode == 1
    assert "needs the Python package 'torch'" in done.stderr
