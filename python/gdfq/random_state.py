"""Random states that are nobody else's, and what is drawn from them."""

import torch
from torch import Tensor

from gdfq import ranks


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
    """uint8 of the shape and the layout of `like`, eight at a time. Where that is a rank's share of a batch, they are
    drawn for the whole batch."""
    whole = torch.empty_like(like, device="meta")
    if ranks.numel(like) > like.numel():
        order = sorted(range(like.dim()), key=whole.stride, reverse=True)
        whole = torch.empty_permuted((ranks.rows(len(like)), *like.shape[1:]), order, device="meta")
    count = -(-whole.numel() // 8)
    words = torch.randint(-(2**63), 2**63 - 1, (count,), generator=random.generator, device=random.device)
    drawn = words.view(torch.uint8).as_strided(whole.shape, whole.stride())
    return drawn if len(drawn) == len(like) else ranks.shard(drawn)
