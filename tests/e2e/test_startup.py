"""A hostile start: exit code 2, one message that names what is wrong, no traceback, and nothing left running."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve.base.architectures import ARCHITECTURES
from moe_serve.base.config import Config
from moe_serve.base.messages import Stop
from moe_serve.cli.main import main
from moe_serve.cli.random_model import make_model
from moe_serve.launch.resolve import resolve
from moe_serve.world.member import MemberSpec
from tests.support.chat_templates import LOOPS
from tests.support.coordinator import RunningCoordinator
from tests.support.server import Server

Refused = Callable[..., str]
SILENT_HUB = "a hub that does not answer"
END_SECONDS = 90.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Refused]:
    """Runs `moe-serve serve` in this process, for what is refused before anything is started; its one message."""
    for name in list(os.environ):
        if name.startswith("MOE_SERVE_"):
            monkeypatch.delenv(name)
    logger = logging.getLogger("moe_serve")
    before = logger.handlers[:], logger.level, logger.propagate

    def run(*arguments: str) -> str:
        assert main(["serve", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1, err
        return err

    yield run
    logger.handlers[:], logger.level, logger.propagate = before


def copied(model: Path, folder: Path, **changes: object) -> Path:
    """The model with other values in its config.json; None removes one."""
    shutil.copytree(model, folder)
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


# --- the model -----------------------------------------------------------------------------------------------------


def test_no_such_folder(refused: Refused, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert f"no such model folder: {absent}" in refused(str(absent))


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(refused: Refused) -> None:
    assert "no such model folder: absent (nor is it an owner/name on the Hugging Face hub)" in refused("absent")


def test_a_file_is_no_model(refused: Refused, model: Path) -> None:
    assert "is a file; the model must be a folder" in refused(str(model / "config.json"))


def test_a_folder_without_config_json(refused: Refused, tmp_path: Path) -> None:
    assert f"{tmp_path} has no config.json" in refused(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_json_that_is_none(text: str, refused: Refused, model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path / "copy")
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert f"{folder / 'config.json'}" in refused(str(folder))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_brackets_without_end(file: str, refused: Refused, model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path / "copy")
    (folder / file).write_text('{"a":' * 200_000)
    assert f"{folder / file} cannot be read as JSON: it is nested too deeply" in refused(str(folder))


@pytest.mark.parametrize(
    "field",
    ["num_experts", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "max_position_embeddings"],
)
def test_a_billion_of_anything(field: str, refused: Refused, model: Path, tmp_path: Path) -> None:
    said = refused(str(copied(model, tmp_path / "copy", **{field: 10**9})))
    assert f"config.json: {field} must be at most" in said


def test_weights_smaller_than_the_model(refused: Refused, model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path / "copy", num_hidden_layers=4000, num_experts=200)
    assert "describes a model of at least" in refused(str(folder))


def test_an_unsupported_architecture_lists_the_supported(refused: Refused, model: Path, tmp_path: Path) -> None:
    said = refused(str(copied(model, tmp_path / "copy", architectures=["LlamaForCausalLM"])))
    assert "LlamaForCausalLM is not supported" in said
    for name in ARCHITECTURES:
        assert name in said


def test_mathematics_that_is_not_computed_is_refused_by_name(refused: Refused, model: Path, tmp_path: Path) -> None:
    said = refused(str(copied(model, tmp_path / "copy", quantization_config={"bits": 4})))
    assert "quantization_config" in said


def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        started = time.monotonic()
        said = one_message(
            run_to_the_end("owner/name", environment=hub_at(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path))
        )
    assert time.monotonic() - started < 20
    assert "owner/name is no folder here and could not be had from the Hugging Face hub" in said
    assert "refused" in said


def hub_at(address: str, cache: Path) -> dict[str, str]:
    return {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-tp", "3"], r"--tensor-parallel-size 3 does not divide the model's 4 query heads.*sizes that work: 1, 2, 4"),
        (["-dp", "300"], "experts of width 128 cannot be cut over 300 ranks.*--enable-expert-parallel"),
        (["--max-model-len", "5000"], r"max_model_len 5000 is more than the checkpoint allows \(4096\)"),
        (["--all2all-backend", "pplx"], "pplx joins at least 2 ranks"),
        (
            ["--all2all-backend", "deepep_v2", "-dp", "2"],
            "deepep_v2 moves rows to whole experts, .*--enable-expert-p",
        ),
        (["--all2all-backend", "pigeon"], "unknown all2all backend 'pigeon'; known are: naive"),
        (["-pp", "99"], "layers cannot be spread over 99 pipeline stages: .*--pipeline-parallel-size"),
        (["-dp", "2", "-dpe"], "data_parallel_external_lb needs data_parallel_rank"),
        (["-dp", "2", "-dph"], "data_parallel_hybrid_lb needs data_parallel_size_local"),
        (["--data-parallel-backend", "ray"], "data_parallel_backend ray needs data_parallel_size > 1"),
        (["--distributed-executor-backend", "external_launcher"], "is for LLM in processes that torchrun starts"),
        (["-tp", "2", "--ray-address", "h:1"], "--ray-address has no effect with the mp executor; add --distributed"),
        (["--enable-dbo"], "enable_dbo needs data_parallel_size x tensor_parallel_size > 1"),
        (
            ["--enable-dbo", "-dp", "2", "-ep", "--all2all-backend", "pplx", "--dtype", "bfloat16"],
            "pplx carries one exchange at a time.*leave out --enable-dbo",
        ),
        (["-tp", "2", "-dcp", "2"], "--decode-context-parallel-size 2 does not divide the 1 .*sizes that work: 1"),
        (["--no-disable-nccl-for-dp-synchronization"], "disable_nccl_for_dp_synchronization=False is not built: data-"),
        (["-dp", "2", "--enable-eplb"], "enable_eplb needs enable_expert_parallel"),
        (["-ep", "--enable-eplb"], "enable_eplb needs data_parallel_size x tensor_parallel_size > 1"),
        (["--eplb-config.num-redundant-experts", "2"], r"num_redundant_experts \(2\) needs enable_eplb"),
        (["-dp", "2", "-dpn", "2"], r"data_parallel_rank \(2\) must lie in \[0, 2\)"),
        (["-dpe"], "need data_parallel_size > 1"),
        (["-dpl", "2"], r"data_parallel_size_local \(2\) must be at most data_parallel_size \(1\)"),
        (["--max-num-seqs", "64", "--max-num-batched-tokens", "8"], r"max_num_batched_tokens \(8\) must be at least"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_are_refused_before_anything_starts(
    options: list[str], message: str, refused: Refused, model: Path
) -> None:
    assert re.search(message, refused(str(model), *options))


# --- what only a started process finds out -------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    code: int
    log: str
    left: int


def run_to_the_end(*arguments: str, environment: dict[str, str] | None = None) -> Ended:
    server = Server(*arguments, environment=environment)
    try:
        code = server.process.wait(END_SECONDS)
        return Ended(code, server.log(), len(server.family()))
    finally:
        server.end()


def one_message(ended: Ended) -> str:
    """The one error of a start that was refused."""
    assert ended.code == 2, ended.log
    assert ended.left == 0, ended.log
    assert "Traceback" not in ended.log
    errors = [line for line in ended.log.splitlines() if " INFO " not in line]
    assert len(errors) == 1, ended.log
    assert "ERROR   [launcher] " in errors[0]
    return errors[0]


Spoil = Callable[[Path], object]


def untouched(folder: Path) -> None:
    pass


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 64)


def corrupt(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 64)


def lacking_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def with_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 1}')


def with_a_template_without_end(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(LOOPS)


@dataclass(frozen=True)
class Case:
    """A folder that was spoilt, options, and the message. PORT stands for a port that is taken."""

    message: str
    options: tuple[str, ...] = ()
    spoil: Spoil = untouched


HOSTILE = {
    "truncated weights": Case(r"model\.safetensors is truncated or not a safetensors file", spoil=truncated),
    "corrupt weights": Case(r"model\.safetensors is truncated or not a safetensors file", spoil=corrupt),
    "a tensor missing": Case(
        r"1 tensors are missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight",
        ("-dp", "2", "-ep"),
        lacking_a_tensor,
    ),
    "no tokenizer": Case(r"tokenizer\.json is missing", spoil=without_tokenizer),
    "a broken tokenizer": Case(r"tokenizer\.json is not a tokenizer", spoil=with_broken_tokenizer),
    "a chat template without end": Case(
        r"chat_template\.jinja cannot render a plain conversation: it takes longer than 1 s .*--chat-template-timeout",
        ("--chat-template-timeout", "1"),
        with_a_template_without_end,
    ),
    "no such device": Case(r"device cuda is not available .*; choose --device cpu or auto", ("--device", "cuda")),
    "too little memory": Case(
        r"one sequence of max_model_len 4096 tokens needs 8,388,608 bytes .* but kv_cache_memory_bytes is 1,000",
        ("--kv-cache-memory-bytes", "1000"),
    ),
    "no such executor": Case(
        r"needs the Python package 'no_such_package', which is not installed",
        ("--distributed-executor-backend", "no_such_package.module.Class"),
    ),
    "HTTP port taken": Case(
        r"the HTTP server cannot listen on 127\.0\.0\.1:PORT: Address already in use .*--port", ("--port", "PORT")
    ),
    "coordinator's port taken": Case(
        r"the coordinator cannot listen on 127\.0\.0\.1:PORT: .*in use.*--data-parallel-rpc-port", ("-dpp", "PORT")
    ),
    "store's port taken": Case(
        r"port PORT on 127\.0\.0\.1 is in use \(tried 5 times\).*--data-parallel-master-port",
        ("--data-parallel-master-port", "PORT"),
    ),
    "somebody else's address": Case(
        r"the HTTP server cannot listen on 192\.0\.2\.1:0: .*--host", ("--host", "192.0.2.1")
    ),
    "a host without address": Case(
        r"host 'no\.such\.host\.invalid' cannot be resolved: .*--data-parallel-address",
        ("-dpa", "no.such.host.invalid"),
    ),
    SILENT_HUB: Case(r"owner/name .* could not be had from the Hugging Face hub: .*timed out"),
}


DAILY = {
    "truncated weights",
    "too little memory",
    "HTTP port taken",
    "store's port taken",
}
"""Each start costs seconds of importing torch: the others' run with the long tests."""


@dataclass(frozen=True)
class Outcomes:
    port: str
    ended: dict[str, Ended]


@pytest.fixture(scope="module")
def outcomes(
    model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Outcomes]:
    """Of those that this run asks for, three at a time: a start is spent importing torch, or waiting."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {name: HOSTILE[name] for name in HOSTILE if any(each.get("name") == name for each in params)}
    with socket.socket() as taken, ThreadPoolExecutor(3) as pool:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = hub_at(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("hub"))
        running = {}
        for name, case in asked.items():
            if name == SILENT_HUB:
                running[name] = pool.submit(run_to_the_end, "owner/name", environment=environment)
            else:
                folder = shutil.copytree(model, tmp_path_factory.mktemp("spoilt") / "tiny")
                case.spoil(folder)
                options = [option.replace("PORT", port) for option in case.options]
                running[name] = pool.submit(run_to_the_end, str(folder), *options)
        yield Outcomes(port, {name: future.result() for name, future in running.items()})


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DAILY else pytest.mark.long) for name in HOSTILE]
)
def test_what_only_a_started_process_finds_ends_everything_with_one_message(name: str, outcomes: Outcomes) -> None:
    if name == "no such device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert re.search(HOSTILE[name].message.replace("PORT", outcomes.port), one_message(outcomes.ended[name]))


# --- meeting at addresses ------------------------------------------------------------------------------------------


def started_by_hand(
    module: str, coordinator: RunningCoordinator, config: Config, dp: int = -1
) -> subprocess.Popen[str]:
    """A member as anybody may start it: told where the coordinator is, the token and its options, nothing else."""
    spec = MemberSpec(host="127.0.0.1", port=coordinator.port, token=coordinator.token, config=config.to_json(), dp=dp)
    return subprocess.Popen(
        [sys.executable, "-m", f"moe_serve.{module}"], env=spec.to_environment(), stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def resolved(model: Path) -> Config:
    options = {"model": str(model), "data_parallel_size": 2, "enable_expert_parallel": True, "max_model_len": 256}
    return resolve(Config.from_flat({**options, "kv_cache_memory_bytes": 2**24, "port": 0}))[0]


@pytest.mark.ranks
def test_an_engine_started_by_hand_with_other_options_is_refused_with_rank_and_fields(resolved: Config) -> None:
    coordinator = RunningCoordinator(resolved.parallel.topology, resolved.agreement())
    other = resolved.with_("cache", block_size=32).with_("parallel", all2all_backend="naive")
    stranger = started_by_hand("engine.process", coordinator, other, dp=1)
    try:
        said = stranger.communicate(timeout=END_SECONDS)[1]
        assert stranger.returncode == 2
        assert "Traceback" not in said
        told = (
            f"engine dp 1 (pid {stranger.pid} on {socket.gethostname()}) was started with other options than rank 0: "
            'all2all_backend: "naive", not "shm"; block_size: 32, not 16'
        )
        assert said.count(told) == 1, said
        assert coordinator.coordinator.fleet.ended == Stop(told, 2)
    finally:
        stranger.kill()
        coordinator.close()


@pytest.mark.ranks
@pytest.mark.long
def test_members_that_know_only_an_address_and_a_token_form_a_world_and_end_with_it(resolved: Config) -> None:
    coordinator = RunningCoordinator(resolved.parallel.topology, resolved.agreement(), token="a token made by hand")
    members = [started_by_hand("engine.process", coordinator, resolved, dp=dp) for dp in (1, 0)]
    members.append(started_by_hand("api.server", coordinator, resolved))
    try:
        address = coordinator.wait_ready(END_SECONDS)
        body = {"prompt": "together", "max_tokens": 4, "ignore_eos": True}
        answer = httpx.post(f"http://{address}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 4
        coordinator.end(Stop("that was all", 0))
        assert [member.wait(10) for member in members] == [0, 0, 0]
    finally:
        for member in members:
            member.kill()
            member.communicate()
        coordinator.close()
