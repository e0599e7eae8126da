"""What a real `openai` client must see at any server of ours, with any model: one function per feature.

Each takes the client, the server's address (http://host:port) and the model's name, and asserts. The HTTP tests call
them on fake engines, the end-to-end tests on a running `moe-serve serve`. Answers are compared with each other, never
with fixed texts; a context of 200 tokens and two data-parallel ranks are enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from moe_serve.base.metrics import ENGINE_METRICS, REQUEST_METRICS
from tests.support.bad_requests import BAD, MESSAGES, PROMPT

Check = Callable[[openai.OpenAI, str, str], None]
LONG = {"max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}}
WAIT_SECONDS = 10.0
http = httpx.Client(verify=False, timeout=60)  # one for all: each would read the certificates anew


def headers_of(client: openai.OpenAI) -> dict[str, str]:
    return {"Authorization": f"Bearer {client.api_key}"}


def post(client: openai.OpenAI, base_url: str, path: str, body: object, **headers: str) -> httpx.Response:
    return http.post(base_url + path, json=body, headers=headers_of(client) | headers)


def complete(client: openai.OpenAI, model: str, prompt: object = PROMPT, **options: object) -> Completion:
    made = client.completions.create(model=model, prompt=prompt, **{**LONG, **options})  # type: ignore[call-overload]
    assert isinstance(made, Completion)
    return made


def chat(client: openai.OpenAI, model: str, **options: object) -> ChatCompletion:
    made = client.chat.completions.create(model=model, messages=MESSAGES, **{**LONG, **options})  # type: ignore[call-overload]
    assert isinstance(made, ChatCompletion)
    return made


def tokens_of(client: openai.OpenAI, base_url: str, text: str) -> list[int]:
    tokens: list[int] = post(client, base_url, "/tokenize", {"prompt": text}).raise_for_status().json()["tokens"]
    return tokens


# --- models, probes, metrics -----------------------------------------------------------------------------------


def check_models(client: openai.OpenAI, base_url: str, model: str) -> None:
    listed = client.models.list().data
    assert [card.id for card in listed] == [model]
    assert listed[0].object == "model"
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no/such-model")
    assert caught.value.code == "model_not_found"


def check_probes(client: openai.OpenAI, base_url: str, model: str) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert http.get(base_url + path).status_code == 200
    assert http.get(base_url + "/version").json()["version"]
    shown = http.get(base_url + "/config", headers=headers_of(client))
    assert {"model", "parallel", "cache", "scheduler", "server"} <= set(shown.json())
    assert client.api_key not in shown.text


def check_metrics(client: openai.OpenAI, base_url: str, model: str) -> None:
    names = {
        metric.full_name + {"counter": "_total", "summary": "_count", "histogram": "_count"}.get(metric.kind, "")
        for metric in (*REQUEST_METRICS, *ENGINE_METRICS)
        if "phase" not in metric.labels
    }
    before = samples_of(base_url)
    used = complete(client, model, max_tokens=5).usage
    assert used is not None
    after = samples_of(base_url)
    for name in names:
        assert any(series.startswith(name + "{") and 'engine="0"' in series for series in after), f"{name} is missing"
    grown = {
        "prompt_tokens_total": used.prompt_tokens,
        "generation_tokens_total": 5,
        "request_success_total": 1,
        "time_to_first_token_seconds_count": 1,
        "e2e_request_latency_seconds_count": 1,
    }
    for name, growth in grown.items():
        assert total(after, name) - total(before, name) == growth, name


def samples_of(base_url: str) -> dict[str, float]:
    """/metrics as series -> value."""
    lines = http.get(base_url + "/metrics").raise_for_status().text.splitlines()
    pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {series: float(value) for series, _, value in pairs}


def total(samples: dict[str, float], name: str) -> float:
    """A metric summed over its labels."""
    return sum(value for series, value in samples.items() if series.startswith(f"moe_serve:{name}{{"))


# --- completions -----------------------------------------------------------------------------------------------


def check_completion(client: openai.OpenAI, base_url: str, model: str) -> None:
    made = complete(client, model)
    assert (made.object, made.model, len(made.choices)) == ("text_completion", model, 1)
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    num_prompt = len(tokens_of(client, base_url, PROMPT))
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (num_prompt, 24)
    assert made.usage.total_tokens == num_prompt + 24
    assert complete(client, model).choices[0].text == made.choices[0].text, "greedy answers are repeatable"
    default = client.completions.create(model=model, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert default.usage is not None
    assert default.usage.completion_tokens == 16


def check_prompts_as_ids_and_lists(client: openai.OpenAI, base_url: str, model: str) -> None:
    prompts = [PROMPT, "def main("]
    ids = [tokens_of(client, base_url, prompt) for prompt in prompts]
    alone = [complete(client, model, prompt).choices[0].text for prompt in prompts]
    assert complete(client, model, ids[0]).choices[0].text == alone[0]
    for several in (prompts, ids):
        made = complete(client, model, several)
        assert [choice.index for choice in made.choices] == [0, 1]
        assert [choice.text for choice in made.choices] == alone
        assert made.usage is not None
        assert made.usage.prompt_tokens == sum(map(len, ids))


def check_completion_stream(client: openai.OpenAI, base_url: str, model: str) -> None:
    whole = complete(client, model)
    stream = client.completions.create(  # type: ignore[call-overload]
        model=model, prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **LONG
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert last.choices == []
    assert whole.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert all(chunk.usage is None for chunk in chunks)


def check_several_choices(client: openai.OpenAI, base_url: str, model: str) -> None:
    options = {"n": 3, "temperature": 1.0, "seed": 7}
    made = complete(client, model, **options)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    texts = [choice.text for choice in made.choices]
    assert len(set(texts)) > 1, "choices have seeds of their own"
    assert made.usage is not None
    assert made.usage.completion_tokens == 3 * 24
    assert made.usage.prompt_tokens == len(tokens_of(client, base_url, PROMPT))
    assert [choice.text for choice in complete(client, model, **options).choices] == texts
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.completions.create(model=model, prompt=PROMPT, stream=True, **{**LONG, **options}):  # type: ignore[call-overload]
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == texts


def check_seed(client: openai.OpenAI, base_url: str, model: str) -> None:
    def text(seed: int) -> str:
        return complete(client, model, temperature=1.0, seed=seed).choices[0].text

    assert text(11) == text(11)
    assert len({text(seed) for seed in range(3)}) > 1


def check_completion_logprobs(client: openai.OpenAI, base_url: str, model: str) -> None:
    made = complete(client, model, logprobs=3, max_tokens=6).choices[0]
    assert made.logprobs is not None
    assert made.logprobs.tokens is not None
    assert made.logprobs.token_logprobs is not None
    assert made.logprobs.top_logprobs is not None
    assert made.logprobs.text_offset is not None
    assert len(made.logprobs.tokens) == len(made.logprobs.token_logprobs) == len(made.logprobs.text_offset) == 6
    for token, value, top in zip(
        made.logprobs.tokens, made.logprobs.token_logprobs, made.logprobs.top_logprobs, strict=True
    ):
        assert value <= 0
        assert 3 <= len(top) <= 4
        assert math.isclose(top[token], max(top.values())), "greedy takes the likeliest"
    assert made.logprobs.text_offset[0] == 0


def check_echo_with_prompt_logprobs(client: openai.OpenAI, base_url: str, model: str) -> None:
    num_prompt = len(tokens_of(client, base_url, PROMPT))
    plain = complete(client, model, max_tokens=4)
    made = complete(client, model, max_tokens=4, echo=True, logprobs=2).choices[0]
    assert made.text == PROMPT + plain.choices[0].text
    assert made.logprobs is not None
    assert made.logprobs.token_logprobs is not None
    assert made.logprobs.text_offset is not None
    assert len(made.logprobs.token_logprobs) == num_prompt + 4
    assert made.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in made.logprobs.token_logprobs[1:])
    assert made.logprobs.text_offset == sorted(made.logprobs.text_offset)
    assert made.logprobs.text_offset[num_prompt] == len(PROMPT)
    scores = complete(client, model, max_tokens=0, echo=True, logprobs=2)
    assert scores.choices[0].text == PROMPT
    assert scores.choices[0].logprobs is not None
    assert scores.choices[0].logprobs.token_logprobs == made.logprobs.token_logprobs[:num_prompt]
    assert scores.usage is not None
    assert scores.usage.completion_tokens == 0


def check_stop_strings(client: openai.OpenAI, base_url: str, model: str) -> None:
    text = complete(client, model).choices[0].text
    stop = text[5:8]
    expected = text[: text.index(stop)]
    for stops in (stop, ["never in any text", stop]):
        made = complete(client, model, stop=stops).choices[0]
        assert (made.text, made.finish_reason) == (expected, "stop")
    kept = complete(client, model, stop=stop, extra_body={"ignore_eos": True, "include_stop_str_in_output": True})
    assert kept.choices[0].text == expected + stop
    streamed = client.completions.create(model=model, prompt=PROMPT, stop=stop, stream=True, **LONG)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected


def check_stop_token_ids_and_logit_bias(client: openai.OpenAI, base_url: str, model: str) -> None:
    wanted = tokens_of(client, base_url, "e")[-1]
    forced = complete(client, model, logit_bias={str(wanted): 100}, max_tokens=4)
    assert forced.choices[0].text.strip() == "eeee"
    assert forced.choices[0].finish_reason == "length"
    body = {"ignore_eos": True, "stop_token_ids": [wanted]}
    stopped = complete(client, model, logit_bias={str(wanted): 100}, extra_body=body)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens == 1


# --- chat ------------------------------------------------------------------------------------------------------


def check_chat(client: openai.OpenAI, base_url: str, model: str) -> None:
    made = chat(client, model)
    choice = made.choices[0]
    assert (made.object, made.model) == ("chat.completion", model)
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "length", None)
    rendered = post(client, base_url, "/tokenize", {"messages": MESSAGES}).json()["tokens"]
    assert complete(client, model, rendered).choices[0].text == choice.message.content
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(rendered), 24)
    newer = chat(client, model, max_tokens=openai.NOT_GIVEN, max_completion_tokens=3)
    assert newer.usage is not None
    assert newer.usage.completion_tokens == 3


def check_chat_stream(client: openai.OpenAI, base_url: str, model: str) -> None:
    whole = chat(client, model)
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **LONG
    )
    first, *middle, end, last = list(stream)
    assert first.choices[0].delta.role == "assistant"
    assert not first.choices[0].delta.content
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == whole.choices[0].message.content
    assert (end.choices[0].finish_reason, end.choices[0].delta.content) == ("length", None)
    assert last.choices == []
    assert whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    content = whole.choices[0].message.content
    assert content is not None
    with client.chat.completions.stream(model=model, messages=MESSAGES, stop=content[4:7], **LONG) as events:  # type: ignore[arg-type]
        assert events.get_final_completion().choices[0].message.content == content[: content.index(content[4:7])]


def check_chat_logprobs(client: openai.OpenAI, base_url: str, model: str) -> None:
    made = chat(client, model, logprobs=True, top_logprobs=2, max_tokens=5).choices[0]
    assert made.logprobs is not None
    assert made.logprobs.content is not None
    assert len(made.logprobs.content) == 5
    spelled = b""
    for entry in made.logprobs.content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 2
        assert entry.bytes is not None
        spelled += bytes(entry.bytes)
    assert made.message.content is not None
    assert spelled.decode(errors="replace").startswith(made.message.content.rstrip("\ufffd")[:3])
    bare = chat(client, model, logprobs=True, max_tokens=2).choices[0]
    assert bare.logprobs is not None
    assert bare.logprobs.content is not None
    assert [entry.top_logprobs for entry in bare.logprobs.content] == [[], []]
    streamed = client.chat.completions.create(  # type: ignore[call-overload]
        model=model, messages=MESSAGES, stream=True, logprobs=True, **{**LONG, "max_tokens": 5}
    )
    entries = [e for chunk in streamed if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in entries] == [entry.token for entry in made.logprobs.content]


def check_chat_stop_and_choices(client: openai.OpenAI, base_url: str, model: str) -> None:
    text = chat(client, model).choices[0].message.content
    assert text is not None
    stop = text[4:7]
    stopped = chat(client, model, stop=[stop]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    made = chat(client, model, n=2, temperature=1.0, seed=3)
    assert [choice.index for choice in made.choices] == [0, 1]


# --- tokens, ranks, leaving ------------------------------------------------------------------------------------


def check_tokenize_and_detokenize(client: openai.OpenAI, base_url: str, model: str) -> None:
    text = "In the beginning, naïve 🙃!"
    body = {"model": model, "prompt": text, "return_token_strs": True, "add_special_tokens": False}
    answer = post(client, base_url, "/tokenize", body).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] > 0
    back = post(client, base_url, "/detokenize", {"tokens": answer["tokens"]}).json()
    assert back["prompt"] == text


def check_pinned_rank(client: openai.OpenAI, base_url: str, model: str) -> None:
    for rank in ("0", "1"):
        made = post(client, base_url, "/v1/completions", {"prompt": PROMPT}, **{"X-data-parallel-rank": rank})
        assert made.status_code == 200
        assert made.headers["X-data-parallel-rank"] == rank
    for wrong in ("2000", "-1", "x", ""):
        refused = post(client, base_url, "/v1/completions", {"prompt": PROMPT}, **{"X-data-parallel-rank": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "X-data-parallel-rank")


def check_a_client_that_leaves_frees_its_place(client: openai.OpenAI, base_url: str, model: str) -> None:
    stream = client.completions.create(
        model=model, prompt=PROMPT, stream=True, max_tokens=100, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + WAIT_SECONDS
    while total(samples_of(base_url), "num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert total(samples_of(base_url), "num_requests_running") == 0


# --- bad requests ----------------------------------------------------------------------------------------------


def check_bad_requests(client: openai.OpenAI, base_url: str, model: str) -> None:
    for path, body, status, param in BAD:
        answer = post(client, base_url, path, body)
        assert answer.status_code == status, f"{path} {body}: {answer.text}"
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["param"]) == ("invalid_request_error", param), f"{path} {body}: {error}"
        assert param is None or param.split(".")[0] in error["message"], error["message"]
    assert complete(client, model).choices[0].finish_reason == "length", "nothing else is disturbed"


def check_too_long_names_both_numbers(client: openai.OpenAI, base_url: str, model: str) -> None:
    limit = post(client, base_url, "/tokenize", {"prompt": "x"}).json()["max_model_len"]
    num_prompt = len(tokens_of(client, base_url, PROMPT))
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, model, max_tokens=limit)
    assert caught.value.code == "context_length_exceeded"
    for number in (num_prompt, limit):
        assert str(number) in caught.value.message
    token = tokens_of(client, base_url, "x")[-1]
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, model, [token] * limit, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    full = complete(client, model, [token] * (limit - 2), max_tokens=2).usage
    assert full is not None
    assert full.total_tokens == limit, "exactly full is allowed"


def check_errors_are_the_clients_own_classes(client: openai.OpenAI, base_url: str, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        complete(client, "no-such-model")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        complete(client, model, temperature=-1)
    assert bad.value.param == "temperature"
    assert http.get(base_url + "/no/such/path", headers=headers_of(client)).json()["error"]["message"]
    assert http.get(base_url + "/v1/completions", headers=headers_of(client)).status_code == 405


CHECKS: tuple[Check, ...] = (
    check_models,
    check_probes,
    check_metrics,
    check_completion,
    check_prompts_as_ids_and_lists,
    check_completion_stream,
    check_several_choices,
    check_seed,
    check_completion_logprobs,
    check_echo_with_prompt_logprobs,
    check_stop_strings,
    check_stop_token_ids_and_logit_bias,
    check_chat,
    check_chat_stream,
    check_chat_logprobs,
    check_chat_stop_and_choices,
    check_tokenize_and_detokenize,
    check_pinned_rank,
    check_a_client_that_leaves_frees_its_place,
    check_bad_requests,
    check_too_long_names_both_numbers,
    check_errors_are_the_clients_own_classes,
)
