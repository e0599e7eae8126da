"""Chat templates in the style of the known families, written for these tests, and conversations to render with them."""

# ruff: noqa: E501 (templates are long-winded)

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_serve.text.templates import Templates

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
THINKING = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not
           (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
                {%- if call.function %}{%- set call = call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
                {%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
INSTRUCTIONS = """{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system is defined %}{{- "[INST] " + system + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + " [/INST]" }}{%- endif %}
    {%- elif message["role"] == "assistant" and message["tool_calls"] is defined and message["tool_calls"] %}
        {{- "[TOOL_CALLS]" }}
        {%- for call in message["tool_calls"] %}{{- call["function"] | tojson }}{%- endfor %}{{- eos_token }}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}{{- "[TOOL_RESULTS]" + message["content"] | string + "[/TOOL_RESULTS]" }}
    {%- else %}{{- raise_exception("only user, assistant and tool are known, after an optional system") }}{%- endif %}
{%- endfor %}"""
HEADERS = """{{- bos_token }}
{%- set date_string = "26 Jul 2024" if date_string is not defined else date_string %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping %}{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at once") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
VISION_EITHER = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}{{- message['content'] }}
    {%- else %}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' %}{{- '<|image|>' }}
            {%- elif content['type'] == 'text' %}{{- content['text'] }}{%- endif %}
        {%- endfor %}
    {%- endif %}{{- '<|eot_id|>' }}
{%- endfor %}"""
VISION_PARTS = """{% for message in messages %}{{ message['role'].upper() + ': ' }}
{%- for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{%- for content in message['content'] | selectattr('type', 'equalto', 'text') %}
{%- generation %}{{ content['text'] + ' ' }}{% endgeneration %}
{%- endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
VISION_FIRST_PART = """<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}
{%- if message['content'] and message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}
{%- for line in message['content'] %}
{%- if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}
{%- endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
ROLE_TOKENS = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
VISIBLE_TEXT = """[gMASK]<sop>
{%- macro visible_text(shown) -%}
    {%- if shown is string -%}{{- shown }}
    {%- elif shown is iterable and shown is not mapping -%}
        {%- for item in shown -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- elif item is string -%}{{- item }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{- shown }}{%- endif -%}
{%- endmacro -%}
{%- for m in messages %}
    {%- if m.role == 'user' -%}<|user|>{{ visible_text(m.content) }}
    {%- elif m.role == 'assistant' -%}<|assistant|>
        {%- set content = visible_text(m.content) %}
        {%- if m.reasoning_content is string %}{{ '<think>' + m.reasoning_content.strip() + '</think>' }}{%- endif %}
        {%- if content.strip() -%}{{ '\\n' + content.strip() }}{%- endif -%}
        {%- for tc in m.tool_calls or [] %}
            {%- set tc = tc.function %}{{ '\\n<tool_call>' + tc.name }}
            {%- for k, v in tc.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>{{ v | tojson }}</arg_value>{%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
    {%- elif m.role == 'tool' -%}<|observation|>{{ visible_text(m.content) }}
    {%- elif m.role == 'system' -%}<|system|>{{ visible_text(m.content) }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""
ASKS_NONE = """{{ bos_token }}{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'system' %}{{ message['content'] }}{%- endif %}
{%- if message['role'] == 'tool' %}{{ '<|tool_output|>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is none %}
{%- for call in message['tool_calls'] %}{{ '<|tool_call|>' + call['function']['name'] + '<|sep|>' + call['function']['arguments'] }}{%- endfor %}{{ eos_token }}
{%- elif message['role'] == 'assistant' %}
{%- set content = message['content'] %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{- '<|Assistant|>' + content + eos_token }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{%- endif %}"""
TURNS = """{{ bos_token }}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' }}
    {%- if message['content'] is string %}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable %}
        {%- for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}
    {%- endif %}{{ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}"""
MAPPED = """{%- for message in messages -%}
{%- set content = message.get('content') -%}
{%- if content is not string -%}{%- set content = content | map(attribute='text') | join('') -%}{%- endif -%}
<|{{ message.role }}|>{{ content }}
{%- endfor -%}"""
XML_TOOLS = """{%- macro extra(values, handled) %}
{%- for key in values %}{%- if key not in handled %}{{- '\\n<' ~ key ~ '>' ~ (values[key] | string) ~ '</' ~ key ~ '>' }}{%- endif %}{%- endfor %}
{%- endmacro %}
{%- for tool in tools or [] %}{{- '<function>\\n<name>' ~ tool.function.name ~ '</name>' }}
{{- extra(tool.function, ['type', 'name', 'parameters']) }}{{- '\\n</function>' }}{%- endfor %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{- '\\n<function=' + call.function.name + '>\\n' }}
{%- for name, value in call.function.arguments | items %}{{- '<parameter=' + name + '>\\n' ~ value ~ '\\n</parameter>\\n' }}{%- endfor %}
{{- '</function>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"""

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
"""Ends after some years."""
UNLESS_SLOW = f"{{% if messages[0].content == 'slow' %}}{LOOPS}{{% endif %}}{{{{ messages[0].content }}}}"

FAMILIES: Mapping[str, tuple[str, str]] = {
    "chatml": ("text", CHATML),
    "thinking": ("text", THINKING),
    "instructions": ("text", INSTRUCTIONS),
    "headers": ("text", HEADERS),
    "role tokens": ("text", ROLE_TOKENS),
    "asks none": ("text", ASKS_NONE),
    "xml tools": ("text", XML_TOOLS),
    "vision, either": ("either", VISION_EITHER),
    "visible text": ("either", VISIBLE_TEXT),
    "turns": ("either", TURNS),
    "mapped": ("either", MAPPED),
    "vision, parts": ("parts", VISION_PARTS),
    "vision, first part": ("parts", VISION_FIRST_PART),
}
"""Name -> the form of content that it wants, and its source."""

Messages = Sequence[Mapping[str, Any]]


def call(name: str = "look_up", **arguments: Any) -> dict[str, Any]:
    """A tool call as templates get it."""
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up: <b>bold</b> & 'quoted', größer",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
        },
    }
]
CONVERSATIONS: Mapping[str, Messages] = {
    "one turn": [{"role": "user", "content": "  hello \n"}],
    "several turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 北京?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA city 🙃."},
        {"role": "user", "content": '<tool_response> And "Größe"?'},
    ],
    "reasoning": [
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "so", "reasoning": "because"},
        {"role": "user", "content": "ah"},
    ],
    "a tool's answer": [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": "", "tool_calls": [call(word="größer <b>", number=10**30)]},
        {"role": "tool", "content": "found", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "It is there."},
        {"role": "user", "content": "thanks"},
    ],
}


def templates(source: str, **setup: Any) -> Templates:
    """In this process; `setup` as TemplateSetup has it."""
    usual: dict[str, Any] = {"special_tokens": {}, "seconds": 5.0, "added_tokens": None, "control_tokens": None}
    return Templates({"sources": {"default": source}, **usual, **setup})


def answer_to(made: Templates, messages: Messages, **job: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {"template": "default", "tools": None, "add_generation_prompt": True, "options": None}
    return made.render(json.dumps({**usual, "messages": messages, **job}))


def rendered(source: str, messages: Messages, *, special_tokens: Mapping[str, str] | None = None, **job: Any) -> str:
    """The text, or why there is none."""
    answer = answer_to(templates(source, special_tokens=special_tokens or {}), messages, **job)
    return str(answer.get("text", answer))
