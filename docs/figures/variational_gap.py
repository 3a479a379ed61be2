"""Draw variational-gap.png: how posteriors answer in a gap of the data, beside the closed form."""

from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn

import bayesguard as bg

mpl.use("Agg")
import matplotlib.pyplot as plt

NOISE = 0.3


def basis(x: Tensor) -> Tensor:
    centres = torch.linspace(-3, 3, 9, dtype=torch.float64)
    return torch.exp(-0.5 * ((x.unsqueeze(-1) - centres) / 0.7).square())


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 1 + 1.5 * torch.rand(40, dtype=torch.float64, generator=generator)
    x[:20] *= -1
    y = torch.sin(2 * x) + NOISE * torch.randn(40, dtype=torch.float64, generator=generator)
    grid = torch.linspace(-3, 3, 200, dtype=torch.float64)
    features, at = basis(x), basis(grid)
    precision = features.T @ features / NOISE**2 + torch.eye(9, dtype=torch.float64)
    mean = torch.linalg.solve(precision, features.T @ y / NOISE**2)
    exact = (at @ torch.linalg.inv(precision) * at).sum(-1).sqrt()
    curves = {"exact": (at @ mean, exact)}
    nuts = bg.NUTS(nn.Linear(9, 1, bias=False).double(), bg.likelihoods.Gaussian(scale=NOISE), num_samples=2000)
    pred = nuts.fit((features, y.unsqueeze(-1)), num_samples=500, num_chains=4)(at)
    curves["NUTS"] = (pred.mean[:, 0], pred.uncertainty().epistemic[:, 0].sqrt())
    for guide, label in (("full", "full covariance"), ("normal", "mean field")):
        predictor = bg.Variational(
            nn.Linear(9, 1, bias=False).double(),
            bg.likelihoods.Gaussian(scale=NOISE),
            guide=guide,
            init_scale=0.1,
            num_samples=2000,
        )
        cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4000)
        predictor.fit(
            (features, y.unsqueeze(-1)),
            epochs=4000,
            batch_size=40,
            optimizer=partial(torch.optim.Adam, lr=0.02),
            scheduler=cosine,
        )
        pred = predictor(at)
        curves[label] = (pred.mean[:, 0], pred.uncertainty().epistemic[:, 0].sqrt())
    figure, axes = plt.subplots(1, 4, figsize=(12, 3), sharey=True, layout="constrained")
    for axis, (label, (centre, stddev)) in zip(axes, curves.items(), strict=True):
        total = (stddev.square() + NOISE**2).sqrt()
        axis.fill_between(grid, centre - 2 * total, centre + 2 * total, color="C0", alpha=0.15, linewidth=0)
        axis.fill_between(grid, centre - 2 * stddev, centre + 2 * stddev, color="C0", alpha=0.35, linewidth=0)
        axis.plot(grid, centre)
        axis.plot(x, y, "k.", markersize=3)
        axis.set(title=label, xlabel="x", ylim=(-3, 3))
        inside = grid.abs() < 0.5
        print(label, "epistemic sd in the gap", round(stddev[inside].mean().item(), 3))
    figure.savefig(Path(__file__).with_name("variational-gap.png"), dpi=110)


if __name__ == "__main__":
    main()
