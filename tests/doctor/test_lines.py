"""Two doctors over loopback: what is told to whom, what is refused, and that every wait and count has an end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import pytest

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.secret import NONCE_BYTES, PROOF_BYTES
from moe_serve.base.topology import Topology
from moe_serve.base.version import package_version
from moe_serve.doctor import calling, listening
from moe_serve.doctor.calling import find_out
from moe_serve.doctor.judge_way import judge_way
from moe_serve.doctor.line import OPEN_TOKEN, Line, LineError, NotTheSameToken, call
from moe_serve.doctor.listening import Listener
from moe_serve.doctor.ports import OpenPorts, try_ports
from moe_serve.doctor.records import MAX_BULK, ClockAsk, GiveBulk, OpenSome, TakeBulk, ToCaller, TryMine
from moe_serve.world.handshake import ANSWER_BYTES, REFUSAL
from tests.support.coordinator import RunningCoordinator

TOKEN = "a token of sixteen characters"
HOST = "127.0.0.1"


class Listening:
    def __init__(self, listener: Listener, told: list[str]) -> None:
        self.listener, self.told, self.port = listener, told, listener.port
        self.lines = ExitStack()

    def line(self, token: str = TOKEN, seconds: float = 5.0) -> Line:
        connection = self.lines.enter_context(socket.create_connection((HOST, self.port), 5))
        return call(connection, token, time.monotonic() + seconds)


@contextmanager
def listening_at(token: str = TOKEN, host: str = "", seconds: float = 60.0) -> Iterator[Listening]:
    told: list[str] = []
    listener = Listener(host, 0, token=token, tell=told.append)
    thread = threading.Thread(target=listener.run, args=(seconds,))
    thread.start()
    made = Listening(listener, told)
    try:
        yield made
    finally:
        made.lines.close()
        listener.end()
        thread.join(5)
        assert not thread.is_alive()


@pytest.fixture
def heard() -> Iterator[Listening]:
    with listening_at() as made:
        yield made


def levels(facts: calling.WayFacts) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for each in judge_way(facts):
        found.setdefault(each.check, set()).add(each.level)
    return found


def test_two_doctors_with_one_token_find_all_that_there_is_and_nothing_wrong(heard: Listening) -> None:
    facts = find_out(HOST, heard.port, token=TOKEN)
    assert set.union(*levels(facts).values()) == {"ok"}
    assert facts.token == "same"
    assert facts.theirs is not None
    assert facts.theirs.package == package_version()
    assert [each.outcome for each in facts.there] == ["open"] * 3
    assert sorted(each.outcome for each in facts.here) == ["held", "open", "open", "open"]  # its own port is taken
    assert facts.out is not None
    assert facts.out.arrived == facts.out.count > 2**18
    assert facts.back is not None
    assert facts.back.arrived == facts.back.count > 2**18
    assert abs(facts.offset) < 0.5
    assert facts.round_trip is not None
    assert heard.listener.num_came == 1


def test_over_ipv6_too(heard: Listening) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    facts = find_out("::1", heard.port, token=TOKEN)
    assert set.union(*levels(facts).values()) == {"ok"}
    assert facts.own_address == "::1"


@pytest.mark.parametrize(
    ("there", "here", "found"),
    [
        (TOKEN, "another token of some length", "differs"),
        (TOKEN, "", "only there"),
        (OPEN_TOKEN, TOKEN, "only here"),
        (OPEN_TOKEN, "", "none"),
    ],
)
def test_who_has_another_token_is_told_so_and_no_version(there: str, here: str, found: str) -> None:
    with listening_at(there) as heard:
        facts = find_out(HOST, heard.port, token=here)
    assert facts.token == found
    if found != "none":
        assert facts.theirs is None
        assert levels(facts)["token"] == {"failure"}
        assert "versions" not in levels(facts)


def test_a_stranger_reads_a_nonce_and_a_refusal_and_nothing_else(heard: Listening) -> None:
    with socket.create_connection((HOST, heard.port), 5) as stranger:
        stranger.settimeout(5)
        stranger.sendall(bytes(ANSWER_BYTES) + b"more")
        said = b""
        while part := _received(stranger):
            said += part
    assert len(said) == NONCE_BYTES + PROOF_BYTES
    assert said.endswith(REFUSAL)
    assert heard.listener.num_came == 0


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except ConnectionResetError:
        return b""


def test_the_token_is_not_among_the_bytes_that_travel() -> None:
    """A relay between two doctors sees all of them."""
    seen = bytearray()
    with listening_at() as heard, socket.create_server((HOST, 0)) as relay:

        def pump(source: socket.socket, sink: socket.socket) -> None:
            while part := _received(source):
                seen.extend(part)
                sink.sendall(part)
            sink.close()

        def relay_one() -> None:
            near, _ = relay.accept()
            far = socket.create_connection((HOST, heard.port))
            threading.Thread(target=pump, args=(near, far), daemon=True).start()
            threading.Thread(target=pump, args=(far, near), daemon=True).start()

        threading.Thread(target=relay_one, daemon=True).start()
        line = call(socket.create_connection(relay.getsockname()), TOKEN, time.monotonic() + 5)
        line.send(ClockAsk())
        line.receive(msgspec.msgpack.Decoder(ToCaller))
        line.close()
    assert len(seen) > NONCE_BYTES + ANSWER_BYTES + PROOF_BYTES
    assert TOKEN.encode() not in seen


@pytest.mark.parametrize("garbage", [b"\0\0\0\5hello", b"\xff" * 64, b"\0\0\0\1\x93", b"GET / HTTP/1.1\r\n\r\n"])
def test_garbage_ends_its_own_line_only(heard: Listening, garbage: bytes) -> None:
    line = heard.line()
    line.push(garbage)
    with pytest.raises(LineError):
        line.receive(msgspec.msgpack.Decoder(ToCaller))
    assert find_out(HOST, heard.port, token=TOKEN).token == "same"


@pytest.mark.parametrize(
    "question",
    [
        GiveBulk(MAX_BULK + 1),
        TakeBulk(-1),
        OpenSome([0]),
        OpenSome([70_000]),
        OpenSome(list(range(1, 100))),
        TryMine([70_000]),
        TryMine(list(range(1, 100))),
    ],
)
def test_more_than_may_be_asked_for_ends_the_line(heard: Listening, question: object) -> None:
    line = heard.line()
    line.send(question)
    with pytest.raises(LineError):
        line.receive(msgspec.msgpack.Decoder(ToCaller))


def test_ports_are_opened_once_for_a_line_and_closed_with_it(heard: Listening) -> None:
    line = heard.line()
    line.send(OpenSome([]))
    opened = line.receive(msgspec.msgpack.Decoder(ToCaller))
    assert isinstance(opened, calling.Opened)
    assert {each.outcome for each in try_ports(HOST, opened.ports, line.secret)} == {"open"}
    line.send(OpenSome([]))
    with pytest.raises(LineError):
        line.receive(msgspec.msgpack.Decoder(ToCaller))
    deadline = time.monotonic() + 5
    while {each.outcome for each in try_ports(HOST, opened.ports, line.secret, 1.0)} != {"refused"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_open_port_answers_only_who_shows_the_secret_and_only_with_it_counts_as_open() -> None:
    with ExitStack() as stack:
        ours = OpenPorts(HOST, [], b"s" * 32, num_random=1)
        stack.callback(ours.close)
        assert [each.outcome for each in try_ports(HOST, ours.ports, b"t" * 32)] == ["stranger"]
        assert [each.outcome for each in try_ports(HOST, ours.ports, b"s" * 32)] == ["open"]
        taken = OpenPorts(HOST, ours.ports, b"s" * 32, num_random=0)
        stack.callback(taken.close)
        assert [each.outcome for each in taken.failed] == ["held"]


def test_who_does_not_show_the_secret_reads_nothing_at_an_open_port() -> None:
    ours = OpenPorts(HOST, [], b"s" * 32, num_random=1)
    try:
        with socket.create_connection((HOST, ours.ports[0]), 5) as stranger:
            stranger.settimeout(5)
            stranger.sendall(bytes(PROOF_BYTES))
            assert _received(stranger) == b""
    finally:
        ours.close()


def test_the_bytes_of_a_line_are_counted_together(heard: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "MAX_LINE_BULK", 1000)
    line = heard.line()
    line.send(GiveBulk(600))
    assert line.pull(600, 5) == 600
    line.send(GiveBulk(600))
    assert line.pull(600, 5) == 0


def test_a_closed_port_is_refused_and_one_that_says_nothing_is_silent_within_its_bound() -> None:
    with socket.create_server((HOST, 0)) as mute:
        port = mute.getsockname()[1]
        begun = time.monotonic()
        assert [each.outcome for each in try_ports(HOST, [port], b"s" * 32, 0.3)] == ["silent"]
        assert time.monotonic() - begun < 2
    assert [each.outcome for each in try_ports(HOST, [port], b"s" * 32)] == ["refused"]


def test_a_peer_that_says_nothing_at_all_is_no_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_serve.doctor.line.PROOF_SECONDS", 0.3)
    with socket.create_server((HOST, 0)) as mute:
        facts = find_out(HOST, mute.getsockname()[1], token=TOKEN)
    assert levels(facts)["answer"] == {"failure"}


def test_a_coordinator_of_the_same_token_is_known_to_be_no_doctor_and_lives_on() -> None:
    running = RunningCoordinator(Topology(dp=1), Config().agreement(), token=TOKEN)
    try:
        facts = find_out(HOST, running.port, token=TOKEN)
        assert facts.token == "same"
        assert "is a server of this world running there?" in facts.broke
        assert levels(facts)["answer"] == {"failure"}
        running.join(0)
        assert running.coordinator.fleet.ended is None
    finally:
        running.close()


def test_a_name_that_does_not_resolve_and_a_port_where_nobody_is_end_the_way() -> None:
    assert [each.check for each in judge_way(find_out("no-such-host.invalid", 1, token=""))] == ["name"]
    with socket.create_server((HOST, 0)) as closed:
        port = closed.getsockname()[1]
    findings = judge_way(find_out(HOST, port, token=""))
    assert [(each.check, each.level) for each in findings] == [("name", "ok"), ("port", "failure")]
    assert "nobody listens" in findings[1].means


def test_a_taken_port_is_a_clear_error(heard: Listening) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on .*{heard.port}"):
        Listener("", heard.port, token=TOKEN, tell=print)


def test_a_listener_ends_by_itself_and_a_line_that_says_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "LINE_SECONDS", 0.3)
    with listening_at(seconds=1.0) as heard:
        line = heard.line()
        with pytest.raises(LineError, match="closed"):
            line.receive(msgspec.msgpack.Decoder(ToCaller))
        time.sleep(1.2)
        with pytest.raises(OSError, match="refused"):
            heard.line()


def test_no_more_lines_at_once_than_there_are_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "MAX_LINES", 2)
    with listening_at() as heard:
        lines = [heard.line() for _ in range(2)]
        with pytest.raises((LineError, NotTheSameToken)):
            heard.line()
        for line in lines:
            line.close()
        deadline = time.monotonic() + 5
        while True:
            try:
                heard.line().close()
                break
            except LineError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
