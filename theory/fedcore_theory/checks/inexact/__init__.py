"""What an inexact aggregation costs, in a bound and along a real run."""
