"""What the facts of a way between two machines mean, without any machine."""

from __future__ import annotations

from copy import deepcopy

import msgspec
import pytest

from moe_serve.doctor.finding import Finding, Level
from moe_serve.doctor.judge_way import judge_way
from moe_serve.doctor.ports import Tried
from moe_serve.doctor.records import Bulk, Versions, WayFacts

MINE = Versions("0.1.0", "3.11.7", "2.13.0", "one", "10.0.0.2", 1500, 1448)
THEIRS = Versions("0.1.0", "3.11.7", "2.13.0", "two", "10.0.0.1", 1500, 1448)
GOOD = WayFacts(
    host="two",
    port=29550,
    lookups=[["10.0.0.2"], ["10.0.0.2"]],
    reached={"10.0.0.2": Tried(29550, "open")},
    address="10.0.0.2",
    own_address="10.0.0.1",
    token="same",
    mine=MINE,
    theirs=THEIRS,
    round_trip=0.0002,
    offset=0.01,
    uncertainty=0.0001,
    there=[Tried(40001, "open"), Tried(40002, "open")],
    here=[Tried(50001, "open"), Tried(29550, "open")],
    out=Bulk(2**26, 2**26, 0.1),
    back=Bulk(2**26, 2**26, 0.1),
)


def judged(**changes: object) -> list[Finding]:
    facts = deepcopy(GOOD)
    for name, value in changes.items():
        setattr(facts, name, value)
    return judge_way(facts)


def test_a_good_way_has_nothing_to_mend() -> None:
    findings = judged()
    assert {each.level for each in findings} == {"ok"}
    checks = {"name", "port", "token", "versions", "clocks", "ports there", "ports here", "packet size (MTU)"}
    assert checks | {"round trip", "bandwidth"} == {each.check for each in findings}


@pytest.mark.parametrize(
    ("check", "level", "word", "changes"),
    [
        ("name", "failure", "No address", {"lookups": [[], []], "name_problem": "No address", "address": ""}),
        ("name", "failure", "127.0.1.1", {"lookups": [["127.0.1.1"]] * 2}),
        ("name", "warning", "10.0.0.3", {"lookups": [["10.0.0.2"], ["10.0.0.3"]]}),
        ("port", "failure", "refused", {"reached": {"10.0.0.2": Tried(29550, "refused", "x")}, "address": ""}),
        ("port", "failure", "firewall", {"reached": {"10.0.0.2": Tried(29550, "silent", "x")}, "address": ""}),
        ("port", "failure", "no way there", {"reached": {"10.0.0.2": Tried(29550, "no route", "x")}, "address": ""}),
        ("token", "failure", "another token", {"token": "differs", "mine": None, "theirs": None}),
        ("token", "failure", "this one has none", {"token": "only there", "mine": None, "theirs": None}),
        ("token", "failure", "other has none", {"token": "only here", "mine": None, "theirs": None}),
        ("token", "warning", "neither", {"token": "none"}),
        ("answer", "failure", "broke", {"broke": "the line broke"}),
        ("clocks", "warning", "+7.500 s", {"offset": 7.5}),
        ("clocks", "warning", "-7.500 s", {"offset": -7.5}),
        ("addresses", "failure", "192.0.2.7", {"theirs": msgspec.structs.replace(THEIRS, you="192.0.2.7")}),
        (
            "versions",
            "failure",
            "moe-serve 0.1.0 here, 0.2.0",
            {"theirs": msgspec.structs.replace(THEIRS, package="0.2.0")},
        ),
        ("versions", "failure", "torch 2.13.0 here", {"theirs": msgspec.structs.replace(THEIRS, torch="2.12.0")}),
        ("versions", "warning", "Python", {"theirs": msgspec.structs.replace(THEIRS, python="3.12.1")}),
        ("ports there", "failure", "40001 no answer", {"there": [Tried(40001, "silent"), Tried(40002, "open")]}),
        ("ports here", "failure", "none", {"here": [Tried(29550, "open")]}),
        ("ports here", "failure", "port 29550: refused", {"here": [Tried(50001, "open"), Tried(29550, "refused")]}),
        ("packet size (MTU)", "failure", "0 of 262144 bytes written here", {"out": Bulk(2**18, 0, 6.0)}),
        ("packet size (MTU)", "failure", "written there", {"back": Bulk(2**18, 1000, 6.0)}),
        ("packet size (MTU)", "warning", "9000 there", {"theirs": msgspec.structs.replace(THEIRS, mtu=9000)}),
        ("round trip", "warning", "5.00 ms", {"round_trip": 0.005}),
        ("bandwidth", "warning", "10 MB/s back", {"back": Bulk(10**7, 10**7, 1.0)}),
    ],
)
def test_each_fault_is_named_alone_with_what_it_means_and_a_way_out(
    check: str, level: Level, word: str, changes: dict[str, object]
) -> None:
    findings = judged(**changes)
    (bad,) = [each for each in findings if each.level != "ok"]
    assert (bad.check, bad.level) == (check, level)
    assert word in f"{bad.found} {bad.means}"
    assert bad.means
    assert bad.do


def test_a_clock_difference_within_what_is_uncertain_is_none() -> None:
    assert {each.level for each in judged(offset=1.5, uncertainty=0.6)} == {"ok"}
    assert {each.level for each in judged(offset=1.5, uncertainty=0.4)} == {"ok", "warning"}


def test_a_second_address_that_is_not_reached_is_a_warning_but_the_first_is_a_failure() -> None:
    dead, live = Tried(29550, "silent"), Tried(29550, "open")
    second = judged(reached={"10.0.0.2": live, "fd00::2": dead})
    assert [each.level for each in second if each.check == "port"] == ["ok", "warning"]
    first = judged(reached={"fd00::2": dead, "10.0.0.2": live})
    assert [each.level for each in first if each.check == "port"] == ["failure", "ok"]


def test_a_port_that_is_in_use_could_not_be_tried_and_is_no_fault() -> None:
    findings = judged(here=[Tried(50001, "open"), Tried(29550, "held")])
    assert {each.level for each in findings} == {"ok"}
    assert any("could not be tried" in each.found for each in findings)


def test_the_last_number_of_python_does_not_matter() -> None:
    assert {each.level for each in judged(theirs=msgspec.structs.replace(THEIRS, python="3.11.9"))} == {"ok"}


def test_a_peer_that_proves_nothing_is_told_and_nothing_more_is_claimed() -> None:
    findings = judged(token="", broke="no doctor answers there", mine=None, theirs=None)
    assert [(each.check, each.level) for each in findings[2:]] == [("token", "warning"), ("answer", "failure")]
