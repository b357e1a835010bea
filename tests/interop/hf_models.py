"""Small models of transformers that tests share."""

import torch

from flowformer.interop.hf import FlowformerConfig, FlowformerForCausalLM
from flowformer.mechanisms import find_attention, list_attentions

CAUSAL = [name for name in list_attentions() if find_attention(name).can("causal")]
OPTIONS = {
    "mobile": {"normalize": True},
    "aft_full": {"position_dim": 4},
    "aft_local": {"window": 3, "position_dim": 4},
    "aft_conv": {"kernel_size": 3},
}
# Options of every module, which give its state more parts.
MODULE_OPTIONS = {"conv": 3, "output_norm": True, "output_gate": True}
VOCABULARY = 61


def configure(attention: str = "flow", **fields) -> FlowformerConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields = {**sizes, "max_position_embeddings": 64, "attention_options": OPTIONS.get(attention), **fields}
    return FlowformerConfig(attention=attention, **fields)


def enliven(model, seed: int = 0):
    """Weights so large that each token matters, and that no two scores are close."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def build(attention: str = "flow", kind: type = FlowformerForCausalLM, seed: int = 0, **fields):
    torch.manual_seed(seed)
    return enliven(kind(configure(attention, **fields)), seed)


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padded(side: str, lengths: tuple[int, ...] = (9, 4, 1), length: int = 9):
    """Tokens that are no tokens where there is padding, and the mask."""
    mask = torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
    mask = mask.flip(1) if side == "left" else mask
    return draw(len(lengths), length).masked_fill(~mask, 10**6), mask.long()


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


GREEDY = {"do_sample": False}
MODES = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True, "top_k": 9, "temperature": 0.8},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
    "several beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam sampling": {"do_sample": True, "num_beams": 2},
}


def generate(model, tokens=None, mask=None, **options):
    options = {"max_new_tokens": 8, "pad_token_id": 0, **options}
    if mask is None:  # else transformers takes any token 0 for padding
        mask = torch.ones(tokens.shape, dtype=torch.int64)
    torch.manual_seed(0)
    return model.generate(tokens, attention_mask=mask, **options)
