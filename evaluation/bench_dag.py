"""What Detect-and-Guide costs at the size of Stable Diffusion 1.5: random weights, with nothing found and with something at every step."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..guidance.detect_and_guide import DetectAndGuideSettings
from ..guidance.guideline_tokens import Calibration, GuidelineTokens
from ..guidance.noise_level import SigmaWindow
from .host import import_host

WIDTH, TEXT_TOKENS = 768, 77
UNET: dict[str, Any] = {
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2]},
    **{"channel_mult": [1, 2, 4, 4], "num_heads": 8, "num_head_channels": -1, "context_dim": WIDTH, "use_spatial_transformer": True},
    **{"transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]},
    **{"transformer_depth_middle": 1, "use_linear_in_transformer": False, "legacy": False, "adm_in_channels": None},
    **{"use_temporal_attention": False, "use_temporal_resblock": False},
}


def large_model() -> Any:
    """A MODEL of Stable Diffusion 1.5's size with small random weights."""
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15({k: list(v) if isinstance(v, list) else v for k, v in UNET.items()})
    config.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.unet_offload_device()
    model = comfy.model_base.BaseModel(config, device=device)
    for parameter in model.diffusion_model.parameters():
        parameter.normal_(std=0.02)
    return comfy.model_patcher.CoreModelPatcher(model, load_device=comfy.model_management.get_torch_device(), offload_device=device)


def measure(steps: int, repeats: int, latent: int) -> dict[str, Any]:
    """Seconds per step and ratios to the plain step, the variants taking turns."""
    import comfy.sample

    from ..nodes.host.detect_and_guide import DetectAndGuideCorrection
    from ..nodes.host.runs import attach

    plain = large_model()
    generator = torch.Generator().manual_seed(0)
    texts = [[[torch.randn(1, TEXT_TOKENS, WIDTH, generator=generator), {}]] for _ in range(3)]
    embeddings = torch.randn(2, WIDTH, generator=generator)
    settings = DetectAndGuideSettings(window=SigmaWindow(), coverage=1.01)

    def guarded(threshold: float) -> Any:
        tokens = GuidelineTokens(embeddings, calibration=Calibration(threshold))
        return attach(plain, DetectAndGuideCorrection([tokens], texts[2], settings))

    models = {"none": plain, "dag, nothing found": guarded(0.999), "dag, found at every step": guarded(0.001)}
    noise = torch.randn(1, 4, latent, latent, generator=generator)

    def run(model: Any) -> float:
        start = time.perf_counter()
        comfy.sample.sample(
            model, noise, steps, 7.5, "euler", "normal", texts[0], texts[1], torch.zeros_like(noise), disable_pbar=True, seed=1
        )
        return (time.perf_counter() - start) / steps

    for model in models.values():
        run(model)
    rounds = [{name: run(model) for name, model in models.items()} for _ in range(repeats)]
    seconds = {name: statistics.median(r[name] for r in rounds) for name in models}
    ratios = {name: statistics.median(r[name] / r["none"] for r in rounds) for name in models}
    return {"version": 1, "latent": latent, "steps": steps, "repeats": repeats, "seconds_per_step": seconds, "ratio": ratios}


def main(argv: Sequence[str]) -> int:
    """Run the measurement and write it as JSON. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latent", type=int, default=64, help="latent's side: 64 is 512 pixels")
    parser.add_argument("--output", type=Path, default=Path("bench_dag.json"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as base:
        import_host(Path(base))
        with torch.inference_mode():
            report = measure(args.steps, args.repeats, args.latent)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(report["ratio"]) + "\n")
    return 0
