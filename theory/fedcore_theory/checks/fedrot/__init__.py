"""FedRot-LoRA."""
