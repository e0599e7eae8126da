"""Ranks that torchrun starts: each process runs the engine itself, and has the same tokens as everybody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moe_serve.base.interpreter import import_environment
from tests.e2e.test_parity import NUM_TOKENS, Checkpoint, make_checkpoint
from tests.support.launched import Job, Processes, torch_variables, torchrun
from tests.support.pages import ROOT, blocks
from tests.support.supervised import free_ports

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DEPLOYING = ROOT / "docs" / "deploying.md"
pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

EXTERNAL: dict[str, object] = {"distributed_executor_backend": "external_launcher", "dtype": "float32"}
GREEDY: dict[str, object] = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
WORLDS = [(1, 2, 1), (2, 1, 1), (2, 2, 1), (1, 1, 2), (1, 1, 3), (1, 2, 2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe", num_hidden_layers=5)


def options(dp: int = 1, tp: int = 1, pp: int = 1, **more: object) -> dict[str, object]:
    sizes = {"data_parallel_size": dp, "tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    return EXTERNAL | sizes | {"enable_expert_parallel": dp * tp > 1} | more


@pytest.mark.parametrize(("dp", "tp", "pp"), WORLDS)
def test_every_process_has_the_tokens_of_transformers(
    checkpoint: Checkpoint, tmp_path: Path, dp: int, tp: int, pp: int
) -> None:
    prompts, answers = checkpoint.prompts, checkpoint.answers
    # Uneven: the first DP rank has one prompt, the last all others, and both are done when both are.
    parts = [slice(0, None)] if dp == 1 else [slice(0, 1), slice(1, None)]
    job = Job(
        model=str(checkpoint.folder),
        options=options(dp, tp, pp, max_parallel_loading_workers=1),
        prompts=[prompts[part] for part in parts],
        sampling=GREEDY,
        calls=2,
    )
    outcome = torchrun(job, tmp_path, dp * tp * pp)
    assert outcome.code == 0, outcome.output
    per_engine = tp * pp
    expected = {rank: [answers[parts[rank // per_engine]]] * 2 for rank in range(dp * per_engine)}
    assert outcome.answers == expected


def test_requests_without_a_seed_get_one_that_all_ranks_of_an_engine_share_and_no_other_run_has(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    job = Job(
        model=str(checkpoint.folder),
        options=options(tp=2),
        prompts=[[[3, 4, 5]] * 8],
        sampling={"temperature": 1.0, "max_tokens": NUM_TOKENS, "ignore_eos": True},
    )
    runs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        outcome = torchrun(job, tmp_path / name, 2)
        assert outcome.code == 0, outcome.output
        assert outcome.answers[0] == outcome.answers[1]
        runs.append(outcome.answers[0])
    assert runs[0] != runs[1]
    assert len({tuple(answer) for answer in runs[0][0]}) > 1, "each request its own"


def test_all_ranks_use_as_many_kv_blocks_as_the_least_of_them_has(checkpoint: Checkpoint, tmp_path: Path) -> None:
    little = 64 * 5 * 2 * 16 * 2 * 24 * 4  # blocks, layers, k and v, tokens, KV heads, head dimension, float32
    job = Job(
        model=str(checkpoint.folder),
        options=options(dp=2),
        options_of={"0": {"kv_cache_memory_bytes": 4 * little}, "1": {"kv_cache_memory_bytes": little}},
        prompts=[checkpoint.prompts, checkpoint.prompts],
        sampling=GREEDY,
    )
    outcome = torchrun(job, tmp_path, 2)
    assert outcome.code == 0, outcome.output
    assert outcome.num_blocks == {0: 64, 1: 64}
    assert outcome.answers == {0: [checkpoint.answers], 1: [checkpoint.answers]}


def test_prompts_that_differ_between_ranks_of_an_engine_are_refused_in_every_process(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    job = Job(
        model=str(checkpoint.folder),
        options=options(dp=2, tp=2),
        prompts=[checkpoint.prompts, checkpoint.prompts],
        odd={"3": checkpoint.prompts[:1]},
        sampling=GREEDY,
    )
    with Processes(job, tmp_path, torch_variables(4)) as processes:
        outcome = processes.wait()
        assert [process.returncode for process in processes.started] == [2] * 4, outcome.output
        for number in range(4):
            assert "generate() was given other requests in process 3 than in process 2" in processes.log(number)
    assert not outcome.answers


def test_options_that_differ_are_refused_in_every_process(checkpoint: Checkpoint, tmp_path: Path) -> None:
    job = Job(
        model=str(checkpoint.folder),
        options=options(tp=2),
        options_of={"1": {"block_size": 32}},
        prompts=[checkpoint.prompts],
        sampling=GREEDY,
    )
    outcome = torchrun(job, tmp_path, 2)
    assert outcome.code != 0
    assert "process 1 was given other options than process 0: block_size: 32, not 16" in outcome.output


def test_a_launcher_that_starts_another_number_of_processes_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    job = Job(model=str(checkpoint.folder), options=options(tp=2), prompts=[checkpoint.prompts], sampling=GREEDY)
    with Processes(job, tmp_path, torch_variables(3)) as processes:
        outcome = processes.wait()
        assert [process.returncode for process in processes.started] == [2] * 3
    assert "the launcher started 3 processes (WORLD_SIZE), but data_parallel_size x" in outcome.output


def test_a_process_that_is_killed_ends_the_others_and_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    job = Job(
        model=str(checkpoint.folder),
        options=options(dp=2),
        prompts=[checkpoint.prompts, checkpoint.prompts],
        sampling=GREEDY,
        idle=[1],
    )
    with Processes(job, tmp_path, torch_variables(2)) as processes:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"made-{number}").exists() for number in range(2)):
            assert time.monotonic() < deadline, processes.log(0) + processes.log(1)
            time.sleep(0.05)
        time.sleep(0.5)  # process 0 waits for it by now
        assert processes.started[0].poll() is None
        processes.started[1].kill()
        assert processes.started[0].wait(10) == 1
        assert "process 1 did not come to this call of generate()" in processes.log(0)


def test_after_a_restart_by_torchrun_the_world_is_formed_anew(checkpoint: Checkpoint, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from moe_serve import LLM\n"
        f"llm = LLM({str(checkpoint.folder)!r}, **{options(tp=2)!r})\n"
        "llm.generate([[3, 4, 5]])\n"
        "if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    os._exit(9)\n"
        "print('tokens', llm.generate([[3, 4, 5]])[0].outputs[0].token_ids)\n"
    )
    again = [*TORCHRUN, "--standalone", "--max-restarts", "1", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(again, env=os.environ | import_environment(), text=True, capture_output=True, timeout=150)
    assert done.returncode == 0, done.stderr
    one, other = done.stdout.splitlines()
    assert one == other
    assert one.startswith("tokens [")
    assert "process 1 did not come to this call of generate()" in done.stderr


def test_torchrun_on_two_nodes_makes_one_world(checkpoint: Checkpoint, tmp_path: Path) -> None:
    job = Job(model=str(checkpoint.folder), options=options(tp=2), prompts=[checkpoint.prompts], sampling=GREEDY)
    (tmp_path / "job.json").write_text(json.dumps(asdict(job)))
    where = ["--master-addr", "127.0.0.1", "--master-port", str(free_ports(1))]
    nodes = [
        subprocess.Popen(
            [*TORCHRUN, "--nnodes", "2", "--node-rank", node, *where, "-m", "tests.support.launched", str(tmp_path)],
            env=os.environ | import_environment(),
        )
        for node in "01"
    ]
    try:
        assert [node.wait(150) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    for rank in range(2):
        assert json.loads((tmp_path / f"answers-{rank}.json").read_text())["answers"] == [checkpoint.answers]


def test_a_script_with_its_llm_in_a_global_ends_with_code_0_without_closing_it(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from moe_serve import LLM\n"
        f"llm = LLM({str(checkpoint.folder)!r}, **{options(tp=2)!r})\n"
        "print('tokens', llm.generate([[3, 4, 5]])[0].outputs[0].token_ids)\n"
    )
    with Processes(script, tmp_path, torch_variables(2)) as processes:
        outcome = processes.wait()
    assert outcome.code == 0, outcome.output
    assert outcome.output.count("tokens [") == 2


def test_the_line_of_the_page_about_deploying_answers_in_every_process() -> None:
    (line,) = (block for block in blocks(DEPLOYING) if block.startswith("torchrun"))
    lines = typed(line)
    assert [line["process"] for line in lines].count(0) == 3
    for first, second in ((0, 1), (2, 3)):
        one, other = ([line | {"process": 0} for line in lines if line["process"] == each] for each in (first, second))
        assert one == other
    assert {line["data_parallel_rank"] for line in lines if line["process"] in (2, 3)} == {1}


def test_the_lines_of_the_page_about_ranks_of_ones_own_answer_in_each() -> None:
    (block,) = (block for block in blocks(DEPLOYING) if "examples.offline_dp" in block)
    lines = typed(block.replace("29600", str(free_ports(1))))
    assert sorted((line["process"], line["data_parallel_rank"]) for line in lines) == [(0, 0)] * 3 + [(1, 1)] * 2


def typed(block: str) -> list[dict[str, Any]]:
    """What a shell prints, where `python` and `torchrun` are those of the tests."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-ec", block],
        env=os.environ | import_environment() | {"PATH": path},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
