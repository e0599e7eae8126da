"""The front-ends of one engine: who is there, whether its lines to them stand, and whose requests end with them."""

from __future__ import annotations

from moe_serve.base.errors import EngineError
from moe_serve.base.messages import LineTo, WorldView
from moe_serve.engine.core import EngineCore
from moe_serve.engine.owners import Owners
from moe_serve.engine.sockets import FrontendSockets, LineLost, LineStands
from moe_serve.world.link import Link


class Frontends:
    """Those that serve DP rank `dp`, by address. The engine's loop thread owns it."""

    def __init__(self, dp: int, owners: Owners, sockets: FrontendSockets, link: Link) -> None:
        self._dp = dp
        self._owners = owners
        self._sockets = sockets
        self._link = link
        self._view = WorldView(engines=0)

    @property
    def addresses(self) -> list[str]:
        """Where those listen that serve this rank."""
        frontends = self._view.frontends
        return [each.address for each in frontends if each.serves is None or self._dp in each.serves]

    def look(self, view: WorldView, core: EngineCore) -> None:
        """Front-ends come and go; nobody waits for answers to one that is gone."""
        before, self._view = self.addresses, view
        for address in set(self.addresses).difference(before):
            self._sockets.connect(address)
        for gone in set(before).difference(self.addresses):
            self._sockets.disconnect(gone)
            core.abort(self._owners.leave(gone))

    def hear_line(self, address: str, news: LineLost | LineStands, core: EngineCore) -> None:
        """Tell the coordinator; what is lost takes its requests along.

        EngineError where the world needs that front-end; others may be cut off for as long as they like.
        """
        self._link.send(LineTo(address=address, stands=isinstance(news, LineStands)))
        if isinstance(news, LineStands):
            return
        core.abort(self._owners.leave(address))
        needed = any(each.address == address and each.essential for each in self._view.frontends)
        if news.final and needed:
            raise EngineError(f"cannot reach the front-end at {address} any more")
