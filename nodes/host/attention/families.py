"""Model families whose attention shows where a concept is, and one capture of token maps for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.ldm.anima.model
import comfy.ldm.krea2.model
import comfy.ldm.lumina.model
from comfy.model_patcher import ModelPatcher

from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ..engine.run import Run
from .capture import Receiver, attention_width, family, layer_names, listen
from .cross_capture import listen_to_cross_attention
from .cross_families import cross_family
from .joint_capture import ConceptMaps, JointReceiver, listen_jointly
from .joint_families import joint_family
from .map_collector import MapCollector

ONE_STREAM = "text and image pass through the same layers as one sequence"
UNREADABLE = {
    comfy.ldm.lumina.model.NextDiT: ONE_STREAM,
    comfy.ldm.krea2.model.SingleStreamDiT: ONE_STREAM,
    comfy.ldm.anima.model.Anima: "an adapter inside the model makes its text embeddings",
}
"""Reasons by the host's class of a network whose attention cannot be read."""


def text_width(model: ModelPatcher) -> int:
    """Return the width of the text embeddings that the model's attention reads.

    Raises:
        ValueError: concepts cannot be found in the attention of this kind of model.
    """
    network = model.model.diffusion_model
    joint = joint_family(network)
    if joint is not None:
        return joint.text_width(network)
    cross = cross_family(network)
    if cross is not None:
        return cross.text_width(network)
    if next(layer_names(network), None) is not None:
        return attention_width(model)
    raise ValueError(
        f"DAG cannot read the attention of this model ({family(model)}), because "
        f"{UNREADABLE.get(type(network), 'the layout of its attention is not known')}. "
        "Use Safe Denoiser or Safe Text Guidance (STG) on it."
    )


def learning_width(model: ModelPatcher) -> int:
    """Return the width of the text embeddings of a model on which guideline tokens can be learnt.

    Raises:
        ValueError: tokens cannot be learnt on this kind of model.
    """
    network = model.model.diffusion_model
    joint = joint_family(network)
    if joint is not None and joint.run_block is not None:
        return joint.text_width(network)
    return attention_width(model)


def check_concepts(model: ModelPatcher, concepts: Sequence[GuidelineTokens]) -> None:
    """Check that guideline tokens fit a model.

    Raises:
        ValueError: they are for another kind of model, or the model's attention cannot be read.
    """
    width = text_width(model)
    network = model.model.diffusion_model
    joint = joint_family(network)
    known = None
    if joint is not None:
        known = {f"double.{i}" for i in range(joint.count(network))}
    elif cross_family(network) is not None:
        known = {f"cross.{i}" for i in range(len(network.blocks))}
    for concept in concepts:
        concept.check_fits(family(model), width)
        if known is not None and not known.issuperset(concept.layers):
            raise ValueError(
                f"The guideline tokens '{concept.name or concept.words}' read layers that this model does "
                "not have. Use tokens that were optimised on this kind of model."
            )


def listen_for_maps(
    model: ModelPatcher,
    concepts: Sequence[GuidelineTokens],
    collector_of: Callable[[Run], MapCollector | None],
) -> None:
    """Collect the concepts' token maps while a guider evaluates its positive branch.

    Args:
        model: a clone that takes part in runs (`hooks.attach`).
        concepts: those of all collectors.
        collector_of: returns a run's collector, or None to collect nothing.
    """
    network = model.model.diffusion_model
    joint = joint_family(network)
    if cross_family(network) is not None:
        listen_to_cross_attention(model, collector_of)
        return
    if joint is None:

        def receiver_of(run: Run) -> Receiver | None:
            collector = collector_of(run)
            return None if collector is None else collector.receive

        listen(model, receiver_of)
        return
    names = {name for concept in concepts for name in concept.layers or joint.read_blocks(network)}
    last = max(int(name.split(".")[1]) for name in names)

    def joint_receiver_of(run: Run) -> JointReceiver | None:
        collector = collector_of(run)
        return None if collector is None else ConceptMaps(collector).receive

    listen_jointly(model, range(min(last + 1, joint.count(network))), joint_receiver_of)
