"""What runs a node in the default interpreter: XNNPACK, a built-in kernel, or nothing at all."""

from lowbit import integer_graph
from lowbit.kernels import requantization

# XNNPACK delegate's bounds on real multipliers; outside them it leaves the node, or fails.
CONVOLUTION_MULTIPLIER_BELOW = 2.0**8  # at or above it the interpreter refuses the whole model
ADD_RATIO_RANGE = (2.0**-10, 2.0**8)  # input scale / output scale, upper end excluded
MULTIPLY_RANGE = (2.0**-16, 2.0**8)  # product of input scales / output scale, upper end excluded
REQUANTIZE_RANGE = (2.0**-8, 2.0**7)  # input scale / output scale, both ends included
CONCATENATION_INPUTS = 5  # at most
_CHANNELS_OF_PACKED = {"int4": 2, "int2": 4}  # dense: rows must be whole bytes

_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED")

_SAME_SCALE = (
    *("MAX_POOL_2D", "CONCATENATION", "PAD", "RESHAPE", "SLICE", "TRANSPOSE", "MAXIMUM", "MINIMUM"),
    *("RESIZE_BILINEAR", "DEPTH_TO_SPACE", "SPACE_TO_DEPTH"),
)
LEFT = (  # whatever their scales
    *("SOFTMAX", "RELU", "RELU6", "RELU_0_TO_1", "GELU", "PRELU", "RSQRT", "STRIDED_SLICE"),
    *("AVERAGE_POOL_2D", "RESIZE_NEAREST_NEIGHBOR"),
)
_JOINS = ("CONCATENATION", "MAXIMUM", "MINIMUM")  # every input has codes


def placement_of(
    graph: integer_graph.IntegerGraph, node: integer_graph.Node, kernels: str = "xnnpack"
) -> tuple[str, str]:
    """Returns (kernel, reason): what runs an integer node in an interpreter.

    The kernel is "xnnpack" or "reference" (the reason is then empty), "builtin", or "refused" where
    the whole model fails to load: the delegate claims the node but cannot prepare it, or no kernel
    takes the node's types.  Found by experiment on ai-edge-litert 2.3, and equal to the bounds in the
    delegate's source.

    Args:
      kernels: "xnnpack" for the default interpreter, "reference" for BUILTIN_REF.
    """
    refused = _unsupported(graph, node, kernels)
    if refused:
        return "refused", refused
    if kernels in ("reference", "micro"):
        return kernels, ""
    if any(graph.tensors[name].dtype == "int16" for name in (*node.inputs, *node.outputs)):
        return "builtin", f"the delegate takes no 16-bit {node.op}"
    left = _packed_reason(graph, node) or _transposed_reason(graph, node)
    if left:
        return "builtin", left
    if node.op in LEFT:
        return "builtin", f"the delegate takes no 8-bit {node.op}"
    ranged = _ratio_reason(graph, node)
    if ranged:
        return ranged
    if node.op in _SAME_SCALE:
        return _same_scale_placement(graph, node)
    if node.op == "QUANTIZE":
        source, target = (graph.tensors[name] for name in (node.inputs[0], node.outputs[0]))
        if source.dtype != "float32" and source.dtype != target.dtype:
            return "builtin", f"the delegate does not requantize {source.dtype} to {target.dtype}"
    return "xnnpack", ""


def _unsupported(graph, node, kernels):
    """Returns why no kernel takes the node's types, or takes them and computes wrongly; else None."""
    if kernels == "micro":
        return _micro_reason(graph, node)
    if node.op == "ELU" and kernels == "reference":
        return "BUILTIN_REF has no ELU of 8 bits"
    if node.op == "DEPTH_TO_SPACE" and kernels == "reference":
        return "BUILTIN_REF has no DEPTH_TO_SPACE of version 2, of 8 bits"
    if node.op == "ELU" and graph.tensors[node.inputs[0]].dtype == "int16":
        return f"no kernel takes 16-bit {node.op}"
    if node.op not in _WEIGHTED:
        return None
    source, weight = (tensor.dtype for tensor in requantization.weighted_tensors(graph, node)[:2])
    if weight in _CHANNELS_OF_PACKED and node.op == "TRANSPOSE_CONV":
        return "no kernel takes packed weights of TRANSPOSE_CONV"
    if weight == "int2" and node.op != "FULLY_CONNECTED":
        return f"no kernel takes 2-bit weights of {node.op}"
    if weight == "int4" and node.op == "DEPTHWISE_CONV_2D":
        if source == "int16":
            return "the kernel computes wrongly with 4-bit weights and 16-bit activations"
        if kernels == "reference":
            return "BUILTIN_REF has no DEPTHWISE_CONV_2D of version 7, with 4-bit weights"
    return None


def _micro_reason(graph, node):
    """Returns why TensorFlow Lite Micro has no kernel for a node, or we none like it; else None."""
    if node.op in ("GELU", "RELU_0_TO_1"):
        return f"TensorFlow Lite Micro has no {node.op}"
    dtypes = {graph.tensors[name].dtype for name in (*node.inputs, *node.outputs)}
    if "int2" in dtypes:
        return "TensorFlow Lite Micro has no 2-bit weights"
    if "int16" in dtypes:
        return "its kernels of 16 bits are not simulated, those of 8 bits are"
    return None


def _packed_reason(graph, node):
    """Returns why the delegate leaves a node with packed weights, or None."""
    if node.op not in _WEIGHTED:
        return None
    weight = graph.tensors[node.inputs[1]]
    if weight.dtype not in _CHANNELS_OF_PACKED:
        return None
    if node.op != "FULLY_CONNECTED":
        return f"the delegate takes no packed weights of {node.op}"
    multiple = _CHANNELS_OF_PACKED[weight.dtype]
    if weight.shape[1] % multiple:
        return f"{weight.shape[1]} input channels of packed weights are no multiple of {multiple}"
    if weight.dtype == "int2" and weight.quantization.scale.size != weight.shape[0]:
        return "the delegate takes 2-bit weights with a scale for each channel alone"
    return None


def _transposed_reason(graph, node):
    """Returns why the delegate leaves a TRANSPOSE_CONV, or None."""
    if node.op != "TRANSPOSE_CONV":
        return None
    _, weight, output = requantization.weighted_tensors(graph, node)
    window, strides = weight.shape[1:3], tuple(node.attributes["strides"])
    if node.attributes["padding"] == "SAME":
        if any(size < stride for size, stride in zip(window, strides, strict=True)):
            return f"strides {strides} exceed the window {window} of padding SAME"
    elif any(size < reach for size, reach in zip(output.shape[1:3], window, strict=True)):
        return f"the output {output.shape[1:3]} is smaller than the window {window}"
    return None


def _ratio_reason(graph, node):
    if node.op in _WEIGHTED:
        largest = float(requantization.weighted_scale_fp32(graph, node).max())
        if largest >= CONVOLUTION_MULTIPLIER_BELOW:
            return "refused", (
                f"input scale * weight scale / output scale = {largest:.6g}; the default "
                f"interpreter loads only models where it is below {CONVOLUTION_MULTIPLIER_BELOW:g}"
            )
        return None
    if node.op in ("ADD", "SUB"):
        output = graph.tensors[node.outputs[0]].scale
        for name in node.inputs:
            ratio = graph.tensors[name].scale / output
            if not ADD_RATIO_RANGE[0] <= ratio < ADD_RATIO_RANGE[1]:
                return "builtin", (
                    f"scale of {name!r} / output scale = {ratio:.6g} is outside "
                    f"[{ADD_RATIO_RANGE[0]:g}, {ADD_RATIO_RANGE[1]:g})"
                )
        return None
    if node.op == "MUL":
        ratio = requantization.product_scale(graph, node)
        if not MULTIPLY_RANGE[0] <= ratio < MULTIPLY_RANGE[1]:
            return "builtin", (
                f"product of the input scales / output scale = {ratio:.6g} is outside "
                f"[{MULTIPLY_RANGE[0]:g}, {MULTIPLY_RANGE[1]:g})"
            )
        return None
    if node.op == "LEAKY_RELU":
        for ratio in requantization.leaky_ratios(graph, node):
            if not REQUANTIZE_RANGE[0] <= abs(ratio) <= REQUANTIZE_RANGE[1]:
                return "builtin", (
                    f"input scale / output scale, or alpha times it, = {ratio:.6g} is outside "
                    f"[{REQUANTIZE_RANGE[0]:g}, {REQUANTIZE_RANGE[1]:g}]"
                )
    if node.op == "QUANTIZE" and graph.tensors[node.inputs[0]].dtype != "float32":
        ratio = graph.tensors[node.inputs[0]].scale / graph.tensors[node.outputs[0]].scale
        if not REQUANTIZE_RANGE[0] <= ratio <= REQUANTIZE_RANGE[1]:
            return "builtin", (
                f"input scale / output scale = {ratio:.6g} is outside "
                f"[{REQUANTIZE_RANGE[0]:g}, {REQUANTIZE_RANGE[1]:g}]"
            )
    return None


def _same_scale_placement(graph, node):
    if node.op == "CONCATENATION" and len(node.inputs) > CONCATENATION_INPUTS:
        return "builtin", (
            f"{len(node.inputs)} inputs; the delegate takes at most {CONCATENATION_INPUTS}"
        )
    if node.op == "MAX_POOL_2D":
        window, strides = node.attributes["filter"], node.attributes["strides"]
        if any(stride > size for size, stride in zip(window, strides, strict=True)):
            return "builtin", f"strides {tuple(strides)} exceed the filter {tuple(window)}"
    if node.op == "SLICE" and (graph.tensors[node.inputs[2]].data < 0).any():
        return "builtin", "the delegate takes no size of -1 (all that is left)"
    differing = differing_map(graph, node)
    if differing:
        kernel = "builtin" if node.op == "RESHAPE" else "refused"
        return kernel, f"{differing!r} has another scale or zero point than the output"
    return "xnnpack", ""


def differing_map(graph, node):
    """Returns the first data input whose affine map is not the output's, or None."""
    output = graph.tensors[node.outputs[0]]
    names = node.inputs if node.op in _JOINS else node.inputs[:1]
    for name in names:
        tensor = graph.tensors[name]
        if tensor.scale != output.scale or tensor.zero_point != output.zero_point:
            return name
    return None
