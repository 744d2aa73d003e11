"""Two-pass sampling, for methods that must see the image before they change it.

Both passes start from the same noise and follow the same texts. In the first pass the two-pass corrections
only observe. The second pass keeps the predictions of the first one outside the region in which these
corrections act, so the rest of the image stays as it was.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.utils
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .run import Run

log = logging.getLogger(__name__)
Callback = Callable[[int, Any, Any, int], None]


class FirstPass:
    """Record of the first pass: its predictions, and the states and the region for the second pass."""

    def __init__(self) -> None:
        self._predictions: deque[tuple[float, Tensor]] = deque()
        self.region: Tensor | None = None
        """(B, 1, h, w) bool, where the second pass may differ; None during the first pass."""
        self.states: Mapping[int, Any] = {}
        """States of the two-pass corrections, by their index."""

    @property
    def is_finished(self) -> bool:
        """Return True in the second pass."""
        return self.region is not None

    def finish(self, region: Tensor, states: Mapping[int, Any]) -> None:
        """Begin the second pass, which may differ from the first one in `region` only."""
        self.region, self.states = region, states

    def apply(self, sigma: float, denoised: Tensor) -> Tensor:
        """Record a prediction in the first pass; replace it outside the region in the second pass."""
        if self.region is None:
            self._predictions.append((sigma, denoised))
            return denoised
        if self._predictions and self._predictions[0][0] == sigma:
            return torch.where(self.region, denoised, self._predictions.popleft()[1])
        if self._predictions:
            log.warning(
                "This sampler chooses its own steps, so the second pass cannot keep the rest of the image. "
                "Use another sampler."
            )
            self._predictions.clear()
        return denoised


@dataclass(frozen=True)
class FirstPassEnd:
    """End of a first pass that stopped before the noise was gone, from which a resumed first pass continues.

    Attributes:
        samples: (B, C, h, w) the latents of the first pass.
        region: (B, 1, h, w) bool, where the second pass may differ from them.
    """

    samples: Tensor
    region: Tensor


class HiddenPreview:
    """Replacement of the host's callback in the first pass: it shows progress but no preview."""

    def __init__(self, callback: Callback | None) -> None:
        self._callback = callback
        self._last: tuple[int, Any, Any, int] | None = None

    def __call__(self, step: int, x0: Any, x: Any, steps: int) -> None:
        comfy.utils.ProgressBar(steps).update_absolute(step + 1)
        self._last = (step, x0, x, steps)

    def reveal(self) -> None:
        """Pass the last step on to the host, because the first pass is the result."""
        if self._callback is not None and self._last is not None:
            self._callback(*self._last)


SamplePass = Callable[[Tensor, Callback | None, FirstPass | None], tuple["Run", Tensor]]
"""Function that samples one pass from a latent, and returns its run and the latents that came out."""


def sample_in_two_passes(
    sample: SamplePass,
    guider: Any,
    latent: Tensor,
    callback: Callback | None,
    previous: FirstPassEnd | None,
) -> tuple[Run, Tensor, FirstPassEnd | None]:
    """Sample the first pass, and the second one if any correction found something to change.

    Args:
        sample: samples one pass.
        guider: the host's guider, whose conditioning the second pass gets back as it was.
        latent: the latent that the run starts from.
        callback: the host's callback for previews.
        previous: the end of the previous first pass when the run is a resumed one.

    Returns:
        The run, its latents, and the end of the first pass, which is None when the first pass is the result.
    """
    conds = {name: [entry.copy() for entry in entries] for name, entries in guider.conds.items()}
    first_pass, preview = FirstPass(), HiddenPreview(callback)
    start = latent if previous is None else previous.samples
    device = guider.model_patcher.load_device
    # Samplers that draw from the global generators must draw the same numbers in both passes.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run, samples = sample(start, preview, first_pass)
    states, regions = run.end_first_pass()
    if previous is not None:
        regions.append(previous.region)
    if not regions:
        preview.reveal()
        return run, samples, None
    region = torch.stack(regions).any(0)
    first_pass.finish(region, states)
    guider.conds = conds
    first_pass_forwards, end = run.recorder.forwards, FirstPassEnd(samples, region)
    run, samples = sample(latent, callback, first_pass)
    run.recorder.first_pass_forwards = first_pass_forwards
    return run, samples, end
