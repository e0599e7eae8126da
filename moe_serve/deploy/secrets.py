"""Secrets of a world: the token by which its ranks know each other, and the keys of its clients.

A manifest holds one only where it was given; else it names a Secret that the operator makes.
"""

from __future__ import annotations

from pydantic import SecretStr

from moe_serve.deploy.deployment import Deployment
from moe_serve.deploy.manifest import Manifest


def token_name(deployment: Deployment) -> str:
    return f"{deployment.name}-world"


def keys_name(deployment: Deployment) -> str:
    return f"{deployment.name}-keys"


def api_keys(deployment: Deployment) -> dict[str, str]:
    """Option -> key, of those that were given."""
    server = deployment.config.server
    keys: dict[str, SecretStr | None] = {"api_key": server.api_key, "admin_api_key": server.admin_api_key}
    return {name: key.get_secret_value() for name, key in keys.items() if key is not None}


def secrets(deployment: Deployment) -> list[Manifest]:
    found = []
    if deployment.token is not None:
        found.append(_secret(deployment, token_name(deployment), {"token": deployment.token}))
    if keys := api_keys(deployment):
        texts = {name.replace("_", "-"): key for name, key in keys.items()}
        found.append(_secret(deployment, keys_name(deployment), texts))
    return found


def how_to_make_the_token(deployment: Deployment) -> str:
    """The command for it; the same for each target."""
    namespace = f" --namespace {deployment.options.namespace}" if deployment.options.namespace else ""
    return (
        f"kubectl create secret generic {token_name(deployment)}{namespace} "
        '--from-literal=token="$(openssl rand -hex 16)"'
    )


def _secret(deployment: Deployment, name: str, texts: dict[str, str]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": deployment.metadata(name),
        "type": "Opaque",
        "stringData": texts,
    }
