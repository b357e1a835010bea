"""Run an attention operation: check its arguments, choose a backend, compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from flowformer.core.backends import TORCH, choose, implementation
from flowformer.core.checks import HEADS, Layout, Masks, check, check_flag, check_state, check_state_use
from flowformer.core.masks import run_packed
from flowformer.core.scan import Step, scan

# On q, k, v, mask of keys, mask of queries, state (``None`` if not causal), and what else there is of tokens: the
# output, and the state after it.
Dense = Callable[..., tuple[Tensor, Any]]


class Given(NamedTuple):
    """Arguments of an attention operation, not yet checked; see :func:`flowformer.ops.flow_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool = False
    mask: Tensor | None = None
    context_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    initial_state: Any = None
    return_state: bool = False
    backend: str = "auto"

    @property
    def sequences(self) -> int:
        """Number of sequences, packed or not."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1


class Checked(NamedTuple):
    """Checked arguments, passed to the implementation of a backend.

    Attributes:
        q: Queries.
        k: Keys.
        v: Values.
        causal: Which form.
        masks: Which keys and queries are real.
        cu_seqlens: Boundaries of a packed batch, or ``None``.
        state: The state before the first token; ``None`` for a fresh one, and if not causal.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    masks: Masks
    cu_seqlens: Tensor | None
    state: Any

    @property
    def sequences(self) -> int:
        """Number of sequences, packed or not."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1


def check_inputs(op: str, given: Given, layout: Layout = HEADS) -> Masks:
    """Check all arguments but states; see :func:`flowformer.core.checks.check`."""
    q, k, v, causal, mask, context_mask, cu_seqlens, *_ = given
    check_flag(f"{op}: causal", causal)
    return check(op, q, k, v, layout=layout, causal=causal, mask=mask, context_mask=context_mask, cu_seqlens=cu_seqlens)


def run(
    op: str,
    given: Given,
    dense: Dense,
    *,
    init_state: Callable[[int], Any] | None = None,
    layout: Layout = HEADS,
    options: Sequence[Any] = (),
    of_tokens: Sequence[Tensor] = (),
    refusals: Mapping[str, str] | None = None,
    apart: bool = False,
) -> Any:
    """Run an operation with the chosen backend, or with ``dense`` in plain PyTorch.

    Args:
        op: Name of the operation, for messages and for the table of implementations.
        given: What the operation was given.
        dense: The operation on a padded batch, in plain PyTorch.
        init_state: The state before the first token, for a number of sequences; ``None`` where there is no state.
        layout: The axes of q, k and v, and whether they must be equally long.
        options: What a backend's implementation is given besides a :class:`Checked`.
        of_tokens: What else there is of each token, (batch, length, ...): ``dense`` takes it after the state.
        refusals: Why backends cannot compute this, by the name of the backend; not of those that can.
        apart: Whether ``dense`` takes packed sequences one by one: see :func:`flowformer.core.masks.run_packed`.

    Returns:
        The output, or the output and the state.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    q, k, v, causal, _, _, cu_seqlens, state, return_state, backend = given
    check_flag(f"{op}: return_state", return_state)
    masks = check_inputs(op, given, layout)
    chosen = choose(op, backend, q, refusals)
    check_state_use(op, causal and init_state is not None, state, return_state)
    if causal and init_state is not None and (state is not None or chosen == TORCH.name):
        fresh = init_state(given.sequences)
        if state is not None:
            check_state(op, state, fresh)
        state = fresh if state is None else state
    checked = Checked(q, k, v, causal, masks, cu_seqlens, state)
    if chosen == TORCH.name:
        out, state = run_dense(dense, checked, of_tokens, apart=apart)
    else:
        out, state = implementation(op, chosen)(checked, *options)
    return (out, state) if return_state else out


def run_dense(
    dense: Dense, checked: Checked, of_tokens: Sequence[Tensor] = (), *, apart: bool = False
) -> tuple[Tensor, Any]:
    """Run an operation on a padded batch as it is, and on the sequences of a packed one as such batches.

    Args:
        dense: The operation on a padded batch.
        checked: The arguments.
        of_tokens: As in :func:`run`.
        apart: Likewise.

    Returns:
        The output and the state; ``None`` where there is none.
    """
    q, k, v, _, masks, cu_seqlens, state = checked
    if cu_seqlens is None:
        return dense(q, k, v, *masks, state, *of_tokens)

    def padded(*given: Any) -> tuple[Tensor, Any]:
        q, k, v, *others, mask, state = given
        return dense(q, k, v, mask, mask, state, *others)

    return run_packed(padded, (q, k, v, *of_tokens), cu_seqlens, state, apart=apart)


def scanned(block: Step, whole: Callable[..., Tensor], causal: bool, learned: Sequence[Tensor | None] = ()) -> Dense:
    """Return the form of a mechanism in linear time that runs block by block, as plain PyTorch does.

    Args:
        block: The causal form on a block of tokens (q, k, v, mask, ...): see :func:`flowformer.core.scan.scan`.
        whole: The bidirectional form on q, k, v, mask of keys, mask of queries, and what else there is of tokens.
        causal: Which form.
        learned: Learned tensors that ``block`` takes after the state.
    """

    def dense(
        q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any, *others: Tensor
    ) -> Any:
        if causal:
            return scan(block, (q, k, v, key, *others), state, learned)
        return whole(q, k, v, key, query, *others), None

    return dense


def at_once(block: Step, whole: Callable[..., Tensor], causal: bool, learned: Sequence[Tensor | None] = ()) -> Dense:
    """Return the form that has all tokens in one block; arguments as of :func:`scanned`."""

    def dense(
        q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any, *others: Tensor
    ) -> Any:
        if causal:
            return block((q, k, v, key, *others), state, *learned)
        return whole(q, k, v, key, query, *others), None

    return dense


# :func:`scanned` or :func:`at_once`: how a backend goes through tokens.
Walk = Callable[..., Dense]
