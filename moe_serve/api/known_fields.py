"""Fields that vLLM, SGLang, TGI, llama.cpp, Ollama or OpenAI know and whose effect this server lacks.

Clients send many of them at values that ask for nothing. `NEUTRAL` has those values for each field: with them an answer
is what it would be without the field. null is neutral everywhere. Any other value is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_serve.base.errors import RequestError, shown

OFF = (False, 0)
ZERO = (0, False)
ONE = (1,)
EMPTY: tuple[object, ...] = ("", [], {})
NOTHING: tuple[object, ...] = ()


def _each(names: str, neutral: tuple[object, ...]) -> dict[str, tuple[object, ...]]:
    return dict.fromkeys(names.split(), neutral)


NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # What is generated.
    **_each("use_beam_search early_stopping watermark watermarking ban_eos_token penalize_nl", OFF),
    **_each("length_penalty typical_p typical tfs tfs_z repeat_penalty encoder_repetition_penalty guidance_scale", ONE),
    **_each("min_new_tokens min_length min_keep n_keep n_discard n_indent t_max_predict_ms no_repeat_ngram_size", ZERO),
    **_each("mirostat mirostat_mode dry_multiplier xtc_probability dynatemp_range dynatemp_min dynatemp_max", ZERO),
    **_each("top_a epsilon_cutoff eta_cutoff smoothing_factor nsigma priority", ZERO),
    **_each("bad_words banned_strings banned_tokens custom_token_bans allowed_token_ids stop_regex", EMPTY),
    **_each("logits_processors samplers custom_params repetition_detection negative_prompt lora", EMPTY),
    **_each("custom_logit_processor lora_path adapter_id random_seed stop_sequences", NOTHING),
    **_each("max_new_tokens max_output_tokens", NOTHING),
    **_each("n_predict num_predict repeat_last_n thinking_token_budget thinking_budget_tokens adaptive_target", (-1,)),
    "top_n_sigma": (-1, 0),
    "do_sample": (True,),
    # Guided decoding.
    **_each("structured_outputs regex ebnf structural_tag grammar guided_grammar guided_regex guided_choice", EMPTY),
    **_each("guided_json json_schema format", NOTHING),
    "response_format": ({"type": "text"},),
    # The prompt.
    **_each("documents media_io_kwargs mm_processor_kwargs chat_template image_data system_prompt tool_prompt", EMPTY),
    **_each("guideline input_embeds prompt_embeds session_params chat_template_kwargs suffix system", EMPTY),
    **_each("prompt messages input inputs input_ids truncate truncate_prompt_tokens", NOTHING),
    **_each("max_dynamic_patch min_dynamic_patch", NOTHING),
    **_each("echo continue_final_message use_audio_in_video raw safe_prompt return_full_text", OFF),
    "add_generation_prompt": (True,),
    # Tools and reasoning.
    **_each("tools functions", EMPTY),
    **_each("tool_choice function_call", ("auto", "none")),
    **_each("think thinking_forced_open", OFF),
    **_each("enable_thinking thinking_budget", NOTHING),
    "reasoning": ({}, {"effort": "none"}, {"enabled": False}),
    "reasoning_effort": ("none",),
    "reasoning_format": ("none", "auto"),
    "include_reasoning": (True,),
    "thinking": ({}, {"type": "disabled"}),
    # OpenAI's other answers.
    **_each("audio prediction web_search_options moderation", NOTHING),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "best_of": (1,),
    # What an answer tells besides.
    **_each("return_tokens return_tokens_as_token_ids return_token_ids return_token_offsets return_prompt_text", OFF),
    **_each("return_hidden_states return_routed_experts return_cached_tokens_details return_logprob details", OFF),
    **_each("decoder_input_details timings_per_token return_progress post_sampling_probs no_stop_trim", OFF),
    **_each("top_logprobs top_n_tokens n_probs routed_experts_prompt_start", ZERO),
    **_each("logprob_token_ids response_fields", EMPTY),
    "prompt_logprobs": NOTHING,
    "max_completion_tokens": NOTHING,
    "stream_interval": ONE,
    # Where and how it is served.
    **_each("kv_transfer_params ec_transfer_params vllm_xargs options", EMPTY),
    **_each("bootstrap_host bootstrap_port bootstrap_room data_parallel_rank cache_salt", NOTHING),
    "id_slot": (-1,),
}

WITHOUT_EFFECT: Mapping[str, object] = {
    # Any value: they qualify an effect that is not asked for, or say what is so here anyway.
    **_each("spaces_between_special_tokens truncation_side separate_reasoning stream_reasoning", NOTHING),
    **_each("dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_threshold", NOTHING),
    **_each("mirostat_tau mirostat_eta dynatemp_exponent smoothing_curve adaptive_decay", NOTHING),
    **_each("guided_decoding_backend guided_whitespace_pattern return_mm_kwargs cache_prompt keep_alive", NOTHING),
    "parallel_tool_calls": NOTHING,
}

INSTEAD: Mapping[str, str] = {
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "repeat_penalty": "repetition_penalty",
    "random_seed": "seed",
    "stop_sequences": "stop",
    "ban_eos_token": "ignore_eos",
    "no_stop_trim": "include_stop_str_in_output",
    "do_sample": "temperature 0",
    "top_logprobs": "logprobs",
    "n_probs": "logprobs",
    "prompt_logprobs": "echo with logprobs in /v1/completions",
    "input": "prompt",
    "inputs": "prompt",
    "prompt": "messages, or /v1/completions",
    "messages": "prompt, or /v1/chat/completions",
    "system": "a message of role system",
    "system_prompt": "a message of role system",
    "enable_thinking": "chat_template_kwargs",
    "data_parallel_rank": "the header X-data-parallel-rank",
}
"""What has the effect of a field here, to be said where the field is refused."""


def is_known(name: str) -> bool:
    return name in NEUTRAL or name in WITHOUT_EFFECT


def check_neutral(name: str, value: object) -> None:
    """RequestError where a known field asks for an effect that is not built."""
    if name in WITHOUT_EFFECT or asks_for_nothing(value, NEUTRAL[name]):
        return
    allowed = ", ".join(["null", *map(_as_json, NEUTRAL[name])])
    instead = f"; here it is {INSTEAD[name]}" if name in INSTEAD else ""
    raise RequestError(f"{name} {shown(value)} is not supported; allowed: {allowed}{instead}", param=name)


def asks_for_nothing(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether a value is null or one of `neutral`; members of an object that are null do not count."""
    if isinstance(value, dict):
        value = {name: member for name, member in value.items() if member is not None}
    return value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def _as_json(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else shown(value).replace("'", '"')
