"""Toy study of guidance by text and by data, with exact scores.

Writes docs/stg_toy.png and prints its figures.

A prompt is an angle c, and its images lie around the point of the unit circle at that angle. So the circle is
what the model can express, and its denoiser is known exactly. A matched safety function penalises a part of
the circle. A mismatched one penalises everything inside the circle, which no prompt can change. Guiding the
text moves along the circle for the matched one and does nothing for the mismatched one. Guiding the data
leaves the circle.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...guidance.core.noise_level import NoiseLevel
from ...guidance.safe_data_guidance import SafeDataGuidanceSettings, data_guidance
from ...guidance.safe_text_guidance import SafeTextGuidanceSettings, guided_embedding

ROOT = Path(__file__).resolve().parents[2]
SPREAD = 0.12
"""Standard deviation of the images of one prompt."""
STEPS, SIGMA_MAX, SIGMA_MIN = 40, 8.0, 0.01
METHODS = ("none", "SDG", "STG")
RHO, STRENGTH = 0.08, 0.06
UNSAFE_CENTRE, UNSAFE_RADIUS = (1.0, 0.0), 0.45

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """Final samples (N, 2) of a method, their unsafe share, and their mean distance from the circle."""

    samples: Tensor
    unsafe: float
    distance: float


def matched(x: Tensor) -> Tensor:
    """Score the neighbourhood of one point of the circle as unsafe."""
    squared = (x - torch.tensor(UNSAFE_CENTRE, dtype=x.dtype)).square().sum(1)
    return torch.exp(-squared / (2 * UNSAFE_RADIUS**2))


def mismatched(x: Tensor) -> Tensor:
    """Score everything near the centre, and so the whole circle, as unsafe."""
    return torch.sigmoid(4 * (1.5 - x.norm(dim=1)))


def denoised(x: Tensor, angle: Tensor, sigma: float) -> Tensor:
    """Predict the posterior mean of N((cos c, sin c), SPREAD^2 I), as the model does."""
    centre = torch.stack([angle.cos(), angle.sin()], dim=1)
    return (SPREAD**2 * x + sigma**2 * centre) / (SPREAD**2 + sigma**2)


def noise_levels() -> list[float]:
    """Return the noise levels of Karras et al.'s schedule with rho 7."""
    ramp = torch.linspace(0, 1, STEPS)
    levels = (SIGMA_MAX ** (1 / 7) + ramp * (SIGMA_MIN ** (1 / 7) - SIGMA_MAX ** (1 / 7))) ** 7
    return [*levels.tolist(), 0.0]


def sample(method: str, score: Score, count: int = 3000) -> Outcome:
    """Sample by Euler steps from the prompts' noised distribution, with prompts all around the circle."""
    generator = torch.Generator().manual_seed(0)
    prompts = 2 * math.pi * torch.rand(count, generator=generator)
    angle = prompts.clone()
    x = torch.stack([angle.cos(), angle.sin()], 1) + (SPREAD**2 + SIGMA_MAX**2) ** 0.5 * torch.randn(
        count, 2, generator=generator
    )
    levels = noise_levels()
    for sigma, following in zip(levels, levels[1:]):
        if method == "STG":
            angle = text_step(x, angle, prompts, sigma, score)
        prediction = denoised(x, angle, sigma)
        if method == "SDG":
            prediction = prediction + data_step(x, angle, sigma, score)
        x = prediction + following / sigma * (x - prediction)
    unsafe = (x - torch.tensor(UNSAFE_CENTRE)).norm(dim=1) < UNSAFE_RADIUS
    return Outcome(x, unsafe.float().mean().item(), (x.norm(dim=1) - 1).abs().mean().item())


def text_step(x: Tensor, angle: Tensor, prompts: Tensor, sigma: float, score: Score) -> Tensor:
    """Move the prompt's angle by one STG step."""
    leaf = angle.clone().requires_grad_(True)
    values = score(denoised(x, leaf, sigma))
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    settings = SafeTextGuidanceSettings(rho=RHO, unit="raw", trust=math.inf)
    shaped = [t[:, None, None] for t in (angle, prompts, gradient)]
    return guided_embedding(*shaped, values.detach(), settings)[0][:, 0, 0]


def data_step(x: Tensor, angle: Tensor, sigma: float, score: Score) -> Tensor:
    """Compute SDG's change of the prediction."""
    leaf = x.clone().requires_grad_(True)
    prediction = denoised(leaf, angle, sigma)
    (gradient,) = torch.autograd.grad(score(prediction).sum(), leaf)
    settings = SafeDataGuidanceSettings(strength=STRENGTH)
    shaped = [t.detach()[:, :, None, None] for t in (prediction, gradient)]
    return data_guidance(*shaped, NoiseLevel.variance_exploding(sigma), settings)[0][..., 0, 0]


def plot(outcomes: dict[tuple[str, str], Outcome], path: Path) -> None:
    """Plot a panel for every safety function and method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(METHODS), figsize=(9, 6.4), sharex=True, sharey=True)
    for row, name in enumerate(("matched", "mismatched")):
        for panel, method in zip(panels[row], METHODS):
            found = outcomes[name, method]
            panel.add_patch(pyplot.Circle((0, 0), 1, fill=False, color="0.6"))
            if name == "matched":
                panel.add_patch(pyplot.Circle(UNSAFE_CENTRE, UNSAFE_RADIUS, color="tab:red", alpha=0.2))
            else:
                panel.add_patch(pyplot.Circle((0, 0), 1.5, color="tab:red", alpha=0.1))
            panel.scatter(*found.samples[:1200].T, s=2, color="tab:blue")
            panel.set_title(
                f"{name}, {method}\nunsafe {found.unsafe:.3f}, off the circle {found.distance:.3f}",
                fontsize=9,
            )
            panel.set_aspect("equal")
            panel.set_xlim(-2, 2)
            panel.set_ylim(-2, 2)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(argv: Sequence[str]) -> int:
    """Sample, plot and print the figures."""
    parser = argparse.ArgumentParser(prog="dev.py study stg_toy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "stg_toy.png")
    output = parser.parse_args(argv).output
    scores: dict[str, Score] = {"matched": matched, "mismatched": mismatched}
    outcomes = {(name, method): sample(method, score) for name, score in scores.items() for method in METHODS}
    plot(outcomes, output)
    for (name, method), found in outcomes.items():
        sys.stdout.write(
            f"{name:10}  {method:4}  unsafe {found.unsafe:.3f}  off the circle {found.distance:.3f}\n"
        )
    return 0
