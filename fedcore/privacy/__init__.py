"""What a server may learn of its clients: sums that hide their terms."""

from fedcore.privacy.secure_sum import SecureMean, SecureSum

__all__ = ["SecureMean", "SecureSum"]
