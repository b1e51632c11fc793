"""Numeric checks of published claims, run against the shipped methods and kernels."""
