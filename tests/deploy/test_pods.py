"""What a pod is told is what the operator said, and the objects around it speak of the same ports, labels and names."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.base.config import Config
from moe_serve.base.section import ENVIRONMENT_PREFIX
from moe_serve.cli.serve import parse_serve
from moe_serve.deploy.deployment import pod_config
from tests.support.manifests import Objects, as_kubelet, expanded, objects_of

TOKEN = "a-token-of-this-test"
SELECTORS = ("Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor", "InferencePool", "StatefulSet")


def told(objects: Objects, pod: int) -> Config:
    """What `moe-serve serve` makes of a pod's container: its command, environment and mounted files."""
    command, environment = as_kubelet(objects, pod, TOKEN)
    assert command[:2] == ["moe-serve", "serve"]
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in config_files(objects).items():
            (Path(folder) / name).write_text(text)
        os.environ |= {name: value for name, value in environment.items() if name.startswith(ENVIRONMENT_PREFIX)}
        try:
            return parse_serve([text.replace("=/etc/moe-serve/", f"={folder}/") for text in command[2:]])
        finally:
            for name in environment:
                if name.startswith(ENVIRONMENT_PREFIX):
                    del os.environ[name]
            os.environ |= before


def config_files(objects: Objects) -> dict[str, str]:
    volume = next(each for each in objects.template["spec"]["volumes"] if each["name"] == "config")
    data: dict[str, str] = objects.one("ConfigMap", volume["configMap"]["name"])["data"]
    return data


def shown(config: Config) -> dict[str, Any]:
    """Every option, but for paths that are others in a pod, and the address, which a controller may fill in."""
    values = config.model_dump()
    for name in ("world_token_file", "expert_placement_file", "data_parallel_address"):
        del values["parallel"][name]
    return values


def test_every_pod_is_told_what_the_operator_said_and_its_own_ranks(objects: Objects) -> None:
    started: list[int] = []
    for pod in range(objects.deployment.num_pods):
        config = told(objects, pod)
        assert shown(config) == shown(pod_config(objects.deployment, pod))
        assert config.parallel.load_balancing == "external"
        started += config.parallel.dp_ranks_here
    assert started == list(range(objects.deployment.num_ranks))


FLAGS = st.lists(
    st.sampled_from(
        [
            "-tp=2",
            "--enable-expert-parallel",
            "--max-model-len=512",
            "--dtype=float32",
            "--device=cpu",
            "--no-enable-prefix-caching",
            "--port=9001",
            "--data-parallel-rpc-port=9102",
            "--host=::",
            "--kv-cache-memory-bytes=1000000",
            "--gpu-memory-utilization=0.5",
            "--max-num-batched-tokens=64",
            "--served-model-name=other",
            "--api-key=secret:with=signs",
            "--shutdown-timeout=0.5",
            "--allowed-origins=https://a.example",
            "--access-log=false",
            "--restart-world",
            "--all2all-backend=torch_a2a",
            "--log-level=warning",
        ]
    ),
    unique=True,
)


@given(
    flags=FLAGS,
    size=st.integers(1, 9),
    local=st.sampled_from([0, 1, 2, 8]),
    model=st.sampled_from(["", "owner/name", "/in/image", "/odd$(HOME)$$x"]),
    target=st.sampled_from(["statefulset", "leaderworkerset", "inferencepool"]),
    namespace=st.sampled_from(["", "--namespace ns"]),
)
@settings(max_examples=20, deadline=None)
def test_any_options_come_out_as_they_went_in(
    flags: list[str], size: int, local: int, model: str, target: str, namespace: str
) -> None:
    quoted = f"'{model}'" if model else ""
    shape = f"--shape node -dpl {local}" if local and size % local == 0 and size > 1 else ""
    ports = "--data-parallel-supervisor-port 9100" if shape else ""
    given = f"-dp {size} {shape} {ports} --target {target} {namespace} {' '.join(flags)}"
    objects = objects_of(f"{quoted} --name w --image i {given}")
    for pod in {0, objects.deployment.num_pods - 1}:
        assert shown(told(objects, pod)) == shown(pod_config(objects.deployment, pod))


def test_a_kubelet_replaces_what_it_knows_and_nothing_else() -> None:
    assert expanded("$(A)-$$(A)-$(B)-$A", {"A": "1"}) == "1-$(A)-$(B)-$A"


def test_selectors_find_the_pods_of_this_world(objects: Objects) -> None:
    labels = objects.template["metadata"]["labels"].items()
    for document in objects.documents:
        if document["kind"] in SELECTORS:
            spec = document["spec"]
            selector = spec.get("selector") or spec["podSelector"]
            assert selector.get("matchLabels", selector).items() <= labels, document["kind"]


def test_every_named_port_is_one_of_the_container(objects: Objects) -> None:
    ports = {port["name"]: port["containerPort"] for port in objects.container["ports"]}
    served = [port for name, port in ports.items() if name.startswith("http")]
    config = told(objects, 0)
    assert served == [config.server.port + place for place in range(len(config.parallel.dp_ranks_here))]
    assert ports["rendezvous"] == config.parallel.data_parallel_rpc_port
    assert (
        ports.get("supervisor", 0) == objects.deployment.is_node_shape * config.parallel.data_parallel_supervisor_port
    )
    assert len(set(ports.values())) == len(objects.container["ports"])
    assert all(len(name) <= 15 for name in ports), "longer names are none"
    for document in objects.documents:
        if document["kind"] == "Service":
            assert all(port["port"] == ports[port["targetPort"]] for port in document["spec"]["ports"])
        if document["kind"] == "InferencePool":
            assert document["spec"]["targetPorts"] == [{"number": port} for port in served]
        if document["kind"] == "PodMonitor":
            endpoints = document["spec"]["podMetricsEndpoints"]
            assert [ports[endpoint["port"]] for endpoint in endpoints] == served
        if document["kind"] == "NetworkPolicy":
            _, everybody = document["spec"]["ingress"]
            assert {ports[each["port"]] for each in everybody["ports"]} == set(ports.values()) - {ports["rendezvous"]}
    asked = "supervisor" if objects.deployment.is_node_shape else "http"
    probes = [objects.container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
    assert [(probe["path"], probe["port"]) for probe in probes] == [
        ("/readyz", asked),
        ("/livez", asked),
        ("/readyz", asked),
    ]


def test_every_series_has_the_rank_that_its_port_serves(objects: Objects) -> None:
    """What Prometheus makes of the relabelings, for each port of each pod."""
    if not objects.has("PodMonitor"):
        return
    found = []
    for pod in range(objects.deployment.num_pods):
        for endpoint in objects.one("PodMonitor")["spec"]["podMetricsEndpoints"]:
            rank = None
            for rule in endpoint["relabelings"]:
                if rule["targetLabel"] == "rank" and re.fullmatch(rule.get("regex", "(.*)"), str(pod)):
                    rank = rule.get("replacement", str(pod))
            found.append(rank)
    assert found == [str(rank) for rank in range(objects.deployment.num_ranks)]


def test_rank_0_has_its_name_before_it_is_ready(objects: Objects) -> None:
    address = next(text for text in objects.container["args"] if text.startswith("--data-parallel-address="))
    if objects.has("LeaderWorkerSet"):
        assert address.endswith("=$(LWS_LEADER_ADDRESS)")
        assert {each["metadata"]["name"] for each in objects.documents if each["kind"] == "Service"}.isdisjoint(
            {objects.one("LeaderWorkerSet")["metadata"]["name"]}
        )
        return
    workload = objects.one("StatefulSet")
    service = objects.one("Service", workload["spec"]["serviceName"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    name = f"{workload['metadata']['name']}-0.{service['metadata']['name']}"
    domain = f".{workload['metadata']['namespace']}.svc" if "namespace" in workload["metadata"] else ""
    assert address == f"--data-parallel-address={name}{domain}"


def test_all_pods_start_together_and_are_replaced_by_nobody(objects: Objects) -> None:
    parallel = objects.deployment.config.parallel
    size = parallel.data_parallel_size // (parallel.data_parallel_size_local or 1)
    if objects.has("StatefulSet"):
        spec = objects.one("StatefulSet")["spec"]
        assert (spec["replicas"], spec["podManagementPolicy"]) == (size, "Parallel")
        assert spec["updateStrategy"] == {"type": "OnDelete"}
    else:
        spec = objects.one("LeaderWorkerSet")["spec"]
        assert (spec["replicas"], spec["leaderWorkerTemplate"]["size"]) == (1, size)
        assert spec["startupPolicy"] == "LeaderCreated"
    assert objects.one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 0


def test_a_pod_may_do_nothing_that_it_need_not(objects: Objects) -> None:
    pod, container = objects.template["spec"], objects.container
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostIPC", "hostPID"} & set(pod)
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    asked = objects.deployment.options.rdma_resource
    added = {"add": ["IPC_LOCK"]} if asked else {}
    assert security["capabilities"] == {"drop": ["ALL"], **added}
    assert (asked in container["resources"]["limits"]) == (asked is not None)


def test_a_nodes_pod_has_its_node_alone_and_a_ranks_pod_need_not(objects: Objects) -> None:
    pod = objects.template["spec"]
    if not objects.deployment.is_node_shape:
        assert "affinity" not in pod
        assert [each["whenUnsatisfiable"] for each in pod["topologySpreadConstraints"]] == ["ScheduleAnyway"]
        return
    (apart,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert apart["topologyKey"] == "kubernetes.io/hostname"
    assert apart["labelSelector"]["matchLabels"].items() <= objects.template["metadata"]["labels"].items()


def test_everything_that_is_mounted_is_there_and_writable_places_are_few(objects: Objects) -> None:
    volumes = {volume["name"]: volume for volume in objects.template["spec"]["volumes"]}
    mounts = {mount["name"]: mount for mount in objects.container["volumeMounts"]}
    assert set(volumes) == set(mounts)
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert mounts["shm"]["mountPath"] == "/dev/shm"
    writable = {mount["mountPath"] for mount in mounts.values() if not mount.get("readOnly")}
    assert writable <= {"/dev/shm", "/tmp", "/models"}
    assert ("/models" in writable) == objects.deployment.is_from_hub


def test_gpus_are_as_many_as_a_pods_ranks_have_workers_and_none_on_a_cpu(objects: Objects) -> None:
    config, local = objects.deployment.config, objects.deployment.config.parallel.data_parallel_size_local or 1
    wanted = None if config.model.device == "cpu" else str(config.parallel.tensor_parallel_size * local)
    resources = objects.container["resources"]
    assert resources["limits"].get("nvidia.com/gpu") == resources["requests"].get("nvidia.com/gpu") == wanted


def test_no_secret_stands_outside_of_a_secret_and_none_is_made_up() -> None:
    command = "--name w --image i -dp 2 --api-key client-key --admin-api-key order-key"
    objects = objects_of(f"{command} --world-token-file tests/data/k8s/token.txt")
    for document in objects.documents:
        for secret in ("client-key", "order-key", "0123456789abcdef"):
            assert (secret in str(document)) <= (document["kind"] == "Secret")
    assert objects.one("Secret", "w-keys")["stringData"] == {"api-key": "client-key", "admin-api-key": "order-key"}
    assert not objects_of("--name w --image i -dp 2").has("Secret")


def test_a_pod_has_the_time_to_drain() -> None:
    short, long = (objects_of(f"--name w --image i -dp 2 --shutdown-timeout {seconds}") for seconds in (0, 300))
    assert short.template["spec"]["terminationGracePeriodSeconds"] == 20
    assert long.template["spec"]["terminationGracePeriodSeconds"] == 320


@pytest.mark.parametrize(("flag", "failures"), [("", 3), ("--restart-world", 66)])
def test_liveness_waits_for_a_world_that_starts_again_inside_its_pod(flag: str, failures: int) -> None:
    container = objects_of(f"--name w --image i -dp 2 --start-timeout-seconds 600 {flag}").container
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] == 660
    assert container["livenessProbe"]["failureThreshold"] == failures


def test_other_options_are_another_config_map_and_the_same_options_the_same() -> None:
    names = [
        objects_of(f"--name w --image i -dp 2 --max-num-seqs {limit}").one("ConfigMap")["metadata"]["name"]
        for limit in (7, 7, 8)
    ]
    assert names[0] == names[1] != names[2]


def test_two_worlds_can_share_a_service_and_nothing_else() -> None:
    old, new = (objects_of(f"--name {name} --service chat --image i -dp 2") for name in ("a", "b"))
    theirs = [{(each["kind"], each["metadata"]["name"]) for each in world.documents} for world in (old, new)]
    assert theirs[0] & theirs[1] == {("Service", "chat")}
    assert old.one("Service", "chat") == new.one("Service", "chat")
    selector = old.one("Service", "chat")["spec"]["selector"].items()
    assert all(selector <= world.template["metadata"]["labels"].items() for world in (old, new))
