"""Kernels for attention and mixtures of experts: one folder an operation, one file a backend.

They take arrays and sizes, and know no model and no mesh.
"""
