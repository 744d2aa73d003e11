"""CLIP models of open_clip, from local weights files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....formats import clip_file, tensor_file
from ....guidance.safety_functions.clip import ClipModel
from .packages import need

HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation with which images of a small CLIP are normalised."""
TOLERANCE = 0.1
"""Largest difference between the numbers in a file and those of its architecture, as a share of the latter.

open_clip resizes position embeddings and drops buffers of older versions.
"""
TOP_KEYS = frozenset(
    "embed_dim vision_cfg text_cfg multimodal_cfg quick_gelu custom_text init_logit_bias".split()
)
VISION_KEYS = frozenset(
    """image_size layers width head_width mlp_ratio patch_size ls_init_value attentional_pool
    attn_pooler_heads attn_pooler_queries no_ln_pre final_ln_after_pool pool_type output_tokens
    act_kwargs norm_kwargs timm_model_name timm_model_pretrained timm_pool timm_proj timm_proj_bias
    timm_drop timm_drop_path""".split()
)
TEXT_KEYS = frozenset(
    """context_length vocab_size width heads layers mlp_ratio ls_init_value embed_cls pad_id eos_id
    no_causal_mask final_ln_after_pool pool_type proj_bias proj_type output_tokens act_kwargs
    norm_kwargs""".split()
)
"""Keys of open_clip's configurations that need nothing but open_clip and timm.

Text towers and tokenizers of Hugging Face are left out, because open_clip downloads them.
"""


def load(path: Path, model_name: str) -> ClipModel:
    """Load a CLIP model.

    Args:
        path: a small CLIP file, or the weights of one of open_clip's architectures, as safetensors.
        model_name: of that architecture; a small CLIP file needs none.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: the file is damaged or fits no architecture, or the architecture would be downloaded.
    """
    open_clip = need("open_clip", "clip")
    small = clip_file.load(path)
    return _large(path, model_name, open_clip) if small is None else _small(small, open_clip)


def _small(small: clip_file.SmallClip, open_clip: Any) -> ClipModel:
    """Build the model of a small CLIP file."""
    configuration = small.configuration
    vision = open_clip.CLIPVisionCfg(**configuration["vision"])
    text = open_clip.CLIPTextCfg(**configuration["text"])
    # Without memory, to know the names and sizes of the weights.
    with torch.device("meta"):
        planned = open_clip.CLIP(configuration["embed_dim"], vision, text).state_dict()
    # Versions of open_clip differ in whether this constant is among the weights.
    planned.pop("attn_mask", None)
    weights = small.weights({name: tuple(tensor.shape) for name, tensor in planned.items()})
    network = open_clip.CLIP(configuration["embed_dim"], vision, text)
    network.load_state_dict(weights, strict=False)
    tokenize = open_clip.SimpleTokenizer(context_length=configuration["text"]["context_length"])
    return ClipModel(_still(network), tokenize, configuration["vision"]["image_size"], HALF, HALF)


def _large(path: Path, model_name: str, open_clip: Any) -> ClipModel:
    """Build one of open_clip's architectures with the weights of a file."""
    configuration = offline_configuration(open_clip, model_name, path.name)
    with torch.device("meta"):
        planned = _network(open_clip, configuration).state_dict()
    expected = sum(tensor.numel() for tensor in planned.values())
    file = tensor_file.structure(path)
    found = sum(torch.Size(shape).numel() for shape in file.shapes.values())
    if abs(found - expected) > TOLERANCE * expected:
        raise ValueError(
            f"{path.name} has {found} weights, and the architecture '{model_name}' has {expected}. "
            "Write the name of the architecture that the file belongs to."
        )
    network = _network(open_clip, configuration)
    try:
        open_clip.load_checkpoint(network, str(path))
    except Exception as error:  # It has no common class of errors.
        raise ValueError(
            f"{path.name} does not fit the architecture '{model_name}'. "
            "Choose another file, or write the name of the architecture that it belongs to."
        ) from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in network.parameters()):
        raise file.error("it has weights that are not finite")
    size = network.visual.image_size
    tokenize = open_clip.SimpleTokenizer(context_length=configuration["text_cfg"].get("context_length", 77))
    return ClipModel(
        _still(network),
        tokenize,
        size if isinstance(size, int) else size[0],
        tuple(open_clip.OPENAI_DATASET_MEAN),
        tuple(open_clip.OPENAI_DATASET_STD),
    )


def offline_configuration(open_clip: Any, model_name: str, file_name: str) -> dict[str, Any]:
    """Return open_clip's configuration of an architecture.

    Raises:
        ValueError: there is none, or open_clip would download a part of the model or its tokenizer.
    """
    if model_name not in open_clip.list_models():
        raise ValueError(
            f"open_clip knows no model '{model_name}'. "
            f"Write the name of the model that {file_name} belongs to."
        )
    configuration: dict[str, Any] = open_clip.get_model_config(model_name)
    vision, text = configuration.get("vision_cfg", {}), configuration.get("text_cfg", {})
    known = configuration.keys() <= TOP_KEYS and vision.keys() <= VISION_KEYS and text.keys() <= TEXT_KEYS
    if not known or vision.get("timm_model_pretrained") or ":" in vision.get("timm_model_name", ""):
        raise ValueError(
            f"The architecture '{model_name}' has parts that open_clip downloads, and this pack downloads "
            "nothing. Use the file of another architecture, such as ViT-B-32 or RN50."
        )
    return configuration


def _network(open_clip: Any, configuration: dict[str, Any]) -> Any:
    """Build an architecture as open_clip does, without weights."""
    arguments = dict(configuration)
    own_text_tower = arguments.pop("custom_text", False)
    if not own_text_tower:
        kind = open_clip.CLIP
    else:
        kind = open_clip.CoCa if "multimodal_cfg" in arguments else open_clip.CustomTextCLIP
    return kind(**arguments)


def _still(network: nn.Module) -> nn.Module:
    return network.requires_grad_(False).eval()
