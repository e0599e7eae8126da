"""LLM with a world of several ranks, whose front-end is this process: what it does with its interpreter ends nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from moe_serve import LLM, SamplingParams
from moe_serve.base.errors import ConfigError, EngineDead
from moe_serve.cli.random_model import make_model

GREEDY = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
HELD_SECONDS = 12
GONE_SECONDS = 12
PROMPTS = ["In the beginning", "def main():"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("embedded") / "tiny"))


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model, data_parallel_size=2, enable_expert_parallel=True, dtype="float32", max_num_seqs=4) as llm:
        yield llm


def hold_interpreter(seconds: int) -> None:
    """As an extension does that computes for long and lets go of nothing: PyDLL keeps the GIL."""
    ctypes.PyDLL(None).sleep(seconds)


def texts(llm: LLM) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY, show_progress=False)]


@pytest.mark.long
def test_code_that_holds_the_interpreter_for_long_ends_neither_the_world_nor_what_is_in_flight(llm: LLM) -> None:
    at_rest = texts(llm)
    hold_interpreter(HELD_SECONDS)
    assert texts(llm) == at_rest
    late: list[list[str]] = []
    meanwhile = threading.Thread(target=lambda: late.append(texts(llm)))
    meanwhile.start()
    time.sleep(0.1)
    hold_interpreter(HELD_SECONDS)
    meanwhile.join(30)
    assert late == [at_rest]


@pytest.mark.long
def test_an_engine_that_dies_is_named_to_who_waits(model: str) -> None:
    others = engines()
    with LLM(model, data_parallel_size=2, enable_expert_parallel=True, max_num_seqs=4) as llm:
        victim = next(each for each in engines() if each not in others)
        threading.Timer(0.3, victim.kill).start()
        endless = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
        with pytest.raises(EngineDead, match=rf"pid {victim.pid}"):
            llm.generate(PROMPTS, endless, show_progress=False)
    assert engines() == others


def test_a_mistake_of_the_operators_is_told_as_one(model: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        LLM(model, data_parallel_size=2, data_parallel_address="192.0.2.1")


@pytest.mark.long
def test_a_process_that_is_killed_leaves_nothing_of_its_world(model: str) -> None:
    script = (
        f"from moe_serve import LLM\nllm = LLM({model!r}, data_parallel_size=2)\nprint('ready', flush=True)\ninput()"
    )
    user = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdout is not None
    try:
        assert user.stdout.readline() == "ready\n"
        family = psutil.Process(user.pid).children(recursive=True)
        assert len(family) >= 3
    finally:
        os.kill(user.pid, signal.SIGKILL)
    user.communicate()
    _, left = psutil.wait_procs(family, timeout=GONE_SECONDS)
    assert left == []


def engines() -> list[psutil.Process]:
    family = psutil.Process().children(recursive=True)
    return [each for each in family if "moe_serve.engine.process" in each.cmdline()]
