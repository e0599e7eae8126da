"""What the facts of a machine mean for a server on it. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from moe_serve.doctor.finding import Finding, failure, ok, warning
from moe_serve.doctor.machine import MachineFacts, NameFacts, PortFacts, TorchFacts, is_loopback

GIB = 2**30
LEAST_PYTHON = (3, 11)
LEAST_MEMORY = GIB
LEAST_SHM = GIB
LEAST_DESCRIPTORS = 4096
FAST_SETS = ("avx512f", "avx512_bf16", "amx_bf16", "avx2", "asimd", "sve", "bf16", "asimdhp")


def judge_machine(facts: MachineFacts) -> list[Finding]:
    """One finding for each check, in the order in which a reader wants them."""
    return [
        _versions(facts),
        _torch(facts.torch, facts.installed_torch),
        _gpus(facts),
        _instructions(facts),
        _kernels(facts.torch),
        _cores(facts),
        _memory(facts),
        _shm(facts),
        _descriptors(*facts.descriptors),
        _own_name(facts.own_name),
        _clock(facts.clock_kept),
        *map(_port, facts.ports),
        *_threads(facts),
        _variables(facts.misspelt),
        _proxies(facts.proxied),
    ]


def _versions(facts: MachineFacts) -> Finding:
    found = f"moe-serve {facts.package}, Python {facts.python}, torch {facts.installed_torch or 'not installed'}"
    if tuple(int(part) for part in facts.python.split(".")[:2]) < LEAST_PYTHON:
        return failure("versions", found, "this Python is too old", "install Python 3.11 or later")
    return ok("versions", found, "must be equal on all machines of a world")


def _torch(torch: TorchFacts, installed: str) -> Finding:
    if torch.problem:
        return failure("torch", torch.problem, "no rank can start here", "pip install moe-serve in this environment")
    found = f"torch {torch.version} loads; {f'CUDA {torch.cuda}' if torch.cuda else 'built for the CPU'}"
    if installed and torch.version.partition("+")[0] != installed.partition("+")[0]:
        return warning(
            "torch",
            f"{found}, but {installed} is what is installed",
            "another folder on the import path brings a torch of its own",
            "look at PYTHONPATH",
        )
    return ok("torch", found)


def _gpus(facts: MachineFacts) -> Finding:
    seen, torch = facts.torch.gpus, facts.torch
    if not facts.gpus and not facts.gpu_driver:
        return ok("GPUs", "none", "ranks compute on the CPU")
    found = "; ".join(facts.gpus) or "a driver, but no GPU is listed (nvidia-smi)"
    if seen:
        return ok("GPUs", f"{found}; torch sees {seen}")
    why = "is built for the CPU" if not torch.cuda else f"is built for CUDA {torch.cuda} and cannot use this driver"
    return warning(
        "GPUs",
        f"{found}; torch sees none",
        f"this torch {why}: ranks would compute on the CPU",
        "install the torch build for this driver; look at CUDA_VISIBLE_DEVICES",
    )


def _instructions(facts: MachineFacts) -> Finding:
    known = [flag for flag in FAST_SETS if flag in facts.cpu_flags]
    found = f"{facts.machine}: {', '.join(known) or 'no vector instructions known'}"
    if facts.torch.cpu:
        found += f"; torch uses {facts.torch.cpu}"
    if facts.machine == "x86_64" and "avx2" not in known:
        return warning(
            "instruction sets",
            found,
            "without AVX2 a step on this CPU takes several times as long",
            "in a virtual machine, pass the host's CPU model through",
        )
    return ok("instruction sets", found)


def _kernels(torch: TorchFacts) -> Finding:
    if torch.no_kernels:
        return warning(
            "compiled kernels",
            f"none ({torch.no_kernels})",
            "in bfloat16 on a CPU torch computes alone, several times slower where it has no AVX-512",
            "install a C++ compiler (Debian: g++) and pip install moe-serve again",
        )
    return ok("compiled kernels", ", ".join(torch.kernels) or "not asked")


def _cores(facts: MachineFacts) -> Finding:
    found = f"{facts.usable_cores} of {facts.cores} cores may be used"
    limit = facts.cpu_limit
    if limit is not None and limit < facts.usable_cores:
        return warning(
            "cores",
            f"{found}, but only {limit:g} CPUs' worth of time (cgroup)",
            "ranks take a thread for each core; once the time is used up all of them stand still for the rest of each "
            "period, in the middle of exchanges",
            "give the container whole cores (Kubernetes: equal CPU requests and limits with the static CPU manager), "
            f"or start the server under `taskset` on {max(1, int(limit))} of them",
        )
    return ok("cores", found if limit is None else f"{found}; the cgroup's limit is {limit:g}")


def _memory(facts: MachineFacts) -> Finding:
    left, words = facts.available_memory, []
    if left is not None:
        words.append(f"{left / GIB:.1f} GiB available")
    if facts.cgroup_memory is not None:
        limit, room = facts.cgroup_memory
        words.append(f"{room / GIB:.1f} GiB left of the cgroup's {limit / GIB:.1f} GiB")
        left = room if left is None else min(left, room)
    if left is None:
        return ok("memory", "cannot be told")
    found = ", ".join(words)
    if left < LEAST_MEMORY:
        return warning(
            "memory",
            found,
            "weights and KV cache may not fit; beyond the limit the kernel kills a process without a word",
            "free memory or raise the limit; `moe-serve plan` says what a model needs",
        )
    return ok("memory", found)


def _shm(facts: MachineFacts) -> Finding:
    kind = facts.shm_kind or "no mount of its own"
    found = f"{facts.shm_free / GIB:.2f} GiB free of {facts.shm_size / GIB:.2f} GiB ({kind})"
    if facts.shm_size == 0 or facts.shm_free < LEAST_SHM:
        return warning(
            "/dev/shm",
            found,
            "ranks on one machine exchange GPU tensors through it (NCCL); gloo on the CPU does without",
            "docker: --shm-size; Kubernetes: an emptyDir of medium Memory at /dev/shm",
        )
    return ok("/dev/shm", found)


def _descriptors(soft: int, hard: int) -> Finding:
    found = f"{_limit(soft)} (soft), {_limit(hard)} (hard)"
    if 0 <= hard < LEAST_DESCRIPTORS:
        return warning(
            "open files",
            found,
            "each connection takes one; the server raises the soft limit to the hard one and refuses what is beyond",
            "raise the hard limit (ulimit -Hn, LimitNOFILE of systemd)",
        )
    return ok("open files", found, "the server raises the soft limit to the hard one")


def _limit(value: int) -> str:
    return "unlimited" if value < 0 else str(value)


def _own_name(name: NameFacts) -> Finding:
    if name.problem:
        return warning(
            "own name",
            f"{name.name} does not resolve: {name.problem}",
            "other machines cannot be given this name as --data-parallel-address",
            "give them an address, or put the name into DNS or /etc/hosts",
        )
    found = f"{name.name} is {', '.join(name.addresses)}"
    if all(map(is_loopback, name.addresses)):
        return warning(
            "own name",
            f"{found}, loopback only",
            "given as --data-parallel-address on this machine, rank 0 would listen where nobody else can reach it",
            "give the address by which others reach this machine, or mend /etc/hosts",
        )
    return ok("own name", found)


def _clock(kept: bool | None) -> Finding:
    if kept is None:
        return ok("clock", "whether somebody keeps it cannot be told here")
    if kept:
        return ok("clock", "kept by somebody (NTP, PTP or the hypervisor), as the kernel says")
    return warning(
        "clock",
        "nobody keeps it, as the kernel says",
        "nothing in a world relies on equal clocks, but log lines of several machines cannot be laid side by side",
        "run chrony or systemd-timesyncd",
    )


def _port(port: PortFacts) -> Finding:
    check = f"port {port.port}"
    if port.free:
        return ok(check, "free")
    told = (
        f"one cannot listen there: {port.problem}",
        "a server that is given this port would end with exit code 2",
        "end what holds it (`ss -ltnp`), or give another (--port, --data-parallel-rpc-port)",
    )
    return failure(check, *told) if port.asked else warning(check, *told)


def _threads(facts: MachineFacts) -> list[Finding]:
    given = facts.environment
    problems: list[tuple[str, ...]] = []
    if "ACTIVE" in given.get("OMP_WAIT_POLICY", "").upper() or given.get("KMP_BLOCKTIME", "") == "infinite":
        problems.append(("idle threads never sleep", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"))
    if given.get("GOMP_SPINCOUNT", "0").lower() == "infinity" or _int(given.get("GOMP_SPINCOUNT", "0")) > 10**6:
        problems.append(("idle threads spin for long before they sleep", "GOMP_SPINCOUNT"))
    bound = [
        name
        for name in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
        if given.get(name, "").lower() not in ("", "false", "none", "disabled")
    ]
    if bound:
        problems.append(("each rank binds its threads to the same first cores", *bound))
    if not problems:
        shown = ", ".join(f"{name}={value}" for name, value in given.items()) or "nothing set"
        return [ok("threads", shown, "ranks get their share of the cores themselves")]
    return [
        warning(
            "threads",
            ", ".join(f"{name}={given[name]}" for name in names if name in given),
            f"{what}, and where ranks share cores a step takes up to twenty times as long",
            f"unset {', '.join(name for name in names if name in given)}",
        )
        for what, *names in problems
    ]


def _int(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _variables(misspelt: Iterable[str]) -> Finding:
    sentences = list(misspelt)
    if not sentences:
        return ok("MOE_SERVE_ variables", "none that is no option")
    return failure(
        "MOE_SERVE_ variables",
        "; ".join(sentences),
        "`moe-serve serve` refuses to start with them",
        "correct or unset them",
    )


def _proxies(hosts: list[str]) -> Finding:
    if not hosts:
        return ok("proxies", "no proxy of the environment catches HTTP to this machine")
    return warning(
        "proxies",
        f"HTTP to {', '.join(hosts)} would go through the proxy that the environment names",
        "clients on this machine, health checks and scrapers may reach the proxy instead of the server",
        f"add {','.join(hosts)} to no_proxy",
    )
