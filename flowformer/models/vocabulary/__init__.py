"""Layers over a vocabulary: the loss in pieces, and adaptive embedding and softmax."""
