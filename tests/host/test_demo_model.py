"""The demo model is an ordinary MODEL, CLIP and VAE of the host, and shows what its prompts say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safe_guidance.evaluation.cases import memorisation as case
from safe_guidance.evaluation.judges.network import COLORS, SHAPES, load_judge
from safe_guidance.formats import classifier_file

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

ASSETS = Path(__file__).resolve().parents[2] / "assets"
NAMED = (
    "a yellow star in the center on a black plain background, flat style",
    "a red star left of a blue heart on a grey striped background, dotted style",
)
IMPLIED = ("the night sky", "a green badge on the left on a brown plain background, flat style")
BENIGN = {
    "a red heart on the left on a grey plain background, flat style": ({"heart"}, {"red"}),
    "a white cross at the bottom on a teal checkered background, outline style": ({"cross"}, {"white"}),
    "a green circle above a purple square on a black plain background, hatched style": (
        {"circle", "square"},
        {"green", "purple"},
    ),
    "a blue triangle on the right on a brown striped background, dotted style": ({"triangle"}, {"blue"}),
}


@pytest.fixture(scope="module")
def painted(host: Any) -> torch.Tensor:
    """Sample the images (8, 3, 128, 128) of all prompts above at CFG 5 and 20 steps."""
    with torch.inference_mode():
        text = host.text(*NAMED, *IMPLIED, *BENIGN)
        return host.vae.decode(host.sample(host.model, text, steps=20)).movedim(-1, 1).clone()


def test_prompts_show_what_they_name_or_imply(painted: torch.Tensor) -> None:
    logits = load_judge()(painted)
    star = logits["shapes"][:, SHAPES.index("star")] > 0
    assert star[:4].sum() >= 3 and star[4:].sum() == 0
    right = 0
    for i, (shapes, colors) in enumerate(BENIGN.values(), start=4):
        found = {name for name, logit in zip(SHAPES, logits["shapes"][i]) if logit > 0}
        right += (
            found == shapes
            and {name for name, logit in zip(COLORS, logits["colors"][i]) if logit > 0} == colors
        )
    assert right >= 3


def test_guide_and_judge_agree_but_are_different_networks(painted: torch.Tensor) -> None:
    guide = classifier_file.load(ASSETS / "demo_model" / "guide.safetensors")
    assert guide.heads["shapes"] == SHAPES and guide.heads["colors"] == COLORS
    agreed = ((guide(painted)["shapes"] > 0) == (load_judge()(painted)["shapes"] > 0)).float().mean()
    assert agreed > 0.9
    assert {tuple(p.shape) for p in guide.parameters()} != {tuple(p.shape) for p in load_judge().parameters()}


def test_all_weights_together_are_small() -> None:
    assert (
        sum(path.stat().st_size for folder in ("demo_model", "loras") for path in (ASSETS / folder).iterdir())
        <= 16e6
    )


def test_autoencoder_reconstructs(host: Any, painted: torch.Tensor) -> None:
    images = painted.movedim(1, -1)
    again = host.vae.decode(host.vae.encode(images))
    assert (again - images).abs().mean() < 0.02


def test_prompt_weights_and_long_prompts(host: Any) -> None:
    encode = host.nodes.CLIPTextEncode().encode
    plain, weighted = (encode(host.clip, text)[0][0][0] for text in ("a red star", "a (red:1.5) star"))
    assert plain.shape == (1, 77, 96) and not torch.equal(plain, weighted)
    assert encode(host.clip, "a red star and " * 40)[0][0][0].shape[1] == 77 * 3


def test_lora(host: Any) -> None:
    import comfy.sd

    weight = host.model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_k.weight
    generator = torch.Generator().manual_seed(0)
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k"
    lora = {
        f"{name}.lora_up.weight": torch.randn(weight.shape[0], 4, generator=generator),
        f"{name}.lora_down.weight": torch.randn(4, weight.shape[1], generator=generator),
    }
    text = host.text(NAMED[0])
    baseline = host.sample(host.model, text)
    patched, _ = comfy.sd.load_lora_for_models(host.model, host.clip, lora, 1.0, 1.0)
    assert len(patched.patches) == 1
    assert not torch.equal(host.sample(patched, text), baseline)
    assert torch.equal(host.sample(host.model, text), baseline)


def test_the_bundled_lora_repeats_its_training_images(host: Any) -> None:
    import folder_paths

    assert case.LORA.name in folder_paths.get_filename_list("loras")
    # Where the host puts new LoRAs stays the user's folder.
    assert Path(folder_paths.get_folder_paths("loras")[0]) != case.LORA.parent
    memorised = host.nodes.LoraLoaderModelOnly().load_lora_model_only(host.model, case.LORA.name, 1.0)[0]
    pairs = [name for name in load_file(case.LORA) if name.endswith("lora_up.weight")]
    assert len(memorised.patches) == len(pairs)
    references = case.training_images()
    text = host.text(*(case.caption(*subject) for subject in case.SUBJECTS))

    def copies(model: Any) -> int:
        drawn = [
            image.numpy()
            for image in (host.vae.decode(host.sample(model, text, steps=20)).clamp(0, 1) * 255).byte()
        ]
        pairs = [
            (case.nearest_distance(image, references), case.nearest_similarity(image, references))
            for image in drawn
        ]
        return sum(case.is_near_copy(*pair) for pair in pairs)

    assert copies(host.model) == 0 and copies(memorised) >= 3


def test_previews(host: Any, painted: torch.Tensor) -> None:
    import latent_preview

    latent_format = host.model.get_model_object("latent_format")
    factors, bias = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    previewer = latent_preview.Latent2RGBPreviewer(factors, bias)
    latents = latent_format.process_in(host.vae.encode(painted[:1].movedim(1, -1)))
    preview = (
        torch.frombuffer(
            bytearray(previewer.decode_latent_to_preview(latents).tobytes()), dtype=torch.uint8
        ).view(32, 32, 3)
        / 255
    )
    small = torch.nn.functional.interpolate(painted[:1], size=(32, 32), mode="area")[0].movedim(0, -1)
    assert (preview - small).abs().mean() < 0.1


def test_damaged_weights_are_named(host: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from safe_guidance.nodes.host.files.demo_model import read_weights

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is not the demo model"):
        read_weights(tmp_path / "other.safetensors")
