"""Rules that limit what single clients can do, in front of another method."""
