"""`moe-serve plan`: tables for people, JSON for machines, one sentence for what cannot be; quick, without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_serve.cli.main import main
from moe_serve.cli.plan import node_line, spans
from moe_serve.launch.resolve import SHIPPED_MODEL
from tests.support.server import serving

WORLD = ("-dp", "2", "-tp", "2", "-ep", "--enable-eplb", "--eplb-config.num-redundant-experts", "4")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The default model's config.json and nothing else."""
    (tmp_path / "config.json").write_text((SHIPPED_MODEL / "config.json").read_text())
    return tmp_path


def test_people_get_tables_of_ranks_and_nodes(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(bare), *WORLD, "--memory-bytes", str(2**30)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in (
        "experts spread over 4 ranks",
        "9: 0-8",
        "worker dp 1 tp 1",
        "HTTP: 127.0.0.1:8000",
        "tokens in each",
    ):
        assert words in out
    assert max(map(len, out.splitlines()[1:-2])) <= 120


def test_machines_get_json(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json", str(bare), *WORLD]) == 0
    world = json.loads(capsys.readouterr().out)
    assert [rank["ep"] for rank in world["ranks"]] == [0, 1, 2, 3]
    assert world["ranks"][3]["experts"][0] == [27, 28, 29, 30, 31, 0, 1, 2, 3]
    assert world["kv_tokens"] is None
    assert [port["port"] for port in world["nodes"][0]["ports"]] == [0, 0, 8000]


def test_one_engine_over_nodes_gets_the_line_for_every_node(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["-tp", "2", "-n", "2", "-r", "1", "--master-addr=HOST0", "--port", "81", "--served-model-name", "a b"]
    common = f"moe-serve serve {bare} -tp 2 -n 2 --master-addr=HOST0"
    lines = [
        f"{common} --port 81 --served-model-name 'a b' --node-rank 0",
        f"{common} --served-model-name 'a b' --node-rank 1",
    ]
    assert main(["plan", str(bare), *given]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"on node {node}: {line}" for node, line in enumerate(lines)]
    assert main(["plan", "--json", str(bare), *given]) == 0
    assert json.loads(capsys.readouterr().out)["lines"] == lines
    assert node_line(["--node_rank=0", "--api-server-count=2", "-tp", "2"], 1) == (
        "moe-serve serve -tp 2 --node-rank 1"
    ), "what only node 0 has is left out"


def test_experts_that_are_cut_say_which_part(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(bare), "-tp", "2"]) == 0
    out = capsys.readouterr().out
    width = json.loads((bare / "config.json").read_text())["moe_intermediate_size"]
    assert f"each cut to columns 0-{width // 2 - 1}" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-tp", "3"], "--tensor-parallel-size 3 does not divide"),
        (["-dp", "2", "-pp", "7"], "6 layers cannot be spread over 7 pipeline stages"),
        (["-dp", "2", "-ep", "--enable-eplb", "--eplb-config.num-redundant-experts", "99"], "more than can be of use"),
        (["--max-model-len", "99999999"], "lower --max-model-len"),
        (["--memory-bytes", "1000"], "spread the model over more ranks"),
        (["--memory-bytes", "0"], "--memory-bytes must be at least 1"),
        (["--memory-bytes", "many"], "--memory-bytes"),
        (["--no-such-option"], "unknown option --no-such-option"),
        (["-dp", "2", "-dpa", "127.0.0.1", "--port", "29550"], "both listen at port 29550"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_sentence_and_code_2(
    bare: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["plan", str(bare), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) <= 2


def test_help_has_the_options_of_serve_and_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    for words in ("moe-serve plan [MODEL]", "--data-parallel-size", "--memory-bytes", "--json"):
        assert words in out


def test_torch_is_never_loaded(bare: Path) -> None:
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise AssertionError(f"{name} was loaded")
sys.meta_path.insert(0, Refuse())
from moe_serve.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "plan", str(bare), *WORLD, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["ranks"]) == 4


def test_runs_of_numbers_are_named_by_their_ends() -> None:
    assert spans([27, 28, 29, 0, 1, 5]) == "27-29, 0-1, 5"
    assert spans([]) == "none"


@pytest.mark.long
@pytest.mark.ranks
def test_what_is_served_is_what_was_planned(capsys: pytest.CaptureFixture[str]) -> None:
    given = (*WORLD, "--kv-cache-memory-bytes", str(2**24), "--dtype", "float32")
    assert main(["plan", *given, "--json"]) == 0
    world = json.loads(capsys.readouterr().out)
    with serving(*given) as server:
        commands = [" ".join(process.cmdline()) for process in server.family()]
        placement = server.get("/eplb").json()["placement"]
        log = server.log()
    modules = {
        "engine": "moe_serve.engine.process",
        "worker": "moe_serve.worker.process",
        "API": "moe_serve.api.server",
    }
    modules |= {"solver": "moe_serve.world.solver_process", "launcher,": "moe_serve serve"}
    planned = [modules[process["name"].split()[0]] for process in world["nodes"][0]["processes"]]
    assert sorted(planned) == sorted(module for each in commands for module in modules.values() if module in each)
    held = [expert for rank in world["ranks"] for expert in rank["experts"][0]]
    assert placement["physical_to_logical"][0] == held
    loaded = {
        (float(mib), int(tokens)) for mib, tokens in re.findall(r"loaded ([\d.]+) MiB .* cache: (\d+) tokens", log)
    }
    engines = [sum(rank["weight_bytes"] for rank in world["ranks"] if rank["dp"] == dp) for dp in (0, 1)]
    assert loaded == {(round(num_bytes / 2**20, 1), world["kv_tokens"]) for num_bytes in engines}
