"""Versions of TFLite's operators: the lowest that knows a node's dtypes and attributes.

A runtime refuses a version that it does not know, and misreads a newer node behind an older number:
litert_quantizer writes version 1 throughout.  The numbers are those of the converter's
op_version.cc; where that leaves int16 activations at 1 (CONV_2D, DEPTHWISE_CONV_2D and
FULLY_CONNECTED without a stated bias type), the version in which the schema introduced them.
"""

from collections.abc import Mapping

from lowbit import integer_graph

# op: {dtype of the first input: version}; what is not named is version 1.
BY_INPUT = {
    **dict.fromkeys(("MAX_POOL_2D", "AVERAGE_POOL_2D"), {"int8": 2, "int16": 3}),
    **dict.fromkeys(("LOGISTIC", "TANH", "SOFTMAX", "CONCATENATION"), {"int8": 2, "int16": 3}),
    **dict.fromkeys(("MEAN", "RELU6", "PAD", "RELU"), {"int8": 2, "int16": 3}),
    **dict.fromkeys(("MAXIMUM", "MINIMUM", "SLICE"), {"int8": 2, "int16": 4}),
    "ADD": {"int8": 2, "int16": 3},
    "SUB": {"int8": 2, "int16": 5},
    "TRANSPOSE": {"int8": 2, "int16": 5},
    **dict.fromkeys(("RESIZE_NEAREST_NEIGHBOR", "RESIZE_BILINEAR"), {"int8": 2, "int16": 4}),
    "LEAKY_RELU": {"int8": 2, "int16": 2},
    "GELU": {"int8": 2},
    "RSQRT": {"int8": 2, "int16": 3},
    "STRIDED_SLICE": {"int8": 2, "int16": 4},
    "DEPTH_TO_SPACE": {"int8": 2},
    "SPACE_TO_DEPTH": {"int8": 2},
}
# op: {(input, weights): version}
_CONVOLUTIONS = {
    "CONV_2D": {
        ("int8", "int8"): 3,
        ("int8", "int4"): 7,
        ("int16", "int8"): 4,
        ("int16", "int4"): 7,
    },
    "DEPTHWISE_CONV_2D": {("int8", "int8"): 3, ("int8", "int4"): 7, ("int16", "int8"): 5},
}
_HYBRID_CONVOLUTIONS = {"CONV_2D": (2, 5), "DEPTHWISE_CONV_2D": (4, 6)}  # per tensor, per channel
_HYBRID_INT4 = 7
_DEQUANTIZE = {"int2": 7, "int4": 6, "int16": 3, "float16": 3, "int8": 2}
_PER_CHANNEL_DEQUANTIZE = 5


def operator_version(node: integer_graph.Node, tensors: Mapping[str, integer_graph.Tensor]) -> int:
    """Returns the version that the node needs.

    Args:
      node: of an operation that `tflite_file.OPTIONS` names.
      tensors: by name, at least the node's own.
    """
    source = tensors[node.inputs[0]]
    if node.op in _CONVOLUTIONS:
        return _convolution(node, source, tensors[node.inputs[1]])
    if node.op == "FULLY_CONNECTED":
        return _fully_connected(node, source, tensors[node.inputs[1]])
    if node.op == "TRANSPOSE_CONV":
        return 4 if node.attributes.get("activation") else 3  # 3: with a bias
    if node.op == "MUL":
        return _multiply(node, source, tensors)
    if node.op == "DEQUANTIZE":
        version = _DEQUANTIZE.get(source.dtype, 1)
        return max(version, _PER_CHANNEL_DEQUANTIZE) if _per_channel(source) else version
    if node.op == "QUANTIZE":
        return 2 if tensors[node.outputs[0]].dtype == "int16" or source.dtype != "float32" else 1
    version = BY_INPUT.get(node.op, {}).get(source.dtype, 1)
    if node.attributes.get("half_pixel_centers") or node.attributes.get("align_corners"):
        return max(version, 3)
    return version


def _per_channel(tensor):
    return tensor.quantization is not None and tensor.quantization.scale.size > 1


def _convolution(node, source, weights):
    if source.dtype == "float32":
        if weights.dtype == "float32":
            dilated = tuple(node.attributes.get("dilations", (1, 1))) != (1, 1)
            return 2 if node.op == "DEPTHWISE_CONV_2D" and dilated else 1
        if weights.dtype == "int4":
            return _HYBRID_INT4
        return _HYBRID_CONVOLUTIONS[node.op][_per_channel(weights)]
    version = _CONVOLUTIONS[node.op].get((source.dtype, weights.dtype), 1)
    if node.op == "CONV_2D" and weights.shape[-1:] != source.shape[-1:]:
        return max(version, 6)  # in groups
    return version


def _fully_connected(node, source, weights):
    if weights.dtype == "int2":
        return 14
    if weights.dtype == "int4":
        return 13 if source.dtype == "int16" else 10
    if source.dtype == "int16":
        return 7
    if source.dtype == "float32" and weights.dtype == "int8":
        return 12 if _per_channel(weights) else 3
    if node.attributes.get("keep_num_dims"):
        return 5
    return 4 if source.dtype == "int8" else 1


def _multiply(node, source, tensors):
    if source.dtype == "int16":
        return 4
    if source.dtype != "int8":
        return 1
    first, second = (tensors[name].scale for name in node.inputs[:2])
    return 3 if first * second / tensors[node.outputs[0]].scale >= 1 else 2
