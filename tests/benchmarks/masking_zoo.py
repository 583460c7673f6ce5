"""Run the masking checks on honest networks and on fakes, and print the tables of docs/results/masking.md.

    python -m tests.benchmarks.masking_zoo --data-root DIR [--only NAME ...] [--samples N]

The honest networks are trained on MNIST, in about five minutes. No check may fail on them. The fakes of
`tests/fakes.py` wrap one of them that has hardly any robustness. Each fake must be called broken, or its figure must be
right: at most 3 points above the true robust accuracy, that of the wrapped network. The thresholds of the checks were
set on other networks. The script exits with 1 if a network is called broken, or a fake is not.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advtrain.attacks import AttackConfig, GradientAttack
from advtrain.data import DataConfig, Dataset, Place, load_data
from advtrain.evaluation import EvalSpec, Report, evaluate
from advtrain.models.network import Network
from advtrain.models.resnet import wide_resnet
from advtrain.models.serialized import ModelSource
from advtrain.models.small import cnn2, mlp
from advtrain.threat import ThreatModel
from tests import fakes

SHAPE, CLASSES = (1, 28, 28), 10
SUITE = "apgd-ce-50,apgd-t-50x3,square-1000"
#: Suite of the fakes that are stochastic.
AVERAGED = "eot-apgd-ce-20x5,eot-apgd-dlr-20x5,eot-square-200x5"
SUITES = {"RandomGradient": AVERAGED, "AskedAgain": AVERAGED}


def fit(
    net: nn.Module, data: Dataset, eps: float, *, steps: int = 1, epochs: int = 3, ibp: bool = False
) -> nn.Module:
    """Train a network on 10,000 images with PGD at linf `eps`, or with interval bounds."""
    batch = next(data.train.batches(10_000, Place()))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    attack = GradientAttack(AttackConfig.model_validate({"num_steps": steps}))
    total = epochs * len(batch.x) // 100
    for number in range(total):
        rows = torch.randint(len(batch.x), (100,))
        x, y, radius = batch.x[rows], batch.y[rows], eps * min(1.0, 2 * number / total)
        net.train()
        if ibp:
            loss = F.cross_entropy(worst_logits(net, x, y, radius), y) + F.cross_entropy(net(x), y)
        elif radius > 0:
            loss = F.cross_entropy(net(attack(net, x, y, ThreatModel("linf", radius))), y)
        else:
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def worst_logits(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Return upper bounds of the wrong logits and the lower bound of the label's (Gowal et al. 2018)."""
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            middle, half = layer((low + high) / 2), F.linear((high - low) / 2, layer.weight.abs())
            low, high = middle - half, middle + half
        elif isinstance(layer, nn.ReLU):
            low, high = low.relu(), high.relu()
        elif isinstance(layer, nn.Flatten):
            low, high = low.flatten(1), high.flatten(1)
    return torch.where(F.one_hot(y, CLASSES).bool(), low, high)


def conv(norm: bool, dropout: float) -> nn.Module:
    """Return a small convolutional network with batch norm or dropout."""
    widths = [(1, 16), (16, 32)]
    layers: list[nn.Module] = []
    for before, after in widths:
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
        layers += [nn.BatchNorm2d(after)] if norm else []
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(32 * 49, CLASSES))


class RoundedInput(nn.Module):
    """Network on 8-bit inputs, with a straight-through gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + ((255 * x).round() / 255 - x).detach())


class Ensemble(nn.Module):
    """Mean of the logits of several networks."""

    def __init__(self, *nets: nn.Module) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets]).mean(0)


def archive(net: nn.Module) -> ModelSource:
    """Return the network as a pt2 archive."""
    file, batch = io.BytesIO(), torch.export.Dim("batch")
    program = torch.export.export(net, (torch.rand(4, *SHAPE),), dynamic_shapes=({0: batch},))
    torch.export.save(program, file)
    return ModelSource(file.getvalue())


def zoo(data: Dataset) -> dict[str, tuple[Callable[[], nn.Module | ModelSource], float]]:
    """Return builders of the honest networks, and the linf radius of their evaluation, by name."""
    made: dict[str, nn.Module] = {}

    def once(name: str, build: Callable[[], nn.Module], eps: float, **options: int | bool) -> nn.Module:
        if name not in made:
            torch.manual_seed(7)
            made[name] = fit(build(), data, eps, **options)
        return made[name]

    def cnn() -> nn.Module:
        return once("cnn", lambda: cnn2(SHAPE, CLASSES), 0.2, steps=5)

    def fast() -> nn.Module:
        return once("fast", lambda: cnn2(SHAPE, CLASSES, width=8), 0.2, epochs=4)

    def plain() -> nn.Module:
        return once("plain", lambda: conv(norm=False, dropout=0.0), 0.0)

    return {
        "cnn2, PGD": (cnn, 0.2),
        "cnn2, one step": (fast, 0.2),
        "cnn, standard training": (plain, 0.1),
        "mlp, one step": (lambda: once("mlp", lambda: mlp(SHAPE, CLASSES), 0.1), 0.1),
        "wide resnet, one step": (
            lambda: once("resnet", lambda: wide_resnet(SHAPE, CLASSES, depth=10, width=1), 0.1, epochs=1),
            0.1,
        ),
        "cnn, batch norm": (lambda: once("bn", lambda: conv(norm=True, dropout=0.0), 0.1), 0.1),
        "cnn, dropout (off)": (lambda: once("dropout", lambda: conv(norm=False, dropout=0.3), 0.1), 0.1),
        "cnn2, bfloat16": (lambda: Network(cnn(), "bf16", channels_last=False), 0.2),
        "cnn2, 8-bit input": (lambda: RoundedInput(cnn()), 0.2),
        "mlp, IBP": (lambda: once("ibp", lambda: mlp(SHAPE, CLASSES), 0.1, ibp=True, epochs=6), 0.1),
        "cnn2, pt2 archive": (lambda: archive(cnn()), 0.2),
        "mean of two": (lambda: Ensemble(cnn(), fast()), 0.2),
    }


def judge(
    model: nn.Module | ModelSource, data: Dataset, eps: float, number: int, suite: str = SUITE
) -> Report:
    """Evaluate a model with all checks on the first `number` test samples."""
    spec = EvalSpec(
        model, data.test.take(range(number)), data, suite, ThreatModel("linf", eps), name="model", full=True
    )
    report = evaluate(spec).report
    assert isinstance(report, Report)
    return report


def row(name: str, report: Report, *more: str) -> str:
    """Return a row of the table."""
    said = {
        verdict: ", ".join(c.name for c in report.checks if c.verdict == verdict)
        for verdict in ("failed", "warning")
    }
    figures = (f"{100 * report.clean_accuracy:.0f}", *more, f"{100 * report.robust_accuracy:.0f}")
    return f"| {name} | {' | '.join(figures)} | {report.trust} | {said['failed']} | {said['warning']} |"


def main() -> int:
    """Print both tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="names of networks or fakes")
    parser.add_argument("--samples", type=int, default=100)
    args = parser.parse_args()
    data = load_data(DataConfig(source="mnist"), args.data_root)
    networks, wrong, started = zoo(data), [], time.time()
    print("| honest network | clean, % | robust, % | trust | failed | warnings |\n|---|---|---|---|---|---|")
    for name, (build, eps) in networks.items():
        if args.only is None or name in args.only:
            report = judge(build(), data, eps, args.samples)
            wrong += [name] if report.trust != "trusted" else []
            print(row(name, report), flush=True)
    net, eps = networks["cnn, standard training"][0](), 0.3
    assert isinstance(net, nn.Module)
    truth = judge(net, data, eps, args.samples).robust_accuracy
    batch = next(data.test.take(range(args.samples)).batches(args.samples, Place()))
    print(
        "\n| fake | clean, % | truth, % | figure, % | trust | failed | warnings |\n|---|---|---|---|---|---|---|"
    )
    for name, kind in fakes.KINDS.items():
        if args.only is None or name in args.only:
            masked = kind(net, batch.x, batch.y, eps).eval()
            report = judge(masked, data, eps, args.samples, SUITES.get(name, SUITE))
            right = report.robust_accuracy <= truth + 0.03
            wrong += [name] if report.trust == "trusted" and not right else []
            print(row(name, report, f"{100 * truth:.0f}"), flush=True)
    print(f"\nwrong: {', '.join(wrong) or 'none'}; {time.time() - started:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
