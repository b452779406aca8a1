"""Meshes, rules from logical axes to mesh axes, and what follows from them: bytes, collectives.

Nothing here knows of MiMo: parameters come as names, shapes and logical axes.
"""
