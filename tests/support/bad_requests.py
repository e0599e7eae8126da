"""Bodies that no server of ours may accept: path, body, status, and the field that the error must name.

And large ones: as much as a body may hold, of what costs a server most before it knows that it is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

PROMPT = "In the beginning"
MESSAGES = [{"role": "user", "content": "Tell me more."}]
BAD: list[tuple[str, dict[str, object], int, str | None]] = [
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": ""}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": [[]]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [1, "x"]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [10**9]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [-1]}, 400, "prompt"),
    ("/v1/completions", {"prompt": 5}, 400, "prompt"),
    ("/v1/completions", {"prompt": PROMPT, "model": "other"}, 404, "model"),
    ("/v1/completions", {"prompt": PROMPT, "model": 5}, 400, "model"),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": 10**9}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": 10**30}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": "5"}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": PROMPT, "temperature": -1}, 400, "temperature"),
    ("/v1/completions", {"prompt": PROMPT, "temperature": "hot"}, 400, "temperature"),
    ("/v1/completions", {"prompt": PROMPT, "top_p": 0}, 400, "top_p"),
    ("/v1/completions", {"prompt": PROMPT, "top_k": -2}, 400, "top_k"),
    ("/v1/completions", {"prompt": PROMPT, "n": 0}, 400, "n"),
    ("/v1/completions", {"prompt": PROMPT, "n": 129}, 400, "n"),
    ("/v1/completions", {"prompt": PROMPT, "n": True}, 400, "n"),
    ("/v1/completions", {"prompt": PROMPT, "logprobs": 21}, 400, "logprobs"),
    ("/v1/completions", {"prompt": PROMPT, "seed": 2**63}, 400, "seed"),
    ("/v1/completions", {"prompt": PROMPT, "stop": [""]}, 400, "stop"),
    ("/v1/completions", {"prompt": PROMPT, "stop": {}}, 400, "stop"),
    ("/v1/completions", {"prompt": PROMPT, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": PROMPT, "logit_bias": {"1": 101}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": PROMPT, "logit_bias": {"999999999": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": PROMPT, "stop_token_ids": [-1]}, 400, "stop_token_ids"),
    ("/v1/completions", {"prompt": PROMPT, "min_tokens": 9, "max_tokens": 8}, 400, "min_tokens"),
    ("/v1/completions", {"prompt": PROMPT, "repetition_penalty": 0}, 400, "repetition_penalty"),
    ("/v1/completions", {"prompt": PROMPT, "suffix": "x"}, 400, "suffix"),
    ("/v1/completions", {"prompt": PROMPT, "best_of": 3}, 400, "best_of"),
    ("/v1/completions", {"prompt": PROMPT, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("/v1/completions", {"prompt": PROMPT, "guided_regex": "x+"}, 400, "guided_regex"),
    ("/v1/chat/completions", {}, 400, "messages"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": ["x"]}, 400, "messages.0"),
    ("/v1/chat/completions", {"messages": [{"content": "x"}]}, 400, "messages.0.role"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ("/v1/chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs"),
    ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": 2}, 400, "logprobs"),
    ("/v1/chat/completions", {"messages": MESSAGES, "response_format": {"type": "json"}}, 400, "response_format"),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_completion_tokens": 10**9}, 400, "max_completion_tokens"),
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": "x", "messages": MESSAGES}, 400, "prompt"),
    ("/detokenize", {"tokens": [10**9]}, 400, "tokens"),
    ("/detokenize", {"tokens": "x"}, 400, "tokens"),
]

MIB = 1 << 20
_LARGE = 16 * MIB - 4096
LARGE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a prompt of 16 MiB": (
        "/v1/completions",
        lambda: b'{"prompt": "' + b"the quick brown fox " * (_LARGE // 20) + b'"}',
    ),
    "a chat of 16 MiB": (
        "/v1/chat/completions",
        lambda: b'{"messages": [{"role": "user", "content": "' + b"x " * (_LARGE // 2 - 40) + b'"}]}',
    ),
    "a list of millions of wrong items": (
        "/v1/completions",
        lambda: b'{"prompt": "x", "stop_token_ids": [' + b'"",' * (_LARGE // 3 - 40) + b'""]}',
    ),
    "a prompt of millions of wrong items": (
        "/v1/completions",
        lambda: b'{"prompt": [' + b'"",' * (_LARGE // 3 - 40) + b"0.5]}",
    ),
    "deep JSON": ("/v1/completions", lambda: b'{"prompt": ' + b"[" * (_LARGE - 20) + b"}"),
    "deep and right JSON": (
        "/v1/completions",
        lambda: b'{"prompt": ' + b"[" * (_LARGE // 2 - 20) + b"]" * (_LARGE // 2 - 20) + b"}",
    ),
}
"""Made when asked for: together they are 96 MiB. Each must get a 4xx of less than MAX_REFUSAL_CHARACTERS."""
MAX_REFUSAL_CHARACTERS = 2000
