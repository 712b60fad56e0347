"""Episodes by the sampling law of Meta-Dataset: varied way and shot, 5-shot, 1-shot; flat, by alphabet, by WordNet.

Pure NumPy, no images. Task number i of a domain is drawn from its own generator, seeded by (seed, domain, i): any task
can be made alone, in any order, by any process.
"""

import math
import zlib
from dataclasses import dataclass

from lab.runs import UserError

import numpy as np


@dataclass(frozen=True)
class Law:
    """Constants of Meta-Dataset's released configuration."""

    min_ways: int = 5
    max_ways: int = 50
    max_query: int = 10  # a class
    max_support: int = 500  # a task
    max_contribution: int = 100  # a class, in the size of the support set
    log_weight: float = math.log(2)  # class weights e^alpha, alpha uniform in [-log 2, log 2]
    shots: int = 0  # support images a class; 0: drawn
    max_leaves: int = 392  # widest WordNet node that is used


LAWS = {
    "varied": Law(),
    "5shot": Law(shots=5),
    "1shot": Law(min_ways=5, max_ways=5, max_contribution=1),
}


@dataclass(frozen=True)
class Pool:
    """What the law needs to know of one split of a domain.

    counts: images of each class. available: those that can be drawn (fewer where a huge class is cut), default counts.
    groups: alphabets, each a tuple of class numbers; one is drawn, then characters of it.
    nodes: inner WordNet nodes, each the tuple of classes below it; one is drawn, then all its classes are taken.
    """

    name: str
    counts: tuple[int, ...]
    available: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    nodes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Task:
    """Rows of support and query are (label in the task, class of the pool, image of the class)."""

    classes: np.ndarray  # [C]
    support: np.ndarray  # [m, 3]
    query: np.ndarray  # [q C, 3]


def generator(seed: int, name: str, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), number])


def choose_classes(pool: Pool, law: Law, rng: np.random.Generator) -> np.ndarray:
    """Classes of a task, in the order of their labels."""
    if pool.nodes:
        fitting = [n for n in pool.nodes if law.min_ways <= len(n) <= law.max_leaves]
        if not fitting:
            raise UserError(f"{pool.name}: no node spans {law.min_ways} to {law.max_leaves} classes")
        leaves = np.array(fitting[rng.integers(len(fitting))])
        return rng.choice(leaves, law.max_ways, replace=False) if len(leaves) > law.max_ways else leaves
    everything = np.arange(len(pool.counts))
    if pool.groups:
        fitting = [g for g in pool.groups if len(g) >= law.min_ways]
        if not fitting:
            raise UserError(f"{pool.name}: no alphabet has {law.min_ways} characters")
        everything = np.array(fitting[rng.integers(len(fitting))])
    if len(everything) < law.min_ways:
        raise UserError(f"{pool.name} has {len(everything)} classes, a task needs {law.min_ways}")
    ways = rng.integers(law.min_ways, min(law.max_ways, len(everything)) + 1)
    return rng.choice(everything, ways, replace=False)


def query_size(counts: np.ndarray, law: Law) -> int:
    """Queries a class, the same for all classes of a task."""
    if law.shots:
        return int(min(law.max_query, counts.min() - law.shots))
    return int(min(law.max_query, (counts // 2).min()))


def support_sizes(counts: np.ndarray, query: int, law: Law, rng: np.random.Generator) -> np.ndarray:
    """Support images of each class, [C]."""
    if law.shots:
        return np.full(len(counts), law.shots)
    beta = rng.random()
    total = np.floor(beta * np.minimum(law.max_contribution, counts - query) + 1).sum()
    total = int(min(total, law.max_support))
    share = counts * np.exp(rng.uniform(-law.log_weight, law.log_weight, len(counts)))
    share = share / share.sum()
    return np.minimum(np.floor(share * (total - len(counts))).astype(int) + 1, counts - query)


def sample(pool: Pool, law: Law, seed: int, number: int) -> Task:
    """Task `number` of a domain. Raises UserError if a class has too few images for the law."""
    rng = generator(seed, pool.name, number)
    classes = choose_classes(pool, law, rng)
    counts = np.array([pool.counts[c] for c in classes])
    query = query_size(counts, law)
    if query < 1:
        raise UserError(f"{pool.name}: class {classes[counts.argmin()]} has {counts.min()} images, too few for a task")
    sizes = support_sizes(counts, query, law, rng)
    support, queries = [], []
    for label, (c, k) in enumerate(zip(classes, sizes, strict=True)):
        there = pool.available[c] if pool.available else pool.counts[c]
        if there < k + query:
            raise UserError(
                f"{pool.name}: class {c} has {there} of {pool.counts[c]} images at hand, a task needs {k + query}"
            )
        images = rng.choice(there, k + query, replace=False)
        support += [(label, c, i) for i in images[:k]]
        queries += [(label, c, i) for i in images[k:]]
    return Task(classes, np.array(support), np.array(queries))
