"""Pods without a cluster: one network namespace per pod, and a real load balancer in front of their ranks.

    Pods    namespaces on one switch, each with an address, a host name, a view of processes and a /dev/shm of its own
    Ranks   one `moe-serve serve --data-parallel-rank R` (or a node's part of a world) in each, started again whenever
            it ends, as a kubelet does
    Proxy   haproxy in a namespace of its own: least connections, health checks on /readyz

Needs root (or CAP_SYS_ADMIN), `ip`, `unshare` and haproxy; `why_not()` says what is missing. As a command, a demo:
`python -m bench.pods --ranks 4 --kills 10` kills one rank after the other, rank 0 among them, under load, and says how
long the world was away each time and how the requests ended that were under way.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import ctypes
import math
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from rich.console import Console

from bench.command import keep, parser_for
from bench.pods_traffic import Traffic
from bench.report import ROOT, Report, spread

CLONE_NEWNET = 0x40000000
HTTP_PORT = 8000
RPC_PORT = 29550
STREAM_TOKENS = 400
TOOLS = ("ip", "unshare", "haproxy")
SMALL = ("-ep", "--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", str(2**24))
console = Console(stderr=True)
Value = TypeVar("Value")


def why_not(tools: Sequence[str] = TOOLS) -> str:
    """Why pods cannot be made here, or the other `tools` be had; "" if they can."""
    missing = [tool for tool in tools if shutil.which(tool, path=search_path()) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install iproute2 util-linux haproxy)"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    return "" if tried.returncode == 0 else f"namespaces are not permitted: {tried.stderr.decode().strip()}"


def search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def run(*command: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": search_path()}
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


class Pods:
    """`names` on one switch. Their names resolve in all of them, as a headless Service's would."""

    def __init__(self, names: Sequence[str]) -> None:
        self._mark = secrets.token_hex(3)
        self.addresses = {name: f"10.213.7.{10 + place}" for place, name in enumerate(names)}
        self._switch = f"sw{self._mark}"
        self._etc: list[Path] = []
        self._links: dict[str, str] = {}
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def namespace(self, name: str) -> str:
        return f"{name}-{self._mark}"

    def start(
        self, name: str, command: Sequence[str], environment: dict[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """A process as the first of a pod: PID 1, with its own host name and /dev/shm."""
        inside = f'hostname {name}; mount -t tmpfs shm /dev/shm; exec "$@"'
        apart = ["unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        told = ["ip", "netns", "exec", self.namespace(name), *apart, "sh", "-c", inside, "sh", *command]
        with log.open("ab") as out:
            return subprocess.Popen(
                told,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**environment, "PATH": search_path()},
            )

    def inside(self, name: str, work: Callable[[], Value]) -> Value:
        """Do something in a thread whose sockets are of a pod's network."""
        results: list[Value] = []
        errors: list[BaseException] = []

        def enter() -> None:
            try:
                self._enter(name)
                results.append(work())
            except BaseException as error:  # noqa: BLE001 (told to the caller)
                errors.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def set_link(self, name: str, *, up: bool) -> None:
        """Plug a pod's cable in, or pull it, at the switch."""
        self._in_switch("ip", "link", "set", self._links[name], "up" if up else "down")

    def set_mtu(self, name: str, size: int) -> None:
        """Of a pod's link at the switch, which drops larger packets without a word. Pods send whole packets then:
        what the kernel hands over in one piece to be cut later would slip through."""
        for pod in self.addresses:
            run("ip", "-n", self.namespace(pod), "link", "set", "eth0", "gso_max_segs", "1")
        self._in_switch("ip", "link", "set", self._links[name], "mtu", str(size))

    def close(self) -> None:
        """Remove the namespaces; processes in them must have ended."""
        for name in self.addresses:
            with contextlib.suppress(RuntimeError):
                run("ip", "netns", "del", self.namespace(name))
        with contextlib.suppress(RuntimeError):
            run("ip", "netns", "del", self._switch)
        for folder in self._etc:
            shutil.rmtree(folder, ignore_errors=True)

    def _enter(self, name: str) -> None:
        handle = os.open(f"/run/netns/{self.namespace(name)}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(handle)

    def _make(self) -> None:
        run("ip", "netns", "add", self._switch)
        self._in_switch("ip", "link", "add", "bridge", "type", "bridge")
        self._in_switch("ip", "link", "set", "bridge", "up")
        hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        for place, (name, address) in enumerate(self.addresses.items()):
            own = self.namespace(name)
            run("ip", "netns", "add", own)
            folder = Path("/etc/netns") / own  # `ip netns exec` puts these over /etc
            folder.mkdir(parents=True)
            self._etc.append(folder)
            (folder / "hosts").write_text(hosts)
            link = self._links[name] = f"p{place}"
            run("ip", "link", "add", link, "netns", self._switch, "type", "veth", "peer", "name", "eth0", "netns", own)
            self._in_switch("ip", "link", "set", link, "master", "bridge", "up")
            for order in ("link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up"):
                run("ip", "-n", own, *order.split())

    def _in_switch(self, *command: str) -> None:
        run("ip", "netns", "exec", self._switch, *command)


class Ranks:
    """One rank per pod, or what `parts` says (name -> options; `-dp` among them). The first has rank 0.

    Whatever ends is started again after a moment, until `close()`. `servers` are the names that speak HTTP.
    """

    def __init__(
        self,
        pods: Pods,
        names: Sequence[str],
        model: str,
        *options: str,
        folder: Path,
        parts: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._pods, self.names, self._folder = pods, list(names), folder
        self._parts = parts or {
            name: ("-dp", str(len(names)), "--data-parallel-rank", str(rank)) for rank, name in enumerate(names)
        }
        self.servers = [name for name in names if "--headless" not in self._parts[name]]
        meeting = ("--data-parallel-address", names[0], "--data-parallel-rpc-port", str(RPC_PORT))
        self._command = (sys.executable, "-m", "moe_serve", "serve", model, *meeting)
        self._options = ("--host", "0.0.0.0", "--port", str(HTTP_PORT), *SMALL, *options)
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
            "MOE_SERVE_WORLD_TOKEN": secrets.token_hex(16),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ends: list[tuple[str, int]] = []
        """Name and exit code of each rank that has ended."""
        self._closing = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    def start(self, order: Sequence[str] | None = None, pause: float = 0.0) -> None:
        for name in order or self.names:
            self._start(name)
            time.sleep(pause)
        self._watching.start()

    def log(self, name: str) -> str:
        path = self._folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self, name: str) -> None:
        """The whole pod at once, as when its node is lost."""
        process = self._processes[name]
        for each in reversed(psutil.Process(process.pid).children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()

    def terminate(self, name: str) -> None:
        """SIGTERM to the pod's first process."""
        first = psutil.Process(self._processes[name].pid)
        while first.name() in ("ip", "unshare"):
            first = first.children()[0]
        first.send_signal(signal.SIGTERM)

    def get(self, client: str, name: str, path: str, timeout: float = 2.0) -> int:
        """Status of a rank's answer, seen from pod `client`; 0 where there is none."""

        def ask() -> int:
            try:
                return httpx.get(f"http://{self._pods.addresses[name]}:{HTTP_PORT}{path}", timeout=timeout).status_code
            except httpx.HTTPError:
                return 0

        return self._pods.inside(client, ask)

    def wait_ready(self, client: str, seconds: float = 120.0) -> float:
        """Until every server's /readyz is green; how long it took."""
        begun = time.monotonic()
        while not all(self.get(client, name, "/readyz") == 200 for name in self.servers):
            if time.monotonic() - begun > seconds:
                logs = "\n\n".join(f"--- {name}\n{self.log(name)[-2000:]}" for name in self.names)
                raise RuntimeError(f"not ready within {seconds:g} s\n{logs}")
            time.sleep(0.1)
        return time.monotonic() - begun

    def close(self) -> None:
        self._closing.set()
        if self._watching.is_alive():
            self._watching.join()
        for process in self._processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
            process.kill()
            process.wait()

    def _start(self, name: str) -> None:
        command = [*self._command, *self._parts[name], *self._options]
        self._processes[name] = self._pods.start(name, command, self._environment, self._folder / f"{name}.log")

    def _watch(self) -> None:
        while not self._closing.wait(0.2):
            for name, process in list(self._processes.items()):
                code = process.poll()
                if code is not None:
                    self.ends.append((name, code))
                    self._start(name)


class Proxy:
    """haproxy in pod `name`, in front of `ranks`."""

    def __init__(self, pods: Pods, name: str, ranks: Sequence[str], folder: Path) -> None:
        self.url = f"http://{pods.addresses[name]}:{HTTP_PORT}"
        servers = "\n".join(
            f"    server {rank} {pods.addresses[rank]}:{HTTP_PORT} check inter 500ms fall 2 rise 1" for rank in ranks
        )
        config = folder / "haproxy.cfg"
        config.write_text(
            f"""defaults
    mode http
    timeout connect 2s
    timeout client 120s
    timeout server 120s
frontend all
    bind {pods.addresses[name]}:{HTTP_PORT}
    default_backend ranks
backend ranks
    balance leastconn
    option httpchk GET /readyz
{servers}
"""
        )
        self._process = pods.start(name, ["haproxy", "-db", "-f", str(config)], dict(os.environ), folder / "proxy.log")

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(self._process.pid).children(recursive=True):
                each.kill()
        self._process.kill()
        self._process.wait()


def complete_all(pods: Pods, client: str, url: str, bodies: Sequence[dict[str, Any]]) -> list[httpx.Response]:
    """All at once, from a pod."""

    async def send() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=180, limits=limits) as http:
            return await asyncio.gather(*(http.post(f"{url}/v1/completions", json=body) for body in bodies))

    return pods.inside(client, lambda: asyncio.run(send()))


@contextlib.contextmanager
def deployment(
    model: str, size: int, *options: str, order: Sequence[int] | None = None
) -> Iterator[tuple[Pods, Ranks, Proxy]]:
    """`size` ranks behind a proxy, in pods rank-0, ...; "gate" has the proxy and is where clients are."""
    names = [f"rank-{rank}" for rank in range(size)]
    with opened(model, names, *options) as (pods, ranks, proxy):
        ranks.start(None if order is None else [names[rank] for rank in order])
        ranks.wait_ready("gate")
        wait_spread(pods, proxy, size)
        yield pods, ranks, proxy


@contextlib.contextmanager
def opened(
    model: str, names: Sequence[str], *options: str, parts: Mapping[str, Sequence[str]] | None = None
) -> Iterator[tuple[Pods, Ranks, Proxy]]:
    """Pods of these names, a "gate" with a proxy in front of those that serve, and ranks that are still to start."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        pods = Pods([*names, "gate"])
        stack.callback(pods.close)
        ranks = Ranks(pods, names, model, *options, folder=Path(folder), parts=parts)
        stack.callback(ranks.close)
        proxy = Proxy(pods, "gate", ranks.servers, Path(folder))
        stack.callback(proxy.close)
        yield pods, ranks, proxy


def wait_spread(pods: Pods, proxy: Proxy, size: int, seconds: float = 30.0) -> None:
    """Until the proxy has noticed that every rank is ready."""
    seen: set[str] = set()
    deadline = time.monotonic() + seconds
    while len(seen) < size:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the proxy uses only ranks {sorted(seen)}")
        answers = complete_all(pods, "gate", proxy.url, [{"prompt": "x", "max_tokens": 2}] * 2 * size)
        seen |= {answer.headers["X-Data-Parallel-Rank"] for answer in answers if answer.status_code == 200}


def main() -> None:
    options = parse()
    if reason := why_not():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        from moe_serve.cli.random_model import make_model

        model = options.model or str(make_model(Path(folder) / "model"))
        report = measure(options, model)
    keep(report, options.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, label="tiny")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--requests", type=int, default=400, help="at once, before the first kill")
    parser.add_argument("--model", help="checkpoint folder; a random tiny one if not given")
    parser.add_argument("--streams", type=int, default=8, help="under way at each kill")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, model: str) -> Report:
    draw = random.Random(options.seed)
    with deployment(model, options.ranks) as (pods, ranks, proxy):
        bodies = [{"prompt": f"number {number}", "max_tokens": 8} for number in range(options.requests)]
        answers = complete_all(pods, "gate", proxy.url, bodies)
        served = collections.Counter(answer.headers.get("X-Data-Parallel-Rank", "none") for answer in answers)
        console.print(f"{sum(answer.status_code == 200 for answer in answers)} of {len(answers)} answered: {served}")
        traffic = Traffic(pods, "gate", proxy.url, count=options.streams, max_tokens=STREAM_TOKENS)
        try:
            victims = [ranks.names[0 if kill == 0 else draw.randrange(options.ranks)] for kill in range(options.kills)]
            kills = [kill_under_load(ranks, victim, traffic, options.streams) for victim in victims]
        finally:
            traffic.close()
        codes = collections.Counter(code for _, code in ranks.ends)
    numbers = {
        "answered": sum(answer.status_code == 200 for answer in answers),
        "served_by_rank": dict(served),
        "victims": dict(collections.Counter(victims)),
        "seconds_until_all_red": spread([kill.red for kill in kills], 2),
        "seconds_until_all_green": spread([kill.green for kill in kills], 2),
        "seconds_until_streams_under_way_ended": spread([kill.ended for kill in kills], 2),
        "streams_under_way_at_a_kill": dict(sum((kill.ends for kill in kills), collections.Counter())),
        "all_streams": traffic.ends(),
        "exit_codes": {str(code): count for code, count in codes.items()},
    }
    config = {name: getattr(options, name) for name in ("ranks", "kills", "requests", "streams", "seed")}
    return Report("pods", options.label, config, numbers)


@dataclass(frozen=True, slots=True)
class Kill:
    """Seconds until no other said that it is ready, until all did again, and until the last stream had ended."""

    red: float
    green: float
    ended: float
    ends: collections.Counter[str]


def kill_under_load(ranks: Ranks, victim: str, traffic: Traffic, least: int) -> Kill:
    under_way = traffic.wait_under_way(least)
    begun = time.monotonic()
    red, green = kill_and_wait(ranks, victim)
    ended = max((stream.ended or math.inf) - begun for stream in under_way)
    ends = collections.Counter(stream.end or "hung" for stream in under_way)
    told = f"{victim} killed: all red after {red:.1f} s, all green after {green:.1f} s"
    console.print(f"{told}; {dict(ends)}, the last after {ended:.1f} s")
    return Kill(red, green, ended, ends)


def kill_and_wait(ranks: Ranks, victim: str) -> tuple[float, float]:
    """Seconds until no other rank says that it is ready, and until all do again."""
    begun = time.monotonic()
    ranks.kill(victim)
    others = [name for name in ranks.servers if name != victim]
    while any(ranks.get("gate", name, "/readyz", timeout=0.5) == 200 for name in others):
        if time.monotonic() - begun > 30:
            raise RuntimeError(f"{victim} was killed and others say that they are ready")
        time.sleep(0.05)
    red = time.monotonic() - begun
    ranks.wait_ready("gate")
    return red, time.monotonic() - begun


if __name__ == "__main__":
    main()
