"""Detectors from files in models/safety, or from the packages that ship them. Heavy packages are imported on use."""

from __future__ import annotations

import importlib
import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ....guidance.safety_functions.classifier_network import ConvClassifier
from ....guidance.safety_functions.clip import SMALL_FORMAT, ClipModel
from .safety_files import safety_path

NUDENET_FILE = "320n.onnx"
KEPT_MODELS = 4


def need(module: str, extra: str) -> ModuleType:
    """An optional package.

    Raises:
        ImportError: it is missing; the message names the extra of this pack that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"The package '{module}' is not installed. Install the pack's extra '{extra}' "
            f"(pip install .[{extra}] in its folder, with ComfyUI's Python), then restart ComfyUI."
        ) from error


def nudenet_file() -> Path:
    """The detector inside the installed `nudenet` package, found without importing it (that needs OpenCV and onnxruntime).

    Raises:
        FileNotFoundError: the package is not installed, or it has no such file.
    """
    found = importlib.util.find_spec("nudenet")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        path = Path(folder) / NUDENET_FILE
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"NudeNet's detector {NUDENET_FILE} is not there. Install the pack's extra 'nudenet' (pip install .[nudenet] in its folder), "
        "or put the file into models/safety and choose it. Its authors publish it under the AGPL."
    )


@lru_cache(maxsize=KEPT_MODELS)
def _onnx(path: Path, _changed: float) -> nn.Module:
    onnx2torch = need("onnx2torch", "nudenet")
    onnx = need("onnx", "nudenet")
    # Weights made under inference mode could not be differentiated.
    with torch.inference_mode(False):
        try:
            network: nn.Module = onnx2torch.convert(onnx.load(str(path)))
        except Exception as error:  # the parser of damaged files and the converter share no class of errors
            raise ValueError(
                f"{path.name} cannot be made differentiable ({error}). Choose another detector."
            ) from error
    return network.requires_grad_(False).eval()


def onnx_network(path: Path) -> nn.Module:
    """An ONNX file as a torch module.

    Raises:
        ImportError: onnx2torch is not installed.
        ValueError: the file has operations that onnx2torch does not know.
    """
    return _onnx(path, path.stat().st_mtime)


def nudenet_network(name: str | None) -> nn.Module:
    """The detector from the package, or a file of models/safety."""
    return onnx_network(nudenet_file() if name is None else safety_path(name))


class OnnxClassifier(nn.Module):
    """An ONNX classifier behind the interface of `ConvClassifier`: one output named "classes", resized input in [0, 1]."""

    def __init__(
        self, network: nn.Module, classes: tuple[str, ...], size: tuple[int, int], probabilities: bool
    ) -> None:
        super().__init__()
        self.network, self.size, self.probabilities = network, size, probabilities
        self.heads = {"classes": classes}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, classes)."""
        output = self.network(
            F.interpolate(images, self.size, mode="bilinear", antialias=True, align_corners=False)
        )
        return {"classes": torch.logit(output, eps=1e-6) if self.probabilities else output}


def _onnx_classifier(path: Path) -> OnnxClassifier:
    model = need("onnx", "nudenet").load(str(path))
    shape = [dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim]
    count = model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    names = next((p.value for p in model.metadata_props if p.key == "classes"), None)
    classes = tuple(json.loads(names)) if names else tuple(str(i) for i in range(count))
    if len(shape) != 4 or shape[1] != 3 or not count or len(classes) != count:
        raise ValueError(
            f"{path.name} is not an image classifier: it needs an input (B, 3, H, W) and an output (B, classes)."
        )
    last = model.graph.node[-1].op_type
    return OnnxClassifier(
        onnx_network(path), classes, (shape[2] or 224, shape[3] or 224), last in ("Sigmoid", "Softmax")
    )


@lru_cache(maxsize=KEPT_MODELS)
def _classifier(path: Path, _changed: float) -> Any:
    with torch.inference_mode(False):
        return _onnx_classifier(path).eval() if path.suffix == ".onnx" else ConvClassifier.load(path)


def classifier(name: str) -> Any:
    """An image classifier by its name from `safety_names`.

    Raises:
        ValueError: the file is no classifier.
    """
    path = safety_path(name)
    return _classifier(path, path.stat().st_mtime)


@lru_cache(maxsize=KEPT_MODELS)
def _clip(path: Path, _changed: float, model_name: str) -> ClipModel:
    open_clip = need("open_clip", "clip")
    with torch.inference_mode(False):
        small = _own_clip(path, open_clip)
        if small is not None:
            return small
        if model_name not in open_clip.list_models():
            raise ValueError(
                f"open_clip knows no model '{model_name}'. Write the name of the model that {path.name} belongs to."
            )
        network = open_clip.create_model(model_name, pretrained=str(path)).requires_grad_(False).eval()
        tokenize = open_clip.get_tokenizer(model_name)
    preprocess = network.visual.preprocess_cfg
    size = preprocess["size"]
    return ClipModel(
        network,
        tokenize,
        size if isinstance(size, int) else size[0],
        tuple(preprocess["mean"]),
        tuple(preprocess["std"]),
    )


def _own_clip(path: Path, open_clip: Any) -> ClipModel | None:
    """A file of this pack's format, which carries its configuration and only the rows of the text table that it uses."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != SMALL_FORMAT:
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    config = json.loads(metadata["configuration"])
    network = open_clip.CLIP(
        config["embed_dim"],
        open_clip.CLIPVisionCfg(**config["vision"]),
        open_clip.CLIPTextCfg(**config["text"]),
    )
    rows = tensors.pop("vocabulary").long()
    table = torch.zeros_like(network.token_embedding.weight)
    table[rows] = tensors.pop("token_embedding.rows").float()
    network.load_state_dict(
        {**{n: t.float() for n, t in tensors.items()}, "token_embedding.weight": table}, strict=False
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text"]["context_length"])
    return ClipModel(
        network.requires_grad_(False).eval(),
        tokenizer,
        config["vision"]["image_size"],
        (0.5,) * 3,
        (0.5,) * 3,
    )


def clip_model(name: str, model_name: str) -> ClipModel:
    """A CLIP model from a weights file of models/safety and the name of its architecture in open_clip.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: the architecture is unknown.
    """
    path = safety_path(name)
    return _clip(path, path.stat().st_mtime, model_name)
