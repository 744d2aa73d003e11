"""Words for what a negation set can tell apart: its own images, each judged by the others."""

from __future__ import annotations

from ..guidance.safety_functions.embedding_density import LeaveOneOut

ENOUGH_NEUTRAL = 40
"""Neutral images from which a share of false alarms of a few per cent can be estimated at all."""


def in_words(check: LeaveOneOut) -> str:
    """Return what the set finds of its own images, and what it lacks."""
    found = f"Each image judged by the others: finds {check.found} of {check.unwanted} unwanted images"
    if not check.neutral:
        return (
            f"{found}. It has no neutral images, so false alarms are unknown. Add about {ENOUGH_NEUTRAL} "
            "images without the unwanted content, with empty masks."
        )
    alarms = f"{found}, and takes {check.false_alarms} of {check.neutral} neutral ones for unwanted."
    if check.found < check.unwanted / 2:
        return (
            f"{alarms} This encoder hardly tells them apart. Connect a larger CLIP_VISION, or add images "
            "of both kinds."
        )
    if check.neutral < ENOUGH_NEUTRAL:
        return f"{alarms} Add neutral images up to about {ENOUGH_NEUTRAL} for a more certain gate."
    return alarms
