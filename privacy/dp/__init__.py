"""Differential privacy: what is clipped, what noise is added, and what that adds up to."""
