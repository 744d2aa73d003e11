"""SAFREE's latent re-attention in the real UNet: identity when off, and the formula of the skip features."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from demo_prompts import HEART, STAR
from safe_guidance.guidance.safree import reattention

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")


def patched(
    host: Any, unfiltered: list[Any], deep: float = 0.9, shallow: float = 0.2, model: Any = None
) -> Any:
    from safe_guidance.nodes.safree import SafreeReattentionNode

    return SafreeReattentionNode.execute(model or host.model, unfiltered, deep, shallow).args[0]


def test_off_or_nothing_filtered_is_the_identity_without_a_third_branch(host: Any) -> None:
    baseline = host.sample(host.model, host.text(STAR), steps=3)
    for model in (patched(host, host.text(HEART), 1.0, 1.0), patched(host, host.text(STAR))):
        counted, rows = host.count_calls(model)
        assert torch.equal(host.sample(counted, host.text(STAR), steps=3), baseline) and rows == [2] * 3


def test_on_it_changes_the_filtered_steps_only(host: Any) -> None:
    from safe_guidance.nodes.host.engine.hooks import trace_of
    from safe_guidance.nodes.host.methods.safree import switched

    plain, filtered = host.text(STAR), host.text(HEART)
    counted, rows = host.count_calls(patched(host, plain))
    samples = host.sample(
        counted, switched(filtered, plain, 5), host.empty_latent(), steps=6, sampler="euler"
    )
    early = rows.count(1)
    assert 0 < early < 6 and rows == [1, 2] * early + [2] * (6 - early)
    trace = trace_of(counted, samples)
    assert trace.forwards + sum(record.forwards for record in trace.records) == sum(rows)
    assert [record.acted for record in trace.records] == [True] * early + [False] * (6 - early)


def test_skip_features_are_those_of_the_mathematics(host: Any) -> None:
    """Hooks around the patch see that the skip features of the positive rows become `reattention` of
    both inputs.
    """
    seen: list[tuple[str, Tensor, tuple[int, ...]]] = []

    def watch(stage: str) -> Any:
        def patch(hidden: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
            if options["block"] == ("output", 0):
                seen.append((stage, skip.clone(), tuple(options["cond_or_uncond"])))
            return hidden, skip

        return patch

    before = host.model.clone()
    before.set_model_output_block_patch(watch("before"))
    model = patched(host, host.text(STAR), model=before)
    model.set_model_output_block_patch(watch("after"))
    host.sample(model, host.text(HEART), steps=1)
    (_, original, _), _, (_, both, order), (_, after, _) = seen
    row = order.index(0)
    torch.testing.assert_close(after[row : row + 1], reattention(both[row : row + 1], original, 0.9))
    assert torch.equal(after[1 - row], both[1 - row]) and not torch.equal(after[row], both[row])


def test_models_without_a_unet_raise_an_error(host: Any, tiny: ModuleType) -> None:
    with pytest.raises(ValueError, match="decoder of a UNet"):
        patched(host, tiny.tiny_conditioning(0), model=tiny.tiny_model("sd3"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_unet(host: Any, tiny: ModuleType, family: str) -> None:
    model = tiny.tiny_model(family)
    latent = {"samples": torch.zeros(2, 4, 8, 8)}

    def sampled(of: Any) -> Tensor:
        conds = tiny.tiny_conditioning(0), tiny.tiny_conditioning(9)
        return host.nodes.common_ksampler(of, 1, 2, 3.0, "euler", "normal", *conds, latent)[0]["samples"]

    changed = sampled(patched(host, tiny.tiny_conditioning(5), model=model))
    assert torch.isfinite(changed).all() and not torch.equal(changed, sampled(model))


@pytest.mark.parametrize("name", ["ControlNet", "regions", "timestep range"])
def test_the_unfiltered_prompt_inherits_what_the_prompt_carries(
    host: Any, tiny: ModuleType, name: str
) -> None:
    """With nothing filtered, nothing is evaluated, whatever is on the positive conditioning."""
    import conditionings

    model, decorate = tiny.tiny_model("sd1"), conditionings.DECORATIONS[name][1]
    positive, negative = decorate(tiny.tiny_conditioning(0)), tiny.tiny_conditioning(9)
    latent = {"samples": torch.zeros(1, 4, 8, 8)}

    def sampled(of: Any) -> tuple[Tensor, list[int]]:
        counted, rows = host.count_calls(of)
        conds = positive, negative, latent
        return host.nodes.common_ksampler(counted, 1, 2, 3.0, "euler", "normal", *conds)[0]["samples"], rows

    baseline, plain_rows = sampled(model)
    same, rows = sampled(patched(host, tiny.tiny_conditioning(0), model=model))
    assert torch.equal(same, baseline) and rows == plain_rows
    changed, more = sampled(patched(host, tiny.tiny_conditioning(5), model=model))
    assert torch.isfinite(changed).all() and not torch.equal(changed, baseline) and sum(more) > sum(rows)
