"""What others may learn of a client: secure sums, differential privacy, and an audit of uploads."""

from fedcore.privacy.keyed_stream import KeyedStream
from fedcore.privacy.secure_sum import SecureMean, SecureSum

__all__ = ["KeyedStream", "SecureMean", "SecureSum"]
