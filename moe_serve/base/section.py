"""What all sections of the configuration are made of: a frozen group of options, and the types they share."""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from moe_serve.base.errors import ConfigError
from moe_serve.base.site import without_brackets

ENVIRONMENT_PREFIX = "MOE_SERVE_"
"""Of the variable of an option."""
Size = Annotated[int, Field(ge=1)]
MAX_PORT = 65535
Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
Host = Annotated[str, AfterValidator(without_brackets)]


class Section(BaseModel):
    """A frozen group of options; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    def check_planned(self) -> None:
        """ConfigError for an option that is known but not built yet, where it asks for something."""
        for name, info in type(self).model_fields.items():
            value, refused = getattr(self, name), planned_values(info)
            if value != info.default and (refused is True or value in (refused or ())):
                flag = dashed(name.replace("_", "-"))
                raise ConfigError(f"{name}={value!r} is known but not built yet; leave {flag} at its default")


def planned_values(info: FieldInfo) -> list[str] | bool:
    """Values of an option that are not built yet: these, all but the default (True), or none (False)."""
    extra = info.json_schema_extra
    found: Any = extra.get("planned", False) if isinstance(extra, dict) else False
    return cast(list[str] | bool, found)


def short(*names: str) -> dict[str, Any]:
    """Short spellings of a flag, and second names of the option, kept beside the field."""
    return {"short": list(names)}


def planned(*values: str) -> dict[str, Any]:
    """Of an option that is known but not built yet: all that is not its default is refused, or these values alone."""
    return {"planned": list(values) or True}


def dashed(spelling: str) -> str:
    """With the hyphens it takes on the command line: -dp, --data-parallel-master-ip."""
    return f"{'--' if '-' in spelling else '-'}{spelling}"
