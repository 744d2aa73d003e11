"""A custom node pack for the evaluation alone: counts a sampling run's model calls and measures its time, without touching an image."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io

KEY = "safe_guidance_probe"
PROBE = io.Custom("SAFE_GUIDANCE_PROBE")


@dataclass
class Run:
    """What one sampling run did. `rows` counts the images of all calls' batches: guidance by two texts makes two of one."""

    calls: int = 0
    rows: int = 0
    seconds: float = 0.0


@dataclass
class Probe:
    """The wrappers of one probed model, and the latest run that ended."""

    last: Run = field(default_factory=Run)

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        run = Run()
        executor.class_obj.model_options["transformer_options"][KEY] = run
        start = time.perf_counter()
        result = executor(*args, **kwargs)
        comfy.model_management.synchronize()
        run.seconds = time.perf_counter() - start
        self.last = run
        return result

    @staticmethod
    def apply_model(
        executor: Any,
        x: Any,
        t: Any,
        c_concat: Any,
        c_crossattn: Any,
        control: Any,
        transformer_options: Any,
        **extra: Any,
    ) -> Any:
        run = transformer_options.get(KEY)
        if run is not None:
            run.calls += 1
            run.rows += x.shape[0]
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **extra)


class EvaluationProbe(io.ComfyNode):
    """Counts and times every run of the model that it returns."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EvaluationProbe",
            display_name="Evaluation Probe",
            category="safe guidance/evaluation",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output(), PROBE.Output()],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        probe, probed = Probe(), model.clone()
        probed.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, probe.outer_sample)
        probed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, probe.apply_model)
        return io.NodeOutput(probed, probe)


class EvaluationProbeResult(io.ComfyNode):
    """Reports the run that made the latent: JSON with calls, rows and seconds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EvaluationProbeResult",
            display_name="Evaluation Probe Result",
            category="safe guidance/evaluation",
            inputs=[io.Latent.Input("latent"), PROBE.Input("probe")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent: Any, probe: Probe) -> io.NodeOutput:
        run = probe.last
        return io.NodeOutput(
            ui={"probe": [json.dumps({"calls": run.calls, "rows": run.rows, "seconds": run.seconds})]}
        )


class Evaluation(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [EvaluationProbe, EvaluationProbeResult]


async def comfy_entrypoint() -> Evaluation:
    return Evaluation()
