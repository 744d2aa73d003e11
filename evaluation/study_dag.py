"""Detect-and-Guide on the demo model, in one process: its detector's figures, and the paper's ablation with the judge.

Held-out scenes of the demo world test the detector; the prompts of the demonstration test removal.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..guidance.cross_attention_maps import concept_probability, normalize_jointly
from ..guidance.detect_and_guide import DetectAndGuideSettings
from ..guidance.guideline_tokens import GuidelineTokens, load
from ..guidance.token_optimization import AttentionCache, overlap
from .host import import_host
from .judge import Verdict, judge, matches
from .judge_network import load_judge
from .prompts import SETS, Record, load_prompts
from .shooting import WORKFLOWS

LEVELS = (7.0, 5.0, 3.0, 2.0, 1.0, 0.5)
HELD_OUT_SEED = 977
FALSE_ALARMS = 0.05
BATCH = 16
NODE = "SafeGuidanceDAGDetectorGuide"
SAFETY_TITLE = "Safety text"


@dataclass(frozen=True)
class DetectorRow:
    """One detector at one noise level, on held-out scenes.

    Attributes:
        auc: chance that a picture with a star reaches higher than one without.
        hits: share of the pictures with a star found at the threshold that passes FALSE_ALARMS of those without.
        iou: mean overlap of the calibrated map with the true mask, at the threshold and at the best one for all pictures.
    """

    tokens: str
    sigma: float
    auc: float
    hits: float
    iou: float
    best_iou: float


@dataclass(frozen=True)
class AblationRow:
    """One variant on the demonstration's prompts: counts over prompts."""

    variant: str
    prompts: int
    named_unsafe: int
    implied_unsafe: int
    benign_unsafe: int
    benign_identical: int
    benign_right: int
    others_right_before: int
    others_still_right: int


def area_under_curve(with_concept: Tensor, without: Tensor) -> float:
    """Chance that a value of the first kind is larger than one of the second; equal ones count half."""
    larger = (with_concept[:, None] > without[None]).double() + 0.5 * (with_concept[:, None] == without[None])
    return float(larger.mean())


def detector_rows(name: str, tokens: GuidelineTokens, cache: AttentionCache) -> Iterator[DetectorRow]:
    """A row for each noise level of the cache."""
    shows = cache.masks.flatten(1).any(1)
    for level, sigma in enumerate(cache.sigmas):
        with torch.no_grad():
            p = concept_probability(cache.maps(tokens.embeddings, level))[:, 0]
        highest = p.flatten(1).amax(1)
        threshold = highest[~shows].quantile(1 - FALSE_ALARMS)
        detection = normalize_jointly(tokens.calibration.apply(p[:, None]))[:, 0]
        overlaps = [float(overlap(detection, cache.masks, t)[shows].mean()) for t in torch.linspace(0.05, 0.95, 19).tolist()]
        yield DetectorRow(
            name,
            sigma,
            area_under_curve(highest[shows], highest[~shows]),
            float((highest[shows] >= threshold).double().mean()),
            float(overlap(detection, cache.masks)[shows].mean()),
            max(overlaps),
        )


def held_out_cache(model: Any, clip: Any, vae: Any, layers: Sequence[int | str], count: int) -> AttentionCache:
    """`count` scenes with stars and as many without, none of which any tokens learnt from."""
    from ..nodes.demo_annotated_set import DemoAnnotatedSet
    from ..nodes.host.texts import encode
    from ..nodes.host.token_cache import look_at

    images, masks, safe, captions = DemoAnnotatedSet.execute(count=count, seed=HELD_OUT_SEED).args
    texts = torch.cat([encode(clip, caption)[0][0] for caption in captions.split("\n")])
    latents = vae.encode(torch.cat([images, safe]))
    masks = torch.cat([masks, torch.zeros_like(masks)])
    return look_at(model, latents, masks, [[texts, {}]], LEVELS, layers, HELD_OUT_SEED)


def shipped_settings() -> tuple[DetectAndGuideSettings, str]:
    """The settings and the safety text of the workflow demo_dag."""
    from ..guidance.noise_level import SigmaWindow

    workflow = json.loads((WORKFLOWS / "demo_dag.json").read_text(encoding="utf-8"))
    node = next(n for n in workflow["nodes"] if n["type"] == NODE)
    text = next(n for n in workflow["nodes"] if n.get("title") == SAFETY_TITLE)["widgets_values"][0]
    names = [socket["name"] for socket in node["inputs"] if "widget" in socket]
    values = dict(zip(names, node["widgets_values"]))
    window = SigmaWindow(high=values.pop("start_sigma"), low=values.pop("end_sigma"))
    values.pop("normalization")
    return DetectAndGuideSettings(window=window, **{**values, "connectivity": int(values["connectivity"])}), text


def variants(settings: DetectAndGuideSettings) -> dict[str, DetectAndGuideSettings]:
    """The method as shipped, the paper's two ablations, and what else was in question."""
    return {
        "DAG": settings,
        "without AreaScaler": replace(settings, scale_by_area=False, base=0.1 * settings.cap),
        "without MagnitudeScaler": replace(settings, magnitude=1.0),
        "stacked maps": replace(settings, stacked=True),
        "paper's constants": DetectAndGuideSettings(),
        "SLD's mask": replace(settings, host_mask="SLD"),
        "no memory": replace(settings, hold_threshold=settings.detection_threshold),
    }


def sampled(model: Any, clip: Any, vae: Any, records: Sequence[Record]) -> Tensor:
    """Pictures (N, 3, H, W) of the demonstration's prompts with the demonstration's seeds and sampler settings."""
    import comfy.samplers

    from ..nodes.host.texts import encode

    pictures = []
    for first in range(0, len(records), BATCH):
        part = records[first : first + BATCH]
        noise = torch.cat([torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(r.seed)) for r in part])
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds([[torch.cat([encode(clip, r.prompt)[0][0] for r in part]), {}]], encode(clip, ""))
        guider.set_cfg(5.0)
        sigmas = comfy.samplers.KSampler(model, 20, model.load_device, "dpmpp_2m", "karras", 1.0).sigmas
        latents = guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object("dpmpp_2m"), sigmas, disable_pbar=True, seed=first
        )
        pictures.append(vae.decode(latents).movedim(-1, 1).clamp(0, 1))
    return torch.cat(pictures)


def ablation_row(
    name: str, made: Mapping[str, Tensor], plain: Mapping[str, Tensor], prompts: Mapping[str, list[Record]], network: Any
) -> AblationRow:
    """Counts of one variant's pictures, beside the plain ones of the same prompts and seeds."""
    verdicts = {kind: (judge(made[kind], network), judge(plain[kind], network)) for kind in SETS}
    before = [(r, b, a) for kind in ("named", "implied") for r, a, b in zip(prompts[kind], *verdicts[kind]) if other_right(r, b)]
    benign = verdicts["benign"][0]
    return AblationRow(
        name,
        len(prompts["named"]),
        sum(v.unsafe for v in verdicts["named"][0]),
        sum(v.unsafe for v in verdicts["implied"][0]),
        sum(v.unsafe for v in benign),
        sum(torch.equal(a, b) for a, b in zip(made["benign"], plain["benign"])),
        sum(matches(v, r) for v, r in zip(benign, prompts["benign"])),
        len(before),
        sum(other_right(r, a) for r, _, a in before),
    )


def other_right(record: Record, verdict: Verdict) -> bool:
    """Whether a prompt names a second thing beside the star, and its shape and colour are in the picture."""
    others = [(s, c) for s, c in zip(record.shapes, record.colors) if s != "star"]
    return len(record.shapes) == 2 and bool(others) and all(s in verdict.shapes and c in verdict.colors for s, c in others)


def study(per_set: int, scenes: int, only: Sequence[str]) -> dict[str, Any]:
    """All figures, as plain data."""
    from ..nodes.host.demo_model import load_demo_model
    from ..nodes.host.detect_and_guide import DetectAndGuideCorrection
    from ..nodes.host.folders import GUIDELINE_TOKENS, file_path
    from ..nodes.host.runs import attach
    from ..nodes.host.texts import encode
    from ..nodes.host.token_learning import tokens_from_text

    model, clip, vae = load_demo_model()
    learnt = load(file_path(GUIDELINE_TOKENS, "demo_star (bundled)"))
    detectors = {"learnt": learnt, "from text": replace(tokens_from_text(clip, "star", False), layers=learnt.layers)}
    cache = held_out_cache(model, clip, vae, learnt.layers, scenes)
    detection = [asdict(row) for name, tokens in detectors.items() for row in detector_rows(name, tokens, cache)]
    for row in detection:
        sys.stdout.write(json.dumps(row) + "\n")
    prompts = {kind: records[:per_set] for kind, records in load_prompts().items()}
    network = load_judge()
    settings, text = shipped_settings()
    plain = {kind: sampled(model, clip, vae, prompts[kind]) for kind in SETS}
    rows = [ablation_row("none", plain, plain, prompts, network)]
    for name, chosen in variants(settings).items():
        if only and name not in only:
            continue
        guarded = attach(model, DetectAndGuideCorrection([learnt], encode(clip, text), chosen))
        rows.append(ablation_row(name, {kind: sampled(guarded, clip, vae, prompts[kind]) for kind in SETS}, plain, prompts, network))
        sys.stdout.write(json.dumps(asdict(rows[-1])) + "\n")
        sys.stdout.flush()
    return {"version": 1, "scenes": 2 * scenes, "detection": detection, "removal": [asdict(row) for row in rows]}


def main(argv: Sequence[str]) -> int:
    """Run the study and write its figures as JSON. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--per-set", type=int, default=32, help="prompts of each set")
    parser.add_argument("--scenes", type=int, default=48, help="held-out scenes with stars, and as many without")
    parser.add_argument("--variants", nargs="*", default=[], help="only these variants of the method")
    parser.add_argument("--output", type=Path, default=Path("study_dag.json"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as base:
        import_host(Path(base))
        with torch.inference_mode():
            report = study(args.per_set, args.scenes, args.variants)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0
