"""Origins of token maps: the positive conditionings of the guider in one model call of a transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..engine.correction import COND
from ..engine.run import Run
from .placement import PLACES, Places


@dataclass(frozen=True)
class Origin:
    """Origin of token maps: a conditioning in one model call.

    Attributes:
        uuid: the host's identifier of the conditioning.
        places: where the rows of the model call lie in the step's latents.
        evaluation: number of the evaluation of the positive branch.
        latent_size: (height, width) of the evaluated latents.
    """

    uuid: Any
    places: Places
    evaluation: int
    latent_size: tuple[int, int]

    def of(self, values: Tensor) -> Tensor:
        """Return the rows (R, ...) of the conditioning out of those of the model call."""
        return values[self.places.rows[self.uuid].to(values.device)]


def positive_origins(run: Run, x: Tensor, options: dict[str, Any]) -> tuple[Origin, ...]:
    """Return the guider's positive conditionings in a model call.

    Args:
        run: the run in progress.
        x: (N, C, [T,] h, w) the latents of the call.
        options: the host's transformer options, with the `Places` of the call.
    """
    own, places = run.own_call, options.get(PLACES)
    if own is None or places is None or COND not in own.conds:
        return ()
    size = (x.shape[-2], x.shape[-1])
    uuids = [entry["uuid"] for entry in own.conds[COND] if entry["uuid"] in places.rows]
    return tuple(Origin(uuid, places, own.number, size) for uuid in dict.fromkeys(uuids))
