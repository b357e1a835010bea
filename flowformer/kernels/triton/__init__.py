"""Triton kernels for GPUs: sums over chunks, and what tokens read of the sums before them, for any mechanism."""
