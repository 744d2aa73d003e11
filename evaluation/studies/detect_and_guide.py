"""Study of Detect-and-Guide on the demo model: its detector's figures, and the paper's ablation.

Held-out scenes of the demo world test the detector; the prompts of the demonstration test removal.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...formats import guideline_token_file
from ...guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ...guidance.safe_latent_diffusion import MAX, STRONG
from ..host import import_host
from ..in_process_sampler import InProcessSampler
from ..judges.network import load_judge
from ..measures.preservation import drawn_changes
from ..prompt_sets.prompts import load_prompts
from .dag_detection import HELD_OUT_SEED, ROC, detection_figures, write_line
from .dag_removal import pair_figures, pairs_of, removal_figures
from .dag_variants import shipped_settings, variants

DRAWN_SCENES = 200


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
    write_line(drawn)
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


def guarded_models(sampler: InProcessSampler, learnt: GuidelineTokens) -> dict[str, tuple[Any, str]]:
    """Return the model with each variant of the method and with SLD, each with its negative prompt."""
    from ...nodes.host.engine.conditioning import encode
    from ...nodes.host.engine.correction import Correction
    from ...nodes.host.engine.hooks import attach
    from ...nodes.host.methods.detect_and_guide import DetectAndGuideCorrection
    from ...nodes.host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection
    from .dag_area_ablation import WithoutAreaScaler

    settings, text = shipped_settings()
    methods: dict[str, Correction] = {
        name: (DetectAndGuideCorrection if variant.area_scaler else WithoutAreaScaler)(
            [learnt], encode(sampler.clip, text), variant.settings
        )
        for name, variant in variants(settings).items()
    }
    for name, chosen in {"SLD-Strong": STRONG, "SLD-Max": MAX}.items():
        methods[name] = SafeLatentDiffusionCorrection(encode(sampler.clip, text), chosen)
    models = {name: (attach(sampler.model, method), "") for name, method in methods.items()}
    return models | {"negative prompt": (sampler.model, text)}


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
