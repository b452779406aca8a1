"""What a model needs on a mesh of devices and how fast it could be there, without the devices."""

from mimo_jax.planning.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
