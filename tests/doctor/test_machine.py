"""What facts of a machine mean, and that they are read from a real one."""

from __future__ import annotations

import json
import os
import resource
import socket
from pathlib import Path

import msgspec
import pytest

from moe_serve.doctor.cgroup import cpu_limit, memory_left
from moe_serve.doctor.finding import Finding, Level, exit_code, failure, ok, warning
from moe_serve.doctor.judge_machine import judge_machine
from moe_serve.doctor.machine import (
    MachineFacts,
    NameFacts,
    PortFacts,
    TorchFacts,
    ask_torch,
    clock_is_kept,
    look_up,
    proxied_hosts,
    read_machine,
    try_port,
)

GOOD = MachineFacts(
    python="3.11.9",
    package="0.1.0",
    installed_torch="2.13.0",
    torch=TorchFacts("2.13.0+cpu", "AVX512", "", 0),
    machine="x86_64",
    cpu_flags=["avx2", "avx512f"],
    cores=8,
    usable_cores=8,
    cpu_limit=None,
    available_memory=2**36,
    cgroup_memory=None,
    shm_kind="tmpfs",
    shm_size=2**34,
    shm_free=2**34,
    descriptors=(1024, 2**20),
    gpus=[],
    gpu_driver=False,
    own_name=NameFacts("host-1", ["10.0.0.1"]),
    clock_kept=True,
    ports=[PortFacts(8000, True, False)],
    environment={},
    proxied=[],
    misspelt=[],
)


def judged(**changes: object) -> dict[str, Finding]:
    facts = msgspec.structs.replace(GOOD, **changes)
    return {each.check: each for each in judge_machine(facts)}


def test_a_good_machine_has_nothing_to_mend() -> None:
    assert {each.level for each in judge_machine(GOOD)} == {"ok"}


@pytest.mark.parametrize(
    ("check", "level", "word", "changes"),
    [
        ("versions", "failure", "3.10", {"python": "3.10.4"}),
        ("torch", "failure", "No module", {"torch": TorchFacts(problem="No module named 'torch'")}),
        ("torch", "warning", "2.12", {"torch": TorchFacts("2.12.0", "AVX2")}),
        ("GPUs", "warning", "torch sees none", {"gpus": ["H100, 550, 80 GiB"], "gpu_driver": True}),
        ("instruction sets", "warning", "AVX2", {"cpu_flags": ["sse2"]}),
        ("compiled kernels", "warning", "no g++", {"torch": TorchFacts("2.13.0", "AVX2", no_kernels="no g++")}),
        ("cores", "warning", "1.5 CPUs", {"cpu_limit": 1.5}),
        ("memory", "warning", "0.5 GiB left", {"cgroup_memory": (2**31, 2**29)}),
        ("/dev/shm", "warning", "0.06 GiB", {"shm_size": 2**26, "shm_free": 2**26}),
        ("open files", "warning", "1024 (hard)", {"descriptors": (1024, 1024)}),
        ("own name", "warning", "loopback", {"own_name": NameFacts("host-1", ["127.0.1.1", "::1"])}),
        ("own name", "warning", "not resolve", {"own_name": NameFacts("host-1", [], "unknown")}),
        ("clock", "warning", "nobody", {"clock_kept": False}),
        ("port 8000", "warning", "Address in use", {"ports": [PortFacts(8000, False, False, "Address in use")]}),
        ("port 8000", "failure", "Address in use", {"ports": [PortFacts(8000, False, True, "Address in use")]}),
        ("threads", "warning", "OMP_WAIT_POLICY", {"environment": {"OMP_WAIT_POLICY": "active"}}),
        ("threads", "warning", "GOMP_SPINCOUNT", {"environment": {"GOMP_SPINCOUNT": "INFINITY"}}),
        ("threads", "warning", "OMP_PROC_BIND", {"environment": {"OMP_PROC_BIND": "close"}}),
        ("MOE_SERVE_ variables", "failure", "MOE_SERVE_PRT", {"misspelt": ["MOE_SERVE_PRT is no option"]}),
        ("proxies", "warning", "localhost", {"proxied": ["localhost"]}),
    ],
)
def test_what_hurts_is_found_with_its_number_and_a_way_out(
    check: str, level: Level, word: str, changes: dict[str, object]
) -> None:
    found = judged(**changes)
    assert found[check].level == level
    assert word in f"{found[check].found} {found[check].means}"
    assert found[check].do
    assert {each.level for name, each in found.items() if name != check} == {"ok"}


def test_settings_of_threads_that_do_no_harm_are_only_shown() -> None:
    found = judged(environment={"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "passive", "OMP_PROC_BIND": "false"})
    assert found["threads"].level == "ok"
    assert "OMP_NUM_THREADS=4" in found["threads"].found


def test_a_limit_of_the_cgroup_that_leaves_all_cores_is_fine() -> None:
    assert judged(cpu_limit=8.0)["cores"].level == "ok"


def test_only_failures_make_the_exit_code() -> None:
    assert exit_code([ok("a", ""), warning("b", "", "", "")]) == 0
    assert exit_code([ok("a", ""), failure("b", "", "", "")]) == 1


def cgroup(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    told = folder / "told"
    told.write_text(own)
    for name, text in files.items():
        path = folder / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "mount", told


def test_the_tightest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n", "a/memory.max": "1000\n"}
    files |= {"a/memory.current": "400\n", "a/b/memory.max": "5000", "a/b/memory.current": "100", "memory.max": "max\n"}
    mount, told = cgroup(tmp_path, "0::/a/b\n", files)
    assert cpu_limit(mount, told) == 1.5
    assert memory_left(mount, told) == (1000, 600)


def test_version_1_of_cgroups_is_read_too_and_no_limit_is_none(tmp_path: Path) -> None:
    files = {"cpu/x/cpu.cfs_quota_us": "200000", "cpu/x/cpu.cfs_period_us": "100000", "cpu/cpu.cfs_quota_us": "-1"}
    files |= {"memory/x/memory.limit_in_bytes": "9223372036854771712", "memory/x/memory.usage_in_bytes": "5"}
    mount, told = cgroup(tmp_path, "4:cpu,cpuacct:/x\n3:memory:/x\n", files)
    assert cpu_limit(mount, told) == 2.0
    assert memory_left(mount, told) is None


def test_a_container_whose_mount_is_its_own_group_is_read(tmp_path: Path) -> None:
    mount, told = cgroup(tmp_path, "0::/kubepods/pod7/c9\n", {"cpu.max": "50000 100000"})
    assert cpu_limit(mount, told) == 0.5


def test_a_port_that_somebody_holds_is_not_free_and_is_again_afterwards() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        held = try_port(port, asked=True)
        assert not held.free
        assert "in use" in held.problem
    assert try_port(port, asked=True).free


def test_names_are_looked_up_with_their_addresses_or_a_reason() -> None:
    assert {"127.0.0.1", "::1"} & set(look_up("localhost").addresses)
    assert look_up("no-such-host.invalid").problem
    assert look_up("." * 300).problem


def test_a_resolver_that_does_not_answer_is_left_alone() -> None:
    assert "0 s" in look_up("no-such-host.invalid", seconds=0).problem


def test_a_proxy_catches_what_no_proxy_does_not_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert proxied_hosts(["127.0.0.1"]) == []
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "localhost,.cluster.local")
    assert proxied_hosts(["127.0.0.1", "localhost", "a.cluster.local"]) == ["127.0.0.1"]


def test_this_machine_is_read_and_agrees_with_what_python_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_serve.doctor.machine.ask_torch", lambda: TorchFacts(problem="not asked"))
    facts = read_machine([0], asked=False, misspelt=[])
    assert facts.usable_cores == len(os.sched_getaffinity(0))
    assert facts.descriptors == resource.getrlimit(resource.RLIMIT_NOFILE)
    assert facts.own_name.name == socket.gethostname()
    assert facts.available_memory is None or facts.available_memory > 0
    assert clock_is_kept() in (True, False, None)
    assert json.loads(msgspec.json.encode(facts))["ports"] == [{"port": 0, "free": True, "asked": False, "problem": ""}]


@pytest.mark.long
def test_torch_is_asked_in_a_process_of_its_own_and_a_late_one_is_told() -> None:
    facts = ask_torch()
    assert not facts.problem
    assert facts.version.startswith("2.")
    assert "within 0 s" in ask_torch(seconds=0).problem
