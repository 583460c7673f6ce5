"""Seeds as pure functions of where the draw is made: nothing random has a state that a resume must restore."""

from __future__ import annotations

import zlib

import numpy as np


def mix_seed(purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed that depends on the purpose and on every number (each at least 0)."""
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
