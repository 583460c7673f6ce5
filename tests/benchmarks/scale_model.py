"""A model of the step time by number of GPUs, from four numbers; it prints the table of docs/explanation/scaling.md.

    python -m tests.benchmarks.scale_model --step-ms 190 --passes 22 --gradient-mb 44.7 --gbit 100

A step of adversarial training with k attack steps runs 2k + 2 local passes (forward and backward count as one each) and
one all-reduce of the gradient, which overlaps with the last backward pass. Standard training runs 2 passes for the same
all-reduce.

    T(n) = compute + max(0, ring(n) - overlap)         ring(n) = 2 (n-1)/n bytes/bandwidth + 2 (n-1) latency

Ring all-reduce: Patarasuk & Yuan 2009. `overlap` is the part of the last backward pass during which gradients of later
layers are already sent. DDP's buckets give about 0.7 of the pass (Li et al. 2020, PyTorch Distributed, figure 6).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

OVERLAP = 0.7
LATENCY_S = 15e-6  # per hop


@dataclass(frozen=True)
class Step:
    """One step on one device, at a fixed number of samples per device."""

    compute_s: float  # of an adversarial step
    passes: int  # forward and backward passes of attack and training
    gradient_bytes: float

    @property
    def standard(self) -> Step:
        """The step of standard training: one forward and one backward pass."""
        return Step(self.compute_s * 2 / self.passes, 2, self.gradient_bytes)


def ring_s(workers: int, gradient_bytes: float, bytes_per_s: float, latency_s: float = LATENCY_S) -> float:
    """Return the seconds of a ring all-reduce."""
    if workers == 1:
        return 0.0
    return 2 * (workers - 1) / workers * gradient_bytes / bytes_per_s + 2 * (workers - 1) * latency_s


def step_s(step: Step, workers: int, bytes_per_s: float, latency_s: float = LATENCY_S) -> float:
    """Return the seconds of a step on `workers` workers."""
    last_backward = step.compute_s / step.passes
    ring = ring_s(workers, step.gradient_bytes, bytes_per_s, latency_s)
    return step.compute_s + max(0.0, ring - OVERLAP * last_backward)


def efficiency(step: Step, workers: int, bytes_per_s: float, latency_s: float = LATENCY_S) -> float:
    """Return the scaling efficiency: speed per worker relative to a single worker, in (0, 1]."""
    return step.compute_s / step_s(step, workers, bytes_per_s, latency_s)


def table(step: Step, gbit: list[float]) -> str:
    """Return a Markdown table of efficiencies: adversarial / standard training."""
    lines = ["| GPUs | " + " | ".join(f"{g:g} Gbit/s" for g in gbit) + " |", "|" + "---|" * (len(gbit) + 1)]
    for workers in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        cells = []
        for g in gbit:
            pair = (efficiency(s, workers, g * 1e9 / 8) for s in (step, step.standard))
            cells.append(" / ".join(f"{100 * e:.0f} %" for e in pair))
        lines.append(f"| {workers} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step-ms", type=float, required=True, help="an adversarial step on one device")
    parser.add_argument("--passes", type=int, required=True, help="2 k + 2 for PGD with k steps")
    parser.add_argument("--gradient-mb", type=float, required=True, help="4 bytes a parameter in fp32")
    parser.add_argument("--gbit", type=float, nargs="+", default=[10, 25, 100, 400])
    arguments = parser.parse_args()
    step = Step(arguments.step_ms / 1000, arguments.passes, arguments.gradient_mb * 1e6)
    print(table(step, arguments.gbit))


if __name__ == "__main__":
    main()
