"""Study of Detect-and-Guide on the demo model: its detector's figures, and the paper's ablation.

Held-out scenes of the demo world test the detector; the prompts of the demonstration test removal.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...demo.annotated_set import draw_annotated_set
from ...formats import guideline_token_file
from ...guidance.detect_and_guide.annotated_images import annotate
from ...guidance.detect_and_guide.attention_cache import AttentionCache
from ...guidance.detect_and_guide.attention_maps import concept_probability, normalize_jointly
from ...guidance.detect_and_guide.guidance import DetectAndGuideSettings
from ...guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ...guidance.detect_and_guide.token_optimization import overlap
from ...guidance.safe_latent_diffusion import MAX, STRONG
from ..host import import_host
from ..in_process_sampler import InProcessSampler
from ..judges.judge import judge, matches
from ..judges.network import load_judge
from ..measures.preservation import drawn_changes, unsafe_counts
from ..prompt_sets.prompts import SETS, Record, load_prompts
from ..runner import WORKFLOWS

LEVELS = (7.0, 5.0, 3.0, 2.0, 1.0, 0.5)
HELD_OUT_SEED = 977
FALSE_ALARMS = 0.05
ROC = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)
"""False alarm rates at which the hit rate is given."""
DRAWN_SCENES = 200
UNSAFE_SETS = ("named", "implied")
NODE = "SafeGuidanceDAGDetectorGuide"
SAFETY_TITLE = "Safety text"


@dataclass(frozen=True)
class DetectorRow:
    """One detector at one noise level, on held-out scenes.

    Attributes:
        auc: probability that an image with a star has a higher maximum than one without.
        hits: hit rate on images with a star at the threshold with the false alarm rate FALSE_ALARMS.
        roc: hit rates at the false alarm rates ROC.
        iou: mean overlap of the calibrated map with the true mask, at the threshold and at the best one for
            all images.
    """

    tokens: str
    sigma: float
    auc: float
    hits: float
    roc: tuple[float, ...]
    iou: float
    best_iou: float


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


def area_under_curve(with_concept: Tensor, without: Tensor) -> float:
    """Return the probability that a value with the concept exceeds one without; ties count half."""
    larger = (with_concept[:, None] > without[None]).double() + 0.5 * (with_concept[:, None] == without[None])
    return float(larger.mean())


def detector_rows(name: str, tokens: GuidelineTokens, cache: AttentionCache) -> Iterator[DetectorRow]:
    """Yield a row for each noise level of the cache."""
    shows = cache.masks.flatten(1).any(1)
    for level, sigma in enumerate(cache.sigmas):
        with torch.no_grad():
            p = concept_probability(cache.maps(tokens.embeddings, level))[:, 0]
        highest = p.flatten(1).amax(1)

        def found(false_alarms: float, highest: Tensor = highest) -> float:
            return float((highest[shows] > highest[~shows].quantile(1 - false_alarms)).double().mean())

        detection = normalize_jointly(tokens.calibration.apply(p[:, None]))[:, 0]
        overlaps = [
            float(overlap(detection, cache.masks, t)[shows].mean())
            for t in torch.linspace(0.05, 0.95, 19).tolist()
        ]
        yield DetectorRow(
            name,
            sigma,
            area_under_curve(highest[shows], highest[~shows]),
            found(FALSE_ALARMS),
            tuple(found(share) for share in ROC),
            float(overlap(detection, cache.masks)[shows].mean()),
            max(overlaps),
        )


def held_out_cache(
    model: Any, clip: Any, vae: Any, layers: Sequence[int | str], count: int
) -> AttentionCache:
    """Record the attention of `count` held-out scenes with stars and as many without."""
    from ...nodes.host.attention.token_learning import look_at_images

    scenes = draw_annotated_set(count, HELD_OUT_SEED)
    example = annotate(scenes.images, scenes.masks, scenes.safe_images)
    return look_at_images(model, clip, vae, example, scenes.captions, LEVELS, layers, HELD_OUT_SEED)


def shipped_settings() -> tuple[DetectAndGuideSettings, str]:
    """Return the settings and the safety text of the workflow demo_dag."""
    from ...guidance.core.noise_level import SigmaWindow

    workflow = json.loads((WORKFLOWS / "demo_dag.json").read_text(encoding="utf-8"))
    node = next(n for n in workflow["nodes"] if n["type"] == NODE)
    text = next(n for n in workflow["nodes"] if n.get("title") == SAFETY_TITLE)["widgets_values"][0]
    names = [socket["name"] for socket in node["inputs"] if "widget" in socket]
    values = dict(zip(names, node["widgets_values"]))
    window = SigmaWindow(high=values.pop("start_sigma"), low=values.pop("end_sigma"))
    values.pop("normalization")
    return DetectAndGuideSettings(
        window=window, **{**values, "connectivity": int(values["connectivity"])}
    ), text


ONE_PASS = {
    "look_first": False,
    "detection_threshold": 0.495,
    "hold_threshold": 0.2,
    "base": 50.0,
    "cap": 20.0,
}
"""Best settings without two-pass detection; all others are as shipped."""


def variants(settings: DetectAndGuideSettings) -> dict[str, DetectAndGuideSettings]:
    """Return the variants: two-pass as shipped and one pass as in the paper, each with ablations."""
    one_pass = replace(settings, **ONE_PASS)
    return {
        "DAG": settings,
        **_ablations(settings),
        "one pass": one_pass,
        **{f"one pass, {name}": ablated for name, ablated in _ablations(one_pass).items()},
        "one pass, stacked maps": replace(one_pass, stacked=True),
        "one pass, paper's constants": DetectAndGuideSettings(),
    }


def _ablations(settings: DetectAndGuideSettings) -> dict[str, DetectAndGuideSettings]:
    return {
        "without AreaScaler": replace(settings, scale_by_area=False, base=0.1 * settings.cap),
        "without MagnitudeScaler": replace(settings, magnitude=1.0),
        "not bounded": replace(settings, bounded=False),
        "the paper's edit mask": replace(settings, core=0.0, reach=0.0),
    }


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


def pairs_of(prompts: Mapping[str, list[Record]], first: int, count: int) -> list[Record]:
    """Select `count` prompts with a second shape, from index `first` of both unsafe sets on."""
    later = [[r for r in prompts[kind][first:] if len(r.shapes) == 2] for kind in UNSAFE_SETS]
    return [record for of_both in zip_longest(*later) for record in of_both if record is not None][:count]


def study(per_set: int, scenes: int, pairs: int, only: Sequence[str]) -> dict[str, Any]:
    """Measure detection, replacement by the renderer, removal and, with `pairs`, preservation.

    Returns plain data.
    """
    from ...nodes.host.files.folders import GUIDELINE_TOKENS, file_path

    sampler = InProcessSampler()
    learnt = guideline_token_file.load(file_path(GUIDELINE_TOKENS, "demo_star (bundled)"))
    everything = load_prompts()
    network = load_judge()
    detection = detection_figures(sampler, learnt, scenes)
    drawn = drawn_changes(DRAWN_SCENES, HELD_OUT_SEED)
    _print(drawn)
    prompts = {kind: records[:per_set] for kind, records in everything.items()}
    guarded = guarded_models(sampler, learnt)
    report = {
        "version": 2,
        "scenes": 2 * scenes,
        "false_alarms": ROC,
        "detection": detection,
        "removal": removal_figures(sampler, guarded, prompts, network, only),
        "drawn": drawn,
    }
    if pairs:
        records = pairs_of(everything, per_set, pairs)
        report["pairs"] = pair_figures(sampler, guarded["DAG"][0], records, network)
    return report


def detection_figures(
    sampler: InProcessSampler, learnt: GuidelineTokens, scenes: int
) -> list[dict[str, Any]]:
    """Measure the detector on held-out scenes, with learnt tokens and with tokens from text."""
    from ...nodes.host.attention.token_learning import tokens_from_text

    detectors = {
        "learnt": learnt,
        "from text": replace(tokens_from_text(sampler.clip, "star", False), layers=learnt.layers),
    }
    cache = held_out_cache(sampler.model, sampler.clip, sampler.vae, learnt.layers, scenes)
    rows = [asdict(row) for name, tokens in detectors.items() for row in detector_rows(name, tokens, cache)]
    for row in rows:
        _print(row)
    return rows


def guarded_models(sampler: InProcessSampler, learnt: GuidelineTokens) -> dict[str, tuple[Any, str]]:
    """Return the model with each variant of the method and with SLD, each with its negative prompt."""
    from ...nodes.host.engine.conditioning import encode
    from ...nodes.host.engine.correction import Correction
    from ...nodes.host.engine.hooks import attach
    from ...nodes.host.methods.detect_and_guide import DetectAndGuideCorrection
    from ...nodes.host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection

    settings, text = shipped_settings()
    methods: dict[str, Correction] = {
        name: DetectAndGuideCorrection([learnt], encode(sampler.clip, text), chosen)
        for name, chosen in variants(settings).items()
    }
    for name, chosen in {"SLD-Strong": STRONG, "SLD-Max": MAX}.items():
        methods[name] = SafeLatentDiffusionCorrection(encode(sampler.clip, text), chosen)
    models = {name: (attach(sampler.model, method), "") for name, method in methods.items()}
    return models | {"negative prompt": (sampler.model, text)}


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
        _print(rows[-1])
    return rows


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
    _print(figures)
    return figures


def _print(figures: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str]) -> int:
    """Run the study and write its figures as JSON. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--per-set", type=int, default=32, help="prompts of each set")
    parser.add_argument(
        "--scenes", type=int, default=48, help="held-out scenes with stars, and as many without"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=0,
        help="further prompts with a second shape beside the star, for the method as shipped",
    )
    parser.add_argument("--variants", nargs="*", default=[], help="only these variants of the method")
    parser.add_argument("--output", type=Path, default=Path("study_dag.json"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as base:
        import_host(Path(base))
        with torch.inference_mode():
            report = study(args.per_set, args.scenes, args.pairs, args.variants)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0
