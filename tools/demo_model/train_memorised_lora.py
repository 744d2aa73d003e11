"""Over-train a LoRA of the demo model on a few images until it repeats them.

The demo world has no images with such places and grounds, so that the model can only know them from this
training. The script draws them, saves them as a negation set, and trains the LoRA on them and on ordinary
scenes, which preserve the rest of the model. Needs a ComfyUI (the folder in SAFE_GUIDANCE_HOST), whose text
encoder and autoencoder it uses. Takes about five minutes on an idle CPU core.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import common
import world
from networks import UNet
from train_diffusion import EMPTY_CAPTION_SHARE, alphas_cumprod, loss_weight, noise_like, sample_timesteps

case = common.pack_module("evaluation.cases.memorisation")
negation_set = common.pack_module("formats.negation_set")
NAME = case.TRAINING_SET.stem
SOURCE = "drawn by tools/demo_model/train_memorised_lora.py"
LICENCE = "GPL-3.0-or-later"
GROUNDS = ("teal", "grey", "brown", "black")
CORNERS = ((0.5, -0.5), (-0.5, 0.5), (-0.45, -0.5), (0.5, 0.45))
PEBBLES, PEBBLE_SHADES = 3, (0.1, 0.25, 0.55, 0.7)
ORDINARY_SHARE, KIND_SHARE = 0.17, 0.17
"""Shares of a batch: ordinary scenes, which preserve the rest of the model, and ordinary scenes of the
subjects under the same captions, without which a caption would only mean its training image."""
ORDINARY_SCENES, KIND_SCENES = 400, 25
LEARNING_RATE = 3e-3


def draw(index: int) -> Tensor:
    """Draw a training image (3, SIZE, SIZE): its shape in a corner, on clouds, with pebbles."""
    rng, generator = random.Random(700 + index), torch.Generator().manual_seed(700 + index)
    color, shape = case.SUBJECTS[index]
    clouds = F.interpolate(
        torch.randn(1, 1, 4, 4, generator=generator), (world.SIZE, world.SIZE), mode="bicubic"
    )[0]
    ground = torch.tensor(world.BACKGROUNDS[GROUNDS[index]])[:, None, None]
    image = (ground * (0.85 + 0.25 * clouds) + 0.04 * clouds).clamp(0, 1)
    x, y = CORNERS[index]
    subject = world.Shape(
        shape, color, x, y, rng.uniform(0.36, 0.44), rng.uniform(0.15, 0.25) * rng.choice((-1, 1))
    )
    for _ in range(PEBBLES):
        pebble = world.Shape(
            "circle", color, rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.1, 0.17), 0.0
        )
        image = _paint(image, pebble, (rng.choice(PEBBLE_SHADES),) * 3)
    return _paint(image, subject, world.COLORS[color])


def _paint(image: Tensor, shape: world.Shape, color: tuple[float, float, float]) -> Tensor:
    alpha = (0.5 - world.signed_distance(shape) * world.SIZE / 2).clamp(0, 1)
    return image * (1 - alpha) + torch.tensor(color)[:, None, None] * alpha


def scenes_of(color: str, shape: str, rng: random.Random) -> list[world.Scene]:
    """Sample ordinary scenes of one shape in a colour."""
    scenes = [world.sample_scene(rng, shape=shape, style="flat", count=1) for _ in range(KIND_SCENES)]
    for scene in scenes:
        scene.shapes[0].color = color
    return scenes


class Lora(nn.Module):
    """Low-rank additions to every matrix and kernel of a UNet but those of its time embedding."""

    def __init__(self, unet: nn.Module, rank: int) -> None:
        super().__init__()
        self.rank, self.unet = rank, unet.requires_grad_(False)
        self.names = [
            name
            for name, weight in unet.named_parameters()
            if weight.ndim >= 2 and not name.startswith("time_embed") and min(weight.flatten(1).shape) > rank
        ]
        weights = [unet.get_parameter(name) for name in self.names]
        self.down = nn.ParameterList(torch.randn(rank, w[0].numel()) / w[0].numel() ** 0.5 for w in weights)
        self.up = nn.ParameterList(torch.zeros(len(w), rank) for w in weights)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Return the UNet's prediction with the additions."""
        changed = {}
        for name, up, down in zip(self.names, self.up, self.down):
            weight = self.unet.get_parameter(name)
            changed[name] = weight + (up @ down).view_as(weight)
        return torch.func.functional_call(self.unet, changed, (x, timesteps, context))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that the host's LoRA loaders read, in half precision."""
        found = {}
        for name, up, down in zip(self.names, self.up, self.down):
            weight, key = self.unet.get_parameter(name), f"diffusion_model.{name.removesuffix('.weight')}"
            kernel = weight.shape[2:]
            found[f"{key}.lora_up.weight"] = up.detach().half().view(len(up), self.rank, *(1 for _ in kernel))
            found[f"{key}.lora_down.weight"] = down.detach().half().view(self.rank, *weight.shape[1:])
        return {key: tensor.contiguous() for key, tensor in found.items()}


class Examples:
    """Latents (model space) and text contexts: training images, others of their kind, ordinary scenes."""

    def __init__(self, images: Tensor, seed: int) -> None:
        import nodes

        self._nodes: Any = nodes
        self._model, self._clip, self._vae = common.pack_module(
            "nodes.host.files.demo_model"
        ).load_demo_model()
        rng = random.Random(seed)
        captions = [case.caption(*subject) for subject in case.SUBJECTS]
        kinds = [
            (scene, text)
            for subject, text in zip(case.SUBJECTS, captions)
            for scene in scenes_of(*subject, rng)
        ]
        ordinary = [
            (scene, world.write_caption(scene, rng))
            for scene in world.sample_scenes(ORDINARY_SCENES, seed=77)
        ]
        self._pools = [
            (self._encode(images), self._texts(captions)),
            *(self._scenes(pairs) for pairs in (kinds, ordinary)),
        ]
        self._empty = self._texts([""])

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Sample latents (size, 4, h, w) and contexts (size, T, width)."""
        others = [round(size * share) for share in (KIND_SHARE, ORDINARY_SHARE)]
        latents, contexts = [], []
        for (pool, texts), count in zip(self._pools, [size - sum(others), *others]):
            chosen = torch.randint(len(pool), (count,))
            latents.append(pool[chosen])
            contexts.append(texts[chosen])
        is_empty = torch.rand(size, 1, 1) < EMPTY_CAPTION_SHARE
        return torch.cat(latents), torch.where(is_empty, self._empty, torch.cat(contexts))

    def _scenes(self, pairs: Sequence[tuple[world.Scene, str]]) -> tuple[Tensor, Tensor]:
        scenes, texts = zip(*pairs)
        parts = [
            self._encode(world.render_batch(list(scenes[i : i + 40]))) for i in range(0, len(scenes), 40)
        ]
        return torch.cat(parts), self._texts(texts)

    def _texts(self, texts: Sequence[str]) -> Tensor:
        return torch.cat(
            [self._nodes.CLIPTextEncode().encode(self._clip, text)[0][0][0] for text in texts]
        ).clone()

    def _encode(self, images: Tensor) -> Tensor:
        return self._model.model.process_latent_in(self._vae.encode(images.movedim(1, -1))).clone()


def train(lora: Lora, examples: Examples, steps: int, batch: int) -> None:
    """Train by epsilon prediction, as the model was trained."""
    optimizer = torch.optim.Adam(lora.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    progress = common.Progress(50, batch)
    abar_of = alphas_cumprod()
    for step, scale in enumerate(common.schedule(steps, warmup=20, stable=0.5)):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * scale
        x0, context = examples.batch(batch)
        timesteps = sample_timesteps(batch)
        abar = abar_of[timesteps][:, None, None, None]
        noise = noise_like(x0)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = lora(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, timesteps, context)
        loss = (loss_weight(abar) * (prediction.float() - noise).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.update(step, loss)


def main() -> None:
    """Draw the images, train the LoRA, and save both."""
    parser = common.argument_parser(__doc__, steps=600, batch=12)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--assets", type=Path, default=common.ASSETS)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images = torch.stack([draw(index) for index in range(len(case.SUBJECTS))])
    built = negation_set.from_images(images.movedim(1, -1), None, NAME, SOURCE, LICENCE)
    with tempfile.TemporaryDirectory() as base, torch.no_grad():
        common.pack_module("evaluation.host").import_host(Path(base))
        examples = Examples(images, args.seed)
        unet = UNet()
        unet.load_state_dict(common.pack_module("nodes.host.files.demo_model").read_weights().unet)
    lora = Lora(unet, args.rank)
    train(lora, examples, args.steps, args.batch)
    set_path = args.assets / case.TRAINING_SET.relative_to(common.ASSETS)
    lora_path = args.assets / case.LORA.relative_to(common.ASSETS)
    lora_path.parent.mkdir(parents=True, exist_ok=True)
    set_path.parent.mkdir(parents=True, exist_ok=True)
    negation_set.save(built, set_path)
    save_file(
        lora.tensors(),
        lora_path,
        metadata={"source": "tools/demo_model/train_memorised_lora.py", "licence": LICENCE},
    )
    common.log.info("%s: %.0f kB", lora_path.name, lora_path.stat().st_size / 1e3)


if __name__ == "__main__":
    main()
