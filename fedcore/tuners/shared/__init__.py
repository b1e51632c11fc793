"""What both tuners stand on."""
