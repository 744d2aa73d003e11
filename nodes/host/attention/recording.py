"""Recording of cross-attention queries during sampling runs, from which guideline tokens are learnt.

`given_images` records images under noise, and `sampled_images` images that the model samples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.detect_and_guide.attention_cache import AttentionCache
from ..engine.correction import Correction, RunContext, Step
from ..engine.run import Run
from .capture import LayerCall, Receiver, attention_layer, listen, reads

SAME_SIGMA = 1e-3
"""Relative tolerance between a sampler's noise level and that of its schedule; some samplers recompute it."""


@dataclass
class Recording:
    """Queries of a sampling run.

    Attributes:
        levels: per recorded noise level, the queries (B, heads, height * width, d) by layer.
        sizes: (height, width) of the map, by layer.
    """

    levels: list[dict[str, Tensor]] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class RecordingState:
    """State of one run: the noise levels still to be recorded, and the current evaluation's layer calls."""

    remaining: list[float]
    calls: dict[str, LayerCall] = field(default_factory=dict)


class RecordingCorrection(Correction):
    """Correction that changes nothing and writes the queries of a sampling run into a recording.

    Args:
        layers: layers to record, by name or by how many times smaller than the latent their map is.
        recording: receives the queries of the last run.
        sigmas: noise levels to record, each at its first evaluation; None for every evaluation.
    """

    name = ""

    def __init__(
        self, layers: Collection[int | str], recording: Recording, sigmas: Sequence[float] | None = None
    ) -> None:
        self.layers, self.recording, self.sigmas = layers, recording, sigmas

    def patch(self, model: ModelPatcher) -> None:
        def receiver_of(run: Run) -> Receiver:
            state: RecordingState = run.state_of(self)

            def receive(call: LayerCall) -> None:
                if reads(call, self.layers):
                    state.calls[call.name] = call

            return receive

        listen(model, receiver_of)

    def begin(self, context: RunContext) -> RecordingState:
        # With a two-pass method on the model a run begins twice; the recording keeps the second pass.
        self.recording.levels.clear()
        return RecordingState(list(self.sigmas or ()))

    def is_active(self, level: Any) -> bool:
        return True

    def correct(self, step: Step, state: RecordingState) -> None:
        if self.sigmas is not None:
            if not state.remaining or not math.isclose(step.sigma, state.remaining[0], rel_tol=SAME_SIGMA):
                return
            state.remaining.pop(0)
        queries = {name: call.queries() for name, call in state.calls.items()}
        self.recording.levels.append({name: q.values.to("cpu", torch.float16) for name, q in queries.items()})
        self.recording.sizes |= {name: q.size for name, q in queries.items()}
        state.calls = {}


def joined(
    model: ModelPatcher,
    layers: Collection[int | str],
    recordings: Sequence[Recording],
    sigmas: Sequence[float],
    latent_size: torch.Size,
) -> AttentionCache:
    """Return the recordings of several runs as one cache, without masks."""
    sizes = recordings[0].sizes
    if not sizes:
        shown = ", ".join(map(str, layers))
        raise ValueError(
            f"The model has none of the attention layers {shown}. "
            "Choose other scales, or tokens made for this model."
        )
    queries = tuple(
        tuple(torch.cat([recording.levels[level][name] for recording in recordings]) for name in sizes)
        for level in range(len(sigmas))
    )
    comfy.model_management.load_models_gpu([model])
    unet = model.model.diffusion_model
    weights = tuple(_weight(attention_layer(unet, name).to_k) for name in sizes)
    masks = torch.zeros(queries[0][0].shape[0], *latent_size, dtype=torch.bool)
    return AttentionCache(tuple(sizes), weights, queries, tuple(sizes.values()), tuple(sigmas), masks)


def _weight(projection: Any) -> Tensor:
    """Return a linear layer's weight as the host applies it, with LoRAs: its outputs for unit vectors."""
    like = next(projection.parameters())
    eye = torch.eye(
        projection.in_features, device=comfy.model_management.get_torch_device(), dtype=like.dtype
    )
    return projection(eye).T.float().cpu()
