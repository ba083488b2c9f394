"""Which instances a caller connects to, where there are more than it needs."""

from collections.abc import Sequence
from hashlib import blake2b

from rollcall.registry import Instance


def subset(instances: Sequence[Instance], caller: str, size: int) -> tuple[Instance, ...]:
    """Choose `size` instances for this caller by rendezvous hashing; all of them where there are no more.

    Each caller ranks all instances by a hash of its own name and theirs. An instance that comes or goes changes at most
    one place in a caller's choice, and different callers' choices spread evenly. (Thaler and Ravishankar, 1998)
    """
    if len(instances) <= size:
        return tuple(instances)

    def rank(instance: Instance) -> bytes:
        return blake2b(f"{caller}\0{instance.id}".encode(), digest_size=8).digest()

    return tuple(sorted(sorted(instances, key=rank)[:size], key=lambda instance: instance.id))
