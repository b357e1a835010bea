"""Classifiers of time series without attention, which the published tables compare with."""
