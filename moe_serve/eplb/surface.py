"""What can be asked of load balancing: what goes with a question from outside, and what follows from its answer. Pure.

The answer itself is made elsewhere (eplb/answers.py): it may take a policy's time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moe_serve.base.balance_messages import BalanceAsk
from moe_serve.base.errors import ConfigError, Conflict
from moe_serve.base.parcel import Parcel
from moe_serve.eplb.answers import NOT_RECORDED, refused
from moe_serve.eplb.questions import Facts, Requested, RequestQuestion, Solved, Unsolved
from moe_serve.eplb.rearrangement import ForEngine, Proposal
from moe_serve.eplb.rebalancer import ROLLBACK, Rebalancer

Answer = tuple[int, Parcel, list[ForEngine]]
OFF = "load balancing is off; start the server with --enable-eplb"
STARTING = "the engines are still starting"
MAX_WAITING = 64
BUSY = f"{MAX_WAITING} requests about load balancing wait already; try again later"


class BalanceSurface:
    """`ask()` gives an answer (an HTTP status, a body, orders to carry out), or None: then there is a question first.

    What came of the question goes to `conclude()`. `rebalancer` None: balancing is off.
    """

    def __init__(self, rebalancer: Rebalancer | None) -> None:
        self.rebalancer = rebalancer
        self._waiting: dict[int, RequestQuestion] = {}
        self._questions: list[RequestQuestion] = []

    def ask(self, member: int, asked: BalanceAsk, *, ready: bool = True) -> Answer | None:
        """`ready`: engines take orders already."""
        if self.rebalancer is None:
            return _refusal(400, OFF)
        if not ready:
            return _refusal(503, STARTING)
        if len(self._waiting) >= MAX_WAITING:
            return _refusal(503, BUSY)
        rebalancer = self.rebalancer
        question = RequestQuestion(
            number=rebalancer.next_number(),
            member=member,
            request=asked.number,
            action=asked.action,
            body=asked.body,
            policy=rebalancer.policy,
            situation=rebalancer.situation(),
            facts=_facts(rebalancer),
        )
        self._waiting[question.number] = question
        self._questions.append(question)
        return None

    def take_questions(self) -> list[RequestQuestion]:
        """What is to be worked out, each given once."""
        questions, self._questions = self._questions, []
        return questions

    def conclude(self, solved: Solved, now: float) -> tuple[RequestQuestion, Answer]:
        """To whom the answer goes, and the answer: a refusal if what was to be done cannot be done any more."""
        question = self._waiting.pop(solved.number)
        try:
            return question, self._done(solved, now)
        except Conflict as error:
            return question, _refusal(409, str(error))
        except ConfigError as error:
            return question, _refusal(400, str(error))

    def is_waiting(self, number: int) -> bool:
        """Whether the question of this number came from outside."""
        return number in self._waiting

    def _done(self, solved: Solved, now: float) -> Answer:
        rebalancer, result = self.rebalancer, solved.result
        assert rebalancer is not None
        if isinstance(result, Unsolved):
            return _refusal(503, result.reason)
        assert isinstance(result, Requested)
        if result.act == "record/dump":
            return result.status, _recorded(rebalancer), []
        acts: Mapping[str, Callable[[Proposal | None], list[ForEngine]]] = {
            "apply": lambda plan: rebalancer.apply(plan, now, why="request") if plan is not None else [],
            "rollback": lambda plan: rebalancer.apply(plan, now, why=ROLLBACK) if plan is not None else [],
            "record/start": lambda _: rebalancer.record(True),
            "record/stop": lambda _: rebalancer.record(False),
            "": lambda _: [],
        }
        return result.status, solved.bodies[0], acts[result.act](result.proposal)


def _facts(rebalancer: Rebalancer) -> Facts:
    totals = rebalancer.totals
    return Facts(
        epoch=rebalancer.epoch,
        in_flight=rebalancer.in_flight,
        window_steps=rebalancer.window.num_steps,
        judged=rebalancer.books.judged,
        history=rebalancer.history,
        totals={
            "rebalances": totals.rebalances,
            "skipped": dict(totals.skipped),
            "moved_experts": totals.moved_experts,
            "moved_bytes": totals.moved_bytes,
            "stage_seconds": [len(totals.stage_seconds), sum(totals.stage_seconds)],
            "commit_seconds": [len(totals.commit_seconds), sum(totals.commit_seconds)],
            "last_success": totals.last_success,
        },
        recording=rebalancer.recording.on,
        recorded_steps=len(rebalancer.recording.steps),
        previous=rebalancer.previous,
    )


def _recorded(rebalancer: Rebalancer) -> Parcel:
    steps = len(rebalancer.recording.steps)
    if not steps:  # begun anew meanwhile
        raise Conflict(NOT_RECORDED)
    return rebalancer.recording.dump({"steps": str(steps), "made_by": "moe-serve"})


def _refusal(status: int, message: str) -> Answer:
    _, (body,) = refused(status, message)
    return status, Parcel.of(body), []
