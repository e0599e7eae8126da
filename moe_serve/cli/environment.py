"""Variables that look like options and are none: a misspelt one is refused, Kubernetes' own are passed over.

For every Service of a namespace Kubernetes puts variables into each pod. A Service named moe-serve makes
MOE_SERVE_PORT=tcp://10.96.12.7:8000, which is no port of ours.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection, MutableMapping

from moe_serve.base.errors import ConfigError
from moe_serve.base.secret import TOKEN_ENVIRONMENT
from moe_serve.world.member import ENVIRONMENT

ADDRESS = re.compile(r"^(tcp|udp|sctp)://")
OF_A_SERVICE = re.compile(r"_SERVICE_(HOST|PORT(_.+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
OURS = {TOKEN_ENVIRONMENT, ENVIRONMENT}
log = logging.getLogger(__name__)


def check_environment(environment: MutableMapping[str, str], prefix: str, options: Collection[str]) -> None:
    """Take Kubernetes' variables out; ConfigError with the nearest name for one that is no option.

    `options` are names as variables spell them, without the prefix; those of a section have `__` before their own.
    """
    known = {prefix + option for option in options} | OURS
    for name in sorted(name for name in environment if name.upper().startswith(prefix)):
        value = environment[name]
        if OF_A_SERVICE.search(name) or (name.endswith("_PORT") and ADDRESS.match(value)):
            log.info("passed over %s=%s, which Kubernetes makes for a Service of that name", name, value)
            del environment[name]
        elif name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known - OURS, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"the environment has {name}, which is no option of moe-serve serve{meant}")
