"""Kubernetes objects as plain data, and how they look as YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import yaml

Manifest = dict[str, object]


def to_yaml(value: object) -> str:
    """Keys in the order in which they were put, texts of several lines as such, no references."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=False)


def to_documents(manifests: Sequence[Manifest]) -> str:
    return "---\n".join(map(to_yaml, manifests))


def digest(value: object) -> str:
    """Ten characters that change with the value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Lists stand deeper than their key."""
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
