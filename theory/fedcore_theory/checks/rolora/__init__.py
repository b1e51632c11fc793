"""RoLoRA, arXiv 2502.01755: alternating minimisation on a linear regressor."""
