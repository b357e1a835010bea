"""Results as tables next to published numbers, and attention maps as figures."""
