"""The published program of ListOps, as short as it goes: lra_benchmarks/data/listops.py of Long Range Arena."""

import numpy as np


def draw_published(rng, depth):
    """A tree of pairs, and its length: generate_tree."""
    if (rng.random() if depth < 10 else 1) > 0.25:
        return rng.choice(range(10)), 1
    length, values = 2, []
    for _ in range(rng.randint(2, 10)):
        tree, size = draw_published(rng, depth + 1)
        values.append(tree)
        length += size
    tree = (rng.choice(["[MIN", "[MAX", "[MED", "[SM"]), values[0])
    for value in values[1:]:
        tree = (tree, value)
    return (tree, "]"), length


def write_published(tree):
    """A tree in text: to_string."""
    return f"( {write_published(tree[0])} {write_published(tree[1])} )" if isinstance(tree, tuple) else str(tree)


def value_published(tree):
    """The value of a tree: to_value."""
    if not isinstance(tree, tuple):
        return tree
    left, right = map(value_published, tree)
    if isinstance(left, str):
        return left, [right]
    if right == "]":
        rules = {"[MIN": min, "[MAX": max, "[MED": lambda values: int(np.median(values))}
        return rules.get(left[0], lambda values: sum(values) % 10)(left[1])
    return left[0], left[1] + [right]
