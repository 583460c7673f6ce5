"""Seeds as pure functions of where the draw is made: nothing random has a state that a resume must restore."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def mix_seed(purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed that depends on the purpose and on every number (each at least 0)."""
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_default_generator(device: torch.device, seed: int) -> None:
    """Seed the generator that dropout draws from on `device`.

    `torch.manual_seed` seeds every kind of device, and where CUDA is not in use it queues each call for ever.
    """
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
