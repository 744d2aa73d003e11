"""Figures of removal: images in which a method leaves the concept, and what it preserves of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..in_process_sampler import InProcessSampler
from ..judges.judge import judge, matches
from ..measures.preservation import unsafe_counts
from ..prompt_sets.prompts import SETS, Record
from .dag_detection import write_line

UNSAFE_SETS = ("named", "implied")


@dataclass(frozen=True)
class AblationRow:
    """One variant on the demonstration's prompts: counts over prompts, and the change outside the star.

    Attributes:
        prompts: number of prompts of each set.
        named_unsafe, implied_unsafe, benign_unsafe: images with a star.
        benign_identical: benign images that are bit-identical to the plain ones.
        benign_right: benign images that show what the text states.
        others: images whose second shape was right without the method.
        others_right: of these, those in which its shape and colour still are.
        others_placed: of these, those in which it also is in its place.
        outside: mean change of pixels more than a latent position away from the plain image's star, where 1
            is from black to white, over the prompts that state the star's colour.
    """

    variant: str
    prompts: int
    named_unsafe: int
    implied_unsafe: int
    benign_unsafe: int
    benign_identical: int
    benign_right: int
    others: int
    others_right: int
    others_placed: int
    outside: float


def removal_figures(
    sampler: InProcessSampler,
    guarded: Mapping[str, tuple[Any, str]],
    prompts: Mapping[str, list[Record]],
    network: Any,
    only: Sequence[str],
) -> list[dict[str, Any]]:
    """Sample the prompts without and with every model (or `only` some) and count what the judge sees."""
    plain = {kind: sampler.draw(sampler.model, prompts[kind]) for kind in SETS}
    rows = [asdict(ablation_row("none", plain, plain, prompts, network))]
    for name, (model, negative) in guarded.items():
        if only and name not in only:
            continue
        made = {kind: sampler.draw(model, prompts[kind], negative=negative) for kind in SETS}
        rows.append(asdict(ablation_row(name, made, plain, prompts, network)))
        write_line(rows[-1])
    return rows


def ablation_row(
    name: str,
    made: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    prompts: Mapping[str, list[Record]],
    network: Any,
) -> AblationRow:
    """Count one variant's images beside the plain ones of the same prompts and seeds."""
    unsafe = {kind: unsafe_counts(made[kind], plain[kind], prompts[kind], network) for kind in UNSAFE_SETS}
    benign = judge(made["benign"], network)
    outside = [change for counts in unsafe.values() for change in counts.outside]
    return AblationRow(
        name,
        len(prompts["named"]),
        unsafe["named"].stars,
        unsafe["implied"].stars,
        sum(v.unsafe for v in benign),
        sum(torch.equal(a, b) for a, b in zip(made["benign"], plain["benign"])),
        sum(matches(v, r) for v, r in zip(benign, prompts["benign"])),
        sum(counts.others for counts in unsafe.values()),
        sum(counts.right for counts in unsafe.values()),
        sum(counts.placed for counts in unsafe.values()),
        sum(outside) / max(1, len(outside)),
    )


def pair_figures(
    sampler: InProcessSampler, guarded: Any, records: Sequence[Record], network: Any
) -> dict[str, Any]:
    """Count what the method preserves on prompts with a second shape beside the star."""
    after = sampler.draw(guarded, records)
    before = sampler.draw(sampler.model, records)
    counts = unsafe_counts(after, before, records, network)
    figures = {
        "prompts": len(records),
        **asdict(counts),
        "outside": sum(counts.outside) / len(records),
    }
    write_line(figures)
    return figures


def pairs_of(prompts: Mapping[str, list[Record]], first: int, count: int) -> list[Record]:
    """Select `count` prompts with a second shape, from index `first` of both unsafe sets on."""
    later = [[r for r in prompts[kind][first:] if len(r.shapes) == 2] for kind in UNSAFE_SETS]
    return [record for of_both in zip_longest(*later) for record in of_both if record is not None][:count]
