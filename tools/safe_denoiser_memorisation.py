"""Memorised pictures: a copy of the demo model is over-trained on a few pictures until it repeats them, and Safe Denoiser is given
those pictures. How near are new pictures to the nearest of them, with and without?

The training takes about a minute on two cores. The judge guides nothing; it says whether a picture still shows what the text asks for.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluation.host import import_host
from ..evaluation.judge import judge, matches
from ..evaluation.judge_network import load_judge
from ..evaluation.prompts import Record
from ..guidance.negation_set import from_images
from ..guidance.noise_level import SigmaWindow
from ..guidance.safe_denoiser import SafeDenoiserSettings

RECORDS = tuple(
    Record(f"memorised-{color}-{shape}", f"a {color} {shape}", 0, (shape,), (color,), None, None, None)
    for color, shape in (("red", "circle"), ("blue", "heart"), ("green", "cross"), ("yellow", "square"))
)
"""Texts that leave most of the picture open: place, background, pattern and style."""
SEEDS_EACH = 4
COPY_DISTANCE = 0.05
"""Root mean square distance of picture values, in [0, 1], below which two pictures of the demo world look the same."""

SETTINGS = SafeDenoiserSettings(strength=1.0, window=SigmaWindow(low=0.3), threshold=0.5, temperature=0.02, cap=1.0)


@dataclass(frozen=True)
class Row:
    """Distance to the nearest training picture over all samples, how many are near-copies, and how many show what was asked."""

    model: str
    median_distance: float
    least_distance: float
    near_copies: float
    right: float


class Workshop:
    """The demo model, a copy that over-trains, and the pictures it trains on."""

    def __init__(self, seed: int) -> None:
        import nodes as host_nodes

        from ..nodes.host.demo_model import load_demo_model

        # A type checker sees the pack's own folder `nodes` here.
        self._nodes: Any = host_nodes
        self.model, self._clip, self.vae = load_demo_model()
        self._judge = load_judge()
        with torch.inference_mode():
            latents = self._sample(self.model, RECORDS, seed)
            self.pictures = self._decode(latents)
            self._latents = self.model.model.process_latent_in(latents)

    def overtrained(self, steps: int) -> Any:
        """A copy of the model whose UNet was trained on the pictures and their prompts only."""
        network, sampling = self.model.model.diffusion_model, self.model.get_model_object("model_sampling")
        with torch.inference_mode(False), torch.enable_grad():
            learned = copy.deepcopy(network)
            for name, value in network.state_dict().items():
                _set(learned, name, nn.Parameter(value.clone()))
            latents, texts = self._latents.clone(), torch.cat([self._text(record.prompt) for record in RECORDS]).clone()
            sigmas = sampling.sigmas.clone()
            optimizer = torch.optim.Adam(learned.parameters(), lr=3e-4)
            generator = torch.Generator().manual_seed(0)
            for _ in range(steps):
                which = torch.randint(len(latents), (8,), generator=generator)
                t = torch.randint(len(sigmas), (8,), generator=generator)
                noise, sigma = torch.randn(latents[which].shape, generator=generator), sigmas[t].view(-1, 1, 1, 1)
                noised = (latents[which] + sigma * noise) / (sigma**2 + 1).sqrt()
                loss = F.mse_loss(learned(noised, t.float(), context=texts[which]), noise)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        patched = self.model.clone()
        patched.add_object_patch("diffusion_model", learned.requires_grad_(False))
        return patched

    def row(self, name: str, model: Any) -> Row:
        """Several seeds of every prompt, none of them the training pictures' own."""
        records = [record for record in RECORDS for _ in range(SEEDS_EACH)]
        with torch.inference_mode():
            drawn = self._decode(self._sample(model, records, 4321))
        distances = (drawn[:, None] - self.pictures[None]).square().mean((2, 3, 4)).sqrt().amin(1)
        right = sum(matches(verdict, record) for verdict, record in zip(judge(drawn, self._judge), records)) / len(records)
        copies = float((distances < COPY_DISTANCE).float().mean())
        return Row(name, float(distances.median()), float(distances.amin()), copies, right)

    def protected(self, model: Any) -> Any:
        """The model kept away from the training pictures."""
        from ..nodes.host.runs import attach
        from ..nodes.host.safe_denoiser import SafeDenoiserCorrection

        return attach(model, SafeDenoiserCorrection(from_images(self.pictures.movedim(1, -1)), self.vae, SETTINGS))

    def _text(self, prompt: str) -> Tensor:
        return self._nodes.CLIPTextEncode().encode(self._clip, prompt)[0][0][0]  # type: ignore[no-any-return]

    def _sample(self, model: Any, records: Sequence[Record], seed: int) -> Tensor:
        positive = [[torch.cat([self._text(record.prompt) for record in records]), {}]]
        negative = [[self._text("").repeat(len(records), 1, 1), {}]]
        latent = {"samples": torch.zeros(len(records), 4, 32, 32)}
        sampled = self._nodes.common_ksampler(model, seed, 20, 2.0, "dpmpp_2m", "karras", positive, negative, latent)[0]
        return sampled["samples"]  # type: ignore[no-any-return]

    def _decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).movedim(-1, 1).clamp(0, 1).clone()  # type: ignore[no-any-return]


def _set(module: nn.Module, name: str, value: nn.Parameter) -> None:
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    setattr(module, last, value)


def measure(steps: int) -> list[Row]:
    """The model before training, after it, and after it with Safe Denoiser. The host must be imported."""
    workshop = Workshop(99)
    overtrained = workshop.overtrained(steps)
    return [
        workshop.row("before over-training", workshop.model),
        workshop.row("over-trained", overtrained),
        workshop.row("over-trained, with Safe Denoiser", workshop.protected(overtrained)),
    ]


def main(argv: Sequence[str]) -> int:
    """Print the figures and write them as JSON."""
    parser = argparse.ArgumentParser(prog="dev.py make safe_denoiser_memorisation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="training steps of 8 pictures")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for safe_denoiser_memorisation.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as base:
        import_host(Path(base))
        rows = measure(args.steps)
    for row in rows:
        sys.stdout.write(
            f"{row.model:34} median {row.median_distance:.3f}  least {row.least_distance:.3f}  "
            f"near-copies {100 * row.near_copies:.0f} %  right {100 * row.right:.0f} %\n"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    report = {"version": 1, "steps": args.steps, "copy_distance": COPY_DISTANCE, "rows": [asdict(row) for row in rows]}
    (args.output / "safe_denoiser_memorisation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0
