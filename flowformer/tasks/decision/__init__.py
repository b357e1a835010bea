"""Offline reinforcement learning: recorded episodes, windows of them, and episodes in a simulator."""
