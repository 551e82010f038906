"""When each client was last heard of: an immutable mapping that is quick to change, because every request does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

PARTS = 256
"""A change copies one part: 40 clients of 10,000, and the list of parts."""


class LastSeen(Mapping[str, float]):
    """{client_id: seconds}. Never changes; `seen` and `without` return another one."""

    __slots__ = ("_parts",)

    def __init__(self, entries: Mapping[str, float]):
        parts: list[dict[str, float]] = [{} for _ in range(PARTS)]
        for client_id, at in entries.items():
            parts[hash(client_id) % PARTS][client_id] = at
        self._parts = parts

    @classmethod
    def of(cls, entries: Mapping[str, float]) -> LastSeen:
        """``entries`` as such a mapping; itself if it is one."""
        return entries if isinstance(entries, LastSeen) else cls(entries)

    def seen(self, client_id: str, at: float) -> LastSeen:
        """With a client heard of at ``at``."""
        return self._with_part(client_id, {**self._part(client_id), client_id: at})

    def without(self, client_id: str) -> LastSeen:
        """Without a client."""
        return self._with_part(client_id, {c: at for c, at in self._part(client_id).items() if c != client_id})

    def __getitem__(self, client_id: str) -> float:
        return self._part(client_id)[client_id]

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            yield from part

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def _part(self, client_id: str) -> dict[str, float]:
        return self._parts[hash(client_id) % PARTS]

    def _with_part(self, client_id: str, part: dict[str, float]) -> LastSeen:
        other = LastSeen.__new__(LastSeen)
        other._parts = self._parts.copy()
        other._parts[hash(client_id) % PARTS] = part
        return other
