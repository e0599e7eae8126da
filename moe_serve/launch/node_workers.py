"""Workers that one node starts for the engine on another: children of its launcher, as engines and API servers are."""

from __future__ import annotations

from moe_serve.base.config import Config
from moe_serve.launch.children import Children
from moe_serve.worker.wire import Invitation
from moe_serve.world.member import MemberSpec


def start_node_workers(children: Children, config: Config, spec: MemberSpec, *, node: int, engine_address: str) -> None:
    """All of this `node`. `config` is its own, with the model's folder here; `spec` by which they are found again."""
    topology = config.parallel.topology
    for worker in topology.workers_of_node(node):
        invitation = Invitation(
            address=engine_address,
            token=spec.token,
            worker=worker,
            threads=spec.site.threads,
            connect_seconds=spec.connect_seconds,
            site=spec.site,
            model=config.model.model,
        )
        name = topology.describe_worker(spec.dp, worker)
        children.start(name, "moe_serve.worker.process", spec, environment=invitation.to_environment())
