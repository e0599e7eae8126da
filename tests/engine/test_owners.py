"""Whose request is whose, as front-ends come and go."""

from __future__ import annotations

from moe_serve.base.engine_messages import TokenEvent
from moe_serve.engine.owners import Owners


def test_events_go_to_who_asked_and_the_last_one_ends_it() -> None:
    owners = Owners()
    for request_id, address in (("a", "one"), ("b", "two"), ("c", "one")):
        owners.add(request_id, address)
    events = [TokenEvent(request_id=name, token_ids=[1]) for name in "abcd"]
    assert owners.sort(events) == {"one": [events[0], events[2]], "two": [events[1]]}
    last = TokenEvent(request_id="a", token_ids=[2], finish_reason="length")
    assert owners.sort([last]) == {"one": [last]}
    assert owners.leave("one") == ["c"]


def test_a_front_end_that_leaves_leaves_its_requests_behind_once_and_nobody_elses() -> None:
    owners = Owners()
    for request_id, address in (("a", "one"), ("b", "two"), ("c", "one")):
        owners.add(request_id, address)
    owners.forget(["c", "unknown"])
    assert owners.leave("one") == ["a"]
    assert owners.leave("one") == []
    assert owners.sort([TokenEvent(request_id="a", token_ids=[1])]) == {}
