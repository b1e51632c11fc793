"""Checks of FLoRG: Gram adapters, their server steps and what a round does to them."""
