"""Feed a causal module one token at a time: constant time and memory per token, however long the stream.

Run: python examples/stream.py
"""

import torch

from flowformer import FlowAttention

if __name__ == "__main__":
    torch.manual_seed(0)
    attention = FlowAttention(dim=64, num_heads=4, causal=True).eval()
    stream = torch.randn(1, 300, 64)
    with torch.inference_mode():
        whole = attention(stream)
        state = attention.init_state(batch_size=1)
        outputs = []
        for token in stream.unbind(1):
            out, state = attention.step(token, state)
            outputs.append(out)
    difference = (torch.stack(outputs, 1) - whole).abs().max().item()
    size = sum(part.numel() * part.element_size() for part in state)
    print(f"300 steps equal one pass to {difference:.1e}; the state is {size / 1024:.0f} KiB at any length")
