"""Secure aggregation: updates leave under masks, and only their sum can be read. Pure: no SQL, no HTTP, no clock."""
