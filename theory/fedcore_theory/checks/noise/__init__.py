"""Gaussian noise on factors and on products."""
