"""CE-LoRA, arXiv 2503.23869, and tri-factor adapters: what averaging cores does."""
