"""A correction's text as the host's conditioning: everything but the text is that of a branch.

A safety direction is the difference between the predictions for a text and for a branch of the guider. It
contains the texts' difference alone only if both have the same ControlNet, inpainting image, sizes, guidance,
reference latents, hooks, areas, masks and timestep ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.hooks
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

Entry = dict[str, Any]
"""One conditioning as the guider holds it: options of the CONDITIONING, embedding and identifier."""

OF_THE_TEXT = (
    "cross_attn",
    "pooled_output",
    "attention_mask",
    "conditioning_",
    "t5xxl_",
    "text_input_ids",
    "num_layers_stacked",
    "grid",
    "deepstack",
    "visual_pos_masks",
    "minimax_token_tags",
    "unprocessed_ltxav_embeds",
)
"""Beginnings of the options that the host's text encoders make; a text never takes them from a branch."""
OF_THE_CONTROLNET = "cross_attn_controlnet"
"""Embedding for ControlNets alone, which belongs to the ControlNet and not to the text."""

RANGES = (("start_percent", "end_percent"), ("clip_start_percent", "clip_end_percent"))


def inherited(text: list[Any], branch: Sequence[Entry], name: str) -> list[Entry]:
    """Return the entries of a text, with what the text does not set taken from those of a branch.

    Args:
        text: CONDITIONING of the text.
        branch: the guider's entries of the branch that the text is compared with; may be empty.
        name: the host's name of the branch.

    Returns:
        An entry per entry of the branch and of the text, for the part of the schedule that both are for.
    """
    own = comfy.sampler_helpers.convert_cond(text)
    merged = [_merged(entry, of_text) for entry in branch or [{}] for of_text in own]
    entries = [entry for entry in merged if entry is not None]
    for entry in entries:
        entry.setdefault("prompt_type", name)
    return entries


def _merged(entry: Entry, text: Entry) -> Entry | None:
    """Return an entry with another text; None if the two are for different parts of the schedule."""
    kept = {key: value for key, value in entry.items() if not _is_of_the_text(key)}
    merged = {**kept, **text, "model_conds": {**entry.get("model_conds", {}), **text["model_conds"]}}
    for start, end in RANGES:
        if start in entry and start in text:
            merged[start], merged[end] = max(entry[start], text[start]), min(entry[end], text[end])
            if merged[start] >= merged[end]:
                return None
    merged["hooks"] = _joined(entry.get("hooks"), text.get("hooks"))
    if merged["hooks"] is None:
        del merged["hooks"]
    return merged


def _is_of_the_text(key: str) -> bool:
    return key.startswith(OF_THE_TEXT) and key != OF_THE_CONTROLNET


def _joined(
    of_branch: comfy.hooks.HookGroup | None, of_text: comfy.hooks.HookGroup | None
) -> comfy.hooks.HookGroup | None:
    """Return the hooks of both; the branch's own group if the text adds none, so the host may batch them."""
    if of_branch is not None and (of_text is None or of_text.is_subset_of(of_branch)):
        return of_branch
    joined: comfy.hooks.HookGroup | None = comfy.hooks.HookGroup.combine_all_hooks([of_branch, of_text])
    return joined


def register_hooks(guider: Any, entries: list[Entry]) -> None:
    """Register the hooks that only a text has, as the host registers those of its branches before a run.

    Hooks that cannot act in this run are removed from the entries, as the host does.
    """
    options, model = guider.model_options, guider.model_patcher
    registered = options.get("registered_hooks") or comfy.hooks.HookGroup()
    wanted = comfy.sampler_helpers.get_hooks_from_cond(entries, comfy.hooks.HookGroup())
    missing = [hook for hook in wanted.hooks if not registered.contains(hook)]
    # The host's dynamic loading knows no hooks. It is left when a branch has some, before the run starts.
    if missing and not model.is_dynamic():
        _register(model, options, registered, missing)
    comfy.samplers.filter_registered_hooks_on_conds({"text": entries}, options)


def _register(
    model: Any,
    options: dict[str, Any],
    registered: comfy.hooks.HookGroup,
    missing: list[comfy.hooks.Hook],
) -> None:
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    together = comfy.hooks.HookGroup()
    for hook in (*registered.hooks, *missing):
        together.add(hook)
    for hook in missing:
        if hook.hook_type in (
            comfy.hooks.EnumHookType.TransformerOptions,
            comfy.hooks.EnumHookType.AdditionalModels,
        ):
            hook.add_hook_patches(model, options, target, registered)
    # The host begins anew with every call, so the branches' hooks are registered once more.
    model.register_all_hook_patches(together, target, options, registered)
    if len(registered) > 0:
        options["registered_hooks"] = registered


def same_entries(a: Sequence[Entry], b: Sequence[Entry]) -> bool:
    """Return True if the host would predict the same: equal texts, and options that are equal."""
    return len(a) == len(b) and all(_same_entry(x, y) for x, y in zip(a, b))


def _same_entry(a: Entry, b: Entry) -> bool:
    keys = (a.keys() | b.keys()) - {"uuid", "prompt_type"}
    return all(_same_value(a.get(key), b.get(key)) for key in keys)


def _same_value(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _same_tensor(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_value(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same_value(x, y) for x, y in zip(a, b))
    return isinstance(a, str | int | float) and type(a) is type(b) and bool(a == b)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Return True for equal tensors, one of which may repeat the other's only row for every image."""
    if a.dtype != b.dtype or a.device != b.device or a.shape[1:] != b.shape[1:] or a.ndim != b.ndim:
        return False
    if a.ndim == 0 or len(a) == len(b):
        return torch.equal(a, b)
    return 1 in (len(a), len(b)) and bool((a == b).all())
