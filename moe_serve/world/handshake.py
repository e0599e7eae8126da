"""Both ends of a member's line prove that they know the world's token, before a byte of the other's is decoded.

    coordinator -> member   its nonce
    member -> coordinator   a nonce of its own, HMAC(token, "member", both nonces)
    coordinator -> member   HMAC(token, "coordinator", both nonces), or REFUSAL and the end of the line

All of fixed lengths. Frames follow.
"""

from __future__ import annotations

from moe_serve.base.secret import NONCE_BYTES, PROOF_BYTES, derive, new_nonce, proves

ANSWER_BYTES = NONCE_BYTES + PROOF_BYTES
REFUSAL = bytes(PROOF_BYTES)


def answer_challenge(token: str, nonce: bytes) -> bytes:
    """A member's answer to a coordinator's nonce."""
    own = new_nonce()
    return own + derive(token, "member", nonce, own)


def judge_answer(token: str, nonce: bytes, answer: bytes) -> bytes:
    """The coordinator's last word about an answer to its nonce; REFUSAL if the member does not know the token."""
    theirs, given = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    return derive(token, "coordinator", nonce, theirs) if proves(given, token, "member", nonce, theirs) else REFUSAL


def is_coordinator(token: str, nonce: bytes, answer: bytes, verdict: bytes) -> bool:
    """Whether the last word came from somebody who knows the token."""
    return proves(verdict, token, "coordinator", nonce, answer[:NONCE_BYTES])
