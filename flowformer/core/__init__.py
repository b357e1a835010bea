"""Pure tensor functions that mechanisms are made of."""
