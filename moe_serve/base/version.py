"""The version of this package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    try:
        return version("moe-serve")
    except PackageNotFoundError:  # run from the source tree
        return "0.0.0+source"
