"""Hidden states on their way through the pipeline stages: from the stage before, to the stage behind."""

from __future__ import annotations

from torch import Tensor

from moe_serve.base.progress import Phase, Progress
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.pending import Pending


class Handover:
    """One rank's. `group`: the ranks with the same place in every stage, in order of the stages.

    Both ends know from the step plan how many rows there are; without rows nothing travels.
    """

    def __init__(self, group: Group, progress: Progress) -> None:
        self._group = group
        self._progress = progress
        self._sent: Pending[Tensor] | None = None

    def take(self, out_TD: Tensor) -> Tensor:
        """The rows of the stage before, written into `out_TD`; itself on the first stage."""
        if self._group.rank > 0 and out_TD.shape[0]:
            self._progress.enter(Phase.RECEIVE_HIDDEN)
            self._group.receive(out_TD, self._group.rank - 1)
        return out_TD

    def pass_on(self, hidden_TD: Tensor) -> None:
        """Give rows to the stage behind, which may be a step behind too: what it has not taken yet must be waited for.

        So one step can be computed here while the one before is still on its way.
        """
        if not hidden_TD.shape[0]:
            return
        if self._sent is not None:
            self._progress.enter(Phase.SEND_HIDDEN)
            self._sent.wait()
        self._sent = self._group.start_send(hidden_TD, self._group.rank + 1)
