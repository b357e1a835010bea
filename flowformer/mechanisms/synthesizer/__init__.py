r"""Synthesizer: attention whose scores are learned tables, or computed from each query alone.

Source: Tay et al., "Synthesizer: Rethinking Self-Attention for Transformer Models", ICML 2021.
out = softmax(B) V without a scale, where B is one of

    random               B_ij = R_ij, a table for each head
    factorized_random    B = R_1 R_2, of r columns and rows
    dense                B_i = relu(q_i) W_2, where q_i = W_1 x_i + b_1 is the projected query
    factorized_dense     B_i,(p b + s) = (relu(q_i) W_A)_p (relu(q_i) W_B)_s, for p below a and s below b

and with ``dot_product`` q_i . k_j / sqrt(K) is added to it: with random tables that is what Long Range Arena has. The
causal form hides later keys. Positions are counted over real tokens, so that padding does not change a result.
"""

from flowformer.mechanisms.synthesizer.module import SynthesizerAttention
from flowformer.mechanisms.synthesizer.operation import (
    SynthesizerState,
    init_synthesizer_state,
    synthesizer_attention,
    synthesizer_attention_step,
)

__all__ = [
    "SynthesizerAttention",
    "SynthesizerState",
    "init_synthesizer_state",
    "synthesizer_attention",
    "synthesizer_attention_step",
]
