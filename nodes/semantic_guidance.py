"""Semantic Guidance: remove or add concepts, each along its own direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..guidance.semantic_guidance import Concept, SemanticGuidanceSettings
from .host.engine.conditioning import encode
from .host.engine.hooks import attach
from .host.methods.semantic_guidance import SemanticGuidanceCorrection
from .io_types import SemanticConceptsType
from .model_inputs import clip_input
from .parsing import lines_of
from .shared_inputs import WHOLE_START, sigma_window

CATEGORY = "safe guidance/text"
ALIASES = ["sega guidance", "semantic guidance", "concept slider", "remove concept", "add concept", "edit"]
DEFAULT = Concept()


@dataclass(frozen=True)
class NamedConcept:
    """Text of a concept with its settings."""

    text: str
    concept: Concept


def concept_inputs() -> list[io.Input]:
    """Return the inputs for a concept's settings, the same for both nodes."""
    return [
        io.Float.Input(
            "scale",
            default=DEFAULT.scale,
            min=0.0,
            max=100.0,
            step=0.5,
            tooltip="How strongly a concept is steered; 0 is off. A higher value changes more "
            "of the image. Start with 5; the paper uses 4 to 10.",
        ),
        io.Float.Input(
            "threshold",
            default=DEFAULT.threshold,
            min=0.0,
            max=1.0,
            step=0.005,
            tooltip="Share of the image that is left unchanged. A higher value changes fewer "
            "positions; 0 changes all. Start with 0.9.",
        ),
        io.Float.Input(
            "start_sigma",
            default=round(DEFAULT.window.high, 2),
            min=0.0,
            max=WHOLE_START,
            step=0.01,
            advanced=True,
            tooltip=f"Noise level (sigma) at which guidance begins; {WHOLE_START:g} is the first "
            "step. A lower value keeps more of the layout. Start with 4.69, the paper's "
            "tenth step of 50.",
        ),
        io.Float.Input(
            "end_sigma",
            default=0.0,
            min=0.0,
            max=WHOLE_START,
            step=0.01,
            advanced=True,
            tooltip="Noise level (sigma) at which guidance stops. A higher value leaves fine "
            "detail unchanged. Start with 0, which acts to the last step.",
        ),
    ]


def _concept(
    remove: bool, scale: float, threshold: float, start_sigma: float, end_sigma: float, weight: float = 1.0
) -> Concept:
    return Concept(scale, remove, threshold, sigma_window(start_sigma, end_sigma), weight)


class SemanticConceptNode(io.ComfyNode):
    """Adds one concept with its own settings to those before it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSemanticConcept",
            display_name="Semantic Concept",
            category=CATEGORY,
            description="A concept with its own settings for Semantic Guidance. Chain several nodes "
            "for several concepts.",
            search_aliases=ALIASES,
            inputs=[
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    tooltip="The concept in one or two words, as in a prompt.",
                ),
                io.Combo.Input(
                    "direction",
                    options=["remove", "add"],
                    tooltip="remove moves images away from the concept; add moves them towards it.",
                ),
                *concept_inputs(),
                io.Float.Input(
                    "weight",
                    default=DEFAULT.weight,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Weight of this concept among several; 0 is off. A higher value wins where "
                    "concepts disagree. Start with 1.",
                ),
                SemanticConceptsType.Input(
                    "concepts",
                    optional=True,
                    tooltip="Concepts from another Semantic Concept node, placed before this one.",
                ),
            ],
            outputs=[SemanticConceptsType.Output(display_name="concepts")],
        )

    @classmethod
    def execute(
        cls,
        text: str,
        direction: str,
        weight: float,
        concepts: tuple[NamedConcept, ...] = (),
        **settings: float,
    ) -> io.NodeOutput:
        if not text.strip():
            raise ValueError("The concept has no text. Write what to remove or to add.")
        return io.NodeOutput(
            (
                *(concepts or ()),
                NamedConcept(text.strip(), _concept(direction == "remove", weight=weight, **settings)),
            )
        )


class SemanticGuidanceNode(io.ComfyNode):
    """Attaches Semantic Guidance to a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSemanticGuidance",
            display_name="Semantic Guidance",
            category=CATEGORY,
            description="Removes or adds concepts during sampling and changes only the positions "
            "where a concept is strongest. Needs a sampler with a negative prompt. "
            "Costs one extra model evaluation per step and concept, in one batch.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="Model to guide. Connect it before any sampler."),
                clip_input("the concepts"),
                io.String.Input(
                    "remove",
                    default="",
                    multiline=True,
                    tooltip="Concepts to remove, one per line. Start with one or two words.",
                ),
                io.String.Input(
                    "add",
                    default="",
                    multiline=True,
                    tooltip="Concepts to add, one per line. Leave it empty to add nothing.",
                ),
                *concept_inputs(),
                io.Float.Input(
                    "momentum_scale",
                    default=SemanticGuidanceSettings(()).momentum_scale,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Weight of the accumulated guidance of earlier steps. A higher value keeps "
                    "the direction longer; 0 is off and saves the evaluations before the start. "
                    "Start with 0.1.",
                ),
                io.Float.Input(
                    "momentum_decay",
                    default=SemanticGuidanceSettings(()).momentum_decay,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Share of the accumulated guidance that is kept at each step. A higher "
                    "value changes more slowly and smoothly. Start with 0.4.",
                ),
                SemanticConceptsType.Input(
                    "concepts",
                    optional=True,
                    tooltip="Further concepts with their own settings, from Semantic Concept.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: Any,
        remove: str,
        add: str,
        momentum_scale: float,
        momentum_decay: float,
        concepts: tuple[NamedConcept, ...] = (),
        **settings: float,
    ) -> io.NodeOutput:
        own = [NamedConcept(line, _concept(True, **settings)) for line in lines_of(remove)]
        own += [NamedConcept(line, _concept(False, **settings)) for line in lines_of(add)]
        chosen = [*own, *(concepts or ())]
        if not chosen:
            raise ValueError(
                "Semantic Guidance has no concept. "
                "Write one under remove or add, or connect a Semantic Concept."
            )
        guidance = SemanticGuidanceSettings(
            tuple(named.concept for named in chosen), momentum_scale, momentum_decay
        )
        texts = [encode(clip, named.text) for named in chosen]
        return io.NodeOutput(attach(model, SemanticGuidanceCorrection(texts, guidance)))


NODES: list[type[io.ComfyNode]] = [SemanticConceptNode, SemanticGuidanceNode]
