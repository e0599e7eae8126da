"""What the facts of a way between two machines mean for a world on both. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_serve.base.site import with_port
from moe_serve.doctor.finding import Finding, failure, ok, warning
from moe_serve.doctor.machine import is_loopback
from moe_serve.doctor.ports import Tried
from moe_serve.doctor.records import Bulk, Versions, WayFacts

SLOW_TRIP_SECONDS = 0.002
SLOW_BYTES_PER_SECOND = 100e6
CLOCK_SECONDS = 1.0
NEGOTIATED = (
    "every port of a world but rank 0's --data-parallel-rpc-port is negotiated: all of them must be open between its "
    "machines, in both directions"
)
OPEN_ALL = (
    "let all TCP between the machines of this world through (a cloud: a rule of the security group with itself as "
    "source; Kubernetes: a NetworkPolicy between the pods)"
)
WORDS = {
    "open": "open",
    "refused": "refused",
    "silent": "no answer",
    "no route": "no route",
    "held": "in use",
    "stranger": "somebody else answers",
    "failed": "failed",
}


def judge_way(facts: WayFacts) -> list[Finding]:
    """Findings in the order in which the way is gone; they end where it does."""
    findings = [*_name(facts), *_reached(facts)]
    if not facts.address:
        return findings
    findings.append(_token(facts))
    mine, theirs = facts.mine, facts.theirs
    if facts.broke and (theirs is None or mine is None) and facts.token in ("", "same", "none"):
        findings.append(
            failure(
                "answer",
                facts.broke,
                "whatever listens there is no doctor",
                "run `moe-serve doctor --listen` there, on a port of its own while a server runs (--port)",
            )
        )
    if mine is None or theirs is None:
        return findings
    if facts.broke:
        findings.append(failure("answer", facts.broke, "the connection did not last", "look at the network's log"))
    findings += [_versions(mine, theirs), *_translation(facts, theirs), *_clock(facts)]
    findings += [
        *_ports("ports there", f"from {facts.own_address} to {facts.address}", facts.there, facts),
        *_ports("ports here", f"from {facts.address} to {facts.own_address}", facts.here, facts),
    ]
    if facts.out is not None and facts.back is not None:
        findings += [_packets(facts.out, facts.back, mine, theirs), *_speed(facts.out, facts.back, facts.round_trip)]
    return findings


def _name(facts: WayFacts) -> list[Finding]:
    first, second = facts.lookups
    if not first or not second:
        return [
            failure(
                "name",
                f"{facts.host} does not resolve: {facts.name_problem}",
                "ranks wait for it until --start-timeout-seconds and give up",
                "mend DNS or /etc/hosts, or give an address",
            )
        ]
    found = f"{facts.host} is {', '.join(first)}"
    if not any(map(is_loopback, [facts.host])) and facts.host != "localhost" and any(map(is_loopback, first)):
        return [
            failure(
                "name",
                found,
                "a name that other machines use points to this one itself",
                "take it off the loopback line of /etc/hosts",
            )
        ]
    if set(first) != set(second):
        return [
            warning(
                "name",
                f"{found}, and asked again {', '.join(second)}",
                "ranks may look for rank 0 on different machines",
                "use a name that belongs to one machine only",
            )
        ]
    return [ok("name", found, "the same answer twice")]


def _reached(facts: WayFacts) -> list[Finding]:
    findings = []
    for address, tried in facts.reached.items():
        where = with_port(address, facts.port)
        if tried.outcome == "open":
            findings.append(ok("port", f"{where} is reached"))
            continue
        means = {
            "refused": "the machine answers, and nobody listens at this port",
            "silent": "packets are dropped on the way: a firewall, a wrong address, or a machine that is off",
            "no route": "this machine knows no way there",
        }.get(tried.outcome, "the connection could not be made")
        do = {
            "refused": "start `moe-serve doctor --listen` there, with the same --port; look at --host",
            "silent": f"let TCP port {facts.port} through; then see the others: {NEGOTIATED}",
        }.get(tried.outcome, "look at `ip route` here, and give an address of a network that both share")
        told = (f"{where}: {WORDS[tried.outcome]} ({tried.why})", means, do)
        # A rank tries the addresses of rank 0 one after the other; rank 0 itself listens at the first.
        first = address == next(iter(facts.reached))
        findings.append(failure("port", *told) if first or not facts.address else warning("port", *told))
    return findings


def _token(facts: WayFacts) -> Finding:
    give = "give both the same MOE_SERVE_WORLD_TOKEN, or the same text in their --world-token-file"
    if facts.token == "same":
        return ok("token", "both know the same", "proved without sending it")
    if facts.token == "none":
        return warning(
            "token", "neither doctor was given one", "whether ranks would know each other is not known", give
        )
    found = {
        "differs": "the other doctor knows another token",
        "only there": "the other doctor has one, this one has none",
        "only here": "this doctor has one, the other has none",
    }.get(facts.token)
    if found is None:
        return warning("token", "could not be compared", "nobody answered in the way of a doctor", give)
    return failure("token", found, "a rank with another token is refused", give)


def _versions(mine: Versions, theirs: Versions) -> Finding:
    pairs = {
        "moe-serve": (mine.package, theirs.package),
        "torch": (mine.torch, theirs.torch),
        "Python": (mine.python, theirs.python),
    }
    different = [f"{name} {a or 'none'} here, {b or 'none'} there" for name, (a, b) in pairs.items() if a != b]
    if not different:
        return ok("versions", ", ".join(f"{name} {a}" for name, (a, _) in pairs.items()) + " on both")
    found, do = "; ".join(different), "install the same on both"
    if mine.package != theirs.package:
        return failure("versions", found, "a rank of another moe-serve is refused", do)
    if mine.torch != theirs.torch:
        return failure("versions", found, "ranks of different torch may not understand each other, or hang", do)
    if mine.python.rsplit(".", 1)[0] == theirs.python.rsplit(".", 1)[0]:
        return ok("versions", found, "the last number does not matter")
    return warning("versions", found, "it works, but nobody tests it", do)


def _translation(facts: WayFacts, theirs: Versions) -> list[Finding]:
    if theirs.you == facts.own_address:
        return []
    return [
        failure(
            "addresses",
            f"this machine is {facts.own_address}, and the other sees it as {theirs.you}",
            "something on the way translates addresses; members tell each other their own, which would not be reached",
            "put both into one network, without NAT between them",
        )
    ]


def _clock(facts: WayFacts) -> list[Finding]:
    if facts.round_trip is None:
        return []
    found = f"theirs is {facts.offset:+.3f} s (to {facts.uncertainty * 1e3:.1f} ms)"
    if abs(facts.offset) - facts.uncertainty > CLOCK_SECONDS:
        return [
            warning(
                "clocks",
                found,
                "nothing in a world relies on equal clocks, but its log lines cannot be laid side by side",
                "run chrony or systemd-timesyncd on both",
            )
        ]
    return [ok("clocks", found)]


def _ports(check: str, way: str, tried: Sequence[Tried], facts: WayFacts) -> list[Finding]:
    """Random ones together, those that somebody named one by one."""
    named = {facts.port, *facts.chosen}
    random = [each for each in tried if each.port not in named]
    findings = [_random_ports(check, way, random)]
    for each in (each for each in tried if each.port in named):
        found = f"{way}, port {each.port}: {_described(each)}"
        if each.outcome == "open":
            findings.append(ok(check, found))
        elif each.outcome == "held":
            findings.append(ok(check, f"{found}, so that it could not be tried", "whoever holds it is no doctor"))
        else:
            findings.append(failure(check, found, "what listens there cannot be reached", OPEN_ALL))
    return findings


def _random_ports(check: str, way: str, tried: Sequence[Tried]) -> Finding:
    closed = [each for each in tried if each.outcome != "open"]
    found = f"{way}, random high ports: " + (", ".join(f"{each.port} {_described(each)}" for each in tried) or "none")
    if tried and not closed:
        return ok(check, found)
    return failure(check, found, NEGOTIATED, OPEN_ALL)


def _described(tried: Tried) -> str:
    return WORDS.get(tried.outcome, tried.outcome) + (f" ({tried.why})" if tried.outcome == "failed" else "")


def _packets(out: Bulk, back: Bulk, mine: Versions, theirs: Versions) -> Finding:
    sizes = (
        f"kernels take the way to carry packets of {_known(mine.mtu)} here and {_known(theirs.mtu)} there, "
        f"TCP segments of {_known(mine.segment)} and {_known(theirs.segment)}"
    )
    lost = [
        f"{each.arrived} of {each.count} bytes {which} arrived"
        for which, each in (("written here", out), ("written there", back))
        if each.arrived < each.count
    ]
    if lost:
        return failure(
            "packet size (MTU)",
            f"small messages pass, but of large writes {' and '.join(lost)}; {sizes}",
            "something on the way drops full packets and says nothing (another MTU, and ICMP blocked): ranks would "
            "meet, and hang in their first large exchange",
            "set one MTU on all devices of the way; `ip link set dev DEVICE mtu 1280` on both shows whether it is that",
        )
    if mine.mtu is not None and theirs.mtu is not None and mine.mtu != theirs.mtu:
        return warning(
            "packet size (MTU)",
            f"large writes arrive both ways; {sizes}",
            "TCP finds its way between different MTUs only as long as ICMP, or the segment size told at the start, "
            "gets through",
            "set one MTU on all devices of the way",
        )
    return ok("packet size (MTU)", f"large writes arrive both ways; {sizes}")


def _known(size: int | None) -> str:
    return "an unknown size" if size is None else str(size)


def _speed(out: Bulk, back: Bulk, round_trip: float | None) -> Iterable[Finding]:
    if round_trip is not None:
        found = f"{round_trip * 1e3:.2f} ms"
        means = "each layer of a step waits for two exchanges or more, each at least so long"
        if round_trip > SLOW_TRIP_SECONDS:
            yield warning("round trip", found, means, "put the machines into one place of one network")
        else:
            yield ok("round trip", found, means)
    if out.arrived == out.count and back.arrived == back.count:
        rates = [each.count / max(each.seconds, 1e-9) for each in (out, back)]
        found = " and ".join(f"{rate / 1e6:,.0f} MB/s {way}" for rate, way in zip(rates, ("out", "back"), strict=True))
        if min(rates) < SLOW_BYTES_PER_SECOND:
            yield warning(
                "bandwidth",
                found,
                "every token's row goes to its experts and back in each layer",
                "use a faster network between the machines, or spread experts over fewer of them",
            )
        else:
            yield ok("bandwidth", found, "by one TCP connection, for a moment")
