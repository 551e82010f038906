"""One labelled data set divided among clients that are unlike each other, as papers of federated learning do it.

Pathological: every client has examples of exactly so many classes (McMahan et al., arXiv 1602.05629). Dirichlet: of
each class, the clients' shares are drawn from Dir(alpha) (Yurochkin et al., arXiv 1905.12022); a small alpha makes
unlike clients.

Pure: numbers in, indices out, the same for the same seed. `edgefed.personal.partition_files` writes them down.
"""

from __future__ import annotations

import numpy as np

from edgefed.errors import ConfigError, DataError

MAX_DRAWS = 1000
"""Draws of a Dirichlet partition before it is given up: about a second for 100 clients and 100 classes."""


def partition_by_class(labels: np.ndarray, clients: int, classes_per_client: int, seed: int) -> tuple[np.ndarray, ...]:
    """Sorted indices into ``labels`` (N,) of each client, who has examples of exactly ``classes_per_client`` classes.

    A class is had by as many clients as any other, give or take one, and its examples are divided evenly among them.
    Every example is used once; only where clients * classes_per_client is less than the number of classes, the classes
    that nobody has are left out.

    Raises:
        ConfigError: fewer classes in ``labels`` than a client should have, or a number below 1.
        DataError: a class has fewer examples than clients who should have it.

    """
    _check_clients(clients)
    classes = np.unique(labels)
    if not 1 <= classes_per_client <= len(classes):
        raise ConfigError(
            f"{classes_per_client} classes per client asked, the data have {len(classes)}",
            remedy=f"Set `classes_per_client` to 1 to {len(classes)}.",
        )
    rng = np.random.default_rng(seed)
    holders: list[list[int]] = [[] for _ in classes]
    for client in range(clients):
        # Those that the fewest have come first, in random order: so no class has two holders more than another.
        order = sorted(rng.permutation(len(classes)).tolist(), key=lambda place: len(holders[place]))
        for place in order[:classes_per_client]:
            holders[place].append(client)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label, of_class in zip(classes, holders, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if len(rows) < len(of_class):
            raise DataError(
                f"class {label} has {len(rows)} examples for the {len(of_class)} clients that should have some",
                remedy="Ask for fewer clients or fewer classes per client, or leave the class out.",
            )
        if of_class:
            for client, shard in zip(of_class, np.array_split(rows, len(of_class)), strict=True):
                parts[client].append(shard)
    return tuple(np.sort(np.concatenate(part)) for part in parts)


def partition_dirichlet(
    labels: np.ndarray, clients: int, alpha: float, seed: int, min_examples: int = 10
) -> tuple[np.ndarray, ...]:
    """Sorted indices into ``labels`` (N,) of each client; every example is used once.

    Of each class, the clients' shares are drawn from Dir(alpha, ..., alpha). Drawn again, all classes, until every
    client has ``min_examples``.

    Raises:
        ConfigError: alpha not above 0, or a number below 1.
        DataError: too few examples, or `MAX_DRAWS` draws left somebody with too few.

    """
    _check_clients(clients)
    if not (np.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha is {alpha}, it must be above 0", remedy="Set `alpha`, for example to 0.5.")
    if min_examples < 1:
        raise ConfigError(f"each client needs at least 1 example, {min_examples} were asked")
    if len(labels) < clients * min_examples:
        raise DataError(
            f"{len(labels)} examples are too few for {clients} clients with at least {min_examples} each",
            remedy="Ask for fewer clients, or lower `min_examples`.",
        )
    rng = np.random.default_rng(seed)
    classes, sizes = np.unique(labels, return_counts=True)
    for _ in range(MAX_DRAWS):
        cuts = _cuts(rng, sizes, clients, alpha)
        if cuts is not None and np.diff(cuts, axis=1).sum(axis=0).min() >= min_examples:
            break
    else:
        raise DataError(
            f"in {MAX_DRAWS} draws with alpha {alpha}, one of {clients} clients always had less than {min_examples} "
            "examples",
            remedy="Raise `alpha`, ask for fewer clients, or lower `min_examples`.",
        )
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label, cut in zip(classes, cuts, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        for client, part in enumerate(parts):
            part.append(rows[cut[client] : cut[client + 1]])
    return tuple(np.sort(np.concatenate(part)) for part in parts)


def class_counts(labels: np.ndarray, parts: tuple[np.ndarray, ...], num_classes: int) -> np.ndarray:
    """(clients, classes) int64: how many examples of each class a client has."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


def _cuts(rng: np.random.Generator, sizes: np.ndarray, clients: int, alpha: float) -> np.ndarray | None:
    """(classes, clients + 1) int64: where each class is cut; None where the draw went below what floats can say."""
    shares = rng.dirichlet(np.full(clients, alpha), len(sizes))
    if not np.allclose(shares.sum(axis=1), 1):
        return None
    ends = np.rint(np.cumsum(shares, axis=1) * sizes[:, None]).astype(np.int64)
    ends[:, -1] = sizes
    return np.concatenate([np.zeros((len(sizes), 1), np.int64), np.minimum(ends, sizes[:, None])], axis=1)


def _check_clients(clients: int) -> None:
    if clients < 1:
        raise ConfigError(f"{clients} clients asked, at least 1 is needed", remedy="Set `clients`, for example to 10.")
