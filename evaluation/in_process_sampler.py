"""The demo model in this process, for studies that sample the demonstration's prompts with its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .prompt_sets.prompts import Record

STEPS, CFG, SAMPLER, SCHEDULER = 20, 5.0, "dpmpp_2m", "karras"
"""Settings of every workflow that the demonstration runs."""
BATCH = 8
"""Small enough that the host never splits it by the memory that is free: other batches round differently,
and the images that a method leaves alone would not be bit-identical to those without it."""


class InProcessSampler:
    """Sampler of records, each with its own seed, in batches that are always the same.

    Attributes:
        model, clip, vae: the demo model.
    """

    def __init__(self) -> None:
        from ..nodes.host.files.demo_model import load_demo_model

        self.model, self.clip, self.vae = load_demo_model()

    def draw(
        self,
        model: Any,
        records: Sequence[Record],
        *,
        negative: str = "",
        cfg: float = CFG,
        sampler: Any = None,
        scheduler: str = SCHEDULER,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Sample the records and return their images (N, 3, 128, 128) in [0, 1].

        Args:
            model: the demo model, with or without a method.
            sampler: the host's sampler object; None for the demonstration's.
            noise: (N, 4, 32, 32) instead of that of the records' seeds.
        """
        import comfy.sample
        import comfy.samplers

        from ..nodes.host.engine.conditioning import encode, encode_each

        chosen = sampler or comfy.samplers.sampler_object(SAMPLER)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, STEPS)
        empty = torch.zeros(len(records), 4, 32, 32)
        if noise is None:
            noise = torch.cat([comfy.sample.prepare_noise(empty[:1], record.seed) for record in records])
        without = encode(self.clip, negative)
        images = []
        for start in range(0, len(records), BATCH):
            part = slice(start, start + BATCH)
            positive = encode_each(self.clip, [record.prompt for record in records[part]])
            sampled = comfy.sample.sample_custom(
                model,
                noise[part],
                cfg,
                chosen,
                sigmas,
                positive,
                without,
                empty[part],
                disable_pbar=True,
                seed=start,
            )
            images.append(self.vae.decode(sampled).movedim(-1, 1).clamp(0, 1).clone())
        return torch.cat(images)
