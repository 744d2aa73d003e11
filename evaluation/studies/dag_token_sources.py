"""Study of training sources for guideline tokens: sampling runs, noised images, and noised scenes.

The sources are the model's own runs, the images of these runs under fresh noise, and drawn scenes under fresh
noise. Each has the same number of images, half of them with stars. The test uses runs of other prompts and
measures whether the maps are higher in images with a star, and whether they overlap with it. Masks of sampled
stars come from `evaluation/judges/locate.py`. Takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...demo import world as world
from ...demo.annotated_set import draw_annotated_set
from ...guidance.detect_and_guide.annotated_images import AnnotatedImages, annotate
from ...guidance.detect_and_guide.attention_cache import AttentionCache
from ...guidance.detect_and_guide.token_evaluation import detections, overlap
from ...guidance.detect_and_guide.token_optimization import OptimizationSettings
from ..host import import_host
from ..in_process_sampler import CFG, SAMPLER, SCHEDULER, STEPS, InProcessSampler
from ..judges.locate import locate
from ..prompt_sets.prompts import Record, load_prompts
from .dag_detection import area_under_curve

SIGMAS = (6.0, 4.5, 3.0, 2.0, 1.2)
TOKENS, ITERATIONS, LEVELS, BATCH = 16, 600, 2, 16
"""Settings with which the bundled tokens are learnt."""
SEEDS = (1, 2)
TAUGHT, TESTED = 100, 0
"""Index of the first prompt of each set, for learning and for the test."""
TEST_IMAGES = 32
DRAWN_SEED = 41
COLUMNS = (
    "learnt from",
    "seed",
    "AUC on its own images",
    "AUC on other runs",
    "of the mean map",
    "best IoU on other runs",
)


@dataclass(frozen=True)
class Lesson:
    """Images with the masks of their stars, their captions, and the attention queries cached for them."""

    example: AnnotatedImages
    captions: tuple[str, ...]
    attention: AttentionCache


def stated(records: Sequence[Record]) -> list[Record]:
    """Select the records that state the colour of every shape, so that the star can be located."""
    return [record for record in records if record.colors and len(record.colors) == len(record.shapes)]


def own_runs(sampler: InProcessSampler, first: int, count: int) -> Lesson:
    """Sample `count` prompts that name a star and as many benign ones, and record their attention."""
    from ...nodes.host.attention.sampled_images import SamplerSettings, sample_and_record
    from ...nodes.host.engine.conditioning import encode

    sets = load_prompts()
    shown = stated(sets["named"][first:])[:count]
    records = [*shown, *sets["benign"][first : first + count]]
    texts = [encode(sampler.clip, record.prompt) for record in records]
    seeds = [record.seed for record in records]
    settings = SamplerSettings(STEPS, CFG, SAMPLER, SCHEDULER)
    empty = {"samples": torch.zeros(1, 4, 32, 32)}
    latents, attention = sample_and_record(
        sampler.model, texts, encode(sampler.clip, ""), seeds, empty, settings, SIGMAS, (2,)
    )
    images = sampler.vae.decode(latents).clamp(0, 1)
    masks = torch.zeros(len(records), world.SIZE, world.SIZE)
    for index, record in enumerate(shown):
        found = locate(images[index].movedim(-1, 0), record, world.CONCEPT)
        if found is not None:
            masks[index] = found.mask.float()
    return Lesson(
        AnnotatedImages(images, masks),
        tuple(record.prompt for record in records),
        attention.with_masks(masks),
    )


def under_noise(sampler: InProcessSampler, example: AnnotatedImages, captions: Sequence[str]) -> Lesson:
    """Record the attention of images under fresh noise."""
    from ...nodes.host.attention.annotated_recording import record_images

    return Lesson(
        example,
        tuple(captions),
        record_images(sampler.model, sampler.clip, sampler.vae, example, captions, SIGMAS, (2,), 0),
    )


def drawn(sampler: InProcessSampler, count: int) -> Lesson:
    """Render scenes of the demo world and record their attention under fresh noise."""
    scenes = draw_annotated_set(count, DRAWN_SEED)
    example = annotate(scenes.images, scenes.masks, scenes.safe_images)
    return under_noise(sampler, example, scenes.captions)


def separation(cache: AttentionCache, embeddings: torch.Tensor) -> tuple[list[float], float, float]:
    """Measure how well the maps separate images with and without a star.

    Returns:
        AUC of the maps' maxima at each noise level, AUC of the mean map, and the mean IoU at the best
        threshold of each level, averaged.
    """
    maps, shows = detections(cache, embeddings), cache.masks.flatten(1).any(1)

    def auc(of: torch.Tensor) -> float:
        highest = of.flatten(1).amax(1)
        return area_under_curve(highest[shows], highest[~shows])

    def best(of: torch.Tensor) -> float:
        return max(
            float(overlap(of, cache.masks, t)[shows].mean()) for t in torch.linspace(0.05, 0.95, 19).tolist()
        )

    return [auc(level) for level in maps], auc(maps.mean(0)), sum(best(level) for level in maps) / len(maps)


def cells(
    name: str, seed: int, embeddings: torch.Tensor, own: AttentionCache, other: AttentionCache
) -> tuple[str, ...]:
    """Format a row of the table."""
    (own_levels, _, _), (levels, mean, iou) = separation(own, embeddings), separation(other, embeddings)
    return (
        name,
        str(seed),
        *(f"{min(auc):.2f} to {max(auc):.2f}" for auc in (own_levels, levels)),
        f"{mean:.2f}",
        f"{iou:.2f}",
    )


def rows(sampler: InProcessSampler, count: int) -> Iterator[tuple[str, ...]]:
    """Yield a row for each source and seed."""
    from ...nodes.host.attention.token_learning import learn

    test = own_runs(sampler, TESTED, TEST_IMAGES).attention
    runs = own_runs(sampler, TAUGHT, count)
    sources = {
        "the model's own runs": runs,
        "their images under noise": under_noise(sampler, runs.example, runs.captions),
        "drawn scenes under noise": drawn(sampler, count),
    }
    for name, lesson in sources.items():
        for seed in SEEDS:
            settings = OptimizationSettings("contrast", ITERATIONS, None, LEVELS, BATCH, seed)
            learnt = learn(
                sampler.model, sampler.clip, lesson.example, lesson.attention, world.CONCEPT, TOKENS, settings
            )
            yield cells(name, seed, learnt.tokens.embeddings, lesson.attention, test)


def main(argv: Sequence[str]) -> int:
    """Print the table. Returns 0."""
    parser = argparse.ArgumentParser(
        prog="dev.py study dag_token_sources", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--images",
        type=int,
        default=90,
        help="images with a star, and as many without (default: %(default)s)",
    )
    count = parser.parse_args(argv).images
    with tempfile.TemporaryDirectory() as base:
        import_host(Path(base))
        with torch.inference_mode():
            sys.stdout.write("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|\n")
            for row in rows(InProcessSampler(), count):
                sys.stdout.write("| " + " | ".join(row) + " |\n")
                sys.stdout.flush()
    return 0
