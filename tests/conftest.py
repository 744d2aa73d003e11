"""Fixtures: the pack under its own name, and the host in this process and as a server."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _load_pack() -> None:
    # The root is itself the package, and its folder `nodes` bears the name of a module of the host: it must
    # not be on sys.path.
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]
    spec = importlib.util.spec_from_file_location(
        "safe_guidance", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["safe_guidance"] = module
    spec.loader.exec_module(module)


_load_pack()


def _watch_network() -> Path:
    """Watch the network calls of this process and of all that it starts, and return the folder of records."""
    records = Path(tempfile.mkdtemp(prefix="safe-guidance-network-"))
    atexit.register(shutil.rmtree, records, ignore_errors=True)
    folder = ROOT / "tests" / "shared" / "network_watch"
    os.environ["SAFE_GUIDANCE_NETWORK_RECORDS"] = str(records)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    # The module watches the process that imports it.
    spec = importlib.util.spec_from_file_location("network_watch", folder / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return records


_RECORDS = _watch_network()


@pytest.fixture(scope="session", autouse=True)
def nothing_is_downloaded() -> Iterator[None]:
    """Fail the run if a process of it has reached another machine, even if nobody saw the refusal."""
    yield
    reached = [text for path in sorted(_RECORDS.iterdir()) if (text := path.read_text(encoding="utf-8"))]
    if reached:
        pytest.fail("The tests reached other machines:\n" + "\n".join(reached), pytrace=False)


HOST_VARIABLE = "SAFE_GUIDANCE_HOST"


def _host_path() -> str:
    path = os.environ.get(HOST_VARIABLE)
    if not path:
        pytest.skip(f"{HOST_VARIABLE} does not name a ComfyUI. Run the tests with 'python3 dev.py test'.")
    return path


class Host:
    """The real ComfyUI in this process, with the demo model loaded."""

    def __init__(self) -> None:
        import nodes
        from safe_guidance.nodes.host.files.demo_model import load_demo_model
        from safe_guidance.nodes.host.files.folders import register_model_folders

        register_model_folders()
        self.nodes = nodes
        self.model, self.clip, self.vae = load_demo_model()

    def text(self, *prompts: str) -> list[Any]:
        """Return a conditioning with a row per prompt."""
        encoded = [self.nodes.CLIPTextEncode().encode(self.clip, prompt)[0] for prompt in prompts]
        return [[torch.cat([e[0][0] for e in encoded]), {}]]

    def empty_latent(self, batch: int = 1, width: int = 128, height: int = 128) -> dict[str, Any]:
        return self.nodes.EmptyLatentImage().generate(width, height, batch)[0]

    def sample(
        self,
        model: Any,
        positive: list[Any],
        latent: dict[str, Any] | None = None,
        seed: int = 1,
        steps: int = 6,
        cfg: float = 5.0,
        sampler: str = "dpmpp_2m",
        scheduler: str = "karras",
        **options: Any,
    ) -> torch.Tensor:
        """Return the latents that the host's KSampler samples."""
        latent = latent or self.empty_latent(len(positive[0][0]))
        result = self.nodes.common_ksampler(
            model, seed, steps, cfg, sampler, scheduler, positive, self.text(""), latent, **options
        )
        return result[0]["samples"]

    def sample_in_parts(
        self,
        model: Any,
        positive: list[Any],
        bounds: Sequence[int],
        seed: int = 1,
        cfg: float = 5.0,
        sampler: str = "euler",
    ) -> torch.Tensor:
        """Sample with one KSampler Advanced after another, from each of `bounds` to the next."""
        latent = self.empty_latent(len(positive[0][0]))
        for start, end in zip(bounds[:-1], bounds[1:]):
            noise, left = "enable" if start == 0 else "disable", "disable" if end == bounds[-1] else "enable"
            inputs = (
                model,
                noise,
                seed,
                bounds[-1],
                cfg,
                sampler,
                "karras",
                positive,
                self.text(""),
                latent,
                start,
                end,
                left,
            )
            latent = self.nodes.KSamplerAdvanced().sample(*inputs)[0]
        samples: torch.Tensor = latent["samples"]
        return samples

    def count_calls(self, model: Any) -> tuple[Any, list[int]]:
        """Return a clone of the model, and a list to which every model call adds its number of rows."""
        from comfy.patcher_extension import WrappersMP

        rows: list[int] = []

        def apply_model(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            rows.append(len(x))
            return executor(x, *args, **kwargs)

        counted = model.clone()
        counted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test_count", apply_model)
        return counted, rows


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """ComfyUI imported into this process, on the CPU, with an empty base directory."""
    from safe_guidance.evaluation.host import import_host

    import_host(tmp_path_factory.mktemp("comfyui"), _host_path())
    return Host()


@pytest.fixture
def as_the_server_runs_prompts() -> Iterator[None]:
    """Run tests in inference mode; modules ask for it with `pytest.mark.usefixtures`."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def tiny(host: Host) -> ModuleType:
    """Return the module of small models of every family, made of the host's own classes."""
    import tiny_models

    return tiny_models


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """A running ComfyUI server with this pack and the evaluation's probe."""
    from safe_guidance.evaluation.server import ComfyServer

    with ComfyServer(host=_host_path(), device="cpu", packs=[ROOT / "evaluation" / "probe"]) as running:
        yield running


@pytest.fixture
def shown(host: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Record the node messages by node id, with the host's own server class that records instead of
    sending.
    """
    import server

    found: dict[str, str] = {}
    instance = SimpleNamespace(send_progress_text=lambda text, node: found.__setitem__(node, text))
    monkeypatch.setattr(server.PromptServer, "instance", instance, raising=False)
    return found
