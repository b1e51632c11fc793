"""Bytes to rows and back: what carries uploads and broadcasts, and nothing else."""
