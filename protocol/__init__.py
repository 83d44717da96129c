"""What both sides agree on: messages, recipes, tensors on the wire, errors; imports nothing of ours."""

PROTOCOL_VERSION = 1
"""Stated by both sides in the header `Murmur-Protocol`; a peer that states another is refused, never guessed at."""
