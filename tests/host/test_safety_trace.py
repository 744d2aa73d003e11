"""The trace in the real host: its sums, the run that it belongs to, and that recording changes nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from demo_prompts import HEART, STAR
from safe_guidance.guidance.core.composition import Change
from safe_guidance.guidance.core.noise_level import SigmaWindow
from safe_guidance.guidance.safe_latent_diffusion import MAX, WEAK
from safe_guidance.reports.trace import Trace

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")


@pytest.fixture
def traces(host: Any) -> Any:
    from safe_guidance.nodes import safety_trace as node
    from safe_guidance.nodes.host.engine import hooks
    from safe_guidance.nodes.host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection

    class Push(hooks.Correction):
        name = "Push"

        def __init__(self, amount: float, gates: list[float], window: SigmaWindow) -> None:
            self.amount, self.gates, self.window = amount, torch.tensor(gates), window

        def is_active(self, level: Any) -> bool:
            return level in self.window

        def correct(self, step: Any, state: None) -> Change | None:
            delta = self.amount * step.denoised
            return Change(delta, self.gates > 0, cap=1.0, gate=self.gates, area=0.5 * self.gates)

    def push(
        model: Any, amount: float = 0.1, gates: tuple[float, ...] = (1.0,), window: SigmaWindow | None = None
    ) -> Any:
        return hooks.attach(model, Push(amount, list(gates), window or SigmaWindow()))

    def sld(model: Any, text: str = "star", settings: Any = MAX) -> Any:
        return hooks.attach(model, SafeLatentDiffusionCorrection(host.text(text), settings))

    return SimpleNamespace(push=push, sld=sld, of=hooks.trace_of, node=node)


def run(host: Any, traces: Any, model: Any, *prompts: str, **options: Any) -> tuple[Trace, list[int]]:
    counted, rows = host.count_calls(model)
    samples = host.sample(counted, host.text(*(prompts or (STAR,))), sampler="euler", **options)
    found = traces.of(counted, samples)
    assert found is not None
    return found, rows


def test_every_prediction_is_counted_for_someone(host: Any, traces: Any) -> None:
    model = traces.sld(traces.push(traces.sld(host.model, "star", WEAK), gates=(1.0, 1.0)), "a red heart")
    model = traces.sld(model, "star")
    trace, rows = run(host, traces, model, STAR, HEART, steps=5)
    assert trace.forwards + sum(record.forwards for record in trace.records) == sum(rows)
    assert trace.forwards == 2 * 2 * 5
    assert trace.methods == ("SLD", "Push", "SLD 2", "SLD 3")
    # The weak one asks for "star" late only, and first among those that ask: then the last one's costs
    # nothing.
    weak, last = (trace.of(method) for method in ("SLD", "SLD 3"))
    assert 0 < len(weak) < 5 and [r.forwards for r in weak] == [2] * len(weak)
    assert [r.forwards for r in last] == [2] * (5 - len(weak)) + [0] * len(weak)
    assert [r.forwards for r in trace.of("SLD 2")] == [2] * 5
    assert len(trace.sigmas) == 5 and [r.call for r in trace.of("Push")] == list(range(5))


def test_the_values_are_those_of_the_changes(host: Any, traces: Any) -> None:
    trace, _ = run(host, traces, traces.push(host.model, 0.25, (0.0, 0.5)), STAR, HEART, steps=2)
    for record in trace.records:
        assert record.gate == record.weight == (0.0, 0.5) and record.area == (0.0, 0.25)
        assert record.change[0] == 0 and record.change[1] == pytest.approx(0.25, rel=1e-4)
        assert record.acted and record.milliseconds > 0


def test_outside_its_window_a_method_has_no_record(host: Any, traces: Any) -> None:
    trace, _ = run(host, traces, traces.push(host.model, window=SigmaWindow(high=5.0, low=1.0)), steps=6)
    inside = [i for i, sigma in enumerate(trace.sigmas) if 1.0 <= sigma <= 5.0]
    assert 0 < len(inside) < 6 and [record.call for record in trace.records] == inside


def test_multi_stage_solvers_have_a_record_per_call(host: Any, traces: Any) -> None:
    model = traces.push(host.model)
    samples = host.sample(model, host.text(STAR), sampler="heun", steps=3)
    assert len(traces.of(model, samples).sigmas) == len(traces.of(model, samples).records) == 5


def test_a_trace_belongs_to_its_latent_and_its_model(host: Any, traces: Any) -> None:
    weak, strong = traces.push(host.model, 0.05), traces.push(host.model, 0.2)
    first, second = host.sample(weak, host.text(STAR)), host.sample(weak, host.text(HEART), steps=4)
    assert len(traces.of(weak, first).sigmas) == 6 and len(traces.of(weak, second).sigmas) == 4
    assert traces.of(weak, first.clone()) == traces.of(weak, first.half())
    assert traces.of(strong, first) is None and traces.of(host.model, first) is None
    assert traces.of(weak, first + 1) is None
    # Another correction on top makes another model: the latent of the model below is foreign to it.
    assert traces.of(traces.push(weak), first) is None
    with pytest.raises(ValueError, match="did not sample this LATENT"):
        traces.node.traced(strong, {"samples": first}, None)


def test_the_custom_samplers_output_has_its_trace(host: Any, traces: Any) -> None:
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_Basic, Noise_RandomNoise, SamplerCustomAdvanced

    model = traces.push(host.model)
    guider = Guider_Basic(model)
    guider.set_conds(host.text(STAR))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    args = (Noise_RandomNoise(1), guider, comfy.samplers.sampler_object("euler"), sigmas, host.empty_latent())
    output, _ = SamplerCustomAdvanced.execute(*args).args
    assert len(traces.of(model, output["samples"]).records) == 3


def test_only_the_last_runs_are_kept(host: Any, traces: Any) -> None:
    from safe_guidance.nodes.host.engine.traces import KEPT

    model = traces.push(host.model)
    first = host.sample(model, host.text(STAR), steps=1)
    for seed in range(KEPT):
        host.sample(model, host.text(STAR), steps=1, seed=seed + 100)
    assert traces.of(model, first) is None


def test_an_interrupted_run_leaves_no_trace(host: Any, traces: Any) -> None:
    from safe_guidance.nodes.host.engine import hooks

    class Fails(hooks.Correction):
        def is_active(self, level: Any) -> bool:
            return True

        def correct(self, step: Any, state: None) -> None:
            raise RuntimeError("in the middle")

    model = hooks.attach(host.model, Fails())
    with pytest.raises(RuntimeError, match="in the middle"):
        host.sample(model, host.text(STAR), steps=2)
    assert not model.model_options[hooks.TRACES]._kept


def test_the_node(host: Any, traces: Any) -> None:
    model = traces.sld(host.model)
    latent = {"samples": host.sample(model, host.text(STAR))}
    image, told, text, trace = traces.node.SafetyTraceNode.execute("light", model, latent).args
    assert image.shape[-1] == 3 and "SLD acted at 6 of 6" in told
    assert Trace.from_dict(json.loads(text)) == trace
    assert traces.node.SafetyTraceNode.execute("dark", trace=trace).args[3] is trace
    with pytest.raises(ValueError, match="no trace to show"):
        traces.node.SafetyTraceNode.execute("dark", model)


def test_the_sampler_node_gives_its_trace(host: Any, traces: Any) -> None:
    from safe_guidance.formats.negation_set import from_images
    from safe_guidance.nodes.safe_denoiser import SafeDenoiserSamplerNode

    node = SafeDenoiserSamplerNode
    defaults = {
        i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None
    }
    chosen = {**defaults, "steps": 4, "sampler_name": "euler", "scheduler": "karras", "cfg": 5.0}
    negation_set = from_images(torch.rand(4, 128, 128, 3, generator=torch.Generator().manual_seed(1)))
    latent, trace = node.execute(
        host.model,
        host.text(STAR),
        host.text(""),
        host.empty_latent(),
        host.vae,
        negation_set,
        **{**chosen, "strength": 1.0, "end_sigma": 4.67, "threshold": 0.4, "temperature": 0.1},
    ).args
    assert len(trace.sigmas) == 4 and 0 < len(trace.records) < 4


def test_the_saved_image_carries_the_trace(host: Any, traces: Any) -> None:
    import folder_paths

    trace = Trace(("SLD",), (1.0,), 2, ())
    shown = traces.node.SaveImageWithTraceNode.execute(
        torch.rand(1, 16, 16, 3), trace, "traced/image"
    ).ui.as_dict()["images"][0]
    with Image.open(
        f"{folder_paths.get_output_directory()}/{shown['subfolder']}/{shown['filename']}"
    ) as image:
        assert Trace.from_dict(json.loads(image.text["safety_trace"])) == trace
