"""Methods on LoRA adapters, W0 + s B A."""
