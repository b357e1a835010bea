"""Interoperability: published weights, Hugging Face, timm, torch.nn.MultiheadAttention, scikit-learn and aeon."""
