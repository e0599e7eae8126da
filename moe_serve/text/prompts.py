"""What a Python caller may give as prompts, conversations and sampling params, each in one form.

Texts, token ids of any integer type, dicts and any iterable of them are taken; what is wrong is named with its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral

from moe_serve.base.errors import RequestError, shown
from moe_serve.base.sampling import SamplingParams

Message = dict[str, object]
FORMS = "a text, token ids, or a dict with prompt or prompt_token_ids"


@dataclass(frozen=True, slots=True)
class GivenPrompt:
    """One prompt. `token_ids` is None where they are still to be made of the `text`, which may be unknown otherwise."""

    text: str | None
    token_ids: list[int] | None


def as_prompts(value: object) -> list[GivenPrompt]:
    """One prompt or several, as several; none for an empty list. RequestError naming the place of what is wrong."""
    value = _without_arrays(value)
    if isinstance(value, str | Mapping):
        return [_prompt(value, "prompts")]
    if not _is_several(value):
        raise RequestError(f"prompts must be {FORMS}, or a list of them, not {shown(value)}", param="prompts")
    several = [_without_arrays(item) for item in value]  # type: ignore[attr-defined]
    ids = [_is_id(item) for item in several]
    if any(ids):
        if not all(ids):
            raise RequestError(f"prompts mix token ids with {shown(several[ids.index(False)])}", param="prompts")
        return [_prompt(several, "prompts")]
    return [_prompt(item, f"prompts[{place}]") for place, item in enumerate(several)]


def as_params(value: object, count: int, default: SamplingParams) -> list[SamplingParams]:
    """Params for each of `count` prompts; `default` where None is given."""
    if value is None or isinstance(value, SamplingParams):
        return [value or default] * count
    if not _is_several(value):
        raise RequestError(
            f"params must be SamplingParams, None, or a list with one for each prompt, not {shown(value)}",
            param="params",
        )
    each = list(value)  # type: ignore[call-overload]
    if len(each) != count:
        raise RequestError(f"{len(each)} sampling params for {count} prompts", param="params")
    for place, item in enumerate(each):
        if item is not None and not isinstance(item, SamplingParams):
            raise RequestError(f"params[{place}] must be SamplingParams or None, not {shown(item)}", param="params")
    return [item or default for item in each]


def as_conversations(value: object) -> list[list[Message]]:
    """One conversation or several, as several."""
    several = list(value) if _is_several(value) else [value]  # type: ignore[call-overload]
    if several and isinstance(several[0], Mapping) and _is_several(value):
        return [_conversation(several, "messages")]
    return [_conversation(each, f"messages[{place}]") for place, each in enumerate(several)]


@contextmanager
def naming(place: str) -> Iterator[None]:
    """A RequestError raised inside says which of the requests it is about."""
    try:
        yield
    except RequestError as error:
        raise type(error)(f"{place}: {error}", param=place) from error


def _conversation(value: object, place: str) -> list[Message]:
    messages = list(value) if _is_several(value) else []  # type: ignore[call-overload]
    if not messages:
        raise RequestError(f"{place} must be a list of messages with role and content, not {shown(value)}", param=place)
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"{place}[{number}] must be a message with role and content, not {shown(message)}")
    return [{**message} for message in messages]


def _prompt(value: object, place: str) -> GivenPrompt:
    if isinstance(value, str):
        return GivenPrompt(value, None)
    if isinstance(value, Mapping):
        return _from_dict(value, place)
    return GivenPrompt(None, _ids(value, place, FORMS))


def _from_dict(value: Mapping[object, object], place: str) -> GivenPrompt:
    given = {name: item for name, item in value.items() if item is not None}
    unknown = [name for name in given if name not in ("prompt", "prompt_token_ids")]
    if unknown:
        raise RequestError(
            f"{place} has {shown(unknown[0])}, which is not supported; allowed: prompt, prompt_token_ids", param=place
        )
    text = given.get("prompt")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"{place}: prompt must be a text, not {shown(text)}", param=place)
    if "prompt_token_ids" in given:
        return GivenPrompt(text, _ids(given["prompt_token_ids"], f"{place}: prompt_token_ids", "token ids"))
    if text is None:
        raise RequestError(f"{place} must have prompt or prompt_token_ids", param=place)
    return GivenPrompt(text, None)


def _ids(value: object, place: str, allowed: str) -> list[int]:
    value = _without_arrays(value)
    if not _is_several(value):
        raise RequestError(f"{place} must be {allowed}, not {shown(value)}", param=place)
    ids = []
    for number, item in enumerate(value):  # type: ignore[arg-type, var-annotated]
        if not _is_id(item):
            raise RequestError(f"{place} must be token ids, not {shown(item)} (at place {number})", param=place)
        ids.append(int(item))
    return ids


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_several(value: object) -> bool:
    """Whether a value has items in an order. bytes have integers for items, and nobody means these."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray | Mapping | AbstractSet)


def _without_arrays(value: object) -> object:
    """An array or a tensor of any library as lists."""
    as_list = getattr(value, "tolist", None)
    return as_list() if callable(as_list) else value
