"""Offline reinforcement learning: recorded episodes, and simulators to try what was learned from them."""
