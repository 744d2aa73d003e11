"""Hostile ONNX files: networks that grow, point outside themselves, or do not fit together."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

SIZES = st.sampled_from([0, 1, 2, 3, 7, 8, 9, 64, 1000, 2**16, 2**20, 10**9, 2**40, -1, -5])
NAMES = st.sampled_from(["", "conv", "a.b", 'x", 0) or __import__("os").abort() or ("', "../x", "self", "\n"])
UNARY = "Relu Sigmoid Softmax Shape Flatten GlobalAveragePool Transpose Identity Exp Log Reciprocal".split()
FOREIGN = "Loop If Scan NonZero RandomNormal ImageDecoder Unknown Einsum EyeLike NonMaxSuppression".split()
BINARY = "Add Mul Sub Div MatMul Pow Min Max Equal".split()
SHAPED = (
    "Reshape Expand Tile ConstantOfShape Range Pad Slice Resize Gather TopK Unsqueeze Squeeze Split".split()
)


@st.composite
def models(draw: st.DrawFn) -> bytes:
    """Draw a model: a small classifier or detector with up to six further operations."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []
    value = "images"
    if draw(st.booleans()):
        constants.append(numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "kernel"))
        attributes = draw(_attributes("kernel_shape", "pads", "strides", "dilations", "group"))
        kind = draw(st.sampled_from(["Conv", "Conv", "ConvTranspose"]))
        nodes.append(helper.make_node(kind, [value, "kernel"], ["convolved"], draw(NAMES), **attributes))
        value = "convolved"
    for number in range(draw(st.integers(0, 6))):
        value = _further(draw, helper, numpy_helper, nodes, constants, value, number)
    if draw(st.booleans()):
        nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"]))
        nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
        value = "flat"
    output = draw(st.sampled_from([value] * 5 + ["nowhere", "images"]))
    sides: list[Any] = draw(st.sampled_from([[8, 8], [32, 32], ["h", "w"]]))
    shape = [draw(st.sampled_from([1, "batch"])), 3, *sides]
    if not draw(st.integers(0, 4)):
        shape = draw(st.lists(SIZES.filter(lambda size: size >= 0), max_size=5))
    inputs = [helper.make_tensor_value_info("images", draw(st.sampled_from([1, 1, 1, 7, 8])), shape)]
    outputs = [
        helper.make_tensor_value_info(output, TensorProto.FLOAT, draw(st.sampled_from([None, [1, 3]])))
    ]
    graph = helper.make_graph(nodes, "g", inputs * draw(st.sampled_from([1, 1, 1, 0, 2])), outputs, constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", draw(st.sampled_from([9, 13, 17])))]
    )
    if draw(st.booleans()):
        names = draw(
            st.sampled_from(['["a", "b", "c", "d"]', '["a"]', "{}", "[", "[" * 5000, "[1, 2, 3]", "7"])
        )
        helper.set_model_props(model, {"classes": names})
    return bytes(model.SerializeToString())


def _attributes(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return some of these attributes with lists of any sizes."""
    lists = st.lists(SIZES, min_size=1, max_size=4)
    return st.one_of(
        st.just({}), st.dictionaries(st.sampled_from(names), st.one_of(lists, SIZES), max_size=2)
    )


def _further(
    draw: st.DrawFn,
    helper: Any,
    numpy_helper: Any,
    nodes: list[Any],
    constants: list[Any],
    value: str,
    number: int,
) -> str:
    """Add one operation and return the name of its output."""
    name, result = draw(NAMES), f"value{number}"
    kind = draw(
        st.sampled_from(["unary", "unary", "double", "binary", "shaped", "shaped", "constant", "foreign"])
    )
    if kind == "double":
        # Concatenation of a value with itself, again and again.
        for step in range(draw(st.sampled_from([1, 3, 40]))):
            following = f"{result}_{step}"
            nodes.append(
                helper.make_node("Concat", [value] * draw(st.integers(1, 9)), [following], name, axis=1)
            )
            value = following
        return value
    if kind in ("binary", "shaped", "constant"):
        constants.append(_constant(draw, helper, numpy_helper, f"constant{number}"))
    if kind == "constant":
        nodes.append(helper.make_node("Constant", [], [result], name, value=constants.pop()))
    elif kind == "shaped":
        operation = draw(st.sampled_from(SHAPED))
        given = (
            [f"constant{number}"]
            if operation in ("ConstantOfShape", "Range")
            else [value, f"constant{number}"]
        )
        given *= 3 if operation == "Range" else 1
        attributes = draw(_attributes("axis", "mode", "allowzero"))
        nodes.append(helper.make_node(operation, given, [result], name, **attributes))
    elif kind == "binary":
        operation = draw(st.sampled_from(BINARY))
        nodes.append(helper.make_node(operation, [value, f"constant{number}"], [result], name))
    else:
        operation = draw(st.sampled_from(FOREIGN if kind == "foreign" else UNARY))
        nodes.append(
            helper.make_node(operation, [value], [result], name, **draw(_attributes("axis", "perm")))
        )
    return result


def _constant(draw: st.DrawFn, helper: Any, numpy_helper: Any, name: str) -> Any:
    """Draw a tensor: sizes, numbers, external data, or a shape without its numbers."""
    from onnx import TensorProto

    kind = draw(st.sampled_from(["sizes", "sizes", "scalar", "numbers", "external", "hollow", "text"]))
    if kind == "sizes":
        return numpy_helper.from_array(np.array(draw(st.lists(SIZES, max_size=5)), np.int64), name)
    if kind == "scalar":
        return numpy_helper.from_array(np.array(draw(SIZES), np.int64), name)
    if kind == "numbers":
        shape = draw(st.sampled_from([(1000, 1), (1, 1000), (4,), (1, 4, 1, 1)]))
        filled = np.full(shape, draw(st.sampled_from([0.0, 1.0, np.nan, np.inf, 1e30])), np.float32)
        return numpy_helper.from_array(filled, name)
    if kind == "text":
        return helper.make_tensor(name, TensorProto.STRING, [1], [b"text"])
    tensor = TensorProto(name=name, data_type=draw(st.sampled_from([1, 7, 10, 16, 99])), dims=[draw(SIZES)])
    if kind == "external":
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(
            key="location", value=draw(st.sampled_from(["/etc/passwd", "../x", "x.bin"]))
        )
    return tensor
