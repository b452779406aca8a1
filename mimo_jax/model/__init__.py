"""The network: Flax NNX modules and the pure functions they are made of."""
