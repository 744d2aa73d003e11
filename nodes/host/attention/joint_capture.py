"""Capture of concepts in joint attention during the ordinary forward, which stays bit-identical.

For transformers with a stream of text and one of the image (see `joint_families`). The mathematics is in
`concept_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.detect_and_guide.concept_attention import output_maps
from ..engine.run import Run
from .concept_stream import BlockCall, note_block
from .joint_families import JointFamily, joint_family
from .map_collector import MapCollector
from .origins import Origin, positive_origins
from .own_forwards import OwnForward, wrap_own_forwards


@dataclass
class JointForward:
    """One forward of the network for several conditionings.

    Attributes:
        family: what is known of the network's family.
        network: the host's network.
        size: (frames, height, width) of the maps.
        timesteps: (B,) as the network gets them.
        origins: the positive conditionings among them.
        streams: the concepts' text streams, if they have been started.
    """

    family: JointFamily
    network: Any
    size: tuple[int, int, int]
    timesteps: Tensor
    origins: tuple[Origin, ...]
    streams: list[Tensor] = field(default_factory=list)

    def start(self, embeddings: Tensor, call: BlockCall) -> Tensor:
        """Return the text stream (B, 1 + K, hidden) of token embeddings (1 + K, width)."""
        like = call.args["img"]
        rows = embeddings.to(like).expand(len(like), -1, -1)
        return self.family.embed(self.network, rows, self.timesteps)

    def maps(self, outputs: Tensor, image: Tensor) -> Tensor:
        """Return the maps (B * frames, 1 + K, height, width) of the outputs of concepts and image."""
        frames, height, width = self.size
        maps = output_maps(outputs, image, (frames * height, width), self.family.temperature)
        return maps.unflatten(2, (frames, height)).movedim(2, 1).flatten(0, 1)

    @property
    def image_part(self) -> slice:
        """Return the positions of the sampled image among the image tokens, without reference images."""
        count = self.size[0] * self.size[1] * self.size[2]
        return slice(-count, None) if self.family.references_first else slice(0, count)

    def options(
        self, options: dict[str, Any], blocks: range, receive: Callable[[JointForward, BlockCall], None]
    ) -> dict[str, Any]:
        """Return transformer options with which the calls of these blocks are reported."""
        replacements = options.get("patches_replace", {})
        of_transformers = dict(replacements.get("dit", {}))
        for index in blocks:
            previous = of_transformers.get(("double_block", index))
            of_transformers["double_block", index] = self._replacement(index, previous, receive)
        return {**options, "patches_replace": {**replacements, "dit": of_transformers}}

    def _replacement(
        self, index: int, previous: Any, receive: Callable[[JointForward, BlockCall], None]
    ) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
        """Return the replacement of a block, which runs another pack's replacement if there is one."""

        def replace(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            result, call = note_block(f"double.{index}", args, extra, previous, self.image_part)
            if call is not None:
                receive(self, call)
            return result

        return replace


JointReceiver = Callable[[JointForward, BlockCall], None]


def listen_jointly(
    model: ModelPatcher, blocks: range, receiver_of: Callable[[Run], JointReceiver | None]
) -> None:
    """Report calls of blocks with two streams while a guider evaluates its positive branch.

    Args:
        model: a clone that takes part in runs (`hooks.attach`), of one of the joint families.
        blocks: the blocks to report.
        receiver_of: returns the function that gets a run's calls, or None to report nothing.
    """

    def options_of(own: OwnForward) -> dict[str, Any]:
        receive = receiver_of(own.run)
        forward = None if receive is None else _forward(own)
        if receive is None or forward is None:
            return own.options
        return forward.options(own.options, blocks, receive)

    wrap_own_forwards(model, options_of)


def _forward(own: OwnForward) -> JointForward | None:
    """Return the forward that begins, None if it evaluates no positive conditioning of the guider."""
    base, x = own.base, own.x
    network, origins = base.diffusion_model, positive_origins(own.run, x, own.options)
    family = joint_family(network)
    if family is None or not origins:
        return None
    return JointForward(
        family=family,
        network=network,
        size=(x.shape[2] if x.ndim == 5 else 1, *family.map_size(network, origins[0].latent_size)),
        timesteps=base.process_timestep(base.model_sampling.timestep(own.timesteps).float(), x=x),
        origins=origins,
    )


class ConceptMaps:
    """Receiver of block calls that passes concepts through the blocks and collects their maps.

    Args:
        collector: gets the maps.
    """

    def __init__(self, collector: MapCollector) -> None:
        self.collector = collector

    def receive(self, forward: JointForward, call: BlockCall) -> None:
        """Pass all concepts through a block, and collect the maps of those that read it."""
        concepts = self.collector.concepts
        if not forward.streams:
            forward.streams = [forward.start(concept.embeddings, call) for concept in concepts]
        for index, concept in enumerate(concepts):
            after, outputs = call.pass_stream(forward.streams[index], forward.family.keeps_text_length)
            if after is not None:
                forward.streams[index] = after
            layers = concept.layers or forward.family.read_blocks(forward.network)
            if outputs is None or call.name not in layers:
                continue
            for origin in forward.origins:
                maps = forward.maps(origin.of(outputs), origin.of(call.image.outputs))
                self.collector.add(origin, index, call.name, maps)
