"""The protocol between agents and the aggregator: messages, tensor frames, routes. Does not use torch."""

PROTOCOL_VERSION = 1
"""Increased when a message or a route changes its meaning; both sides must have the same."""
