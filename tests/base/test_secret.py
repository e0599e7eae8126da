"""Nothing that is shown of a world's token tells it."""

from __future__ import annotations

import pytest

from moe_serve.base.errors import ConfigError
from moe_serve.base.secret import check_token, derive, new_nonce, new_token, proves, world_name

TOKEN = "a token that nobody guesses"


def test_any_text_of_sixteen_characters_is_a_token_and_a_shorter_one_is_refused() -> None:
    assert check_token("ä" * 16) == "ä" * 16
    assert check_token(new_token())
    with pytest.raises(ConfigError, match=r"MOE_SERVE_WORLD_TOKEN has 3 characters; .* 16 or more"):
        check_token("dev")


def test_what_is_derived_differs_by_token_purpose_and_parts() -> None:
    one, other = new_nonce(), new_nonce()
    made = [
        derive(TOKEN, "member", one, other),
        derive(TOKEN, "member", other, one),
        derive(TOKEN, "coordinator", one, other),
        derive(TOKEN + "!", "member", one, other),
        derive(TOKEN, "curve"),
    ]
    assert len(set(made)) == len(made)
    assert proves(made[0], TOKEN, "member", one, other)
    assert not any(proves(each, TOKEN, "member", one, other) for each in [*made[1:], b"", bytes(32)])


def test_the_name_of_a_world_is_no_part_of_its_token() -> None:
    assert world_name(TOKEN) == world_name(TOKEN) != world_name(TOKEN + "!")
    assert world_name(new_token()) not in TOKEN
