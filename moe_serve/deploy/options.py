"""What `moe-serve k8s render` is told about a cluster, beside the options of `moe-serve serve`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator

from moe_serve.base.section import Section

Target = Literal["statefulset", "leaderworkerset", "inferencepool"]
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SUBDOMAIN = re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*")
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]*")
QUANTITY = re.compile(r"(?!0+(\.0*)?\D*$)[0-9]+(\.[0-9]+)?(m|[kMGTPE]|[KMGTPE]i)?")
RESOURCE = re.compile(rf"{SUBDOMAIN.pattern}/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
MAX_NAME = 40
"""A pod's revision label holds the name, up to 12 characters of ours and 11 of Kubernetes', in 63."""
MAX_LABEL = 63
MAX_SUBDOMAIN = 253


class ClusterOptions(Section):
    name: str
    """Name of this world in the cluster; all of its objects begin with it."""
    image: str
    """Container image with this package; the same for all ranks, so a fixed tag or a digest."""
    namespace: str | None = None
    """Namespace of the objects; whatever `kubectl` is set to if not given."""
    target: Target = "statefulset"
    """What holds the pods: statefulset; leaderworkerset (its controller must be there); inferencepool, a statefulset
    with a pool and a route of the Gateway API in front."""
    shape: Literal["rank", "node"] = "rank"
    """What one pod holds: a data-parallel rank, or a node's ranks, each with a port of its own."""
    service: str | None = None
    """Name of the Service that clients use; the world's name if not given. Two worlds may share one: the new and the
    old one of an update."""
    model_claim: str | None = None
    """PersistentVolumeClaim, mounted at /models: the hub's cache for an owner/name, else where MODEL's folder lies.
    Every pod must be able to mount it (ReadWriteMany, or ReadOnlyMany for a folder)."""
    cpu: str = "4"
    """Cores that a pod asks for; without a limit, which would only slow it down."""
    memory: str = "16Gi"
    """Memory that a pod asks for and may have, /dev/shm included."""
    shm_size: str = "2Gi"
    """Size of /dev/shm."""
    rdma_resource: str | None = None
    """Name under which the cluster hands out RDMA devices, such as rdma/ib; a pod gets one, and IPC_LOCK."""
    gateway: str = "inference-gateway"
    """Gateway that the route of an inferencepool belongs to, in the same namespace."""
    endpoint_picker: str | None = None
    """Service of the endpoint picker of an inferencepool, port 9002; the world's name and -epp if not given."""
    monitoring: bool = True
    """Write a PodMonitor and a PrometheusRule; the Prometheus operator must be there."""

    @field_validator("name", "service")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and (len(value) > MAX_NAME or not NAME.fullmatch(value)):
            raise ValueError(
                f"{value!r} is no name for pods and services: lower-case letters, digits and hyphens, a letter first, "
                f"no hyphen last, at most {MAX_NAME} characters"
            )
        return value

    @field_validator("namespace")
    @classmethod
    def _namespace(cls, value: str | None) -> str | None:
        if value is not None and (len(value) > MAX_LABEL or not LABEL.fullmatch(value)):
            raise ValueError(
                f"{value!r} is no namespace: lower-case letters, digits and hyphens, no hyphen at the ends, at most "
                f"{MAX_LABEL} characters"
            )
        return value

    @field_validator("model_claim", "gateway", "endpoint_picker")
    @classmethod
    def _object(cls, value: str | None) -> str | None:
        if value is not None and (len(value) > MAX_SUBDOMAIN or not SUBDOMAIN.fullmatch(value)):
            raise ValueError(
                f"{value!r} is no name of an object: lower-case letters, digits, hyphens and dots, a letter or digit "
                f"at each end, at most {MAX_SUBDOMAIN} characters"
            )
        return value

    @field_validator("image")
    @classmethod
    def _image(cls, value: str) -> str:
        if not IMAGE.fullmatch(value):
            raise ValueError(f"{value!r} is no image; it looks like registry.example/moe-serve:0.1.0")
        return value

    @field_validator("cpu", "memory", "shm_size")
    @classmethod
    def _quantity(cls, value: str) -> str:
        if not QUANTITY.fullmatch(value):
            raise ValueError(f"{value!r} is no quantity above 0; it looks like 8, 500m or 16Gi")
        return value

    @field_validator("rdma_resource")
    @classmethod
    def _resource(cls, value: str | None) -> str | None:
        if value is not None and not RESOURCE.fullmatch(value):
            raise ValueError(f"{value!r} is no extended resource; it looks like rdma/ib")
        return value
