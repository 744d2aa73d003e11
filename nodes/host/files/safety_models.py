"""Detectors for safety functions, from files in models/safety or from the packages that ship them.

Large packages are imported when they are first used.
"""

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
from torch import Tensor, nn

from ....formats import classifier_file, clip_file
from ....guidance.safety_functions.clip import ClipModel
from .safety_files import safety_path

NUDENET_FILE = "320n.onnx"
KEPT_MODELS = 4
"""Models of each kind that stay in memory."""


def need(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: its name.
        extra: the extra of this pack that installs it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"The package '{module}' is not installed. Install the pack's extra '{extra}' "
            f"(pip install .[{extra}] in its folder, with ComfyUI's Python), then restart ComfyUI."
        ) from error


def nudenet_file() -> Path:
    """Find the detector's file in the installed `nudenet` package.

    The package is not imported, because it needs OpenCV and onnxruntime.

    Raises:
        FileNotFoundError: the package is not installed, or it has no such file.
    """
    found = importlib.util.find_spec("nudenet")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        path = Path(folder) / NUDENET_FILE
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"NudeNet's detector {NUDENET_FILE} is not installed. Install the pack's extra 'nudenet' "
        "(pip install .[nudenet] in its folder), or put the file into models/safety and choose it. "
        "Its authors publish it under the AGPL."
    )


@lru_cache(maxsize=KEPT_MODELS)
def _onnx(path: Path, _changed: float) -> nn.Module:
    """Convert an ONNX file; the second argument makes a changed file a new entry of the cache."""
    onnx2torch = need("onnx2torch", "nudenet")
    onnx = need("onnx", "nudenet")
    # Gradients cannot flow through weights that were made under inference mode.
    with torch.inference_mode(False):
        try:
            network: nn.Module = onnx2torch.convert(onnx.load(str(path)))
        except Exception as error:  # The parser and the converter have no common class of errors.
            raise ValueError(
                f"{path.name} cannot be converted to torch ({error}). Choose another detector."
            ) from error
    return network.requires_grad_(False).eval()


def onnx_network(path: Path) -> nn.Module:
    """Load an ONNX file as a torch module.

    Raises:
        ImportError: onnx2torch is not installed.
        ValueError: the file is damaged, or has operations that onnx2torch does not know.
    """
    return _onnx(path, path.stat().st_mtime)


def nudenet_network(name: str | None) -> nn.Module:
    """Load NudeNet's detector: the package's with None, else a file of models/safety by its name."""
    return onnx_network(nudenet_file() if name is None else safety_path(name))


class OnnxClassifier(nn.Module):
    """An ONNX classifier with the interface of `ConvClassifier` and one head, named "classes".

    Args:
        network: images (B, 3, height, width) to (B, classes).
        classes: their names.
        size: (height, width) of the network's input.
        probabilities: the network returns probabilities instead of logits.
    """

    def __init__(
        self, network: nn.Module, classes: tuple[str, ...], size: tuple[int, int], probabilities: bool
    ) -> None:
        super().__init__()
        self.network, self.size, self.probabilities = network, size, probabilities
        self.heads = {"classes": classes}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (B, classes) of images (B, 3, H, W) in [0, 1]."""
        resized = F.interpolate(images, self.size, mode="bilinear", antialias=True, align_corners=False)
        output = self.network(resized)
        return {"classes": torch.logit(output, eps=1e-6) if self.probabilities else output}


def _onnx_classifier(path: Path) -> OnnxClassifier:
    """Load an ONNX classifier; a last Sigmoid or Softmax layer means that it returns probabilities."""
    model = need("onnx", "nudenet").load(str(path))
    shape = [dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim]
    count = model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    names = next((p.value for p in model.metadata_props if p.key == "classes"), None)
    classes = tuple(json.loads(names)) if names else tuple(str(i) for i in range(count))
    if len(shape) != 4 or shape[1] != 3 or not count or len(classes) != count:
        raise ValueError(
            f"{path.name} is not an image classifier. "
            "Choose a file with an input (B, 3, H, W) and an output (B, classes)."
        )
    size = (shape[2] or 224, shape[3] or 224)
    returns_probabilities = model.graph.node[-1].op_type in ("Sigmoid", "Softmax")
    return OnnxClassifier(onnx_network(path), classes, size, returns_probabilities)


@lru_cache(maxsize=KEPT_MODELS)
def _classifier(path: Path, _changed: float) -> Any:
    """Load a classifier; the second argument makes a changed file a new entry of the cache."""
    with torch.inference_mode(False):
        return _onnx_classifier(path).eval() if path.suffix == ".onnx" else classifier_file.load(path)


def classifier(name: str) -> Any:
    """Load an image classifier by its name from `safety_names`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a classifier.
    """
    path = safety_path(name)
    return _classifier(path, path.stat().st_mtime)


@lru_cache(maxsize=KEPT_MODELS)
def _clip(path: Path, _changed: float, model_name: str) -> ClipModel:
    """Load a CLIP model; the second argument makes a changed file a new entry of the cache."""
    open_clip = need("open_clip", "clip")
    with torch.inference_mode(False):
        small = clip_file.load(path) if path.suffix == ".safetensors" else None
        if small is not None:
            return _small_clip(small, open_clip)
        if model_name not in open_clip.list_models():
            raise ValueError(
                f"open_clip knows no model '{model_name}'. "
                f"Write the name of the model that {path.name} belongs to."
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


def _small_clip(small: clip_file.SmallClip, open_clip: Any) -> ClipModel:
    """Build the model of a small CLIP file. Tokens that the file does not store get a zero embedding."""
    configuration = small.configuration
    vision = open_clip.CLIPVisionCfg(**configuration["vision"])
    text = open_clip.CLIPTextCfg(**configuration["text"])
    network = open_clip.CLIP(configuration["embed_dim"], vision, text)
    table = torch.zeros_like(network.token_embedding.weight)
    table[small.vocabulary] = small.token_embeddings
    network.load_state_dict({**small.weights, "token_embedding.weight": table}, strict=False)
    tokenize = open_clip.SimpleTokenizer(context_length=configuration["text"]["context_length"])
    size = configuration["vision"]["image_size"]
    half = (0.5, 0.5, 0.5)
    return ClipModel(network.requires_grad_(False).eval(), tokenize, size, half, half)


def clip_model(name: str, model_name: str) -> ClipModel:
    """Load a CLIP model from a weights file.

    Args:
        name: of the file, from `safety_names`.
        model_name: of its architecture in open_clip; a small CLIP file needs none.

    Raises:
        ImportError: open_clip is not installed.
        FileNotFoundError: there is no such file.
        ValueError: open_clip does not know the architecture.
    """
    path = safety_path(name)
    return _clip(path, path.stat().st_mtime, model_name)
