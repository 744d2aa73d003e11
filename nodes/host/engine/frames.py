"""Images and video frames in the sampler's latents: the one place that knows where they are.

Methods see images (F, C, h, w). Image models sample them as they are, or with a frame dimension of length 1
(Qwen-Image, Krea 2, Anima). In a video every latent frame is an image of its own. Models of video with audio
sample both as one row of numbers, of which the video is the first part; the rest is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_FRAMES = 65
"""Longest still video that is tried to find a VAE's second latent frame."""


@dataclass(frozen=True)
class Frames:
    """Position of the images in a run's latents.

    Attributes:
        shapes: of the latents that the run samples together; the first holds the images. (B, C, h, w) or
            (B, C, T, h, w).
    """

    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(latent_shapes: Sequence[Sequence[int]]) -> Frames:
        """Return the frames of latents with these shapes.

        Raises:
            ValueError: the first latent has no images: the model samples audio or a solid.
        """
        shapes = tuple(tuple(shape) for shape in latent_shapes)
        if len(shapes[0]) not in (4, 5):
            raise ValueError(
                f"Safe Guidance works on images and videos, and this model samples latents of shape "
                f"{shapes[0]}. Remove its nodes from this MODEL."
            )
        return Frames(shapes)

    @property
    def count(self) -> int:
        """Return the number of latent frames T of every sample; 1 for images."""
        return self.shapes[0][2] if len(self.shapes[0]) == 5 else 1

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Return the shape (B * T, C, h, w) of all images."""
        batch, channels, *_, height, width = self.shapes[0]
        return batch * self.count, channels, height, width

    def images(self, latent: Tensor) -> Tensor:
        """Return the images of sampler latents: (S, ...) of any number of samples to (S * T, C, h, w).

        Also for masks, which may have one channel.
        """
        if len(self.shapes) > 1:
            size = math.prod(self.shapes[0][1:])
            latent = latent[..., :size].reshape(len(latent), *self.shapes[0][1:])  # (S, C, T, h, w)
        if latent.ndim == 5:
            latent = latent.movedim(2, 1).flatten(0, 1)  # (S * T, C, h, w)
        return latent

    def with_images(self, latent: Tensor, images: Tensor) -> Tensor:
        """Return sampler latents (S, ...) with other images (S * T, C, h, w); the rest keeps its bits."""
        if len(self.shapes[0]) == 5:
            # Samplers and the network get latents in the usual order of memory.
            images = (
                images.unflatten(0, (len(latent), self.count)).movedim(1, 2).contiguous()
            )  # (S, C, T, h, w)
        if len(self.shapes) == 1:
            return images
        packed = images.reshape(len(latent), 1, -1)
        return torch.cat([packed, latent[..., packed.shape[-1] :]], -1)

    def of_samples(self, values: Tensor) -> Tensor:
        """Repeat a value of every sample for its frames: (S, ...) to (S * T, ...)."""
        return values if self.count == 1 else values.repeat_interleave(self.count, 0)

    def samples(self, rows: Tensor) -> Tensor:
        """Return the samples with at least one frame in `rows`: (S * T,) bool to (S,) bool."""
        return rows if self.count == 1 else rows.view(-1, self.count).any(1)


def images_in(latent_format: Any, latents: Tensor) -> Tensor:
    """Convert images (N, C, h, w) from VAE space to the space of the sampler."""
    if latent_format.latent_dimensions == 2:
        return latent_format.process_in(latents)  # type: ignore[no-any-return]
    return latent_format.process_in(latents[:, :, None])[:, :, 0]  # type: ignore[no-any-return]


def images_out(latent_format: Any, latents: Tensor) -> Tensor:
    """Convert images (N, C, h, w) from the space of the sampler to VAE space."""
    if latent_format.latent_dimensions == 2:
        return latent_format.process_out(latents)  # type: ignore[no-any-return]
    return latent_format.process_out(latents[:, :, None])[:, :, 0]  # type: ignore[no-any-return]


def image_latents(images: Tensor, vae: Any) -> Tensor:
    """Encode images (n, H, W, 3) in [0, 1], each by itself, to latents (n, C, h, w) in VAE space.

    Raises:
        ValueError: the VAE encodes no images.
    """
    if vae.latent_dim == 2:
        latents = vae.encode(images)
    else:  # VAEs of videos take a batch of images for the frames of one video
        latents = torch.cat([vae.encode(image[None]) for image in images])
    if latents.ndim == 5 and latents.shape[2] == 1:
        latents = latents[:, :, 0]
    if latents.ndim != 4:
        raise ValueError(
            f"The VAE makes latents of shape {tuple(latents.shape)} from an image, not one latent image. "
            "Connect the VAE that belongs to the model."
        )
    return latents  # type: ignore[no-any-return]


def standing_latents(images: Tensor, vae: Any) -> Tensor:
    """Encode images (n, H, W, 3) as they are in a video after its first frame: (n, C, h, w) in VAE space.

    Each image is repeated to the shortest video with two latent frames, of which the second is returned. A
    VAE of images, with which some video models work, has one latent for both.
    """
    if vae.latent_dim == 2:
        return image_latents(images, vae)
    length = next(n for n in range(2, MOST_FRAMES) if vae.downscale_ratio[0](n) >= 2)
    videos = [vae.encode(image.expand(length, -1, -1, -1)) for image in images]  # (1, C, T, h, w) each
    return torch.cat([video[:, :, 1] for video in videos])
