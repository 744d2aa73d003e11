"""Bench of Safe Text Embedding Guidance beside a UNet of Stable Diffusion 1.5's size with random weights."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...formats import classifier_file
from ...guidance.core.noise_level import SigmaWindow
from ...guidance.safe_text_guidance import SafeTextGuidanceSettings
from ...guidance.safety_functions.classifier import ClassifierSafetyFunction
from ...guidance.safety_functions.classifier_network import ConvClassifier
from ...guidance.safety_functions.linear_decoder import fit_linear_decoder, sample_images
from .sd15_unet import SHAPE, private_memory, sd15_sized_model

PIXELS_PER_LATENT = 8
ALWAYS, NEVER = 0.0, 1.1
"""Thresholds of the classifier's probability."""
CASES = (
    ("untriggered", NEVER, False),
    ("triggered", ALWAYS, False),
    ("triggered, saving memory", ALWAYS, True),
)
DECODERS = ("taesd", "linear")
WARM_UP = 8
"""Side of the latent of the warm-up run, which loads weights and calls every function for the first time."""


@dataclass
class Row:
    """Figures of one case beside the plain step before it. Peak memory is without the weights."""

    name: str
    seconds_per_step: float
    plain_seconds_per_step: float
    ratio: float
    peak_memory_mb: float


def measure(steps: int, side: int = SHAPE[-1], decoders: Sequence[str] = DECODERS) -> list[Row]:
    """Measure STG with every fast decoder, untriggered and triggered (CFG, one image of 8 * `side` pixels).

    Each case runs right after the plain sampler. Rows are printed as soon as they are known.
    """
    import nodes as host_nodes

    from ...nodes.host.files.folders import ASSETS

    nodes: Any = host_nodes
    model = sd15_sized_model()
    guide = classifier_file.load(ASSETS / "demo_model" / "guide.safetensors")
    generator = torch.Generator().manual_seed(0)
    positive = [[torch.randn(1, 77, 768, generator=generator), {}]]
    negative = [[torch.randn(1, 77, 768, generator=generator), {}]]

    def run(chosen: Any, size: int = side) -> tuple[float, float]:
        latent = {"samples": torch.zeros(1, SHAPE[0], size, size)}
        with private_memory() as peak:
            start = time.perf_counter()
            nodes.common_ksampler(chosen, 1, steps, 7.5, "euler", "normal", positive, negative, latent)
            return (time.perf_counter() - start) / steps, peak[0]

    rows: list[Row] = []
    for decoder in decoders:
        for name, threshold, checkpointed in CASES:
            guarded = _guarded(model, guide, decoder, threshold, checkpointed)
            run(guarded, WARM_UP)
            plain, plain_peak = run(model)
            seconds, peak = run(guarded)
            if not rows:
                rows.append(Row("plain", plain, plain, 1.0, plain_peak))
                _print(rows[-1])
            rows.append(Row(f"{decoder}, {name}", seconds, plain, seconds / plain, peak))
            _print(rows[-1])
    return rows


def _print(row: Row) -> None:
    sys.stdout.write(
        f"{row.name:34} {row.seconds_per_step:8.2f} s/step beside {row.plain_seconds_per_step:.2f}: "
        f"x{row.ratio:.2f}  peak {row.peak_memory_mb:6.0f} MB\n"
    )
    sys.stdout.flush()


def _guarded(model: Any, guide: ConvClassifier, decoder: str, threshold: float, checkpointed: bool) -> Any:
    from ...nodes.host.autograd.auxiliary_models import load_along
    from ...nodes.host.engine.hooks import attach
    from ...nodes.host.methods.safe_text_guidance import SafeTextGuidanceCorrection

    class WithoutVae(SafeTextGuidanceCorrection):
        """STG with a given decoder, of random weights or fitted to random data, instead of a VAE."""

        def patch(self, model: Any) -> Any:
            chosen = _decoder(decoder, model)
            load_along(model, chosen.patchers, self.function)
            return chosen

    settings = SafeTextGuidanceSettings(tau=0.0, window=SigmaWindow())
    function = ClassifierSafetyFunction(guide, "shapes", ["star"], threshold)
    return attach(model, WithoutVae(None, function, settings, checkpointed=checkpointed))


def _decoder(name: str, model: Any) -> Any:
    import comfy.taesd.taesd

    from ...nodes.host.autograd.decoders import NetworkDecoder, TinyAutoencoder

    latent_format = model.get_model_object("latent_format")
    with torch.inference_mode(False):
        if name == "linear":
            images = sample_images(2, 16 * PIXELS_PER_LATENT)
            return NetworkDecoder(latent_format, fit_linear_decoder(torch.randn(2, SHAPE[0], 16, 16), images))
        network = comfy.taesd.taesd.TAESD(None, None, latent_channels=SHAPE[0])
        _fill(network.taesd_decoder)
        return NetworkDecoder(latent_format, TinyAutoencoder(network))


def _fill(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.uniform_(-0.05, 0.05, generator=generator)
