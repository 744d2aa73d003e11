"""Hostile detector files: each is read, or refused with one clear error and without much memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safe_guidance.evaluation.fuzz import detector_files
from safe_guidance.formats import latent_file

SMALL = 40
"""Files of each kind. `evaluation.fuzz.detector_files.run` makes any number."""
MOST_MEMORY = 600 * 2**20
"""Most memory in bytes that a hostile file of a few hundred bytes may use at its peak."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, detector_files.Kind]:
    path = tmp_path_factory.mktemp("latents") / "a.latents"
    latent_file.write(path, "key", 3, iter([(torch.rand(3, 4, 8, 8), torch.rand(3, 1, 8, 8))]))
    return detector_files.kinds(path)


@pytest.mark.parametrize("name", ["classifier", "clip", "latents", "onnx detector", "onnx classifier"])
def test_hostile_files_are_read_or_refused_clearly(
    kinds: dict[str, detector_files.Kind], tmp_path: Path, name: str
) -> None:
    pytest.importorskip("onnx2torch")
    pytest.importorskip("open_clip")
    kind = kinds[name]
    answers: list[str] = []
    detector_files.run(
        kind, 7, SMALL, lambda content: answers.append(detector_files.answer(kind, content, tmp_path))
    )
    assert len(answers) >= SMALL and len(set(answers)) > 5


def test_the_checker_sees_unclear_errors(tmp_path: Path) -> None:
    def read(path: Path) -> object:
        raise ERRORS.pop()

    ERRORS: list[Exception] = [
        ValueError("hostile.x is damaged"),
        ValueError("It is damaged. Copy it again."),
        ValueError("hostile.x is\ndamaged. Copy it again."),
        UnicodeDecodeError("utf-8", b"", 0, 1, "hostile.x. No."),
    ]
    kind = detector_files.Kind(detector_files.JSON, ".x", read)  # type: ignore[arg-type]
    while ERRORS:
        with pytest.raises(AssertionError):
            detector_files.answer(kind, b"", tmp_path)


def onnx_model(nodes: list[Any], constants: dict[str, Any], output: str = "classes", side: int = 32) -> bytes:
    """A model with one input, images (1, 3, side, side)."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", 1, [1, 3, side, side])],
        [helper.make_tensor_value_info(output, 1, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    return bytes(model.SerializeToString())


def growing(operation: str) -> bytes:
    """A network of a few hundred bytes that makes gigabytes from one small image."""
    onnx = pytest.importorskip("onnx")
    import numpy as np

    node = onnx.helper.make_node
    sizes, big = np.array([2**15, 2**15], np.int64), np.array(2**30, np.int64)
    one = np.zeros(1, np.int64)
    cases: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "ConstantOfShape": ([node("ConstantOfShape", ["s"], ["classes"])], {"s": sizes}),
        "Expand": (
            [node("Expand", ["f", "s"], ["e"]), node("Relu", ["e"], ["classes"])],
            {"f": np.ones(1, np.float32), "s": sizes},
        ),
        "Tile": ([node("Tile", ["images", "s"], ["classes"])], {"s": np.array([1, 1, 999, 999], np.int64)}),
        "Range": (
            [node("Range", ["z", "n", "o"], ["classes"])],
            {"z": one[0], "n": big, "o": np.array(1, np.int64)},
        ),
        "Resize": (
            [node("Resize", ["images", "", "s"], ["classes"], mode="nearest")],
            {"s": np.array([1, 1, 999, 999], np.float32)},
        ),
        "Pad": (
            [node("Pad", ["images", "s"], ["classes"])],
            {"s": np.array([0, 0, 0, 0, 0, 0, 20000, 20000], np.int64)},
        ),
        "Concat": (
            [node("Concat", ["images" if i == 0 else f"v{i}"] * 2, [f"v{i + 1}"], axis=1) for i in range(24)]
            + [node("Relu", ["v24"], ["classes"])],
            {},
        ),
        "outer product": (
            [
                node("Reshape", ["images", "c"], ["x"]),
                node("Reshape", ["images", "r"], ["y"]),
                node("MatMul", ["x", "y"], ["m"]),
                node("Concat", ["m"] * 40, ["classes"], axis=0),
            ],
            {"c": np.array([-1, 1], np.int64), "r": np.array([1, -1], np.int64)},
        ),
        "ConvTranspose": (
            [node("ConvTranspose", ["images", "k"], ["classes"], strides=[900, 900])],
            {"k": np.ones((3, 3, 1, 1), np.float32)},
        ),
        "kernel_shape": (
            [node("Conv", ["images", "k"], ["classes"], kernel_shape=[20000, 20000])],
            {"k": np.ones((3, 3, 1, 1), np.float32)},
        ),
    }
    return onnx_model(*cases[operation])


GROWING = ("ConstantOfShape", "Expand", "Tile", "Range", "Resize", "Pad", "Concat", "outer product")


@pytest.mark.skipif(sys.platform != "linux", reason="The peak of the memory is measured as Linux does.")
@pytest.mark.parametrize("operation", [*GROWING, "ConvTranspose", "kernel_shape"])
def test_a_small_network_cannot_grow(
    kinds: dict[str, detector_files.Kind], tmp_path: Path, operation: str
) -> None:
    pytest.importorskip("onnx2torch")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = detector_files.answer(kinds["onnx detector"], growing(operation), tmp_path)
    assert found != "read"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY / 1024


def test_an_input_of_any_size_is_not_made(kinds: dict[str, detector_files.Kind], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    nodes = [onnx.helper.make_node("GlobalAveragePool", ["images"], ["classes"])]
    content = onnx_model(nodes, {}, side=100_000)
    assert "sides outside" in detector_files.answer(kinds["onnx classifier"], content, tmp_path)


def test_names_in_a_network_are_not_run(kinds: dict[str, detector_files.Kind], tmp_path: Path) -> None:
    """The converter writes the names of operations into a program."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnx2torch")
    mark = tmp_path / "run"
    hostile = f'x", 0) or open("{mark}", "w") or getattr(self, "x'
    nodes = [onnx.helper.make_node("Relu", ["images"], ["classes"], name=hostile)]
    assert detector_files.answer(kinds["onnx detector"], onnx_model(nodes, {}), tmp_path) == "read"
    assert not mark.exists()


@pytest.mark.parametrize("place", ["initializer", "constant"])
def test_numbers_in_other_files_are_not_read(
    kinds: dict[str, detector_files.Kind], tmp_path: Path, place: str
) -> None:
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    (tmp_path / "w.bin").write_bytes(bytes(16))
    constant = onnx.helper.make_node("Constant", [], ["w"], value=tensor)
    add = onnx.helper.make_node("Add", ["images", "w"], ["classes"])
    model = onnx.load_model_from_string(onnx_model([constant, add] if place == "constant" else [add], {}))
    if place == "initializer":
        model.graph.initializer.append(tensor)
    answer = detector_files.answer(kinds["onnx detector"], model.SerializeToString(), tmp_path)
    assert "other files" in answer


def test_many_empty_messages_are_refused_before_they_are_parsed(
    kinds: dict[str, detector_files.Kind], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each needs two bytes in the file and a hundred in memory."""
    onnx = pytest.importorskip("onnx")
    from safe_guidance.nodes.host.files import onnx_checks

    monkeypatch.setattr(onnx_checks, "MOST_DESCRIPTION", 2**12)
    monkeypatch.setattr(onnx, "load_model_from_string", lambda content: pytest.fail("parsed"))
    nodes = b"\x0a\x00" * 2500
    length = bytes([len(nodes) & 127 | 128, len(nodes) >> 7])
    answer = detector_files.answer(kinds["onnx detector"], b"\x3a" + length + nodes, tmp_path)
    assert "beside the numbers" in answer


def configured(source: str, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A bundled file whose configuration is changed."""
    import json

    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(detector_files.ASSETS / source, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}
    configuration = json.loads(metadata["configuration"])
    change(configuration)
    return save(tensors, {**metadata, "configuration": json.dumps(configuration)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["vision"].update(timm_model_name="hf-hub:a/b", timm_model_pretrained=True), "must have"),
        (lambda c: c["text"].update(hf_model_name="roberta-base"), "must have"),
        (lambda c: c["text"].update(hf_tokenizer_name="a/b"), "must have"),
        (lambda c: c["text"].update(width=2048), "has the shape"),
        (lambda c: c["text"].update(vocab_size=10**9), "'vocab_size'"),
        (lambda c: c["text"].update(context_length=10**9), "'context_length'"),
        (lambda c: c["vision"].update(layers=10**9), "'layers'"),
        (lambda c: c["vision"].update(layers=60), "has no tensor"),
        (lambda c: c["vision"].update(mlp_ratio=float("nan")), "'configuration'"),
        (lambda c: c["vision"].update(mlp_ratio=1e9), "'mlp_ratio'"),
        (lambda c: c["vision"].update(image_size=1024), "patches"),
        (lambda c: c.update(embed_dim=True), "'embed_dim'"),
        (lambda c: c.update(vision=None), "'vision'"),
    ],
)
def test_a_clips_configuration_neither_downloads_nor_allocates(
    kinds: dict[str, detector_files.Kind], tmp_path: Path, change: Any, message: str
) -> None:
    pytest.importorskip("open_clip")
    assert message in detector_files.answer(kinds["clip"], configured("clip.safetensors", change), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(size=10**6), "its size"),
        (lambda c: c.update(widths=[2**20, 2**20]), "widths"),
        (lambda c: c["heads"].update(more=["a"]), "head.2"),
        (lambda c: c.update(heads={"shapes": "circle"}), "lists of class names"),
        (lambda c: c.update(dtype="float64"), "exactly the keys"),
    ],
)
def test_a_classifiers_sizes_are_those_of_its_tensors(
    kinds: dict[str, detector_files.Kind], tmp_path: Path, change: Any, message: str
) -> None:
    content = configured("guide.safetensors", change)
    assert message in detector_files.answer(kinds["classifier"], content, tmp_path)


@pytest.mark.parametrize(
    ("name", "is_offline"),
    [
        ("ViT-B-32", True),
        ("RN50", True),
        ("convnext_base", True),
        ("EVA02-B-16", True),
        ("roberta-ViT-B-32", False),
        ("xlm-roberta-base-ViT-B-32", False),
        ("ViT-B-16-SigLIP", False),
        ("hf-hub:someone/model", False),
        ("local-dir:/tmp", False),
        ("", False),
    ],
)
def test_architectures_that_would_be_downloaded_are_refused(name: str, is_offline: bool) -> None:
    open_clip = pytest.importorskip("open_clip")
    from safe_guidance.nodes.host.files.clip_models import offline_configuration

    if is_offline:
        assert offline_configuration(open_clip, name, "file")["embed_dim"] > 0
    else:
        with pytest.raises(ValueError, match="downloads nothing|knows no model"):
            offline_configuration(open_clip, name, "file")


def test_a_small_file_does_not_make_a_large_architecture(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    from safe_guidance.nodes.host.files import clip_models

    save_file({"logit_scale": torch.ones(())}, tmp_path / "a.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="Write the name of the architecture"):
        clip_models.load(tmp_path / "a.safetensors", "ViT-bigG-14")
    assert open_clip and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY / 1024
