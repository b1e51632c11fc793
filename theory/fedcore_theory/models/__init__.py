"""Toy models and random rounds that several checks share."""
