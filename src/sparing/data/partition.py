"""Who has which samples: cutting one data set among the clients of a fleet.

Every function takes the class of each sample (N,) and returns one sorted array of sample numbers for each client. No
sample is given twice, and the same arguments give the same parts on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from sparing.core.errors import InvalidValue, shown

ATTEMPTS = 100
"""So often :func:`dirichlet_partition` draws again until every client has a sample."""


def iid_partition(labels: Integer[ndarray, " n"], n_clients: int, seed: int) -> list[Integer[ndarray, " _"]]:
    """Samples dealt out at random, to each client as many as to the next, but for one.

    Raises:
        InvalidValue: more clients than samples.
    """
    _check_clients(labels, n_clients)
    order = np.random.RandomState(seed).permutation(len(labels))
    return [np.sort(part) for part in np.array_split(order, n_clients)]


def label_shard_partition(
    labels: Integer[ndarray, " n"], n_clients: int, classes_per_client: int, seed: int
) -> list[Integer[ndarray, " _"]]:
    """Each client has samples of ``classes_per_client`` classes, by shards dealt at random (McMahan et al. 2017).

    Every class is cut into n_clients · classes_per_client / K equal shards, K the number of classes (where that is no
    whole number, some classes drawn at random into one more), and no client is dealt two of one class. The classes of
    two clients depend on the seed and not on how many samples a class has.

    Args:
        labels: class of each sample.
        n_clients: how many parts.
        classes_per_client: how many classes each part has.
        seed: decides who has which classes, and which samples of them.

    Raises:
        InvalidValue: more classes for a client than there are; fewer shards than classes, so that samples of some
            would be nobody's; a class with fewer samples than shards.
    """
    _check_clients(labels, n_clients)
    classes, counts = np.unique(labels, return_counts=True)
    if not 1 <= classes_per_client <= len(classes):
        raise InvalidValue(
            f"classes_per_client = {classes_per_client}; 1 … {len(classes)}, the number of classes, is expected"
        )
    if n_clients * classes_per_client < len(classes):
        raise InvalidValue(
            f"{n_clients} clients with {classes_per_client} classes each cannot hold all {len(classes)} classes; more "
            "of either are needed"
        )
    draw = np.random.RandomState(seed)
    dealt = _deal(len(classes), n_clients, classes_per_client, draw)
    parts: list[list[ndarray]] = [[] for _ in range(n_clients)]
    for number, label in enumerate(classes):
        owners = np.flatnonzero(dealt[:, number])
        if len(owners) > counts[number]:
            raise InvalidValue(
                f"class {shown(int(label))} has {counts[number]} samples for {len(owners)} clients; one for each is "
                "needed: fewer clients, or fewer classes_per_client"
            )
        members = draw.permutation(np.flatnonzero(labels == label))
        for owner, shard in zip(draw.permutation(owners), np.array_split(members, len(owners)), strict=True):
            parts[owner].append(shard)
    return [np.sort(np.concatenate(shards)) for shards in parts]


def _deal(classes: int, clients: int, each: int, draw: np.random.RandomState) -> ndarray:
    """(clients, classes) of True where a client is dealt a class: ``each`` for every client, classes equally often.

    A client takes of the classes with most shards left, at random among equals; so none is left with one class only.
    """
    left = np.full(classes, clients * each // classes)
    left[draw.permutation(classes)[: clients * each % classes]] += 1
    dealt = np.zeros((clients, classes), bool)
    for client in draw.permutation(clients):
        chosen = np.lexsort((draw.rand(classes), -left))[:each]
        dealt[client, chosen] = True
        left[chosen] -= 1
    return dealt


def dirichlet_partition(
    labels: Integer[ndarray, " n"], n_clients: int, alpha: float, seed: int
) -> list[Integer[ndarray, " _"]]:
    """Each class is shared out in proportions drawn from a Dirichlet distribution (Hsu et al. 2019, arXiv:1909.06335).

    Args:
        labels: class of each sample.
        n_clients: how many parts.
        alpha: concentration > 0: large is nearly even, 0.1 gives most of a class to few clients.
        seed: decides proportions and samples.

    Raises:
        InvalidValue: more clients than samples; alpha so small that a hundred draws leave some client without any.
    """
    _check_clients(labels, n_clients)
    if not 0 < alpha < np.inf:
        raise InvalidValue(f"alpha = {alpha}; a finite number > 0 is expected")
    draw = np.random.RandomState(seed)
    for _ in range(ATTEMPTS):
        parts: list[list[ndarray]] = [[] for _ in range(n_clients)]
        for label in np.unique(labels):
            members = draw.permutation(np.flatnonzero(labels == label))
            shares = draw.dirichlet(np.full(n_clients, float(alpha)))
            cuts = (np.cumsum(shares)[:-1] * len(members)).round().astype(np.int64)
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                part.append(piece)
        joined = [np.sort(np.concatenate(pieces)) for pieces in parts]
        if all(len(part) for part in joined):
            return joined
    raise InvalidValue(
        f"alpha = {alpha:g} left one of {n_clients} clients without a sample of {len(labels)} in each of {ATTEMPTS} "
        "draws; a larger alpha or fewer clients are needed"
    )


def limit_samples(
    labels: Integer[ndarray, " n"],
    parts: Sequence[Integer[ndarray, " _"]],
    samples_per_client: int,
    seed: int,
    *,
    by_class: bool = False,
) -> list[Integer[ndarray, " _"]]:
    """Parts of at most so many samples each, drawn at random from what they were.

    Args:
        labels: class of each sample.
        parts: sample numbers of each client.
        samples_per_client: the most that one keeps.
        seed: decides which.
        by_class: as many of one of its classes as of another, as far as they go; else all samples are alike.

    Raises:
        InvalidValue: samples_per_client below 1, or with ``by_class`` below a client's number of classes.
    """
    if samples_per_client < 1:
        raise InvalidValue(f"samples_per_client = {samples_per_client}; at least 1 is expected")
    draw, kept = np.random.RandomState(seed), []
    for number, part in enumerate(parts):
        order = draw.permutation(part)
        if by_class:
            classes = np.unique(labels[order])
            if samples_per_client < len(classes):
                raise InvalidValue(
                    f"samples_per_client = {samples_per_client} for the {len(classes)} classes of client {number}; at "
                    "least one of each is needed"
                )
            # the first of every class before the second of any
            turns = np.empty(len(order), np.int64)
            for label in classes:
                members = np.flatnonzero(labels[order] == label)
                turns[members] = np.arange(len(members))
            order = order[np.argsort(turns, kind="stable")]
        kept.append(np.sort(order[:samples_per_client]))
    return kept


def _check_clients(labels: ndarray, n_clients: int) -> None:
    if not 1 <= n_clients <= len(labels):
        raise InvalidValue(
            f"n_clients = {n_clients} for {len(labels)} samples; 1 … {len(labels)} is expected, so that every client "
            "has a sample"
        )
