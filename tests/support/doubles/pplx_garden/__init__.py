"""A double of pplx_garden (commit 2446003) as far as its all-to-all: documented semantics and refusals.

With OPEN sizes and types are free.
"""

OPEN = False
