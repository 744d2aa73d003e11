"""Safe Denoiser in the real host: where it acts, where it must not, and what it says about bad input."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safe_denoiser_values import WHOLE_IMAGES

from demo_prompts import STAR
from safe_guidance.formats.negation_set import NegationSet, from_images

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

OTHERS = (
    "a red heart on the left on a grey striped background, dotted style",
    "a white cross at the bottom on a teal checkered background, outline style",
    "a green circle on the right on a brown plain background, hatched style",
)


def protect(host: Any, negation_set: NegationSet, vae: Any = None, **settings: Any) -> Any:
    """Apply Safe Denoiser's node to the demo model, with settings for whole images unless told otherwise."""
    from safe_guidance.nodes.safe_denoiser import SafeDenoiserNode

    defaults = {
        i.id: i.default
        for i in SafeDenoiserNode.define_schema().inputs
        if getattr(i, "default", None) is not None
    }
    return SafeDenoiserNode.execute(
        model=host.model,
        vae=vae or host.vae,
        negation_set=negation_set,
        **{**defaults, **WHOLE_IMAGES, **settings},
    ).args[0]


@pytest.fixture(scope="module")
def copies(host: Any) -> NegationSet:
    """Return a set whose only reference is the image that the model samples for STAR with seed 1."""
    with torch.inference_mode():
        image = host.vae.decode(host.sample(host.model, host.text(STAR)))
    return from_images(image.clone())


# The reference is the unguarded result, so late predictions resemble it almost perfectly and those of other
# prompts do not.
CLOSE = {"threshold": 1.6, "strength": 1.0, "end_sigma": 0.0}


def test_acts_on_what_resembles_the_set_and_only_on_that(host: Any, copies: NegationSet) -> None:
    text = host.text(STAR, *OTHERS)
    latent = host.empty_latent(4)
    baseline = host.sample(host.model, text, latent)
    protected = host.sample(protect(host, copies, **CLOSE), text, latent)
    assert [torch.equal(protected[i], baseline[i]) for i in range(4)] == [False, True, True, True]


def test_costs_no_model_call(host: Any, copies: NegationSet) -> None:
    plain, plain_rows = host.count_calls(host.model)
    protected, rows = host.count_calls(protect(host, copies, **CLOSE))
    host.sample(plain, host.text(STAR))
    host.sample(protected, host.text(STAR))
    assert rows == plain_rows


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 0.0},
        {"end_sigma": 100.0},
        {"start_sigma": 0.01, "end_sigma": 0.0},
        {"threshold": 2.0, "end_sigma": 0.0},
    ],
    ids=["strength 0", "window above the schedule", "window below the schedule", "closed gate"],
)
def test_identity_is_bit_exact(host: Any, copies: NegationSet, settings: dict[str, Any]) -> None:
    text = host.text(STAR)
    assert torch.equal(host.sample(protect(host, copies, **settings), text), host.sample(host.model, text))


def test_tempered_mode_acts_more_widely_than_exact(host: Any, copies: NegationSet) -> None:
    text = host.text(STAR, *OTHERS)
    baseline = host.sample(host.model, text)

    def change(mode: str) -> float:
        sampled = host.sample(protect(host, copies, mode=mode, end_sigma=0.0), text)
        return (sampled - baseline).abs().mean().item()

    assert change("tempered") > change("exact") > 0


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2s_ancestral", "uni_pc", "lcm", "dpmpp_2m_sde"])
def test_works_under_every_kind_of_sampler(host: Any, copies: NegationSet, sampler: str) -> None:
    text = host.text(STAR)
    eager = {**CLOSE, "threshold": 0.5}
    baseline = host.sample(host.model, text, sampler=sampler)
    protected = host.sample(protect(host, copies, **eager), text, sampler=sampler)
    assert torch.isfinite(protected).all()
    assert not torch.equal(protected, baseline)


def test_two_part_sampling_equals_one_run(host: Any, copies: NegationSet) -> None:
    """KSampler Advanced samples in two runs; the result equals that of one run."""
    model = protect(host, copies, **{**CLOSE, "threshold": 0.5})
    whole, joined = (host.sample_in_parts(model, host.text(STAR), bounds) for bounds in ((0, 6), (0, 3, 6)))
    # The latent passes the latent format and back between the parts.
    torch.testing.assert_close(joined, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bounds", [(0, 8, 12), (0, 3, 6, 9, 12)], ids=str)
def test_what_the_local_search_decided_holds_in_the_next_part(host: Any, bounds: tuple[int, ...]) -> None:
    """Below sigma 1 nothing new is decided. Without the decisions of the run before, the star would
    return.
    """
    from safe_guidance.formats.negation_set import load
    from safe_guidance.nodes.host.files.folders import ASSETS

    stars = load(ASSETS / "negation_sets" / "demo_star.safetensors")
    model, text = (
        protect(host, stars, strength=1.2, end_sigma=0.15, threshold=0.7, cap=2.0),
        host.text(STAR, OTHERS[0]),
    )
    whole, joined = host.sample_in_parts(model, text, (0, 12)), host.sample_in_parts(model, text, bounds)
    torch.testing.assert_close(joined, whole, atol=1e-3, rtol=1e-3)
    plain = host.sample_in_parts(host.model, text, bounds)
    assert not torch.equal(joined[0], plain[0]) and torch.equal(joined[1], plain[1])


def test_inpainting_looks_and_acts_inside_the_mask_only(host: Any, copies: NegationSet) -> None:
    """The kept part shows the reference itself. It neither triggers the gate nor changes."""
    unguarded = host.sample(host.model, host.text(STAR))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 24:] = 1
    latent = {"samples": unguarded, "noise_mask": mask}
    text = host.text(OTHERS[0])
    baseline = host.sample(host.model, text, latent, seed=9)
    protected = host.sample(protect(host, copies, **CLOSE), text, latent, seed=9)
    torch.testing.assert_close(protected[..., :24], unguarded[..., :24], atol=1e-5, rtol=1e-5)
    assert torch.equal(protected, baseline)


def test_img2img_below_the_window_is_untouched(host: Any, copies: NegationSet) -> None:
    latent = {"samples": host.sample(host.model, host.text(STAR))}
    text = host.text(STAR)
    settings = {**CLOSE, "end_sigma": 4.67}
    assert torch.equal(
        host.sample(protect(host, copies, **settings), text, latent, denoise=0.4),
        host.sample(host.model, text, latent, denoise=0.4),
    )
    assert not torch.equal(
        host.sample(protect(host, copies, **CLOSE), text, latent, denoise=0.4),
        host.sample(host.model, text, latent, denoise=0.4),
    )


def test_any_size(host: Any, copies: NegationSet) -> None:
    text = host.text(STAR)
    sampled = host.sample(
        protect(host, copies, **{**CLOSE, "threshold": 0.2}), text, host.empty_latent(width=168, height=104)
    )
    assert sampled.shape == (1, 4, 26, 42) and bool(torch.isfinite(sampled).all())


def test_the_sampler_node_equals_the_model_node(host: Any, copies: NegationSet) -> None:
    from safe_guidance.nodes.safe_denoiser import SafeDenoiserSamplerNode

    settings = {
        **CLOSE,
        "mode": "calibrated",
        "start_sigma": 1000.0,
        "temperature": 0.1,
        "cap": 0.5,
        "effective_dimensions": 256,
    }
    result = SafeDenoiserSamplerNode.execute(
        model=host.model,
        positive=host.text(STAR),
        negative=host.text(""),
        latent_image=host.empty_latent(),
        vae=host.vae,
        negation_set=copies,
        seed=1,
        steps=6,
        cfg=5.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
        denoise=1.0,
        **settings,
    )
    assert torch.equal(
        result.args[0]["samples"], host.sample(protect(host, copies, **settings), host.text(STAR))
    )


def test_references_are_encoded_once(host: Any, copies: NegationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    from safe_guidance.nodes.host.files import negation_latents

    fresh = from_images(torch.rand(3, 64, 96, 3))
    calls = []
    encode = host.vae.encode
    monkeypatch.setattr(host.vae, "encode", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    first = negation_latents.encode(fresh, host.vae, 32, 32)
    assert negation_latents.encode(fresh, host.vae, 32, 32) is first
    assert calls == [3]
    assert negation_latents.encode(fresh, host.vae, 16, 16).latents.shape == (3, 4, 16, 16)


def test_references_are_in_the_samplers_space(host: Any) -> None:
    """A reference equals what the host's own sampler sees of the encoded image, for every image format of
    the host.
    """
    import comfy.latent_formats as formats

    from safe_guidance.nodes.host.engine.frames import Frames
    from safe_guidance.nodes.host.files.negation_latents import references_for

    negation_set = from_images(torch.rand(2, 64, 64, 3))
    for name in ("SD15", "SDXL", "SDXL_Playground_2_5", "SC_Prior", "SD3", "Flux", "ChromaRadiance"):
        latent_format = getattr(formats, name)()
        raw = (
            torch.randn(2, latent_format.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
            .half()
            .float()
        )
        vae = SimpleNamespace(
            first_stage_model=torch.nn.Identity(),
            latent_dim=2,
            spacial_compression_encode=lambda: 8,
            encode=lambda pixels, raw=raw: raw,
        )
        model = SimpleNamespace(get_model_object=lambda _, latent_format=latent_format: latent_format)
        frames = Frames.of([(1, latent_format.latent_channels, 8, 8)])
        references = references_for(model, vae, negation_set, frames)
        # Half precision is what references are kept in.
        torch.testing.assert_close(
            references.read(slice(None)), latent_format.process_in(raw), atol=2e-3, rtol=2e-3, msg=name
        )


def test_the_wrong_vae_is_named(host: Any, copies: NegationSet) -> None:
    vae = SimpleNamespace(
        first_stage_model=torch.nn.Identity(),
        latent_dim=2,
        spacial_compression_encode=lambda: 8,
        encode=lambda pixels: torch.zeros(len(pixels), 16, 32, 32),
    )
    model = protect(host, copies, vae)
    with pytest.raises(ValueError, match="16 channels, the model samples 4. Connect the VAE"):
        host.sample(model, host.text(STAR))


def test_interrupting_the_encoding(host: Any) -> None:
    import comfy.model_management

    from safe_guidance.nodes.host.files import negation_latents

    fresh = from_images(torch.rand(5, 64, 64, 3))
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        negation_latents.encode(fresh, host.vae, 32, 32)
    comfy.model_management.interrupt_current_processing(False)
    assert len(negation_latents.encode(fresh, host.vae, 32, 32)) == 5


def test_statistics_of_the_set_are_kept_between_runs_of_one_size(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safe_guidance.guidance.safe_denoiser import whole_image

    calls = []
    measure = whole_image.reference_statistics
    monkeypatch.setattr(
        whole_image, "reference_statistics", lambda *inputs: calls.append(1) or measure(*inputs)
    )
    model = protect(host, from_images(torch.rand(4, 64, 64, 3)), end_sigma=0.0)
    first = host.sample(model, host.text(STAR), steps=2)
    assert torch.equal(host.sample(model, host.text(STAR), steps=2), first)
    assert len(calls) == 1
    host.sample(model, host.text(STAR), host.empty_latent(width=96, height=96), steps=2)
    assert len(calls) == 2


def test_masked_sets_are_looked_for_locally(host: Any) -> None:
    """The same set acts differently with and without masks, and finds a subject that has moved."""
    image = host.vae.decode(host.sample(host.model, host.text(STAR))).clone()
    mask = torch.zeros(1, 128, 128)
    mask[:, 28:100, 28:100] = 1
    moved = from_images(image.roll(24, 2), mask.roll(24, 2))
    settings = {"strength": 2.0, "end_sigma": 0.0, "threshold": 1.2, "temperature": 0.03, "cap": 2.0}
    text = host.text(STAR)
    baseline = host.sample(host.model, text)
    assert not torch.equal(host.sample(protect(host, moved, **settings), text), baseline)


def test_the_bundled_masked_set_takes_a_star_away_and_spares_other_shapes(host: Any) -> None:
    """The settings are those of the workflow. A judge that guides nothing decides on a batch of four
    images.
    """
    from safe_guidance.evaluation.judges.judge import judge
    from safe_guidance.evaluation.judges.network import load_judge
    from safe_guidance.formats.negation_set import load
    from safe_guidance.nodes.host.files.folders import ASSETS

    stars = load(ASSETS / "negation_sets" / "demo_star.safetensors")
    model = protect(host, stars, strength=1.2, end_sigma=0.15, threshold=0.7, cap=2.0)
    text = host.text(STAR, *OTHERS)
    for sampler in ("dpmpp_2m", "heun"):
        options = {"latent": host.empty_latent(4), "steps": 12, "sampler": sampler}
        baseline, protected = host.sample(host.model, text, **options), host.sample(model, text, **options)
        assert [torch.equal(protected[i], baseline[i]) for i in range(4)] == [False, True, True, True]
        before, after = (
            judge(host.vae.decode(latents[:1]).movedim(-1, 1).clamp(0, 1), load_judge())[0]
            for latents in (baseline, protected)
        )
        assert before.unsafe and not after.unsafe


def test_a_mask_says_where_to_look_and_act(host: Any, copies: NegationSet) -> None:
    text = host.text(STAR)
    baseline = host.sample(host.model, text)
    half = torch.zeros(1, 64, 64)
    half[:, :, 32:] = 1
    eager = {**CLOSE, "threshold": 0.02}
    changed = host.sample(protect(host, copies, mask=half, **eager), text, steps=1) - host.sample(
        host.model, text, steps=1
    )
    assert bool(changed[..., 16:].any()) and not bool(changed[..., :16].any())
    for nowhere in (torch.zeros(1, 64, 64), torch.zeros(16, 16), torch.full((1, 8, 8), torch.nan)):
        assert torch.equal(host.sample(protect(host, copies, mask=nowhere, **CLOSE), text), baseline)


def test_a_mask_per_sample(host: Any, copies: NegationSet) -> None:
    text = host.text(STAR, STAR)
    masks = torch.stack([torch.zeros(32, 32), torch.ones(32, 32)])
    baseline = host.sample(host.model, text)
    protected = host.sample(protect(host, copies, mask=masks, **{**CLOSE, "threshold": 0.02}), text)
    assert torch.equal(protected[0], baseline[0]) and not torch.equal(protected[1], baseline[1])


def test_windows_by_percent_and_by_name(host: Any, copies: NegationSet) -> None:
    """A window in percent acts at the steps that the host's conversion gives."""
    from safe_guidance.nodes.host.engine.windows import percent_window

    sampling = host.model.get_model_object("model_sampling")
    window = percent_window(host.model, 0.2, 0.6)
    assert window.high == pytest.approx(sampling.percent_to_sigma(0.2)) and window.low == pytest.approx(
        sampling.percent_to_sigma(0.6)
    )
    text, eager = host.text(STAR), {**CLOSE, "threshold": 0.2}
    by_percent = host.sample(
        protect(host, copies, **{**eager, "window": "percent", "start_percent": 0.2, "end_percent": 0.6}),
        text,
    )
    by_sigma = host.sample(
        protect(host, copies, **{**eager, "start_sigma": window.high, "end_sigma": window.low}), text
    )
    assert torch.equal(by_percent, by_sigma)
    assert not torch.equal(by_percent, host.sample(host.model, text))
    by_name = host.sample(
        protect(host, copies, **{**eager, "end_sigma": 12.0, "window": "SD 1.x paper (sigma 4.67)"}), text
    )
    assert torch.equal(by_name, host.sample(protect(host, copies, **{**eager, "end_sigma": 4.67}), text))
    with pytest.raises(ValueError, match="from 60% to 20% of the schedule. Make its start smaller"):
        protect(host, copies, window="percent", start_percent=0.6, end_percent=0.2)


def test_official_mode_acts_on_every_image(host: Any, copies: NegationSet) -> None:
    text = host.text(STAR, *OTHERS)
    latent = host.empty_latent(4)
    baseline = host.sample(host.model, text, latent)
    official = {"mode": "official", "strength": 0.33, "kappa": 0.37}
    protected = host.sample(protect(host, copies, **official), text, latent)
    assert all(not torch.equal(protected[i], baseline[i]) for i in range(4))
    assert torch.equal(
        host.sample(protect(host, copies, **{**official, "strength": 0.0}), text, latent), baseline
    )


def test_the_unconditional_prediction_as_anchor(host: Any, copies: NegationSet) -> None:
    """Without CFG it costs the one model call that the guider skips, and with CFG none."""
    text, eager = host.text(STAR), {**CLOSE, "threshold": 0.05, "anchor": "unconditional"}
    plain, plain_rows = host.count_calls(host.model)
    protected, rows = host.count_calls(protect(host, copies, **eager))
    guided = host.sample(protected, text)
    assert not torch.equal(guided, host.sample(plain, text)) and rows == plain_rows
    assert not torch.equal(
        guided, host.sample(protect(host, copies, **{**eager, "anchor": "prediction"}), text)
    )
    rows.clear()
    host.sample(protected, text, cfg=1.0)
    assert sum(rows) == 2 * 6


def test_two_sets_with_their_own_strengths(host: Any, copies: NegationSet) -> None:
    """Chained sets act together in any order. A set of strength 0 has no effect."""
    other = from_images(host.vae.decode(host.sample(host.model, host.text(OTHERS[0]))).clone())
    text = host.text(STAR, OTHERS[0], OTHERS[1])

    def chain(*sets: tuple[NegationSet, float]) -> torch.Tensor:
        from types import SimpleNamespace as Namespace

        model = host.model
        for negation_set, strength in sets:
            with_model = Namespace(model=model, vae=host.vae)
            model = protect(with_model, negation_set, **{**CLOSE, "strength": strength})
        return host.sample(model, text)

    baseline, first, second = host.sample(host.model, text), chain((copies, 1.0)), chain((other, 0.4))
    both = chain((copies, 1.0), (other, 0.4))
    assert torch.equal(both, chain((other, 0.4), (copies, 1.0)))
    assert (
        torch.equal(both[0], first[0])
        and torch.equal(both[1], second[1])
        and torch.equal(both[2], baseline[2])
    )
    assert torch.equal(chain((copies, 1.0), (other, 0.0)), first)


def test_letterboxed_and_augmented_sets_are_other_references(host: Any, copies: NegationSet) -> None:
    text, wide = host.text(STAR), host.empty_latent(width=192, height=96)
    settings = {**CLOSE, "threshold": 0.05}
    results = [
        host.sample(protect(host, copies, **settings, **layout), text, wide)
        for layout in (
            {},
            {"fit": "letterbox"},
            {"augmentation": "flip"},
            {"augmentation": "flip, crops and shifts"},
        )
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_references_that_do_not_fit_are_streamed(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without free memory the image is equal up to rounding, and no reference is placed on the device."""
    from safe_guidance.guidance.core.references import References
    from safe_guidance.nodes.host.files import negation_latents

    placed: list[int] = []
    usual = References.resident
    monkeypatch.setattr(
        References, "resident", lambda self, device: placed.append(len(self)) or usual(self, device)
    )
    images = from_images(
        host.vae.decode(host.sample(host.model, host.text(STAR, *OTHERS), host.empty_latent(4))).clone()
    )
    settings = {**CLOSE, "threshold": 0.0, "temperature": 0.005}
    resident = host.sample(protect(host, images, **settings), host.text(STAR))
    assert placed == [4]
    monkeypatch.setattr(negation_latents, "RESIDENT_SHARE", 0.0)
    streamed = host.sample(protect(host, images, **settings), host.text(STAR))
    assert placed == [4]
    assert not torch.equal(streamed, host.sample(host.model, host.text(STAR)))
    torch.testing.assert_close(streamed, resident, atol=0.05, rtol=0.05)


HATCHED = (
    "a red circle on the left on a brown plain background, hatched style",
    "a purple triangle in the center on a black plain background, hatched style",
)
PLAIN_STYLE = "a green circle on the right on a brown plain background, flat style"
STYLE = {"strength": 1.0, "start_sigma": 1.5, "end_sigma": 0.0, "threshold": 0.2, "cap": 2.0}


@pytest.fixture(scope="module")
def four_and_what_is_fine() -> NegationSet:
    """Return the sets of the workflow: four images in the style, and neutral ones with empty masks."""
    from safe_guidance.formats.negation_set import combined, load
    from safe_guidance.nodes.host.files.folders import ASSETS

    few, fine = (
        load(ASSETS / "negation_sets" / f"{name}.safetensors") for name in ("demo_hatched_few", "demo_fine")
    )
    assert len(few) == 4 and all(mask is None for mask in few.masks)
    assert all(mask is not None and not bool(mask.any()) for mask in fine.masks)
    return combined([few, fine])


def test_four_images_keep_a_style_away_and_shape_and_colour_stay(
    host: Any, four_and_what_is_fine: NegationSet
) -> None:
    """The settings are those of the workflow, and a judge that guides nothing decides.

    A flat image stays bit-identical.
    """
    from safe_guidance.evaluation.judges.judge import judge
    from safe_guidance.evaluation.judges.network import load_judge

    text = host.text(*HATCHED, PLAIN_STYLE)
    plain, plain_rows = host.count_calls(host.model)
    guarded, rows = host.count_calls(protect(host, four_and_what_is_fine, **STYLE))
    before, after = (host.sample(model, text, steps=20) for model in (plain, guarded))
    first, second = (
        judge(host.vae.decode(x).movedim(-1, 1).clamp(0, 1), load_judge()) for x in (before, after)
    )
    assert [v.style for v in first] == ["hatched", "hatched", "flat"]
    assert "hatched" not in [v.style for v in second]
    assert [(v.shapes, v.colors) for v in second] == [(v.shapes, v.colors) for v in first]
    assert torch.equal(after[2], before[2]) and rows == plain_rows


def test_a_style_costs_nothing_at_cfg_1_until_it_shows(host: Any, four_and_what_is_fine: NegationSet) -> None:
    """Without CFG there is no unconditional prediction. It is requested only for samples with the style."""
    plain, plain_rows = host.count_calls(host.model)
    guarded, rows = host.count_calls(protect(host, four_and_what_is_fine, **STYLE))
    text = host.text(HATCHED[0], PLAIN_STYLE)
    before, after = (host.sample(model, text, cfg=1.0, steps=10) for model in (plain, guarded))
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])
    extra = sum(rows) - sum(plain_rows)
    assert 0 < extra < sum(plain_rows) / 2


@pytest.mark.parametrize(
    "settings",
    [{"strength": 0.0}, {"threshold": 2.0}, {"start_sigma": 1e-4}],
    ids=["strength", "gate", "window"],
)
def test_a_style_off_is_bit_exact(
    host: Any, four_and_what_is_fine: NegationSet, settings: dict[str, Any]
) -> None:
    text = host.text(HATCHED[0])
    assert torch.equal(
        host.sample(protect(host, four_and_what_is_fine, **{**STYLE, **settings}), text),
        host.sample(host.model, text),
    )


def test_a_style_stays_found_in_the_next_part(host: Any, four_and_what_is_fine: NegationSet) -> None:
    model = protect(host, four_and_what_is_fine, **STYLE)
    whole, joined = (
        host.sample_in_parts(model, host.text(HATCHED[0]), bounds) for bounds in ((0, 12), (0, 9, 12))
    )
    torch.testing.assert_close(joined, whole, atol=1e-3, rtol=1e-3)


def test_a_set_of_nothing_but_fine_images_is_refused(host: Any) -> None:
    model = protect(host, from_images(torch.rand(2, 64, 64, 3), torch.zeros(2, 64, 64)))
    with pytest.raises(ValueError, match="Paint a mask on what is unwanted"):
        host.sample(model, host.text(STAR))


def test_window_names_that_saved_workflows_hold_are_still_options(host: Any) -> None:
    """The host rejects a saved workflow whose value is no longer an option."""
    from safe_guidance.nodes.shared_inputs import window_inputs

    names = [
        "sigma",
        "percent",
        "every step",
        "SD 1.x paper (sigma 4.67)",
        "SD3 published code (sigma 3.545)",
        "large pictures (sigma 9)",
    ]
    assert window_inputs()[0].options == names
