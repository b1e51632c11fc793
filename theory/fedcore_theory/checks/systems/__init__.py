"""What a server may see, scalings, and rules that judge whole clients."""
