"""The differentiable NudeNet against the package's own detector, on photographs and on noise."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_guidance.guidance.safety_functions import nudenet

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

skimage_data = pytest.importorskip("skimage.data")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


@pytest.fixture(scope="module")
def detectors(host: Any) -> Any:
    """Return the torch network, and the package's own detector in onnxruntime."""
    from nudenet import NudeDetector

    from safe_guidance.nodes.host.files.safety_models import nudenet_network

    return nudenet_network(None), NudeDetector()


def photograph(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.ascontiguousarray(getattr(skimage_data, name)()[..., :3])


def as_tensor(image: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    return torch.from_numpy(image).movedim(-1, 0)[None].float() / 255


def theirs(detector: Any, blob: Tensor) -> Tensor:
    return torch.from_numpy(detector.onnx_session.run(None, {detector.input_name: blob.numpy()})[0])


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_raw_output_equals_onnxruntime_on_photographs(detectors: Any, name: str) -> None:
    network, detector = detectors
    blob = nudenet.squared(as_tensor(photograph(name)), 320)
    ours, expected = network(blob), theirs(detector, blob)
    # Box coordinates are pixels, up to 320; confidences are in [0, 1].
    torch.testing.assert_close(ours[:, :4], expected[:, :4], atol=2e-3, rtol=0)
    torch.testing.assert_close(ours[:, 4:], expected[:, 4:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [320, 640])
def test_raw_output_equals_onnxruntime_on_noise(detectors: Any, size: int) -> None:
    network, detector = detectors
    noise = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    ours, expected = network(noise), theirs(detector, noise)
    torch.testing.assert_close(ours[:, :4], expected[:, :4], atol=2e-3 * size / 320, rtol=0)
    torch.testing.assert_close(ours[:, 4:], expected[:, 4:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("colors", ["red first", "blue first"])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_boxes_equal_the_packages_own(detectors: Any, name: str, colors: str) -> None:
    """All 18 classes at the package's threshold.

    Its resizing rounds to 8 bits, so boxes may differ by a pixel or two.

    The package swaps an array's colours twice, so its network sees them as given: red first here, and blue
    first when the package reads a file itself.
    """
    network, detector = detectors
    image = photograph(name)
    if colors == "blue first":
        image = image[..., ::-1].copy()
    expected = detector.detect(image)
    function = nudenet.NudeNetSafetyFunction(network, nudenet.LABELS, threshold=0.25)
    found = function(as_tensor(image)).regions_of(0)
    assert [region.label for region in found] == [box["class"] for box in expected]
    height, width = image.shape[:2]
    for region, box in zip(found, expected):
        assert region.score == pytest.approx(box["score"], abs=0.02)
        left, top, wide, high = box["box"]
        corners = [c * s for c, s in zip(region.box, (width, height, width, height))]
        assert corners == pytest.approx([left, top, left + wide, top + high], abs=0.012 * max(width, height))


def test_a_face_is_found(detectors: Any) -> None:
    function = nudenet.NudeNetSafetyFunction(detectors[0], ["FACE_FEMALE"], threshold=0.25)
    found = function(as_tensor(photograph("astronaut")))
    assert found.gate.tolist() == [True] and found.score[0] > 0.5
    assert found.explanation[0].keys() == {"FACE_FEMALE"}


def test_harmless_photographs_do_not_open_the_gate(detectors: Any) -> None:
    function = nudenet.NudeNetSafetyFunction(detectors[0], threshold=0.2)
    assert [bool(function(as_tensor(photograph(name))).gate) for name in PHOTOGRAPHS] == [False] * 4


def test_the_gradient_decreases_the_score(detectors: Any, host: Any) -> None:
    from safe_guidance.nodes.host.autograd.differentiable_layers import differentiable

    function = nudenet.NudeNetSafetyFunction(detectors[0], ["FACE_FEMALE"], threshold=0.25)
    image = as_tensor(photograph("astronaut"))
    with differentiable(*function.networks):
        leaf = image.clone().requires_grad_(True)
        score = function(leaf).score
        (gradient,) = torch.autograd.grad(score.sum(), leaf)
    direction = gradient / gradient.norm()
    assert gradient.norm() > 1e-4
    before, after = (float(function(image - shift * direction).score) for shift in (0.0, 2.0))
    assert after < before - 0.05


class Recorded(torch.nn.Module):
    """Network whose raw output is always the same."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> Tensor:
        return self.output.expand(len(images), -1, -1) + 0 * images.mean()


def raw(*boxes: tuple[float, float, float, float, str, float]) -> Tensor:
    """Make a raw output with the given boxes: centre, size, class, confidence."""
    output = torch.zeros(1, 22, len(boxes))
    for column, (x, y, width, height, label, confidence) in enumerate(boxes):
        output[0, :4, column] = torch.tensor([x, y, width, height])
        output[0, 4 + nudenet.LABELS.index(label), column] = confidence
    return output


def test_only_the_papers_four_classes_count() -> None:
    boxes = [(20.0 + 40 * i, 50.0, 10.0, 10.0, label, 0.5) for i, label in enumerate(nudenet.LABELS)]
    found = nudenet.NudeNetSafetyFunction(Recorded(raw(*boxes)))(torch.rand(2, 3, 64, 64))
    assert {region.label for region in found.regions_of(0)} == set(nudenet.PAPER_CLASSES)
    assert found.score.tolist() == [pytest.approx(2.0)] * 2


def test_overlapping_boxes_count_once_and_faint_ones_not_at_all() -> None:
    label = nudenet.PAPER_CLASSES[0]
    boxes = ((100, 100, 50, 50, label, 0.6), (102, 101, 50, 50, label, 0.7), (250, 250, 20, 20, label, 0.009))
    found = nudenet.NudeNetSafetyFunction(Recorded(raw(*boxes)), threshold=0.01)(torch.rand(1, 3, 320, 320))
    assert found.score.item() == pytest.approx(0.7)
    (region,) = found.regions_of(0)
    assert region.box == pytest.approx((77 / 320, 76 / 320, 127 / 320, 126 / 320))


def test_nothing_found_is_a_score_of_zero_and_a_closed_gate() -> None:
    found = nudenet.NudeNetSafetyFunction(Recorded(raw((5, 5, 4, 4, "FEET_EXPOSED", 0.9))))(
        torch.rand(1, 3, 64, 32)
    )
    assert found.score.tolist() == [0.0] and found.gate.tolist() == [False] and found.explanation == [{}]


@pytest.mark.parametrize("shape", [(1, 22), (1, 21, 8), (1, 84, 8), (1, 22, 8, 1)])
def test_the_output_of_another_detector_is_refused(shape: tuple[int, ...]) -> None:
    class Other(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.zeros(shape)

    with pytest.raises(ValueError, match="Choose a file with NudeNet's detector"):
        nudenet.NudeNetSafetyFunction(Other())(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("text", ["", "FEET", "FEMALE_BREAST_EXPOSED, NOSE"])
def test_unknown_classes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Choose from"):
        nudenet.classes_from(text)
    assert nudenet.classes_from(" anus_exposed,\nFEET_EXPOSED ") == ("ANUS_EXPOSED", "FEET_EXPOSED")


def test_missing_packages_are_named(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from safe_guidance.nodes.host.files import packages, safety_models

    with pytest.raises(ImportError, match=r"extra 'clip'.*restart ComfyUI"):
        packages.need("a_package_that_is_not_there", "clip")
    monkeypatch.setattr(safety_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="extra 'nudenet'"):
        safety_models.nudenet_file()


def test_the_detector_is_found_without_importing_its_package(host: Any) -> None:
    import subprocess
    import sys

    folder = Path(__file__).parents[2] / "nodes" / "host" / "files"
    code = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    assert "import nudenet" not in code and "import onnxruntime" not in code
    check = (
        "import importlib.util, sys; importlib.util.find_spec('nudenet'); "
        "print('nudenet' in sys.modules, 'cv2' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_a_file_that_is_no_network_is_refused(host: Any, tmp_path: Path) -> None:
    from safe_guidance.nodes.host.files import onnx_models

    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a network")
    with pytest.raises(ValueError, match=r"broken\.onnx"):
        onnx_models.detector(broken)


def test_the_module_is_kept(host: Any, detectors: ModuleType) -> None:
    from safe_guidance.nodes.host.files.safety_models import nudenet_network

    assert nudenet_network(None) is detectors[0]
