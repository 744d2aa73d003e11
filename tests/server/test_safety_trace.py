"""Traces through the server: with the host's caches in between, and in the file that is saved."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from safe_guidance.evaluation import graphs, workflow_conversion
from safe_guidance.evaluation.server import ComfyServer
from safe_guidance.evaluation.server_errors import PromptFailed, PromptRejected
from safe_guidance.reports.trace import Trace

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "demo_safety_trace.json"
STEPS = 6
LOAD = "SafeGuidanceLoadSafetyTrace"


@pytest.fixture(scope="module")
def prompt(server: ComfyServer) -> graphs.Prompt:
    shipped = workflow_conversion.to_prompt(
        workflow_conversion.load_workflow(WORKFLOW), server.get_json("/object_info")
    )
    return graphs.set_inputs(shipped, "KSampler", steps=STEPS)


def shown(server: ComfyServer, prompt: graphs.Prompt) -> str:
    """Return the text that the Safety Trace node shows; empty when the host took it from its cache."""
    (node,) = graphs.find(prompt, "SafeGuidanceSafetyTrace")
    outputs: dict[str, Any] = server.run(prompt)["outputs"]
    return str(outputs.get(node, {}).get("text", [""])[0])


def test_the_trace_is_that_of_the_latent_whatever_the_host_has_cached(
    server: ComfyServer, prompt: graphs.Prompt
) -> None:
    first = shown(server, prompt)
    assert "SLD acted at" in first
    # Only the theme changes: the sampler's latent comes from the cache, and its trace is found.
    assert shown(server, graphs.set_inputs(prompt, "SafeGuidanceSafetyTrace", theme="light")) == first
    # Fewer steps: another latent, another trace.
    fewer = shown(server, graphs.set_inputs(prompt, "KSampler", steps=STEPS - 2))
    assert f"of {STEPS - 2} model calls" in fewer and f"of {STEPS} model calls" in first
    # Other guidance: the sampler runs anew, and so does the trace.
    stronger = shown(server, graphs.set_inputs(prompt, "SafeGuidanceSafeLatentDiffusion", preset="max"))
    assert stronger.splitlines()[0] != first.splitlines()[0] and f"of {STEPS} model calls" in stronger


def test_the_saved_file_carries_trace_and_workflow(server: ComfyServer, prompt: graphs.Prompt) -> None:
    (saved,) = graphs.find(prompt, "SafeGuidanceSaveImageWithTrace")
    prompt = graphs.set_inputs(prompt, "KSampler", seed=99)
    outputs = server.run(prompt)["outputs"]
    (file,) = server.images({"outputs": {saved: outputs[saved]}})
    with Image.open(io.BytesIO(file)) as image:
        texts = image.text
    trace = Trace.from_dict(json.loads(texts["safety_trace"]))
    assert set(trace.methods) == {"SLD", "Safe Denoiser"} and len(trace.sigmas) == STEPS
    assert json.loads(texts["prompt"]).keys() == prompt.keys()


def test_a_saved_file_is_loaded_again(server: ComfyServer, prompt: graphs.Prompt) -> None:
    (saved,) = graphs.find(prompt, "SafeGuidanceSaveImageWithTrace")
    (drawn,) = graphs.find(prompt, "SafeGuidanceSafetyTrace")
    prompt = graphs.set_inputs(prompt, "KSampler", seed=98)
    outputs = server.run(prompt)["outputs"]
    (file,) = server.images({"outputs": {saved: outputs[saved]}})
    folder = Path(server.base) / "input" / "runs"
    folder.mkdir(exist_ok=True)
    (folder / "saved.png").write_bytes(file)
    loading: graphs.Prompt = {
        "1": {
            "class_type": LOAD,
            "inputs": {"file": "runs/saved.png", "theme": "dark"},
            "_meta": {"title": LOAD},
        }
    }
    assert server.run(loading)["outputs"]["1"]["text"] == outputs[drawn]["text"]
    (folder / "saved.png").write_bytes(file[:100])
    with pytest.raises(PromptFailed, match=r"saved\.png"):
        server.run(loading)
    with pytest.raises(PromptRejected):
        server.run(graphs.set_inputs(loading, LOAD, file="../saved.png"))
