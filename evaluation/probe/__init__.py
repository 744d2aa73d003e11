"""Node pack of the evaluation: counts a run's model calls and times it without changing the image."""

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
    """Cost of one sampling run.

    `rows` sums the batch sizes of all calls: CFG makes two rows of one image.
    """

    calls: int = 0
    rows: int = 0
    seconds: float = 0.0


@dataclass
class Probe:
    """Wrappers of one probed model, and its latest run that ended."""

    last: Run = field(default_factory=Run)

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Measure a run and keep its figures."""
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
        """Count a call of the model."""
        run = transformer_options.get(KEY)
        if run is not None:
            run.calls += 1
            run.rows += x.shape[0]
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **extra)


class EvaluationProbe(io.ComfyNode):
    """Node that counts and times every run of the model that it returns."""

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
    """Node that reports the run that made the latent: JSON with calls, rows and seconds."""

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
    """The pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [EvaluationProbe, EvaluationProbeResult]


async def comfy_entrypoint() -> Evaluation:
    return Evaluation()
