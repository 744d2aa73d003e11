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
from .parsing import lines_of
from .shared_inputs import WHOLE_START, sigma_window

CATEGORY = "safe guidance/text"
ALIASES = ["sega guidance", "semantic guidance", "concept slider", "remove concept", "add concept", "edit"]
DEFAULT = Concept()


@dataclass(frozen=True)
class NamedConcept:
    """A concept's text with its settings."""

    text: str
    concept: Concept


def concept_inputs() -> list[io.Input]:
    """A concept's settings, the same for both nodes."""
    return [
        io.Float.Input(
            "scale",
            default=DEFAULT.scale,
            min=0.0,
            max=100.0,
            step=0.5,
            tooltip="How hard a concept is steered. 0 is off; the paper uses 4 to 10; more changes more of the image.",
        ),
        io.Float.Input(
            "threshold",
            default=DEFAULT.threshold,
            min=0.0,
            max=1.0,
            step=0.005,
            tooltip="The share of the image that is left alone. More touches fewer places; 0 touches all.",
        ),
        io.Float.Input(
            "start_sigma",
            default=round(DEFAULT.window.high, 2),
            min=0.0,
            max=WHOLE_START,
            step=0.01,
            advanced=True,
            tooltip=f"Noise level at which the warm-up ends; {WHOLE_START:g} starts with the first step. 4.69 is the paper's tenth step "
            "of 50; less keeps more of the layout.",
        ),
        io.Float.Input(
            "end_sigma",
            default=0.0,
            min=0.0,
            max=WHOLE_START,
            step=0.01,
            advanced=True,
            tooltip="Noise level at which a concept cools down. 0 never does; more spares fine detail.",
        ),
    ]


def _concept(
    remove: bool, scale: float, threshold: float, start_sigma: float, end_sigma: float, weight: float = 1.0
) -> Concept:
    return Concept(scale, remove, threshold, sigma_window(start_sigma, end_sigma), weight)


class SemanticConcept(io.ComfyNode):
    """One concept with settings of its own, in front of those before it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSemanticConcept",
            display_name="Semantic Concept",
            category=CATEGORY,
            description="A concept with its own settings for Semantic Guidance. Chain several.",
            search_aliases=ALIASES,
            inputs=[
                io.String.Input(
                    "text", default="", multiline=True, tooltip="The concept in words, as in a prompt."
                ),
                io.Combo.Input(
                    "direction",
                    options=["remove", "add"],
                    tooltip="Whether images move away from the concept or towards it.",
                ),
                *concept_inputs(),
                io.Float.Input(
                    "weight",
                    default=DEFAULT.weight,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="The concept's share among several. More lets it decide where they disagree; 0 is off.",
                ),
                SemanticConceptsType.Input(
                    "concepts", optional=True, tooltip="Concepts that come before this one."
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


class SemanticGuidance(io.ComfyNode):
    """MODEL in, MODEL out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSemanticGuidance",
            display_name="Semantic Guidance",
            category=CATEGORY,
            description="Removes concepts from an image or adds them while it is sampled, changing only the places where a concept shows "
            "most. Needs a sampler with a negative prompt. Costs one more model evaluation a step and concept, in one batch.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The model to steer."),
                io.Clip.Input(
                    "clip", tooltip="The text encoder that belongs to the model; it encodes the concepts."
                ),
                io.String.Input(
                    "remove", default="", multiline=True, tooltip="What to remove, one concept per line."
                ),
                io.String.Input(
                    "add", default="", multiline=True, tooltip="What to add, one concept per line."
                ),
                *concept_inputs(),
                io.Float.Input(
                    "momentum_scale",
                    default=SemanticGuidanceSettings(()).momentum_scale,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="How much of the guidance of earlier steps is added. 0 is off and saves model evaluations before the start.",
                ),
                io.Float.Input(
                    "momentum_decay",
                    default=SemanticGuidanceSettings(()).momentum_decay,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="The share of the collected guidance that stays at each step. More is slower and smoother.",
                ),
                SemanticConceptsType.Input(
                    "concepts", optional=True, tooltip="Further concepts with settings of their own."
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
                "Semantic Guidance has no concept. Write one under remove or add, or connect a Semantic Concept."
            )
        guidance = SemanticGuidanceSettings(
            tuple(named.concept for named in chosen), momentum_scale, momentum_decay
        )
        texts = [encode(clip, named.text) for named in chosen]
        return io.NodeOutput(attach(model, SemanticGuidanceCorrection(texts, guidance)))


NODES: list[type[io.ComfyNode]] = [SemanticConcept, SemanticGuidance]
