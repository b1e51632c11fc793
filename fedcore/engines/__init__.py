"""Engines that run a federation; the local one keeps every client in this process."""
