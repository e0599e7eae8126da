"""What can be seen of this machine: read here, judged elsewhere (judge_machine.py). Every wait has a bound."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import platform
import resource
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from moe_serve.base.interpreter import child_environment
from moe_serve.base.version import package_version
from moe_serve.doctor.cgroup import cpu_limit, memory_left

TORCH_SECONDS = 120.0
GPU_SECONDS = 20.0
NAME_SECONDS = 10.0
TIME_ERROR = 5
"""What adjtimex(2) returns when nobody keeps the clock."""
ASK_TORCH = """
import json, torch
from moe_kernels import paths
print(json.dumps({"version": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(),
    "cuda": torch.version.cuda or "", "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    "kernels": list(paths.available()), "no_kernels": "" if paths.available() else paths.why_none()}))
"""


class TorchFacts(msgspec.Struct, frozen=True):
    """As a fresh process that imports torch says. `problem` where it could not.

    `kernels` that were compiled and can run here, best first; where there are none, why.
    """

    version: str = ""
    cpu: str = ""
    cuda: str = ""
    gpus: int = 0
    problem: str = ""
    kernels: list[str] = []
    no_kernels: str = ""


class NameFacts(msgspec.Struct, frozen=True):
    """A name and its addresses, in the order of the resolver. `problem` where there are none."""

    name: str
    addresses: list[str] = []
    problem: str = ""


class PortFacts(msgspec.Struct, frozen=True):
    """Whether one could listen at a port. `asked`: somebody named it."""

    port: int
    free: bool
    asked: bool
    problem: str = ""


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, seconds and counts. None where it cannot be told."""

    python: str
    package: str
    installed_torch: str
    torch: TorchFacts
    machine: str
    cpu_flags: list[str]
    cores: int
    usable_cores: int
    cpu_limit: float | None
    available_memory: int | None
    cgroup_memory: tuple[int, int] | None
    shm_kind: str
    shm_size: int
    shm_free: int
    descriptors: tuple[int, int]
    gpus: list[str]
    gpu_driver: bool
    own_name: NameFacts
    clock_kept: bool | None
    ports: list[PortFacts]
    environment: dict[str, str]
    proxied: list[str]
    misspelt: list[str]


def read_machine(ports: Iterable[int], *, asked: bool, misspelt: Iterable[str]) -> MachineFacts:
    """Everything of this machine. `ports` are tried; `misspelt` sentences about variables come from who knows them."""
    size, free = _shm()
    return MachineFacts(
        python=platform.python_version(),
        package=package_version(),
        installed_torch=_installed("torch"),
        torch=ask_torch(),
        machine=platform.machine(),
        cpu_flags=_cpu_flags(),
        cores=os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)),
        cpu_limit=cpu_limit(),
        available_memory=_available_memory(),
        cgroup_memory=memory_left(),
        shm_kind=_kind_of_mount("/dev/shm"),
        shm_size=size,
        shm_free=free,
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE),
        gpus=_gpus(),
        gpu_driver=Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists(),
        own_name=look_up(socket.gethostname()),
        clock_kept=clock_is_kept(),
        ports=[try_port(port, asked=asked) for port in ports],
        environment={name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        proxied=proxied_hosts(["127.0.0.1", "localhost", socket.gethostname()]),
        misspelt=list(misspelt),
    )


THREAD_VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"),
    *("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"),
)


def look_up(name: str, seconds: float = NAME_SECONDS) -> NameFacts:
    """Addresses of a name, IPv4 and IPv6, each once. A resolver that does not answer is left alone after `seconds`."""
    found: list[NameFacts] = []

    def ask() -> None:
        try:
            answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            found.append(NameFacts(name, list(dict.fromkeys(str(answer[4][0]) for answer in answers))))
        except (OSError, UnicodeError) as error:
            found.append(NameFacts(name, problem=getattr(error, "strerror", None) or str(error)))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return found[0] if found else NameFacts(name, problem=f"the resolver gave no answer in {seconds:g} s")


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def clock_is_kept() -> bool | None:
    """Whether something keeps this machine's clock as the kernel says; None if it does not say."""
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(1024))  # all zero: only reads
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != TIME_ERROR


def try_port(port: int, *, asked: bool) -> PortFacts:
    """As a server would listen: old connections of an ended one do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            return PortFacts(port, False, asked, error.strerror or str(error))
    return PortFacts(port, True, asked)


def proxied_hosts(hosts: Iterable[str]) -> list[str]:
    """Those whose HTTP would go through a proxy that the environment names."""
    proxies = urllib.request.getproxies_environment()
    if not {"http", "all"} & proxies.keys():
        return []
    return [host for host in dict.fromkeys(hosts) if not urllib.request.proxy_bypass(host)]


def ask_torch(seconds: float = TORCH_SECONDS) -> TorchFacts:
    """In a process of its own: torch takes seconds to load, may crash, and may hold a GPU."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", ASK_TORCH],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env=child_environment(),
        )
    except subprocess.TimeoutExpired:
        return TorchFacts(problem=f"torch was not loaded within {seconds:g} s")
    try:
        return msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=TorchFacts)
    except (IndexError, msgspec.MsgspecError):
        said = done.stderr.strip().splitlines()
        return TorchFacts(problem=said[-1] if said else f"the process ended with {done.returncode}")


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu_flags() -> list[str]:
    """Instruction sets, as the kernel names them ("flags" of x86, "Features" of ARM)."""
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return value.split()
    return []


def _available_memory() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _shm() -> tuple[int, int]:
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return 0, 0
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


def _kind_of_mount(path: str) -> str:
    """The file system mounted there; "" if none is."""
    kinds = [line.split()[2] for line in _lines("/proc/mounts") if line.split()[1:2] == [path]]
    return kinds[-1] if kinds else ""


def _gpus() -> list[str]:
    """Name, driver and memory of each NVIDIA GPU; whatever is no such line is passed over."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=GPU_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.count(",") == 2] if done.returncode == 0 else []


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
