"""`doctor --server`: what a running server says of its world (GET /world), and what that means."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

import msgspec

from moe_serve.base.errors import ConfigError
from moe_serve.base.messages import UNREADABLE
from moe_serve.base.world_messages import MemberStatus, WorldStatus
from moe_serve.doctor.finding import Finding, failure, ok, warning

ASK_SECONDS = 10.0
MAX_ANSWER_BYTES = 1 << 24
STUCK_SECONDS = 10.0
"""In one phase, or half of what the step may take, if that is less."""


class RankAtFrontend(msgspec.Struct, frozen=True):
    """As an engine last told this front-end."""

    dp: int
    step: int
    running: int
    waiting: int


class Frontend(msgspec.Struct, frozen=True):
    """What the API server knows without the coordinator."""

    pid: int
    host: str
    not_ready: str | None = None
    ranks: list[RankAtFrontend] = []


class WorldBody(msgspec.Struct, frozen=True):
    """An answer to GET /world."""

    world: WorldStatus | None
    reason: str
    frontend: Frontend


class WorldAnswered(msgspec.Struct, frozen=True):
    """`body` or the `problem`, with the HTTP `status` where there was an answer."""

    url: str
    seconds: float
    status: int = 0
    body: WorldBody | None = None
    problem: str = ""


def ask_world(url: str, api_key: str | None, seconds: float = ASK_SECONDS) -> WorldAnswered:
    """Without any proxy. ConfigError if `url` is none."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or parts.scheme not in ("http", "https"):
        raise ConfigError(f"{url!r} is no address such as http://127.0.0.1:8000 (option --server)")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    begun = time.monotonic()
    try:
        with contextlib.closing(kind(host, port, timeout=seconds)) as connection:
            connection.request("GET", parts.path.rstrip("/").removesuffix("/v1") + "/world", headers=headers)
            response = connection.getresponse()
            status, text = response.status, response.read(MAX_ANSWER_BYTES)
    except (OSError, HTTPException, UnicodeError) as error:
        return WorldAnswered(url, time.monotonic() - begun, problem=str(error) or type(error).__name__)
    took = time.monotonic() - begun
    try:
        return WorldAnswered(url, took, status, msgspec.json.decode(text, type=WorldBody))
    except UNREADABLE:
        return WorldAnswered(url, took, status, problem=ascii(text[:200].decode("latin-1")))


def judge_world(answered: WorldAnswered) -> list[Finding]:
    """Findings, the server first, then the world as its coordinator sees it."""
    body = answered.body
    if body is None:
        return [_no_answer(answered)]
    findings = [ok("server", f"{answered.url} answered in {answered.seconds * 1e3:.0f} ms")]
    if body.frontend.not_ready is not None:
        told = ("requests get 503", "see what follows")
        findings.append(warning("ready", f"it takes no requests: {body.frontend.not_ready}", *told))
    if body.world is None:
        return [*findings, _no_coordinator(body)]
    return [*findings, *_judge_status(body.world)]


def _no_answer(answered: WorldAnswered) -> Finding:
    if answered.status == 401:
        return failure("server", f"{answered.url} wants a key", "the world is told to clients only", "give --api-key")
    if answered.status:
        found = f"{answered.url} answered {answered.status}: {answered.problem}"
        return failure("server", found, "it has no /world: another program, or an older moe-serve", "look at --server")
    return failure(
        "server",
        f"{answered.url} did not answer within {answered.seconds:.1f} s: {answered.problem}",
        "the API server is not there, is stopped, or cannot be reached from here",
        "look at its log, and at its process on its own machine",
    )


def _no_coordinator(body: WorldBody) -> Finding:
    known = ", ".join(f"dp {each.dp} in step {each.step}" for each in body.frontend.ranks) or "nothing"
    return failure(
        "coordinator",
        f"{body.reason}; of its engines this API server last heard: {known}",
        "every member gives it up after some seconds more, and the world ends",
        "look at the launcher of rank 0: is it stopped, swapped out, or behind a broken link?",
    )


def _judge_status(world: WorldStatus) -> list[Finding]:
    about = f"world {world.number}, generation {world.generation:x}, {world.engines} DP ranks"
    findings = [ok("coordinator", about)]
    if world.ended:
        findings.append(failure("world", f"it has ended: {world.ended}", "its processes end", "start it again"))
    elif not world.ready:
        missing = "; ".join(world.missing) or "nobody"
        findings.append(
            warning("world", f"it starts; missing: {missing}", "requests wait", "start them, or look at their logs")
        )
    else:
        findings.append(ok("world", "it drains, and ends then" if world.draining else "all members are ready"))
    return [*findings, *_silent(world.members), _step(world), _unfinished(world.members)]


def _silent(members: Iterable[MemberStatus]) -> list[Finding]:
    return [
        failure(
            "silent",
            f"{each.name} was last heard {each.seconds_since_heard:.1f} s ago, {_place(each)}",
            "its process is stopped or starved, or the link to it is down; the world ends if it stays so",
            f"look at process {each.pid} on {each.host} (ps, dmesg), and at the way there (`moe-serve doctor --peers`)",
        )
        for each in members
        if each.state == "silent"
    ]


def _step(world: WorldStatus) -> Finding:
    waited_for = [world.members[place] for place in world.waits_for]
    if not waited_for:
        return ok("step", "none takes long")
    told = (
        f"step {world.slow_step} waits for: " + "; ".join(f"{each.name}, {_place(each)}" for each in waited_for),
        f"all ranks stand still until they go on; after {world.step_timeout_seconds:g} s the world ends "
        "(--step-timeout-seconds)",
        "; ".join(f"look at process {each.pid} on {each.host} (`py-spy dump --pid {each.pid}`)" for each in waited_for),
    )
    longest = max(each.seconds_in_phase for each in waited_for)
    stuck = longest >= min(STUCK_SECONDS, world.step_timeout_seconds / 2)
    return failure("step", *told) if stuck else warning("step", *told)


def _place(member: MemberStatus) -> str:
    if not member.phase:
        return member.state
    return f"in step {member.step}, phase {member.phase!r}, since {member.seconds_in_phase:.1f} s"


def _unfinished(members: Iterable[MemberStatus]) -> Finding:
    counts = {each.dp: each.unfinished for each in members if each.unfinished is not None}
    found = ", ".join(f"{count} at dp {dp}" for dp, count in counts.items())
    return ok("unfinished requests", found or "none", "as of each rank's last step")
