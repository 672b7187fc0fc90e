"""The neighbours under rules, by a loop over all pairs: rules first, then the best, greedily."""

import math
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np

from index_builder.index.shards import IndexDataset
from index_builder.rules.conditions import Condition
from index_builder.rules.rules import JoinRules
from tests.index_fixtures import Catalogue, brute_force

Pairs = Collection[tuple[str, str]]


def holds(condition: Condition, value: Any) -> bool:
    """Decides a condition for one value."""
    if value is None:
        return condition.is_null is True
    tests = [
        condition.is_null is not True,
        condition.equals is None or value == condition.equals,
        condition.one_of is None or value in condition.one_of,
        condition.not_in is None or value not in condition.not_in,
        condition.at_least is None or value >= condition.at_least,
        condition.at_most is None or value <= condition.at_most,
    ]
    return all(tests)


def expected(
    index: IndexDataset,
    catalogue: Catalogue,
    rules: JoinRules,
    k: int,
    nprobe: int | None = None,
    excluded: Pairs = (),
) -> dict[str, tuple[list[str], list[float]]]:
    """Returns ids and scores by query id; a query that the rules leave out is not there.

    `excluded` are pairs of the rules' `by` column, both directions where they are symmetric.
    """
    oracle = brute_force(index, catalogue, JoinRules(rules.same, rules.different), nprobe)
    columns = catalogue.columns()
    rows = [{name: values[row] for name, values in columns.items()} for row in range(len(catalogue))]
    out = set(excluded)
    if rules.exclude is not None and rules.exclude.symmetric:
        out |= {(neighbor, query) for query, neighbor in out}
    found = {}
    for q, query in enumerate(rows):
        if not all(holds(condition, query[condition.column]) for condition in rules.queries):
            continue
        candidates = [
            x
            for x, candidate in enumerate(rows)
            if oracle.allowed[q, x]
            and all(holds(condition, candidate[condition.column]) for condition in rules.candidates)
            and (rules.exclude is None
                 or (query[rules.exclude.by], candidate[rules.exclude.by]) not in out)
        ]  # fmt: skip
        candidates.sort(key=lambda x: (-oracle.scores[q, x], rows[x]["image_id"].encode()))
        taken: list[int] = []
        used: Counter[tuple[str, Any]] = Counter()
        caps = {"item_id": 1} | dict(rules.max_per)
        for x in candidates:
            kinds = [(name, rows[x][name]) for name in caps if rows[x][name] is not None]
            if len(taken) < k and all(used[kind] < caps[kind[0]] for kind in kinds):
                taken.append(x)
                used.update(kinds)
        found[query["image_id"]] = (
            [rows[x]["image_id"] for x in taken],
            [float(oracle.scores[q, x]) for x in taken],
        )
    return found


def margins(scores: list[float], next_score: float | None) -> list[float | None]:
    """Returns each score minus the one after it, in float32."""
    following = [*scores[1:], next_score] if scores else []
    return [
        None if after is None else float(np.float32(score) - np.float32(after))
        for score, after in zip(scores, following, strict=True)
    ]


def several_images(n: int, dim: int, seed: int = 0) -> Catalogue:
    """Items of one to three images near each other, with one brand an item; some items have none."""
    rng = np.random.default_rng(seed)
    items: list[str] = []
    brands: list[str | None] = []
    vectors = []
    while len(items) < n:
        item = f"item{len(set(items))}"
        centre, brand = rng.normal(size=dim), ("a", "b", "c", None)[int(rng.integers(4))]
        for _ in range(min(int(rng.integers(1, 4)), n - len(items))):
            vectors.append(centre + 0.3 * rng.normal(size=dim))
            items.append(item)
            brands.append(brand)
    ids = [f"i{row * 7919 % 100_003}" for row in range(n)]
    sizes = [None if row % 7 == 0 else math.floor(row % 5) for row in range(n)]
    return Catalogue(np.asarray(vectors), ids, item_ids=items, brands=brands, sizes=sizes)
