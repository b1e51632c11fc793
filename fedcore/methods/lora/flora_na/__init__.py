"""FLoRA-NA: the combination of uploads nearest to the mean product."""
