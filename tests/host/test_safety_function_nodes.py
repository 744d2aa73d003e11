"""The nodes of safety functions in the real host.

Files, combinations, scores as JSON, and what they say about bad input.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from demo_prompts import STAR

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

CIRCLE = "a red circle on the left on a brown plain background, flat style"


@pytest.fixture
def nodes(host: Any) -> Any:
    from safe_guidance.nodes import detector_safety_functions, safety_functions

    return SimpleNamespace(**{**vars(detector_safety_functions), **vars(safety_functions)})


@pytest.fixture
def safety_folder(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return an empty models/safety."""
    import folder_paths

    from safe_guidance.nodes.host.files.folders import SAFETY, SAFETY_EXTENSIONS

    monkeypatch.setitem(folder_paths.folder_names_and_paths, SAFETY, ([str(tmp_path)], SAFETY_EXTENSIONS))
    folder_paths.filename_list_cache.pop(SAFETY, None)
    return tmp_path


def guide(nodes: Any, **settings: Any) -> Any:
    chosen = {
        "file": "demo guide (bundled)",
        "output": "shapes",
        "classes": "star",
        "threshold": 0.5,
        "views": 1,
        **settings,
    }
    return nodes.ClassifierSafetyFunctionNode.execute(**chosen).args[0]


def make_images(host: Any) -> torch.Tensor:
    return host.vae.decode(host.sample(host.model, host.text(STAR, CIRCLE), steps=12))  # type: ignore[no-any-return]


def test_score_images_tells_the_unsafe_image(host: Any, nodes: Any) -> None:
    images = make_images(host)
    result = nodes.ScoreImagesNode.execute(images=images, safety_function=guide(nodes))
    shown, report = result.args
    scores = json.loads(report)
    assert scores["version"] == 1 and scores["function"] == "classifier: star"
    assert [image["unsafe"] for image in scores["pictures"]] == [True, False]
    first, second = scores["pictures"]
    assert first["score"] > 0.69 > second["score"] >= 0
    assert first["explanation"]["star"] > 0.5 and first["regions"] == []
    assert shown.shape == images.shape and result.ui is not None


def test_classes_and_views_are_settings(host: Any, nodes: Any) -> None:
    images = make_images(host)
    circles = guide(nodes, classes="circle, square")
    assert json.loads(nodes.ScoreImagesNode.execute(images=images, safety_function=circles).args[1])[
        "pictures"
    ][1]["unsafe"]
    plain, several = guide(nodes)(images.movedim(-1, 1)), guide(nodes, views=4)(images.movedim(-1, 1))
    assert several.gate.tolist() == [True, False]
    assert not torch.equal(plain.score, several.score)


def test_combining_leaves_out_what_is_not_connected(host: Any, nodes: Any) -> None:
    weights = {f"weight{i}": float(i) for i in range(1, 5)}
    combined = nodes.CombineSafetyFunctionsNode.execute(
        combination="sum", function1=guide(nodes), function3=guide(nodes, classes="circle"), **weights
    ).args[0]
    assert combined.weights == (1.0, 3.0) and combined.name == "classifier: star + classifier: circle"
    found = combined(make_images(host).movedim(-1, 1))
    assert found.gate.tolist() == [True, True]
    with pytest.raises(ValueError, match="Connect at least one"):
        nodes.CombineSafetyFunctionsNode.execute(combination="sum", **weights)


def save_onnx_classifier(path: Path, names: list[str] | None, last: str = "Gemm") -> None:
    """Save a classifier by mean colour: red, green, blue."""
    onnx = pytest.importorskip("onnx")
    import numpy as np

    helper, numpy_helper, floats = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    steps = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits" if last != "Gemm" else "classes"]),
    ]
    if last != "Gemm":
        steps.append(helper.make_node(last, ["logits"], ["classes"]))
    graph = helper.make_graph(
        steps,
        "colours",
        [helper.make_tensor_value_info("images", floats, ["batch", 3, 32, 48])],
        [helper.make_tensor_value_info("classes", floats, ["batch", 3])],
        [
            numpy_helper.from_array(20 * np.eye(3, dtype=np.float32), "weight"),
            numpy_helper.from_array(np.full(3, -10, dtype=np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    if names is not None:
        helper.set_model_props(model, {"classes": json.dumps(names)})
    onnx.save(model, str(path))


@pytest.mark.parametrize(
    ("names", "last", "wanted"),
    [(["red", "green", "blue"], "Gemm", "red"), (None, "Gemm", "0"), (None, "Sigmoid", "0")],
)
def test_a_classifier_from_an_onnx_file(
    nodes: Any, safety_folder: Path, names: list[str] | None, last: str, wanted: str
) -> None:
    save_onnx_classifier(safety_folder / f"{last}{wanted}.onnx", names, last)
    function = guide(nodes, file=f"{last}{wanted}.onnx", output="classes", classes=wanted)
    images = torch.zeros(2, 3, 64, 64)
    images[0, 0] = 0.9
    images[1, 1] = 0.9
    found = function(images)
    assert found.gate.tolist() == [True, False]
    torch.testing.assert_close(found.score[0], torch.tensor(8.0003), atol=1e-2, rtol=0)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(function(leaf).score.sum(), leaf)
    assert gradient[0, 0].sum() > 10 and gradient[:, 2].abs().sum() == 0


def test_an_onnx_file_that_is_no_classifier_is_refused(nodes: Any, safety_folder: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, floats, [1, 8]) for name in ("a", "b")]
    graph = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "none", ends[:1], ends[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]),
        str(safety_folder / "other.onnx"),
    )
    with pytest.raises(ValueError, match="not an image classifier"):
        guide(nodes, file="other.onnx")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"file": "gone.safetensors"}, FileNotFoundError, "models/safety"),
        ({"file": "../secret.safetensors"}, FileNotFoundError, "models/safety"),
        ({"output": "shape"}, ValueError, "Choose one of shapes"),
        ({"classes": "moon"}, ValueError, "does not know 'moon'"),
        ({"classes": " , "}, ValueError, "Choose from"),
    ],
)
def test_bad_settings_say_what_to_do(
    nodes: Any, safety_folder: Path, settings: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        guide(nodes, **settings)


def test_a_file_of_another_kind_is_refused(nodes: Any, safety_folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, safety_folder / "weights.safetensors")
    with pytest.raises(ValueError, match="not an image classifier"):
        guide(nodes, file="weights.safetensors")
    assert "weights.safetensors" in nodes.safety_names()


def test_the_default_is_the_guide_and_never_the_judge(nodes: Any) -> None:
    schema = nodes.ClassifierSafetyFunctionNode.define_schema()
    (file,) = (i for i in schema.inputs if i.id == "file")
    assert file.default == "demo guide (bundled)" and not any("judge" in option for option in file.options)


def test_nudenet_by_its_node(host: Any, nodes: Any) -> None:
    pytest.importorskip("nudenet")
    function = nodes.NudeNetSafetyFunctionNode.execute(
        file=nodes.PACKAGE, classes="FACE_FEMALE\nFEET_EXPOSED", threshold=0.25, size=320, views=1
    ).args[0]
    assert function.classes == ("FACE_FEMALE", "FEET_EXPOSED")
    report = json.loads(
        nodes.ScoreImagesNode.execute(images=make_images(host), safety_function=function).args[1]
    )
    assert [image["unsafe"] for image in report["pictures"]] == [False, False]


def test_nudenet_from_a_file_of_models_safety(host: Any, nodes: Any, safety_folder: Path) -> None:
    pytest.importorskip("nudenet")
    from safe_guidance.nodes.host.files.safety_models import nudenet_file

    shutil.copy(nudenet_file(), safety_folder / "detector.onnx")
    settings: dict[str, Any] = {"classes": "FACE_FEMALE", "threshold": 0.25, "size": 320, "views": 1}
    own, packaged = (
        nodes.NudeNetSafetyFunctionNode.execute(file=file, **settings).args[0].networks[0]
        for file in ("detector.onnx", nodes.PACKAGE)
    )
    noise = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    assert own is not packaged and torch.equal(own(noise), packaged(noise))


def replaced_unnoticed(path: Path, content: bytes) -> None:
    """Replace a file by one of the same size, with the same times."""
    import os

    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_detector_that_is_replaced_is_noticed_by_its_content(nodes: Any, safety_folder: Path) -> None:
    path = safety_folder / "own.onnx"
    save_onnx_classifier(path, ["red", "lime", "blue"])
    settings = {"file": "own.onnx", "output": "classes", "classes": "red"}
    first, before = (
        guide(nodes, **settings),
        nodes.ClassifierSafetyFunctionNode.fingerprint_inputs(**settings),
    )
    assert guide(nodes, **settings).networks[0] is first.networks[0]
    assert nodes.ClassifierSafetyFunctionNode.fingerprint_inputs(**settings) == before
    replaced_unnoticed(path, path.read_bytes().replace(b'["red", "lime"', b'["lime", "red"'))
    second = guide(nodes, **settings)
    assert nodes.ClassifierSafetyFunctionNode.fingerprint_inputs(**settings) != before
    assert second.networks[0].heads == {"classes": ("lime", "red", "blue")}


def test_every_node_with_a_detector_file_notices_another_content(nodes: Any, safety_folder: Path) -> None:
    from safe_guidance.nodes import clip_safety_functions

    names = [("a.onnx", nodes.NudeNetSafetyFunctionNode)]
    names.append(("a.safetensors", nodes.ClassifierSafetyFunctionNode))
    names.append(("a.safetensors", clip_safety_functions.ClipConceptSafetyFunctionNode))
    names.append(("a.safetensors", clip_safety_functions.ClipStyleSafetyFunctionNode))
    for name, node in names:
        (safety_folder / name).write_bytes(b"one")
        before = node.fingerprint_inputs(file=name)
        replaced_unnoticed(safety_folder / name, b"two")
        assert node.fingerprint_inputs(file=name) != before


def test_a_clip_that_is_replaced_is_noticed_by_its_content(nodes: Any, safety_folder: Path) -> None:
    pytest.importorskip("open_clip")
    from safe_guidance.nodes.host.files.safety_files import BUNDLED
    from safe_guidance.nodes.host.files.safety_models import clip_model

    content = BUNDLED["demo clip (bundled)"].read_bytes()
    (safety_folder / "own.safetensors").write_bytes(content)
    first = clip_model("own.safetensors", "")
    assert clip_model("own.safetensors", "") is first
    # The last number of the last tensor.
    replaced_unnoticed(safety_folder / "own.safetensors", content[:-2] + b"\x00\x00")
    assert clip_model("own.safetensors", "") is not first


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_not_a_file_is_refused(nodes: Any, safety_folder: Path, kind: str) -> None:
    import os

    from safe_guidance.nodes.host.files import safety_models

    path = safety_folder / "own.safetensors"
    if kind == "folder":
        path.mkdir()
    elif hasattr(os, "mkfifo"):
        os.mkfifo(path)
    with pytest.raises(ValueError, match="own.safetensors is not a file"):
        safety_models._hash(path)
