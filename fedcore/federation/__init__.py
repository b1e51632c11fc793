"""The server's side of a federation, whatever carries the bytes."""
