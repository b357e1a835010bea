"""ListOps by recursion over trees of pairs, one expression at a time: what the fast generator is compared with.

Chances and forms are those of Long Range Arena, lra_benchmarks/data/listops.py.
"""

import numpy as np


def draw_tree(rng, depth):
    """Return a random tree of pairs, and its length."""
    if (rng.random() if depth < 10 else 1) > 0.25:
        return rng.choice(range(10)), 1
    length, values = 2, []
    for _ in range(rng.randint(2, 10)):
        tree, size = draw_tree(rng, depth + 1)
        values.append(tree)
        length += size
    tree = (rng.choice(["[MIN", "[MAX", "[MED", "[SM"]), values[0])
    for value in values[1:]:
        tree = (tree, value)
    return (tree, "]"), length


def write_tree(tree):
    """Return a tree as text with parentheses."""
    return f"( {write_tree(tree[0])} {write_tree(tree[1])} )" if isinstance(tree, tuple) else str(tree)


def value_of(tree):
    """Return the value of a tree; of an operation whose arguments are not all there, those so far."""
    if not isinstance(tree, tuple):
        return tree
    left, right = map(value_of, tree)
    if isinstance(left, str):
        return left, [right]
    if right == "]":
        rules = {"[MIN": min, "[MAX": max, "[MED": lambda values: int(np.median(values))}
        return rules.get(left[0], lambda values: sum(values) % 10)(left[1])
    return left[0], left[1] + [right]
