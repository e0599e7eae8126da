"""One world in a cluster, settled: everything that its objects have in common. Refuses what no manifest can be.

The options are those of `moe-serve serve`, but for the ones that follow from where a pod stands in its world.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from moe_serve.base.config import SECTIONS, Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.secret import check_token
from moe_serve.deploy.options import ClusterOptions

MODELS = "/models"
ANY_ADDRESS = "0.0.0.0"
MAX_PORTS = 8
"""Ports of one pod that an InferencePool can name."""
MAX_PLACEMENT_BYTES = 900_000
"""A ConfigMap holds 1 MiB."""
FROM_THE_POD = (
    "data_parallel_rank",
    "data_parallel_rank_local",
    "data_parallel_start_rank",
    "data_parallel_address",
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
    "headless",
)
ONE_HOST = {
    "deepep_high_throughput": "hands GPU memory to its neighbours by CUDA IPC",
    "shm": "exchanges tokens in one /dev/shm",
}
"""All-to-all backends that cannot leave a pod, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """`config` holds what all ranks have in common. `token` is the world's, if it is to be in the manifests;
    `placement` the text of --expert-placement-file."""

    config: Config
    options: ClusterOptions
    token: str | None = None
    placement: str | None = None

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def service(self) -> str:
        return self.options.service or self.name

    @property
    def num_ranks(self) -> int:
        return self.config.parallel.data_parallel_size

    @property
    def port(self) -> int:
        return self.config.server.port

    @property
    def ranks_name(self) -> str:
        """Of the headless Service, under which each rank has a name of its own."""
        return f"{self.name}-ranks"

    @property
    def selector(self) -> dict[str, str]:
        """Labels of this world's pods and of no others."""
        return {"app.kubernetes.io/name": "moe-serve", "app.kubernetes.io/instance": self.name}

    @property
    def labels(self) -> dict[str, str]:
        return {**self.selector, "app.kubernetes.io/part-of": self.service}

    @property
    def is_leader_worker_set(self) -> bool:
        return self.options.target == "leaderworkerset"

    @property
    def rank_label(self) -> str:
        """The pod label that holds the rank."""
        controller = "leaderworkerset.sigs.k8s.io/worker-index"
        return controller if self.is_leader_worker_set else "apps.kubernetes.io/pod-index"

    @property
    def rank_0(self) -> str:
        """The name of rank 0, known before there is a pod."""
        if self.is_leader_worker_set:
            return "$(LWS_LEADER_ADDRESS)"
        domain = f".{self.options.namespace}.svc" if self.options.namespace else ""
        return f"{self.name}-0.{self.ranks_name}{domain}"

    @property
    def is_from_hub(self) -> bool:
        """Whether the model has a name on the hub: `owner/name`, not a path."""
        model = self.config.model.model
        return model is not None and not model.startswith("/")

    def metadata(self, name: str) -> dict[str, object]:
        namespace = {"namespace": self.options.namespace} if self.options.namespace else {}
        return {"name": name, **namespace, "labels": self.labels}


def make_deployment(
    config: Config, options: ClusterOptions, *, token: str | None = None, placement: str | None = None
) -> Deployment:
    """ConfigError for what cannot be rendered, or would not start."""
    _check_shape(config.parallel, options)
    _check_backend(config.parallel)
    _check_given(config)
    _check_model(config, options)
    if options.service == f"{options.name}-ranks":
        raise ConfigError(
            f"--service {options.service} is the name under which the ranks find each other; take another"
        )
    if token is not None:
        check_token(token)
    if placement is not None:
        _check_placement(placement, config.parallel.topology.ep)
    deployment = Deployment(config=config, options=options, token=token, placement=placement)
    for rank in range(deployment.num_ranks):
        rank_config(deployment, rank).parallel.check_built()
    return deployment


def rank_config(deployment: Deployment, rank: int) -> Config:
    """What the pod of one rank will be told."""
    meeting = {"data_parallel_rank": rank, "data_parallel_address": deployment.rank_0}
    return Config.from_flat({**given_options(deployment.config), **meeting, "host": host_of(deployment.config)})


def given_options(config: Config) -> dict[str, object]:
    """Option -> value for all that was given somewhere: command line, environment or file."""
    sections = [getattr(config, name) for name in SECTIONS]
    return {name: getattr(section, name) for section in sections for name in sorted(section.model_fields_set)}


def host_of(config: Config) -> str:
    return config.server.host if "host" in config.server.model_fields_set else ANY_ADDRESS


def _check_shape(parallel: ParallelConfig, options: ClusterOptions) -> None:
    dp, local = parallel.data_parallel_size, parallel.data_parallel_size_local
    if options.shape == "rank":
        if local not in (None, 1):
            raise ConfigError(
                f"data_parallel_size_local ({local}) is ranks of a node, but --shape rank has one rank in each pod; "
                "leave it out"
            )
        return
    if local is None or dp % local:
        raise ConfigError(
            f"--shape node needs --data-parallel-size-local, the ranks in each pod: a divisor of "
            f"data_parallel_size ({dp}), at most {MAX_PORTS} (given: {local})"
        )
    if local > MAX_PORTS:
        raise ConfigError(
            f"{local} ranks in each pod (--data-parallel-size-local) need a port each, and a pool names {MAX_PORTS} "
            f"ports of a pod at most; take a divisor of {dp} up to {MAX_PORTS}, or --shape rank"
        )
    raise ConfigError(
        "--shape node is known but not built yet: `moe-serve serve` has no supervisor of several ranks with a port "
        "each; use --shape rank"
    )


def _check_backend(parallel: ParallelConfig) -> None:
    reason = ONE_HOST.get(parallel.all2all_backend)
    if reason is not None:
        raise ConfigError(
            f"all2all_backend {parallel.all2all_backend} {reason}, which does not reach from one pod to another; "
            "--shape rank puts each rank in a pod of its own, so choose another --all2all-backend"
        )


def _check_given(config: Config) -> None:
    given = given_options(config)
    theirs = [name for name in FROM_THE_POD if name in given and given[name] is not False]
    if theirs:
        raise ConfigError(f"{' and '.join(theirs)} follows from a pod's place in its world; leave it out")
    if host_of(config) in ("localhost", "::1") or host_of(config).startswith("127."):
        raise ConfigError(f"host {host_of(config)} is reached from within its pod only; leave --host out, or give ::")
    _check_ports({"port": config.server.port, "data_parallel_rpc_port": config.parallel.data_parallel_rpc_port})


def _check_ports(ports: Mapping[str, int]) -> None:
    for name, port in ports.items():
        if port < 1024:
            raise ConfigError(f"{name} ({port}) must be at least 1024: others must know it, and the server is not root")
    if len(set(ports.values())) < len(ports):
        raise ConfigError(f"{' and '.join(ports)} must differ (both are {next(iter(ports.values()))})")


def _check_model(config: Config, options: ClusterOptions) -> None:
    model = config.model.model
    if model is None:
        if options.model_claim is not None:
            raise ConfigError("--model-claim has no effect without a MODEL: the default one is in the image")
        return
    if model.startswith("/"):
        if options.model_claim is not None and not f"{model}/".startswith(f"{MODELS}/"):
            raise ConfigError(f"MODEL {model} lies outside of {MODELS}, where --model-claim is mounted")
    elif model.startswith((".", "~")) or model.count("/") != 1 or not all(model.split("/")):
        raise ConfigError(
            f"MODEL {model} is neither an owner/name on the Hugging Face hub nor a folder in the pod (which begins "
            f"with /, such as {MODELS}/mine)"
        )


def _check_placement(text: str, num_ranks: int) -> None:
    """Only what cannot depend on the model: the ranks compare the rest with it."""
    size = len(text.encode())
    if size > MAX_PLACEMENT_BYTES:
        raise ConfigError(
            f"--expert-placement-file has {size} bytes, and a ConfigMap holds {MAX_PLACEMENT_BYTES}; leave it out, "
            "--enable-eplb finds a placement again"
        )
    try:
        given = json.loads(text)["num_ranks"]
    except (ValueError, TypeError, LookupError) as error:
        raise ConfigError("--expert-placement-file is no placement, such as `moe-serve eplb plan` writes") from error
    if given != num_ranks:
        raise ConfigError(f"--expert-placement-file is for {given} ranks, and this world has {num_ranks}")
