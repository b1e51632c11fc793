"""The server's side of a round, whatever carries the bytes."""
