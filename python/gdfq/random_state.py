"""Random states that are nobody else's, and what is drawn from them."""

import torch
from torch import Tensor


class RandomState:
    """A random state of its own, on a device, that can be saved.

    Args:
        seed: of the state.
        device: where it lives, and what is drawn from it.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def restore(self, state: Tensor) -> None:
        """Go on from `state` with a new generator: one whose capture as a CUDA graph failed cannot be used again."""
        self.generator = torch.Generator(self.device)
        self.generator.set_state(state)


def random_bytes(like: Tensor, random: RandomState) -> Tensor:
    """uint8 of the shape and the layout of `like`, eight at a time."""
    count = -(-like.numel() // 8)
    whole = torch.randint(-(2**63), 2**63 - 1, (count,), generator=random.generator, device=random.device)
    return whole.view(torch.uint8).as_strided(like.shape, torch.empty_like(like, device="meta").stride())
