"""A double of flashinfer 0.7.2.post1 (commit beabf50) as far as its communications over NVLink.

With OPEN sizes and types are free.
"""

OPEN = False
