"""What all sections of the configuration are made of: a frozen group of options, and the types they share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

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


def short(*names: str) -> dict[str, Any]:
    """Short spellings of a flag, and second names of the option, kept beside the field."""
    return {"short": list(names)}


def dashed(spelling: str) -> str:
    """With the hyphens it takes on the command line: -dp, --data-parallel-master-ip."""
    return f"{'--' if '-' in spelling else '-'}{spelling}"
