"""CE-LoRA: cores mixed for each client by similarity."""
