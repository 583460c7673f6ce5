"""Seeds as pure functions of the position of a draw, so that a resume restores no state."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from advtrain.errors import UserError


def mix_seed(purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed that depends on the purpose and on every number.

    Raises:
        UserError: a number is negative or no integer.
    """
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 0:
            raise UserError(f"a seed must be an integer of at least 0 (got {number!r})")
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_default_generator(device: torch.device, seed: int) -> None:
    """Seed the generator that dropout draws from on `device`.

    `torch.manual_seed` seeds every device type, and queues each call forever while CUDA is not in use.
    """
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the default generators of the CPU and of `device`, and restore them afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        seed_default_generator(device, seed)
        yield
