"""What a client insists on in a masked round, whatever the coordinator says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .context import Context, refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """min_clients: smallest sum that may be read; min_threshold: fewest shares that may unmask.

    min_degree: fewest others that each client masks with, where it is not with all. colluders: how many holders of one
    client's secrets may be the coordinator's, wherever they stand. trusted: identity keys by client id that may take
    part, and no others; None takes known keys and new ones.
    """

    min_clients: int = 3
    min_threshold: int = 2
    min_degree: int = 2
    colluders: int = 0
    trusted: Mapping[str, bytes] | None = None

    def check(self, context: Context) -> None:
        """Raise PrivacyRefusal for terms that this policy does not allow."""
        t, shares = context.threshold, context.holders
        if context.min_clients < self.min_clients:
            detail = f"a sum of {context.min_clients} clients may be unmasked, the policy asks for {self.min_clients}"
            raise refusal("policy_min_clients", detail)
        if t < self.min_threshold:
            raise refusal("policy_threshold", f"{t} shares unmask, the policy asks for {self.min_threshold}")
        if shares < len(context.cohort) and context.degree < self.min_degree:
            detail = f"each client masks with {context.degree} others, the policy asks for {self.min_degree}"
            raise refusal("policy_degree", detail)
        if 2 * t <= shares + self.colluders:
            detail = f"{t} of {shares} shares unmask: with {self.colluders} liars among their holders that is too few"
            raise refusal("policy_colluders", detail)

    def check_peer(self, peer: str, key: bytes) -> None:
        """Raise PrivacyRefusal for a client that is not to take part under this identity key."""
        if self.trusted is not None and self.trusted.get(peer) != key:
            raise refusal("untrusted", f"{peer}'s key is not the one on the list of trusted keys", clients=[peer])
