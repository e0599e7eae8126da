"""The command line: every option as flag, environment variable and YAML key; mistakes get one message."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from moe_serve.base.config import SECTIONS
from moe_serve.base.eplb_config import EPLBConfig
from moe_serve.base.errors import ConfigError
from moe_serve.cli.main import main
from moe_serve.cli.serve import parse_serve

FIELDS = [name for section in SECTIONS.values() for name in section.model_fields]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MOE_SERVE_"):
            monkeypatch.delenv(name)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `moe-serve` says on standard error, having ended with code 2."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2
    return err


# --- flags ---------------------------------------------------------------------------------------------------------


def test_the_model_is_the_one_positional_argument() -> None:
    assert parse_serve(["owner/name"]).model.model == "owner/name"
    assert parse_serve(["--port", "80", "folder", "-dp", "2"]).model.model == "folder"
    assert parse_serve([]).model.model is None


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--tensor_parallel_size", "--tp", "-tp"])
@pytest.mark.parametrize("joined", [True, False], ids=["=", "blank"])
def test_a_flag_has_long_and_short_spellings(flag: str, joined: bool) -> None:
    arguments = [f"{flag}=2"] if joined else [flag, "2"]
    assert parse_serve(arguments).parallel.tensor_parallel_size == 2


@pytest.mark.parametrize(
    ("short", "field"),
    [
        ("dp", "data_parallel_size"),
        ("pp", "pipeline_parallel_size"),
        ("dpl", "data_parallel_size_local"),
        ("dpp", "data_parallel_rpc_port"),
    ],
)
def test_short_forms_are_the_fields(short: str, field: str) -> None:
    assert getattr(parse_serve([f"-{short}", "1"]).parallel, field) == 1
    assert getattr(parse_serve([f"--{short}", "1"]).parallel, field) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-ep"], True),
        (["--enable-expert-parallel"], True),
        (["--enable-expert-parallel=true"], True),
        (["--enable_expert_parallel=false"], False),
        (["--no-enable-expert-parallel"], False),
        (["-ep=false"], False),
    ],
    ids=str,
)
def test_a_switch_is_on_off_or_told(arguments: list[str], expected: bool) -> None:
    assert parse_serve(arguments).parallel.enable_expert_parallel is expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--eplb-config.window-size", "7"],
        ["--eplb-config.window_size", "7"],
        ["--eplb_config.window_size=7"],
        ["--eplb-config", '{"window_size": 7}'],
        ["--eplb-config", '{"window_size": 7}', "--eplb-config.step-interval", "9"],
    ],
    ids=str,
)
def test_the_nested_section_comes_as_json_or_dotted(arguments: list[str]) -> None:
    eplb = parse_serve(arguments).parallel.eplb_config
    assert eplb == EPLBConfig(window_size=7, step_interval=9 if len(arguments) > 2 else 3000)


# --- environment, file, precedence ---------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        "port: 1\nmax-num-seqs: 11\nblock_size: 21\ntp: 2\nmodel: from/file\n"
        "eplb-config: {window-size: 31, step_interval: 32}\n"
    )
    monkeypatch.setenv("MOE_SERVE_PORT", "2")
    monkeypatch.setenv("MOE_SERVE_MAX_NUM_SEQS", "12")
    monkeypatch.setenv("MOE_SERVE_EPLB_CONFIG__WINDOW_SIZE", "33")
    config = parse_serve(["--config", str(file), "--port", "3"])
    assert config.server.port == 3
    assert config.scheduler.max_num_seqs == 12
    assert config.cache.block_size == 21
    assert config.parallel.tensor_parallel_size == 2
    assert config.model.model == "from/file"
    assert config.parallel.eplb_config == EPLBConfig(window_size=33, step_interval=32)
    assert config.scheduler.max_num_batched_tokens == 2048


@pytest.mark.parametrize("flag", ["--config", "--config="])
def test_the_file_may_be_given_in_one_word_or_two(flag: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("host: 0.0.0.0\n")
    arguments = [flag + str(file)] if flag.endswith("=") else [flag, str(file)]
    assert parse_serve(arguments).server.host == "0.0.0.0"


def test_a_secret_from_the_environment_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_SERVE_API_KEY", "sesame")
    config = parse_serve([])
    assert config.server.api_key is not None
    assert config.server.api_key.get_secret_value() == "sesame"
    assert "sesame" not in repr(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1\n", "holds prot, which is no option"),
        ("- 1\n", "must hold options under their names, not list"),
        ("a: [\n", "cannot be read"),
        ("config: x\n", "holds config, which is no option"),
        ("eplb-config.window-size: 3\n", "which is no option"),
        ("port: many\n", "port: .*given: 'many'"),
    ],
)
def test_a_wrong_file_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_serve(["--config", str(file)])


def test_an_absent_file_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"--config no-such-file\.yaml cannot be read: .*No such file"):
        parse_serve(["--config", "no-such-file.yaml"])


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MOE_SERVE_PORT", "eight thousand")
    said = refused(capsys, "serve")
    assert "port: " in said
    assert "from the environment: MOE_SERVE_PORT" in said


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--tensor-paralel-size", "2"],
            ["unknown option --tensor-paralel-size", "did you mean --tensor-parallel-size?"],
        ),
        (["--eplb-config.window-sise", "2"], ["did you mean --eplb-config.window-size?"]),
        (["--max-num-seq", "2"], ["did you mean --max-num-seqs?"]),
        (["--xyzzy=5"], ["unknown option --xyzzy"]),
        (["-x"], ["unknown option -x"]),
        (["a", "b"], ["unexpected: b"]),
        (["--host"], ["--host: expected one argument"]),
        (["--enable-dbo=perhaps"], ["--enable-dbo", "takes no value: 'perhaps'"]),
    ],
    ids=str,
)
def test_a_wrong_flag_gets_one_line_the_near_match_and_the_usage(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "serve", *arguments)
    for part in [*parts, "usage: moe-serve serve [MODEL] [OPTIONS]", "--help"]:
        assert part in said


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--eplb-config", "{bad"], ["--eplb-config must be JSON"]),
        (["--eplb-config", "5"], ["eplb_config"]),
        (["--eplb-config", '{"window": 5}'], ["eplb_config.window"]),
        (["-dp", "two"], ["data_parallel_size", "integer", "'two'"]),
        (["--dtype", "int4"], ["dtype", "'float32', 'bfloat16' or 'float16'", "'int4'"]),
        (["--port", "70000"], ["port", "65535", "70000"]),
        (["--api-key="], ["api_key"]),
    ],
    ids=str,
)
def test_a_wrong_value_is_told_with_what_is_allowed(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "serve", *arguments)
    for part in parts:
        assert part in said


def test_an_unknown_command_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    known = "known are: serve, plan, doctor, chat, make-model, eplb, k8s, version"
    assert f"unknown command 'sevre'; {known}" in refused(capsys, "sevre")


def test_mistakes_of_the_other_commands_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "FOLDER" in refused(capsys, "make-model")
    assert "did you mean --preset?" in refused(capsys, "make-model", "x", "--prest", "tiny")
    assert "'tiny' or 'small'" in refused(capsys, "make-model", "x", "--preset", "huge")


# --- help and version ----------------------------------------------------------------------------------------------


def test_help_lists_every_option_once_with_its_description(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: moe-serve serve [MODEL] [OPTIONS]\n")
    assert max(map(len, text.splitlines())) <= 80
    listed = re.findall(r"^  --(?:no-)?([a-z0-9.-]+)", text, re.MULTILINE)
    expected = {name.replace("_", "-") for name in FIELDS if name != "model"} | {"config"}
    assert {name for name in listed if "." not in name} == expected
    assert len(listed) == len(set(listed))
    assert "--tensor-parallel-size, -tp N\n        Ranks that share" in text
    assert "--dtype auto|float32|bfloat16|float16" in text
    assert (
        "--all2all-backend\n        auto|naive|allgather_reducescatter|torch_a2a|torch_padded|shm|\n"
        "        deepep_high_throughput|deepep_v2|deepep_low_latency|pplx|\n"
        "        pplx_garden|flashinfer_nvlink_one_sided|flashinfer_nvlink_two_sided\n        How tokens" in text
    )


@pytest.mark.parametrize("command", ["make-model", "chat"])
def test_the_other_commands_have_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "-h"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: moe-serve {command}")


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "serve [MODEL]" in capsys.readouterr().out
    assert main(["--help"]) == 0


def test_version_is_the_packages_also_as_a_process() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "moe_serve", "version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, version("moe-serve") + "\n", "")


def test_a_launcher_imports_nothing_of_other_commands_and_no_web_server() -> None:
    code = (
        "import sys; from moe_serve.cli.main import main; main(['serve', '--help']); "
        "print([name for name in sys.modules if name in ('torch', 'fastapi', 'httpx') "
        "or name.startswith(('moe_serve.deploy', 'moe_serve.doctor'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
