"""`moe-serve k8s` as one types it: what it prints, what it refuses and how."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_serve.cli.main import main
from moe_serve.model.all2all.limits import LIMITS

WORLD = ("--name", "w", "--image", "i", "-dp", "16")
NODES = (*WORLD, "--shape", "node", "-dpl", "8")
IN_ONE_HOST = [name for name, limits in LIMITS.items() if limits.host_memory is not None]


def k8s(*arguments: str) -> int:
    return main(["k8s", *arguments])


def test_render_writes_yaml_and_nothing_else_to_standard_output(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe_serve", "k8s", "render", *WORLD, "--target", "inferencepool"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    kinds = [document["kind"] for document in yaml.safe_load_all(done.stdout)]
    assert {"StatefulSet", "InferencePool", "HTTPRoute"} < set(kinds)
    assert "kubectl create secret generic w-world --from-literal=token=" in done.stdout


def test_options_come_from_the_environment_and_a_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "options.yaml").write_text("data_parallel_size: 5\nport: 9001\nimage: from-the-file\n")
    monkeypatch.setenv("MOE_SERVE_PORT", "9002")
    assert k8s("render", "--name", "w", "--config", str(tmp_path / "options.yaml")) == 0
    documents = {each["kind"]: each for each in yaml.safe_load_all(capsys.readouterr().out)}
    spec = documents["StatefulSet"]["spec"]
    assert spec["replicas"] == 5
    (container,) = spec["template"]["spec"]["containers"]
    assert container["image"] == "from-the-file"
    assert container["ports"][0]["containerPort"] == 9002


def test_every_render_line_of_the_page_renders(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "kubernetes" / "README.md").read_text()
    lines = re.findall(r"^moe-serve k8s (render .*) > (\S+)\.yaml$", page, re.MULTILINE)
    assert len(lines) == 3
    for line, name in lines:
        assert k8s(*line.split()) == 0
        made = re.search(r"create secret generic .*", capsys.readouterr().out)
        assert made is not None
        assert f"kubectl {made[0]}\n" in page
        assert f"kubectl apply -f {name}.yaml" in page


def test_a_dashboard_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert k8s("dashboard") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "moe-serve"


def test_help_lists_the_options_of_the_cluster_and_of_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert k8s("--help") == 0
    assert "render" in capsys.readouterr().out
    assert k8s() == 2
    capsys.readouterr()
    assert k8s("render", "--help") == 0
    printed = capsys.readouterr().out
    assert "--model-claim" in printed
    assert "--tensor-parallel-size" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["play"], "unknown command k8s play; known are: render, dashboard"),
        (["dashboard", "--name", "x"], "takes no arguments"),
        (["render"], "k8s render needs --name and --image"),
        (["render", "--name", "w"], "k8s render needs --image"),
        (["render", *WORLD, "--name", "Big"], "'Big' is no name for pods"),
        (["render", *WORLD, "--name", "9w"], "a letter first"),
        (["render", *WORLD, "--name", "w-"], "no hyphen last"),
        (["render", *WORLD, "--name", "w" * 41], "at most 40 characters"),
        (["render", *WORLD, "--service", "a.b"], "'a.b' is no name for pods and services"),
        (["render", *WORLD, "--service", "w-ranks"], "the name under which the ranks find each other"),
        (["render", *WORLD, "--namespace", "a_b"], "'a_b' is no namespace"),
        (["render", *WORLD, "--image", "my image"], "'my image' is no image"),
        (["render", *WORLD, "--memory", "lots"], "memory: 'lots' is no quantity"),
        (["render", *WORLD, "--cpu", "0"], "cpu: '0' is no quantity"),
        (["render", *WORLD, "--rdma-resource", "ib"], "it looks like rdma/ib"),
        (["render", *WORLD, "--model-claim", "A"], "'A' is no name of an object"),
        (["render", *WORLD, "--model-claim", "c"], "no effect without a MODEL"),
        (["render", "/data/m", *WORLD, "--model-claim", "c"], "outside of /models"),
        (["render", "models/here/mine", *WORLD], "neither an owner/name"),
        (["render", "./mine", *WORLD], "neither an owner/name"),
        (["render", *WORLD, "--target", "helm"], "'statefulset', 'leaderworkerset' or 'inferencepool'"),
        (["render", *WORLD, "--shape", "node"], "--shape node needs --data-parallel-size-local"),
        (["render", *WORLD, "--shape", "node", "-dpl", "5"], "a divisor of data_parallel_size (16)"),
        (["render", *WORLD, "--shape", "node", "-dpl", "16"], "a pool names 8 ports of a pod at most"),
        (["render", *WORLD, "-dpl", "8"], "--shape rank has one rank in each pod"),
        (
            ["render", *WORLD, "-dpb", "ray"],
            "data_parallel_backend ray needs nodes of a Ray cluster, and these",
        ),
        (["render", *WORLD, "-dpl", "8", "-dpm"], "leave it out, or give --shape node"),
        (["render", *WORLD, "-n", "2"], "nnodes spreads the ranks of one engine over nodes, and a pod here has whole"),
        (["render", *WORLD, "--master-addr", "h", "-n", "2"], "master_addr and nnodes spreads"),
        (["render", *NODES, "--node-rank", "1"], "node_rank follows from a pod's place"),
        (["render", *NODES, "--port", "65530"], "which reach beyond 65535; give one up to 65528"),
        (["render", *NODES, "--data-parallel-supervisor-port", "8007"], "lies among the ports of this node's ranks"),
        (["render", *NODES, "-dpp", "8003"], "port and data_parallel_rpc_port must differ, or a port that follows"),
        (["render", *NODES, "-dpp", "9256"], "data_parallel_supervisor_port and data_parallel_rpc_port must differ"),
        (["render", *NODES, "--data-parallel-supervisor-port", "80"], "data_parallel_supervisor_port (80) must be at"),
        (["render", *NODES[:5], "1", "--shape", "node", "-dpl", "1"], "needs data_parallel_size > 1"),
        (["render", *NODES, "--all2all-backend", "shm"], "by file descriptors, which cannot leave a host"),
        (["render", *WORLD, "--data-parallel-rank", "1"], "data_parallel_rank follows from a pod's place"),
        (["render", *WORLD, "--data-parallel-address", "h"], "data_parallel_address follows from"),
        (["render", *WORLD, "--all2all-backend", "deepep_high_throughput"], "by CUDA IPC, which does not reach"),
        (["render", *WORLD, "--host", "127.0.0.1"], "reached from within its pod only"),
        (["render", *WORLD, "--distributed-executor-backend", "ray"], "needs nodes of a Ray cluster, and these"),
        (["render", *WORLD, "--port", "80"], "port (80) must be at least 1024"),
        (["render", *WORLD, "--port", "0"], "port (0) must be at least 1024"),
        (["render", *WORLD, "--port", "29550"], "must differ (both are 29550)"),
        (["render", *WORLD, "--world-token-file", "absent"], "--world-token-file absent cannot be read"),
        (["render", *WORLD, "--world-token-file", "short"], "5 characters"),
        (["render", *WORLD, "-ep", "--expert-placement-file", "short"], "is no placement"),
        (["render", *WORLD, "-ep", "--expert-placement-file", "two"], "is for 2 ranks, and this world has 16"),
        (["render", *WORLD, "-ep", "--expert-placement-file", "large"], "a ConfigMap holds 900000"),
        (["render", *WORLD, "-tp", "3"], "--tensor-parallel-size 3 does not divide"),
        (["render", *WORLD, "--max-model-len", "9999999"], "more than the checkpoint allows"),
        (["render", *WORLD, "--imag", "i"], "did you mean --image?"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("short\n")
    (tmp_path / "two").write_text('{"num_ranks": 2}')
    (tmp_path / "large").write_text("x" * 900_001)
    assert k8s(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    complaint = printed.err.splitlines()[0]
    assert complaint.startswith("moe-serve: ")
    assert words in complaint


@pytest.mark.parametrize("name", IN_ONE_HOST)
def test_a_backend_that_shares_a_hosts_memory_is_refused_across_pods_and_not_for_that_within_one(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--all2all-backend", name)
    assert k8s("render", *WORLD, *asked) == 2
    complaint = capsys.readouterr().err
    assert f"all2all_backend {name} hands memory to the ranks of its host by" in complaint
    assert "--shape node" in complaint
    assert all(built in complaint for built in ("allgather_reducescatter", "torch_a2a"))
    k8s("render", *WORLD[:-1], "8", "--shape", "node", "-dpl", "8", *asked)
    assert "hands memory" not in capsys.readouterr().err
