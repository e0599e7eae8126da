"""generation_config.json: the sampling it asks for, refused where no request could be served so; the rest named."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moe_serve.base.errors import CheckpointError, RequestError
from moe_serve.base.fields import Fields
from moe_serve.base.sampling import SamplingParams

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
USED = (*SAMPLING_FIELDS, "do_sample", "eos_token_id", "bos_token_id")
UNUSED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "max_length": (None,),
        "max_new_tokens": (None,),
        "min_length": (None, 0),
        "min_new_tokens": (None, 0),
        "max_time": (None,),
        "stop_strings": (None, []),
        "num_beams": (None, 1),
        "num_beam_groups": (None, 1),
        "num_return_sequences": (None, 1),
        "penalty_alpha": (None, 0),
        "dola_layers": (None,),
        "diversity_penalty": (None, 0),
        "constraints": (None, []),
        "force_words_ids": (None, []),
        "top_h": (None,),
        "typical_p": (None, 1),
        "epsilon_cutoff": (None, 0),
        "eta_cutoff": (None, 0),
        "encoder_repetition_penalty": (None, 1),
        "no_repeat_ngram_size": (None, 0),
        "bad_words_ids": (None, []),
        "forced_bos_token_id": (None,),
        "forced_eos_token_id": (None,),
        "exponential_decay_length_penalty": (None,),
        "suppress_tokens": (None, []),
        "begin_suppress_tokens": (None, []),
        "sequence_bias": (None, {}, []),
        "token_healing": (None, False),
        "guidance_scale": (None, 1),
        "watermarking_config": (None,),
    }
)
"""What changes an answer of transformers and is not used here, with the values under which it does not."""


def sampling_defaults(generation: Fields) -> dict[str, float]:
    """Sampling options under SamplingParams' names; an explicit `"do_sample": false` means greedy."""
    found = {name: generation.values.get(name) for name in SAMPLING_FIELDS}
    defaults = {name: value for name, value in found.items() if value is not None}
    for name, value in defaults.items():
        try:
            SamplingParams(**{name: value})  # type: ignore[arg-type]
        except RequestError as error:
            raise CheckpointError(
                f"{generation.path}: {error}; no request that leaves {name} out could be answered (correct the file, "
                "or take the key out)"
            ) from error
    if generation.values.get("do_sample") is not None and not generation.flag("do_sample"):
        defaults["temperature"] = 0.0
    return defaults  # type: ignore[return-value]


def unused_settings(generation: Fields) -> str | None:
    """A sentence for the operator that names what would change answers in transformers, and does not here."""
    values = generation.values
    unused = [name for name, neutral in UNUSED.items() if values.get(name) not in neutral]
    if not unused:
        return None
    shown = ", ".join(f"{name} = {str(values[name])[:40]}" for name in unused)
    return f"{generation.path}: what would change answers in transformers and is not used here: {shown}"
