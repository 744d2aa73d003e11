"""Every method of the pack on the demo model, attached by its node, with settings with which it acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...formats.negation_set import load

CONCEPT = "star"
FOR_MASKS = {"strength": 1.2, "threshold": 0.7, "cap": 2.0, "end_sigma": 0.15}
"""Settings of the demonstration for a set with masks."""


@dataclass(frozen=True)
class Contender:
    """A way to sample.

    Attributes:
        method: its name.
        references: images in its negation set; 0 without one.
        model: the MODEL with the method.
        positive: conditioning in place of the prompt's own; None for the prompt's own.
    """

    method: str
    references: int
    model: Any
    positive: Any = None


def outputs_of(node: Any, **given: Any) -> tuple[Any, ...]:
    """Execute a node with its schema's defaults and the given inputs; return its outputs."""
    schema = node.define_schema()
    defaults = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
    outputs: tuple[Any, ...] = node.execute(**{**defaults, **given}).args
    return outputs


def every_method(model: Any, clip: Any, vae: Any, prompt: str) -> list[Contender]:
    """Return every method but Safe Denoiser without masks, whose cost depends on the size of its set.

    Windows begin at the first step, and end at the last where the method has no other end.
    """
    from ...nodes.detect_and_guide import DAGDetectorGuideNode
    from ...nodes.detector_safety_functions import ClassifierSafetyFunctionNode
    from ...nodes.guideline_tokens import LoadGuidelineTokensNode
    from ...nodes.host.files.folders import ASSETS
    from ...nodes.safe_data_guidance import SafeDataGuidanceNode
    from ...nodes.safe_denoiser import SafeDenoiserNode
    from ...nodes.safe_latent_diffusion import SafeLatentDiffusionNode
    from ...nodes.safe_text_guidance import SafeTextEmbeddingGuidanceNode
    from ...nodes.safree import SafreeReattentionNode, SafreeTextFilterNode
    from ...nodes.semantic_guidance import SemanticGuidanceNode
    from ...nodes.shared_inputs import WHOLE_START
    from ...nodes.spell import SparseRepellencyNode

    masked = load(ASSETS / "negation_sets" / "demo_star.safetensors")
    filtered, unfiltered, *_ = outputs_of(
        SafreeTextFilterNode, clip=clip, text=prompt, concepts=CONCEPT, steps="all"
    )
    (function,) = outputs_of(ClassifierSafetyFunctionNode, threshold=0.0)
    (tokens,) = outputs_of(LoadGuidelineTokensNode, name="demo_star (bundled)")
    safety = clip.encode_from_tokens_scheduled(clip.tokenize(CONCEPT))
    on = {"model": model}
    guided = {**on, "vae": vae, "safety_function": function, "start_sigma": WHOLE_START, "end_sigma": 0.0}
    guided["tau"] = -1.0
    set_of = {**on, "vae": vae, "negation_set": masked}
    models: dict[str, tuple[int, Any]] = {
        "Safe Denoiser, masked": (len(masked), outputs_of(SafeDenoiserNode, **set_of, **FOR_MASKS)[0]),
        "SPELL": (len(masked), outputs_of(SparseRepellencyNode, **set_of, radius=10.0)[0]),
        "SLD": (0, outputs_of(SafeLatentDiffusionNode, **on, clip=clip, safety_text=CONCEPT)[0]),
        "Semantic Guidance": (0, outputs_of(SemanticGuidanceNode, **on, clip=clip, remove=CONCEPT)[0]),
        "DAG": (0, outputs_of(DAGDetectorGuideNode, **on, guideline_tokens=tokens, safety=safety)[0]),
        "STG": (0, outputs_of(SafeTextEmbeddingGuidanceNode, **guided)[0]),
        "SDG": (0, outputs_of(SafeDataGuidanceNode, **guided)[0]),
        "SDG, cheap": (0, outputs_of(SafeDataGuidanceNode, **guided, cheap=True)[0]),
    }
    found = [Contender(name, count, guarded) for name, (count, guarded) in models.items()]
    (reattention,) = outputs_of(SafreeReattentionNode, **on, unfiltered=unfiltered)
    found.append(Contender("SAFREE", 0, model, filtered))
    found.append(Contender("SAFREE with re-attention", 0, reattention, filtered))
    return found
