"""Methods on Gram adapters, W0 + s left A^T A right."""
