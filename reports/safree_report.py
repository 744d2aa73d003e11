"""Report on a prompt that SAFREE filtered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..guidance.safree import ConceptSubspace, TokenVerdict


def safree_report(
    verdicts: Sequence[TokenVerdict],
    change: float,
    last_step: int | None,
    limited: Mapping[str, ConceptSubspace],
) -> str:
    """Return a report for people: every token with its score, and whether it was filtered.

    Args:
        verdicts: verdicts on every token of every encoder.
        change: how far the filter would move the whole prompt.
        last_step: the last of 50 steps that uses the filtered prompt; None when all do.
        limited: the concepts' subspace by encoder, where only a part of it is used.
    """
    lines = [
        _first_line(verdicts, last_step),
        *(_limit(encoder, subspace) for encoder, subspace in limited.items()),
        f"The filter would change the whole prompt by {change:.3f} (0 = not at all).",
        "",
        "Distance from the concepts without the token, relative to that without another token:",
    ]
    for verdict in verdicts:
        outcome = "filtered" if verdict.toxic else "kept"
        lines.append(f"{verdict.encoder:8} {verdict.ratio:6.3f}  {outcome:8}  {verdict.token}")
    return "\n".join(lines)


def _limit(encoder: str, subspace: ConceptSubspace) -> str:
    return (
        f"The concepts span {subspace.spanned} of the {len(subspace.projector)} dimensions of {encoder}: "
        f"only their {subspace.used} main directions are removed. Use fewer phrases."
    )


def _first_line(verdicts: Sequence[TokenVerdict], last_step: int | None) -> str:
    toxic = [verdict for verdict in verdicts if verdict.toxic]
    if not toxic:
        return "Nothing was filtered: the conditioning is the prompt's own."
    until = "all steps" if last_step is None else f"steps 0 to {last_step} of 50"
    several = len({verdict.encoder for verdict in verdicts}) > 1
    return f"Filtered for {until}: {_by_encoder(toxic, several)}."


def _by_encoder(toxic: Sequence[TokenVerdict], several: bool) -> str:
    """List the words, each once; with several text encoders, under the name of the one that found them."""
    words: dict[str, dict[str, None]] = {}
    for verdict in toxic:
        words.setdefault(verdict.encoder, {})[verdict.token] = None
    return "; ".join(
        (f"{encoder}: " if several else "") + ", ".join(found) for encoder, found in words.items()
    )
