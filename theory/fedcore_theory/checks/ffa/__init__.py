"""FFA-LoRA: a frozen factor, its exact averages, its floor and its smoothness."""
