"""Bits that tell: digests of frozen tensors, and random numbers that depend on a name alone."""

import hashlib
from collections.abc import Iterable

import torch

PIECE = 1 << 22  # elements


@torch.no_grad()
def bit_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over sums of the bit patterns of named tensors: changes if any bit flips."""
    digest, position = hashlib.sha256(), None
    for name, tensor in tensors:
        bits = tensor.reshape(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
        digest.update(name.encode())
        # In pieces: the positions and products are int64, several times the size of the weights.
        for piece in bits.split(PIECE):
            if position is None:
                position = torch.arange(1, PIECE + 1, device=bits.device)
            weighted = (piece * position[: piece.numel()]).sum()
            digest.update(f":{piece.sum(dtype=torch.int64)}:{weighted}".encode())
    return digest.hexdigest()


def named_generator(name: str, seed: int) -> torch.Generator:
    """Random numbers of a tensor: by its name, so that they are the same at every grid."""
    return torch.Generator().manual_seed(named_seed(name, seed))


def named_seed(name: str, seed: int) -> int:
    """A seed of its own for each name and seed; neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")
