"""Checks of an ONNX file before anything in it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

MOST_BYTES = 2**30
"""Largest file."""
MOST_DESCRIPTION = 2**22
"""Most bytes of a file that are not the numbers of tensors. A parsed message needs many times its bytes."""
MOST_NODES = 20_000
MOST_DIMENSIONS = 16
MOST_LIST = 2**16
"""Longest list in an attribute of a node."""
MIN_SIDE, MAX_SIDE = 8, 1024
"""Sides in pixels that a file may demand for its input."""
ALLOWED = frozenset(
    """Abs Acos Add And ArgMax ArgMin Asin Atan AveragePool BatchNormalization Cast Ceil Celu Clip Concat
    Constant ConstantOfShape Conv ConvTranspose Cos CumSum DepthToSpace Div Dropout Elu Equal Erf Exp Expand
    Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool Greater GreaterOrEqual HardSigmoid
    HardSwish Identity InstanceNormalization LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    MatMul Max MaxPool Mean Min Mod Mul Neg Not Or PRelu Pad Pow Range Reciprocal ReduceL1 ReduceL2
    ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
    Reshape Resize Round Selu Shape Sigmoid Sign Sin Slice Softmax Softplus Softsign Split Sqrt Squeeze Sub
    Sum Tan Tanh Tile TopK Transpose Unsqueeze Where Xor""".split()
)
"""Operations that may occur. None has a graph of its own, draws random numbers or calls other code."""
NUMBERS = {"FLOAT": "float_data", "INT32": "int32_data", "INT64": "int64_data", "UINT8": "int32_data"}
NUMBERS |= {"INT8": "int32_data", "BOOL": "int32_data", "DOUBLE": "double_data", "FLOAT16": "int32_data"}
"""Types of tensors, with the field that has their numbers if these are not stored as bytes."""
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor"},
    "tensor": {4: "numbers", 9: "numbers", 10: "numbers"},
}
"""Fields of ONNX's messages that lead to the numbers of tensors: float_data, raw_data and double_data."""


def parsed(onnx: Any, content: bytes) -> Any:
    """Parse and check an ONNX file.

    Args:
        onnx: the module.
        content: the file's bytes.

    Returns:
        The model (ModelProto). Its nodes have new names, because the converter writes them into a program.

    Raises:
        ValueError: what is wrong, as the second half of a sentence.
    """
    if _description_bytes(memoryview(content), "model") > MOST_DESCRIPTION:
        raise ValueError(f"it has more than {MOST_DESCRIPTION} bytes beside the numbers of its tensors")
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # The class of the parser's error depends on its version.
        raise ValueError("it is damaged or not an ONNX file") from error
    graph = model.graph
    if model.functions or model.training_info or graph.sparse_initializer:
        raise ValueError("it has functions, training data or sparse tensors")
    if not 0 < len(graph.node) <= MOST_NODES:
        raise ValueError(f"it has {len(graph.node)} operations; from 1 to {MOST_NODES} are allowed")
    for tensor in graph.initializer:
        _check_tensor(onnx, tensor)
    for number, node in enumerate(graph.node):
        _check_node(onnx, node)
        node.name = f"node{number}"
    return model


def input_size(model: Any) -> tuple[int | None, int | None]:
    """Return height and width of the model's only input, (B, 3, H, W); None where they may vary.

    Raises:
        ValueError: the model has another input or not exactly one output.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ValueError("it does not have one input and one output")
    shape = [dimension.dim_value for dimension in inputs[0].type.tensor_type.shape.dim]
    if len(shape) != 4 or shape[1] not in (0, 3):
        raise ValueError("its input is not (B, 3, H, W)")
    if any(side and not MIN_SIDE <= side <= MAX_SIDE for side in shape[2:]):
        raise ValueError(f"its input has sides outside {MIN_SIDE} to {MAX_SIDE} pixels")
    return shape[2] or None, shape[3] or None


def _check_node(onnx: Any, node: Any) -> None:
    if node.domain not in ("", "ai.onnx") or node.op_type not in ALLOWED:
        raise ValueError(f"it has an operation '{node.op_type}', which is not allowed")
    kinds = onnx.AttributeProto
    plain = {kinds.FLOAT, kinds.INT, kinds.STRING, kinds.FLOATS, kinds.INTS, kinds.STRINGS, kinds.TENSOR}
    for attribute in node.attribute:
        if attribute.type not in plain or attribute.ref_attr_name:
            raise ValueError(f"an operation '{node.op_type}' has an attribute that is not allowed")
        if max(len(attribute.floats), len(attribute.ints), len(attribute.strings)) > MOST_LIST:
            raise ValueError(f"an operation '{node.op_type}' has a list with more than {MOST_LIST} entries")
        if attribute.HasField("t"):
            _check_tensor(onnx, attribute.t)


def _check_tensor(onnx: Any, tensor: Any) -> None:
    """Check that a tensor has exactly the numbers that its shape says, in the file itself, and finite."""
    if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ValueError("it keeps tensors in other files")
    types = onnx.TensorProto.DataType
    kind = types.Name(tensor.data_type) if tensor.data_type in types.values() else "UNDEFINED"
    if kind not in NUMBERS:
        raise ValueError(f"it has a tensor of type {kind}")
    if len(tensor.dims) > MOST_DIMENSIONS:
        raise ValueError(f"it has a tensor with more than {MOST_DIMENSIONS} dimensions")
    count = 1
    for side in tensor.dims:
        count *= side
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    stored = len(tensor.raw_data) // dtype.itemsize
    if not tensor.HasField("raw_data"):
        stored = len(getattr(tensor, NUMBERS[kind]))
    exact = not tensor.HasField("raw_data") or stored * dtype.itemsize == len(tensor.raw_data)
    if min(tensor.dims, default=0) < 0 or count != stored or not exact:
        raise ValueError("it has a tensor whose shape does not fit its numbers")
    # A single infinity is an ordinary constant of attention masks.
    if np.issubdtype(dtype, np.floating) and count > 1:
        if not bool(np.isfinite(onnx.numpy_helper.to_array(tensor)).all()):
            raise ValueError("it has a tensor with numbers that are not finite")


def _description_bytes(content: memoryview, message: str) -> int:
    """Return the bytes of a message that are not the numbers of tensors; more than allowed if there are many.

    What is not a message of ONNX counts as a whole; the parser says what is wrong with it.
    """
    found, fields = 0, MESSAGES[message]
    for number, payload in _fields(content):
        found += 2
        inner = fields.get(number)
        if inner is None:
            found += len(payload)
        elif inner != "numbers":
            found += _description_bytes(payload, inner)
        if found > MOST_DESCRIPTION:
            return found
    return found


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the fields of a message of protocol buffers by their numbers, up to the first damaged one."""
    position, size = 0, len(content)
    while position < size:
        key, position = _varint(content, position)
        length = {1: 8, 5: 4}.get(key & 7, 0)
        if key & 7 == 0:
            _, position = _varint(content, position)
        elif key & 7 == 2:
            length, position = _varint(content, position)
        yield key >> 3, content[position : position + length]
        position += length


def _varint(content: memoryview, position: int) -> tuple[int, int]:
    """Return a number of variable length and the position behind it."""
    value, taken = 0, 0
    for taken, byte in enumerate(content[position : position + 10], start=1):
        value |= (byte & 127) << (7 * (taken - 1))
        if byte < 128:
            break
    return value, position + max(1, taken)
