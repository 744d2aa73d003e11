"""Recording of joint attention for learning: what concept tokens meet in the blocks, for images under noise.

The image never attends to the concept tokens, so its keys, values and outputs are recorded once, and tokens
are learnt by passing them through the blocks of the text stream again and again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import torch
import torch.nn.functional as F
from comfy.ldm.flux.layers import ModulationOut
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.detect_and_guide.attention_maps import against_background, average_over_layers
from ..engine.correction import Correction, RunContext, Step
from .concept_stream import BlockCall, ImageAttention
from .given_images import evaluate_latents
from .joint_capture import JointForward, JointReceiver, listen_jointly
from .joint_families import JointFamily, joint_family

MEMORY_SHARE = 0.5
"""Share of the free main memory that a recording may take."""


@dataclass(frozen=True)
class _ImageRecord:
    """Blocks and image attention of one image at one noise level, for concept tokens to pass through."""

    forward: JointForward
    calls: tuple[BlockCall, ...]

    def maps(self, embeddings: Tensor, layers: Sequence[str], size: tuple[int, int]) -> Tensor:
        """Return token maps (1, 1 + K, h, w), differentiable in the embeddings (1 + K, width)."""
        family, maps = self.forward.family, []
        stream = self.forward.start(embeddings, _moved(self.calls[0], embeddings.device))
        for stored in self.calls:
            call = _moved(stored, embeddings.device)
            after, outputs = call.pass_stream(stream, family.keeps_text_length)
            stream = stream if after is None else after
            if outputs is not None and call.name in layers:
                maps.append(self.forward.maps(outputs, call.image.outputs))
        return average_over_layers(maps, size)


@dataclass(frozen=True)
class JointRecording:
    """Joint attention of N images at some noise levels, from which guideline tokens are learnt.

    It has the methods of an `AttentionCache` that learning uses.

    Attributes:
        layers: names of the blocks that are read.
        records: per noise level, per image.
        sigmas: the noise levels.
        masks: (N, h, w) bool, True where the concept is.
        width: of a text embedding.
    """

    layers: tuple[str, ...]
    records: tuple[tuple[_ImageRecord, ...], ...]
    sigmas: tuple[float, ...]
    masks: Tensor
    width: int

    def __len__(self) -> int:
        return len(self.masks)

    def images(self, indices: Sequence[int]) -> JointRecording:
        """Return the recording of some of the images."""
        records = tuple(tuple(level[i] for i in indices) for level in self.records)
        return replace(self, records=records, masks=self.masks[torch.tensor(list(indices), dtype=torch.long)])

    def with_masks(self, masks: Tensor) -> JointRecording:
        """Return the same images with masks (N, H, W) in [0, 1] of any size."""
        small = F.interpolate(masks[:, None].float(), size=tuple(self.masks.shape[-2:]), mode="area")[:, 0]
        return replace(self, masks=small > 0.5)

    def probabilities(self, embeddings: Tensor, level: int, indices: Tensor | slice = slice(None)) -> Tensor:
        """Return probabilities (n, K, h, w) of each concept token against the background token."""
        chosen = torch.arange(len(self))[indices].tolist()
        size = (self.masks.shape[-2], self.masks.shape[-1])
        device = comfy.model_management.get_torch_device()
        rows = embeddings.to(device)
        maps = [self.records[level][i].maps(rows, self.layers, size) for i in chosen]
        return against_background(torch.cat(maps)).to(embeddings.device)


@dataclass
class _State:
    """Calls of the blocks in the current evaluation."""

    forward: JointForward | None = None
    calls: list[BlockCall] = field(default_factory=list)


class _JointRecordingCorrection(Correction):
    """Correction that changes nothing and records every evaluation of one image."""

    name = ""

    def __init__(self, blocks: range) -> None:
        self.blocks = blocks
        self.records: list[_ImageRecord] = []

    def patch(self, model: ModelPatcher) -> None:
        def receiver_of(run: Any) -> JointReceiver:
            state: _State = run.state_of(self)

            def receive(forward: JointForward, call: BlockCall) -> None:
                if state.forward is not forward:
                    state.forward, state.calls = forward, []
                state.calls.append(_stored(call, forward))

            return receive

        listen_jointly(model, self.blocks, receiver_of)

    def begin(self, context: RunContext) -> _State:
        self.records.clear()
        return _State()

    def is_active(self, level: Any) -> bool:
        return True

    def correct(self, step: Step, state: _State) -> None:
        if state.forward is None:
            raise ValueError(
                "Another node answered for the model, so its attention could not be recorded. "
                "Remove nodes that cache its results."
            )
        forward = replace(state.forward, timesteps=_copied(state.forward.timesteps), origins=(), streams=[])
        self.records.append(_ImageRecord(forward, tuple(state.calls)))
        state.forward = None


def record_jointly(
    model: ModelPatcher,
    latents: Tensor,
    conditioning: list[Any],
    sigmas: Sequence[float],
    seed: int,
) -> JointRecording:
    """Record the joint attention of images under noise at chosen levels.

    Args:
        model: of a family in which tokens can be learnt.
        latents: (N, C, h, w) in VAE space.
        conditioning: the images' prompt, with one row for all images or one per image.
        sigmas: noise levels, as noise-to-signal ratios.
        seed: of the noise.

    Raises:
        ValueError: the recording would not fit into main memory.
    """
    network = model.model.diffusion_model
    family = joint_family(network)
    assert family is not None
    if model.get_model_object("latent_format").latent_dimensions == 3:
        latents = latents[:, :, None]  # (N, C, 1, h, w)
    layers = family.read_blocks(network)
    blocks = range(int(layers[-1].split(".")[1]) + 1)
    _check_memory(model, family, latents, len(blocks), len(sigmas))
    corrections: list[_JointRecordingCorrection] = []

    def correction_of(batch: slice) -> _JointRecordingCorrection:
        corrections.append(_JointRecordingCorrection(blocks))
        return corrections[-1]

    evaluate_latents(model, correction_of, latents, conditioning, sigmas, seed, batch_size=1)
    records = tuple(tuple(c.records[level] for c in corrections) for level in range(len(sigmas)))
    masks = torch.zeros(len(latents), *latents.shape[-2:], dtype=torch.bool)
    return JointRecording(layers, records, tuple(sigmas), masks, family.text_width(network))


def _check_memory(
    model: ModelPatcher, family: JointFamily, latents: Tensor, blocks: int, levels: int
) -> None:
    network = model.model.diffusion_model
    height, width = family.map_size(network, (latents.shape[-2], latents.shape[-1]))
    values = 3 * blocks * height * width * network.hidden_size
    needed = model.model.get_dtype_inference().itemsize * values * len(latents) * levels
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > MEMORY_SHARE * free:
        raise ValueError(
            f"Learning tokens from {len(latents)} images of this size at {levels} noise levels takes "
            f"{needed / 2**30:.0f} GB of main memory, and {free / 2**30:.0f} GB are free. Use fewer or "
            "smaller images, or fewer noise levels."
        )


def _stored(call: BlockCall, forward: JointForward) -> BlockCall:
    """Return a copy of a call that can be run after the forward, kept in main memory."""
    run, network, index = forward.family.run_block, forward.network, int(call.name.split(".")[1])
    assert run is not None

    def block(args: dict[str, Any]) -> dict[str, Any]:
        return run(network, index, args)

    image = ImageAttention(*(_copied(t.cpu()) for t in vars(call.image).values()))
    args = {**call.args, "transformer_options": {}}
    return BlockCall(call.name, {k: _copied(v) for k, v in args.items()}, call.text, image, block)


def _moved(call: BlockCall, device: torch.device) -> BlockCall:
    """Return a call with the image's attention on a device."""
    return replace(call, image=ImageAttention(*(t.to(device) for t in vars(call.image).values())))


def _copied(value: Any) -> Any:
    """Return a copy that autograd may save; tuples and objects of tensors are copied with their contents."""
    if isinstance(value, Tensor):
        with torch.inference_mode(False):
            return value.clone()
    if isinstance(value, tuple | list):
        return type(value)(_copied(element) for element in value)
    if isinstance(value, ModulationOut):
        found = copy.copy(value)
        vars(found).update({name: _copied(of_name) for name, of_name in vars(value).items()})
        return found
    return value
