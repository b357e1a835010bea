"""Classifiers of time series without attention, which the published tables compare with."""

from flowformer.models.classical.lstm import LSTMClassifier

__all__ = ["LSTMClassifier"]
