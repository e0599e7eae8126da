"""One world in a cluster, settled: everything that its objects have in common. Refuses what no manifest can be.

The options are those of `moe-serve serve`, but for the ones that follow from where a pod stands in its world.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from moe_serve.base.config import SECTIONS, Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.launched import check_served
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.secret import check_token
from moe_serve.deploy.options import ClusterOptions
from moe_serve.model.all2all.limits import check_containers

MODELS = "/models"
HTTP, RENDEZVOUS, SUPERVISOR = "http", "rendezvous", "supervisor"
OPTION_OF_PORT = {RENDEZVOUS: "data_parallel_rpc_port", SUPERVISOR: "data_parallel_supervisor_port"}
ANY_ADDRESS = "0.0.0.0"
MAX_PORTS = 8
"""Ports of one pod that an InferencePool can name."""
MAX_PLACEMENT_BYTES = 900_000
"""A ConfigMap holds 1 MiB."""
NODES = ("nnodes", "master_addr", "master_port")
FROM_THE_POD = (
    "data_parallel_rank",
    "data_parallel_rank_local",
    "data_parallel_start_rank",
    "node_rank",
    "data_parallel_address",
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
    "headless",
)


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
    def is_node_shape(self) -> bool:
        return self.options.shape == "node"

    @property
    def ranks_per_pod(self) -> int:
        """Each has a server of its own."""
        return (self.config.parallel.data_parallel_size_local or 1) if self.is_node_shape else 1

    @property
    def num_pods(self) -> int:
        return self.num_ranks // self.ranks_per_pod

    @property
    def http_ports(self) -> dict[str, int]:
        """Name -> number, of the servers of a pod's ranks in their order."""
        first = self.config.server.port
        if not self.is_node_shape:
            return {HTTP: first}
        return {f"{HTTP}-{place}": first + place for place in range(self.ranks_per_pod)}

    @property
    def other_ports(self) -> dict[str, int]:
        """Name -> number, of what else listens in a pod and must be known beforehand."""
        parallel = self.config.parallel
        supervisor = {SUPERVISOR: parallel.data_parallel_supervisor_port} if self.is_node_shape else {}
        return {**supervisor, RENDEZVOUS: parallel.data_parallel_rpc_port}

    @property
    def probed_port(self) -> str:
        """Name of the port that speaks for the whole pod."""
        return SUPERVISOR if self.is_node_shape else HTTP

    @property
    def ranks_name(self) -> str:
        """Of the headless Service, under which each pod has a name of its own."""
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
    def index_label(self) -> str:
        """The pod label that holds its place: the rank, or the node with its ranks."""
        controller = "leaderworkerset.sigs.k8s.io/worker-index"
        return controller if self.is_leader_worker_set else "apps.kubernetes.io/pod-index"

    @property
    def rank_0(self) -> str:
        """The name of rank 0's pod, known before there is one."""
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
    deployment = Deployment(config=config, options=options, token=token, placement=placement)
    check_containers(
        config.parallel.all2all_backend, containers=deployment.num_pods, hosts_apart=deployment.is_node_shape
    )
    _check_given(config)
    _check_ports({**deployment.http_ports, **deployment.other_ports})
    _check_model(config, options)
    if options.service == f"{options.name}-ranks":
        raise ConfigError(
            f"--service {options.service} is the name under which the ranks find each other; take another"
        )
    if token is not None:
        check_token(token)
    if placement is not None:
        _check_placement(placement, config.parallel.topology.ep)
    check_served(config.parallel)
    for pod in range(deployment.num_pods):
        pod_config(deployment, pod).parallel.check_built()
    return deployment


def refuse_nodes(options: Mapping[str, object]) -> None:
    """ConfigError where one engine is asked for in several pods."""
    if given := sorted(name for name in NODES if options.get(name, 1) != 1):
        raise ConfigError(
            f"{' and '.join(given)} spreads the ranks of one engine over nodes, and a pod here has whole engines; "
            "leave it out and give --data-parallel-size for several pods (--tensor-parallel-size counts within a pod)"
        )


def pod_config(deployment: Deployment, pod: int) -> Config:
    """What one pod will be told: of a rank, or of a node's supervisor."""
    place = "node_rank" if deployment.is_node_shape else "data_parallel_rank"
    meeting = {place: pod, "data_parallel_address": deployment.rank_0}
    return Config.from_flat({**given_options(deployment.config), **meeting, "host": host_of(deployment.config)})


def given_options(config: Config) -> dict[str, object]:
    """Option -> value for all that was given somewhere: command line, environment or file."""
    sections = [getattr(config, name) for name in SECTIONS]
    return {name: getattr(section, name) for section in sections for name in sorted(section.model_fields_set)}


def host_of(config: Config) -> str:
    return config.server.host if "host" in config.server.model_fields_set else ANY_ADDRESS


def _check_shape(parallel: ParallelConfig, options: ClusterOptions) -> None:
    dp, local = parallel.data_parallel_size, parallel.data_parallel_size_local
    for option in ("distributed_executor_backend", "data_parallel_backend"):
        if getattr(parallel, option) == "ray":
            raise ConfigError(
                f"{option} ray needs nodes of a Ray cluster, and these pods are none; leave it out, or start moe-serve "
                "serve on a node of that cluster"
            )
    if options.shape == "rank":
        if parallel.data_parallel_multi_port_external_lb:
            raise ConfigError(
                "data_parallel_multi_port_external_lb is for several ranks in a pod, but --shape rank has one in each; "
                "leave it out, or give --shape node"
            )
        if local not in (None, 1):
            raise ConfigError(
                f"data_parallel_size_local ({local}) is ranks of a node, but --shape rank has one rank in each pod; "
                "leave it out, or give --shape node"
            )
        return
    if not local or dp % local:
        raise ConfigError(
            f"--shape node needs --data-parallel-size-local, the ranks in each pod: a divisor of "
            f"data_parallel_size ({dp}), at most {MAX_PORTS} (given: {local})"
        )
    if local > MAX_PORTS:
        raise ConfigError(
            f"{local} ranks in each pod (--data-parallel-size-local) need a port each, and a pool names {MAX_PORTS} "
            f"ports of a pod at most; take a divisor of {dp} up to {MAX_PORTS}, or --shape rank"
        )


def _check_given(config: Config) -> None:
    given = given_options(config)
    theirs = [name for name in FROM_THE_POD if name in given and given[name] is not False]
    if theirs:
        raise ConfigError(f"{' and '.join(theirs)} follows from a pod's place in its world; leave it out")
    if host_of(config) in ("localhost", "::1") or host_of(config).startswith("127."):
        raise ConfigError(f"host {host_of(config)} is reached from within its pod only; leave --host out, or give ::")


def _check_ports(ports: Mapping[str, int]) -> None:
    taken: dict[int, str] = {}
    for name, port in ports.items():
        option = OPTION_OF_PORT.get(name, "port")
        if port < 1024:
            raise ConfigError(
                f"{option} ({port}) must be at least 1024: others must know it, and the server is not root"
            )
        if port in taken:
            among = "" if name in (HTTP, RENDEZVOUS) and len(ports) == 2 else ", or a port that follows from it"
            raise ConfigError(f"{taken[port]} and {option} must differ{among} (both are {port})")
        taken[port] = option


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
