"""FLoRA-NA, arXiv 2509.26399: two combinations of the factors nearest to the mean product."""
