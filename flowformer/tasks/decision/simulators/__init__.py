"""Gymnasium environments: made by name and checked, and run beside each other in this process or in others."""
