"""FedAvg of the factors: its error, its orders and its gauge."""
