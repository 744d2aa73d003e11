"""Train a classifier on drawn scenes and measure its error: the guide, a second guide, or the judge.

Methods may use the guide. The second guide is for studies with several detectors. No method uses the judge.
They differ in architecture, images and seed. Half of the images pass through the autoencoder with noise on
their latents, so that a classifier has seen images with the errors of generated ones.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import common
import world

demo_networks = common.pack_module("demo.networks")
SEEDS = {"guide": 100, "second": 5100, "judge": 9100}
SECOND = {"widths": (16, 32, 32, 64, 64, 96), "size": 48}
GUIDES = {
    "guide": common.ASSETS / "demo_model" / "guide.safetensors",
    "second": common.ROOT / "evaluation" / "judges" / "second_guide.safetensors",
}
HELD_OUT_SEED = 200
LATENT_NOISE = 0.15
HEAD_WEIGHTS = {"shapes": 3.0, "colors": 2.0, "style": 1.0, "background": 0.5, "pattern": 0.5}


def draw(count: int, seed: int, autoencoder: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw images (count, 3, 128, 128) as bytes, with labels. Every second hundred passes the autoencoder."""
    scenes = world.sample_scenes(count, seed)
    images = []
    for start in range(0, count, 100):
        batch = world.render_batch(scenes[start : start + 100])
        if start // 100 % 2:
            with torch.autocast("cpu", torch.bfloat16):
                z = autoencoder.encode(batch * 2 - 1)
                strength = LATENT_NOISE / demo_networks.LATENT_SCALE * torch.rand(len(batch), 1, 1, 1)
                batch = (autoencoder.decode(z + strength * torch.randn_like(z)).float() + 1) / 2
        images.append((batch.clamp(0, 1) * 255).round().byte())
    per_scene = [world.labels(scene) for scene in scenes]
    return torch.cat(images), {
        name: torch.stack([labels[name] for labels in per_scene]) for name in per_scene[0]
    }


def augment(images: Tensor) -> Tensor:
    """Reduce contrast and add a tint and noise; sometimes reduce the resolution."""
    b = len(images)
    if torch.rand(()) < 0.3:
        side = int(torch.randint(40, 100, ()))
        small = F.interpolate(images, size=(side, side), mode="area")
        images = F.interpolate(small, size=images.shape[-2:], mode="bilinear")
    images = 0.5 + (images - 0.5) * (1 - 0.2 * torch.rand(b, 1, 1, 1)) + 0.04 * torch.randn(b, 3, 1, 1)
    return (images + 0.12 * torch.rand(b, 1, 1, 1) ** 2 * torch.randn_like(images)).clamp(0, 1)


def classification_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Sum binary cross-entropy of independent labels and cross-entropy of exclusive ones."""
    losses = [
        weight * F.binary_cross_entropy_with_logits(logits[name], labels[name])
        if labels[name].is_floating_point()
        else weight * F.cross_entropy(logits[name], labels[name])
        for name, weight in HEAD_WEIGHTS.items()
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def measure(classifier: nn.Module, images: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    """Measure error rates on held-out images by head, and misses and false alarms of the concept."""
    outputs = [classifier(part.float() / 255) for part in images.split(100)]
    logits = {name: torch.cat([o[name] for o in outputs]) for name in outputs[0]}
    error = {}
    for name, truth in labels.items():
        right = (
            ((logits[name] > 0) == (truth > 0.5)).all(1)
            if truth.is_floating_point()
            else logits[name].argmax(1) == truth
        )
        error[name] = 1 - right.float().mean().item()
    concept = world.SHAPES.index(world.CONCEPT)
    fires, present = logits["shapes"][:, concept] > 0, labels["shapes"][:, concept] > 0.5
    error["concept_missed"] = (~fires[present]).float().mean().item()
    error["concept_false_alarm"] = fires[~present].float().mean().item()
    return {name: round(value, 4) for name, value in error.items()}


def main() -> None:
    """Train a classifier, measure it and save it."""
    parser = common.argument_parser(__doc__, steps=1500, batch=64)
    parser.add_argument("which", choices=list(SEEDS))
    parser.add_argument("--scenes", type=int, default=12000)
    args = parser.parse_args()
    seed = SEEDS[args.which]
    torch.manual_seed(seed)
    autoencoder = demo_networks.Autoencoder().requires_grad_(False)
    autoencoder.load_state_dict(load_file(args.work / "autoencoder.safetensors"))
    images, labels = draw(args.scenes, seed, autoencoder)

    judge_network = common.pack_module("evaluation.judges.network")
    if args.which in GUIDES:
        options = SECOND if args.which == "second" else {}
        classifier = common.pack_module("guidance.safety_functions.classifier_network").ConvClassifier(
            judge_network.HEADS, **options
        )
    else:
        classifier = judge_network.Judge()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    progress = common.Progress(100, args.batch)
    for step, scale in enumerate(common.schedule(args.steps, warmup=50, stable=0.2)):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * scale
        chosen = torch.randint(0, len(images), (args.batch,))
        with torch.autocast(args.device, torch.bfloat16):
            logits = classifier(augment(images[chosen].float() / 255))
        loss = classification_loss(
            {k: v.float() for k, v in logits.items()}, {k: v[chosen] for k, v in labels.items()}
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.update(step, loss)

    error = measure(classifier.eval(), *draw(4000, HELD_OUT_SEED, autoencoder))
    common.log.info("error on 4000 held-out drawings: %s", json.dumps(error))
    if args.which in GUIDES:
        common.pack_module("formats.classifier_file").save(classifier, GUIDES[args.which])
    else:
        tensors = {name: tensor.half().contiguous() for name, tensor in classifier.state_dict().items()}
        save_file(tensors, common.ROOT / "evaluation" / "judges" / "judge.safetensors")
    (args.work / f"{args.which}_error.json").write_text(json.dumps(error, indent=1))


if __name__ == "__main__":
    main()
