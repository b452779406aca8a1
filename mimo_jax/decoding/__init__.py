"""Turning the model's logits into tokens: sampling, and the loops that generate."""
