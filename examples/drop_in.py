"""Replace the attention of a model by Flow-Attention: a small encoder over sequences of unequal length.

Run: python examples/drop_in.py
"""

import torch
from torch import nn

from flowformer import FlowAttention


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = FlowAttention(dim, num_heads)  # was: nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Transform (batch, length, dim); ``real`` (batch, length) marks tokens that are not padding."""
        x = x + self.attention(self.norm1(x), mask=real)
        return x + self.mlp(self.norm2(x))


if __name__ == "__main__":
    torch.manual_seed(0)
    block = Block(dim=64, num_heads=4)
    lengths = torch.tensor([[4000], [1500]])
    real = torch.arange(4000) < lengths
    out = block(torch.randn(2, 4000, 64), real)
    print("output", tuple(out.shape), "for sequences of", lengths.flatten().tolist(), "tokens")
