"""Independent random streams, each named by what it is for.

Nothing in a run draws from a generator that outlives its purpose, so a resumed run needs no
generator state: the seed of every draw follows from the run's seed, the round and the client.
"""

from __future__ import annotations

from hashlib import sha256


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one ``purpose``, for example ``derive_seed(0, "batches", round, client)``.

    The same arguments give the same seed on every machine; different ones give unrelated seeds.

    Example:
        >>> derive_seed(0, "batches", 3, "client-1") == derive_seed(0, "batches", 3, "client-1")
        True
    """
    text = "/".join([str(seed), *(str(part) for part in purpose)])
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little") >> 1
