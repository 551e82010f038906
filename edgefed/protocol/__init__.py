"""The wire contract between agents and the aggregator: messages, tensor frames, routes. Knows no torch."""

PROTOCOL_VERSION = 1
"""Raised whenever a message or a route changes its meaning; both sides must agree."""
