"""Approximations tend to what they approximate as their budget grows: a table, and a picture of it.

Run: python examples/convergence.py
     python examples/convergence.py --length 256 --draws 10 --picture docs/pictures/convergence.png
"""

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from flowformer import ops

HEADS, CHANNELS = 4, 16
CORRELATION = 0.97  # of neighbouring tokens: landmarks and windows need tokens that are like their neighbours


class Inputs(NamedTuple):
    """Queries and keys (1, length, heads, channels) with numbers of variance 1/4, and values of variance 1."""

    q: Tensor
    k: Tensor
    v: Tensor


class Curve(NamedTuple):
    """Relative errors by budget; one of random numbers is the mean over draws."""

    name: str
    budget: str
    limit: str
    errors: dict[int, float]


def make_inputs(length: int) -> Inputs:
    """Autoregressive series of order 1, float64."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 1, length, HEADS, CHANNELS, generator=generator, dtype=torch.float64)
    place = torch.arange(length)
    weights = (CORRELATION ** (place[:, None] - place).double()).tril()
    weights[:, 1:] *= (1 - CORRELATION**2) ** 0.5
    q, k, v = torch.einsum("ij,nbjhc->nbihc", weights, noise)
    return Inputs(q / 2, k / 2, v)


def segment_means(rank: int, length: int) -> Tensor:
    """A projection (rank, length) to the means of segments: the identity where rank is length."""
    return torch.eye(rank, dtype=torch.float64).repeat_interleave(length // rank, 1) * (rank / length)


def shared_softmax(q: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of queries that are keys, scaled to unit length; no token attends to itself."""
    Q, V = q.transpose(1, 2), v.transpose(1, 2)
    others = ~torch.eye(q.shape[1], dtype=torch.bool)
    return scaled_dot_product_attention(Q, normalize(Q, dim=-1), V, attn_mask=others).transpose(1, 2)


def normal(draw: int, *size: int) -> Tensor:
    """Normal random numbers of one draw."""
    return torch.randn(size, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)


def random_curves(x: Inputs, draws: int) -> Iterator[Curve]:
    """Those with random numbers: errors fall as the square root of their number."""
    q, k, v = x

    def curve(name: str, budget: str, limit: str, want: Tensor, attend: Callable[[int, int], Tensor]) -> Curve:
        sizes = (4, 16, 64, 256) if budget == "hashes" else (64, 256, 1024, 4096)
        errors = {size: sum(error(attend(size, draw), want) for draw in range(draws)) / draws for size in sizes}
        return Curve(name, budget, limit, errors)

    yield curve(
        "performer", "features", "softmax", ops.softmax_attention(q, k, v),
        lambda size, draw: ops.performer_attention(q, k, v, normal(draw, size, CHANNELS), eps=0.0),
    )  # fmt: skip
    # Its features are of directions: exp(-|x - y|^2 / 2) is exp(x . y) but for a factor that cancels.
    directions = ops.softmax_attention(CHANNELS**0.5 * normalize(q, dim=-1), normalize(k, dim=-1), v)
    paper = {"feature_scale": None, "norm_eps": 0.0, "bound": "none"}
    yield curve(
        "rfa", "features", "softmax of directions", directions,
        lambda size, draw: ops.rfa_attention(q, k, v, None, normal(draw, HEADS, size // 2, CHANNELS), **paper),
    )  # fmt: skip
    yoso = {"hash_code_len": 4, "gradient": "surrogate"}
    yield curve(
        "yoso", "hashes", "its expectation", ops.yoso_attention(q, k, v, **yoso),
        lambda size, draw: ops.yoso_attention(q, k, v, normal(draw, size, CHANNELS, 4), **yoso),
    )  # fmt: skip


def other_curves(x: Inputs) -> Iterator[Curve]:
    """Those that are exact once their budget is the length."""
    q, k, v = x
    length = q.shape[1]
    full = ops.softmax_attention(q, k, v)

    def curve(name: str, budget: str, limit: str, want: Tensor, attend: Callable[[int], Tensor]) -> Curve:
        sizes = [length // 2**power for power in range(5, -1, -1)]
        return Curve(name, budget, limit, {size: error(attend(size), want) for size in sizes})

    yield curve(
        "nystromformer", "landmarks", "softmax", full,
        lambda size: ops.nystromformer_attention(q, k, v, num_landmarks=size),
    )  # fmt: skip
    yield curve(
        "linformer", "rank", "softmax", full,
        lambda size: ops.linformer_attention(q, k, v, segment_means(size, length)),
    )  # fmt: skip
    yield curve(
        "reformer", "tokens of a bucket", "softmax of shared queries", shared_softmax(q, v),
        lambda size: ops.reformer_attention(
            q, q, v, normal(0, 8, CHANNELS, max(1, length // size // 2)), chunk_length=size
        ),
    )  # fmt: skip
    yield curve(
        "local", "window", "softmax", full,
        lambda size: ops.local_attention(q, k, v, window=size, exact_window=True),
    )  # fmt: skip


def error(got: Tensor, want: Tensor) -> float:
    """Relative to what was wanted."""
    return float((got - want).norm() / want.norm())


def show(curves: list[Curve]) -> None:
    """Print a table in Markdown."""
    print("| mechanism | tends to | as grow its | relative error |\n|---|---|---|---|")
    for name, budget, limit, errors in curves:
        cells = ", ".join(f"{size:,}: {value:.2g}" for size, value in errors.items())
        print(f"| `{name}` | {limit} | {budget} | {cells} |")


def draw(random: list[Curve], others: list[Curve], length: int, path: str) -> None:
    """Draw both kinds of curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, curves in ((left, random), (right, others)):
        for curve, marker in zip(curves, "osD^", strict=False):
            sizes = [size if axes is left else size / length for size in curve.errors]
            label = f"{curve.name}: {curve.budget}, to {curve.limit}"
            axes.plot(sizes, list(curve.errors.values()), marker=marker, label=label)
        axes.set_ylabel("relative error")
        axes.set_xscale("log", base=2 if axes is right else 10)
        axes.grid(visible=True, alpha=0.3)
    sizes = (4, 4096)
    left.plot(sizes, [0.6 * size**-0.5 for size in sizes], "k:", label="slope of -1/2")
    left.set(yscale="log", xlabel="features or hashes", title="Random numbers")
    right.set_yscale("symlog", linthresh=1e-4)
    right.set(ylim=(0, None), xlabel=f"part of the length ({length})", title="Landmarks, rows, buckets, windows")
    for axes in (left, right):
        axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32, help="tokens, a multiple of 32")
    parser.add_argument("--draws", type=int, default=1, help="random numbers drawn so many times, and errors averaged")
    parser.add_argument("--picture", default="", help="file to draw")
    given = parser.parse_args()
    inputs = make_inputs(given.length)
    random, others = list(random_curves(inputs, given.draws)), list(other_curves(inputs))
    show([*random, *others])
    if given.picture:
        draw(random, others, given.length, given.picture)
