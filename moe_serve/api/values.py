"""Fields that clients write in several ways, in one."""

from __future__ import annotations

from moe_serve.base.errors import RequestError, shown
from moe_serve.base.sampling import MAX_LOGIT_BIAS

MAX_STOPS = 32
MAX_STOP_LENGTH = 1024


def as_stops(value: object) -> object:
    """One stop string or several."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise RequestError(f"stop must be a string or a list of strings, not {shown(value)}", param="stop")
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise RequestError(f"stop may hold at most {MAX_STOPS} strings of {MAX_STOP_LENGTH} characters", param="stop")
    return tuple(stops)


def as_prompts(value: object) -> object:
    """A string, ids, or a list of either -> a list."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise RequestError(
            f"prompt must be a string, token ids or a non-empty list of them, not {shown(value)}", param="prompt"
        )
    prompts = [value] if all(type(item) is int for item in value) else value
    for prompt in prompts:
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list) or not all(type(item) is int for item in prompt):
            raise RequestError("prompt must be a string, token ids or a list of strings or of ids", param="prompt")
    return prompts


def as_bias(value: object) -> object:
    """OpenAI's object of token id (as text) -> bias."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError("logit_bias must be an object of token id: bias", param="logit_bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias may hold at most {MAX_LOGIT_BIAS} token ids, not {len(value)}", param="logit_bias"
        )
    bias = {}
    for key, weight in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise RequestError(f"logit_bias must have token ids as keys, not {shown(key)}", param="logit_bias")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RequestError(f"logit_bias must have numbers as values, not {shown(weight)}", param="logit_bias")
        bias[int(key)] = weight
    return bias


def false_is_none(value: object) -> object:
    """false where a count is due asks for none."""
    return None if value is False else value


def zero_is_false(value: object) -> object:
    """0 where true or false is due."""
    return False if type(value) in (int, float) and value == 0 else value
