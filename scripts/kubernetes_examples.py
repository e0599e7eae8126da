"""Manifests that are kept: examples for readers in docs/kubernetes, and what tests compare with in tests/data/k8s.

Each is what `moe-serve k8s render` writes for the arguments beside it; `python -m scripts.generate_docs` writes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from moe_serve.base.section import ENVIRONMENT_PREFIX
from moe_serve.cli.k8s import parse_render
from moe_serve.deploy.dashboard import dashboard
from moe_serve.deploy.render import render

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "kubernetes"
KEPT = ROOT / "tests" / "data" / "k8s"
WIDE = (
    "Qwen/Qwen3-30B-A3B --name qwen --namespace serving --image registry.example/moe-serve:0.1.0 "
    "-dp 4 -tp 2 -ep --enable-eplb --eplb-config.num-redundant-experts 16 --max-model-len 16384 "
    "--model-claim models --cpu 16 --memory 256Gi --shm-size 16Gi"
)
CASES: dict[Path, str] = {
    EXAMPLES / "statefulset.yaml": WIDE,
    EXAMPLES / "leaderworkerset.yaml": f"{WIDE} --target leaderworkerset",
    EXAMPLES / "inferencepool.yaml": f"{WIDE} --target inferencepool",
    EXAMPLES / "statefulset-node.yaml": f"{WIDE} --shape node -dpl 2",
    EXAMPLES / "inferencepool-node.yaml": f"{WIDE} --shape node -dpl 2 --target inferencepool",
    KEPT / "two-ranks.yaml": "--name demo --image moe-serve:test -dp 2 -ep --device cpu",
    KEPT / "everything.yaml": (
        f"/models/mine --name mine --namespace ns --image moe-serve@sha256:{'0' * 64} -dp 2 -tp 2 -ep "
        "--service chat --model-claim weights --rdma-resource rdma/ib --served-model-name mine --host :: --port 8080 "
        "--data-parallel-rpc-port 29551 --enable-eplb --eplb-config.num-redundant-experts 2 "
        "--eplb-config.window-size 50 --restart-world --start-timeout-seconds 600 --shutdown-timeout 120 "
        "--no-enable-prefix-caching --allowed-origins https://chat.example --api-key client-key "
        "--admin-api-key order-key --world-token-file tests/data/k8s/token.txt "
        "--expert-placement-file tests/data/k8s/placement.json --target inferencepool --gateway front "
        "--endpoint-picker picker"
    ),
    KEPT / "group.yaml": (
        "Qwen/Qwen3-30B-A3B --name demo --image moe-serve:test -dp 3 -ep --target leaderworkerset --no-monitoring"
    ),
    KEPT / "two-nodes.yaml": (
        "--name demo --namespace ns --image moe-serve:test -dp 4 -dpl 2 -ep --shape node --device cpu --port 8100 "
        "--data-parallel-supervisor-port 8200 --data-parallel-rpc-port 8300"
    ),
    KEPT / "node-group.yaml": (
        "--name demo --image moe-serve:test -dp 16 -dpl 8 -tp 2 -ep --shape node --target leaderworkerset "
        "--rdma-resource rdma/ib --no-monitoring"
    ),
    KEPT / "node-pool.yaml": (
        "--name demo --namespace ns --image moe-serve:test -dp 16 -dpl 8 -ep --shape node --target inferencepool"
    ),
}


@cache
def kept_manifests() -> dict[Path, str]:
    """Every manifest, and the dashboard, as they are written now."""
    with _without_options():
        written = {path: render(parse_render(command.split())) for path, command in CASES.items()}
    return {**written, EXAMPLES / "dashboard.json": json.dumps(dashboard(), indent=2) + "\n"}


@contextmanager
def _without_options() -> Iterator[None]:
    """Options in this shell's environment are nobody else's; paths are the project's own."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(ENVIRONMENT_PREFIX)}
    folder = Path.cwd()
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(folder)
        os.environ.update(kept)
