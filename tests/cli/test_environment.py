"""What stands in the environment under our prefix is an option, Kubernetes' or a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_serve.base.errors import ConfigError
from moe_serve.cli.serve import parse_serve


def test_a_misspelt_variable_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_SERVE_MAX_NUM_SEQ", "7")
    with pytest.raises(ConfigError, match=r"MOE_SERVE_MAX_NUM_SEQ, which .* did you mean MOE_SERVE_MAX_NUM_SEQS\?"):
        parse_serve([])


@pytest.mark.parametrize(
    "values",
    [
        {"MOE_SERVE_PORT": "tcp://10.96.12.7:8000"},
        {"MOE_SERVE_SERVICE_HOST": "10.96.12.7", "MOE_SERVE_SERVICE_PORT": "8000", "MOE_SERVE_SERVICE_PORT_HTTP": "80"},
        {"MOE_SERVE_PORT_8000_TCP": "tcp://10.96.12.7:8000", "MOE_SERVE_PORT_8000_TCP_ADDR": "10.96.12.7"},
        {"MOE_SERVE_HEADLESS_PORT": "udp://[fd00::7]:53", "MOE_SERVE_HEADLESS_PORT_53_UDP_PROTO": "udp"},
    ],
)
def test_what_kubernetes_makes_for_a_service_is_passed_over(
    values: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert parse_serve([]).server.port == 8000
    assert [record.args[0] for record in caplog.records if "passed over" in record.msg] == sorted(values)  # type: ignore[index]


def test_options_of_the_environment_hold_also_those_of_a_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_SERVE_PORT", "9000")
    monkeypatch.setenv("MOE_SERVE_EPLB_CONFIG__WINDOW_SIZE", "77")
    monkeypatch.setenv("MOE_SERVE_WORLD_TOKEN", "a token of some length")
    config = parse_serve([])
    assert config.server.port == 9000
    assert config.parallel.eplb_config.window_size == 77


TRAPS = ["random.py", "types.py", "queue.py", "logging.py", "platform.py", "numpy", "moe_serve"]
START_A_CHILD = """
import subprocess
from moe_serve.base.interpreter import child_environment, module_command
command = module_command("moe_serve.engine.process")
ended = subprocess.run(command, capture_output=True, text=True, env=child_environment())
print(ended.stderr)
"""


@pytest.mark.parametrize("name", [TRAPS[0], *(pytest.param(name, marks=pytest.mark.long) for name in TRAPS[1:])])
def test_what_lies_in_the_current_folder_is_not_run_by_children(name: str, tmp_path: Path) -> None:
    """The whole start of a child, from a folder with a trap in it."""
    trap = tmp_path / name
    if trap.suffix:
        trap.write_text("raise SystemExit('trapped')\n")
    else:
        trap.mkdir()
        (trap / "__init__.py").write_text("raise SystemExit('trapped')\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-P", "-c", START_A_CHILD]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "trapped" not in ended.stdout + ended.stderr
    assert "KeyError: 'MOE_SERVE_MEMBER'" in ended.stdout, "it got as far as asking who it is"
