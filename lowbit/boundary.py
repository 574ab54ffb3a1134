"""Other inputs and outputs for an integer graph: raw uint8 pixels in, or float32 in and out."""

import dataclasses

import numpy as np

from lowbit import affine, integer_graph
from lowbit.data import preprocess as preprocessing


def with_float_io(graph: integer_graph.IntegerGraph) -> integer_graph.IntegerGraph:
    """Returns the graph with QUANTIZE before each input and DEQUANTIZE after each output."""
    tensors, nodes = dict(graph.tensors), list(graph.nodes)
    inputs, outputs = [], []
    for name in graph.inputs:
        if graph.tensors[name].dtype == "float32":
            inputs.append(name)
            continue
        outer = _renamed(tensors, f"{name}_float", graph.tensors[name], "float32")
        nodes.insert(0, integer_graph.Node("QUANTIZE", f"{name}_quantize", (outer,), (name,)))
        inputs.append(outer)
    for name in graph.outputs:
        if graph.tensors[name].dtype == "float32":
            outputs.append(name)
            continue
        outer = _renamed(tensors, f"{name}_float", graph.tensors[name], "float32")
        nodes.append(integer_graph.Node("DEQUANTIZE", f"{name}_dequantize", (name,), (outer,)))
        outputs.append(outer)
    return dataclasses.replace(
        graph, tensors=tensors, nodes=tuple(nodes), inputs=tuple(inputs), outputs=tuple(outputs)
    )


def with_pixel_io(
    graph: integer_graph.IntegerGraph, preprocess: preprocessing.Preprocess
) -> integer_graph.IntegerGraph:
    """Returns the graph with uint8 pixels (0..255, RGB) in and uint8 codes out.

    QUANTIZE subtracts 128; a 1x1 convolution computes normalized = scale[c] * pixel + offset[c] in
    integers (and reverses the channels where the preprocess says so); the output's codes move up
    by 128.

    Raises:
      ValueError: where the graph has not exactly one image input.
    """
    if len(graph.inputs) != 1 or len(graph.tensors[graph.inputs[0]].shape) != 4:
        raise ValueError(f"--io=uint8 needs one image input; this model has {graph.inputs}")
    (name,) = graph.inputs
    inner = graph.tensors[name]
    for each in (name, *graph.outputs):
        if graph.tensors[each].dtype != "int8":
            raise ValueError(
                f"--io=uint8 needs int8 activations; {each} is {graph.tensors[each].dtype}"
            )
    channels = inner.shape[-1]
    tensors, nodes = dict(graph.tensors), []
    pixels = _renamed(tensors, f"{name}_pixels", inner, "uint8", np.float32(1), 0)
    shifted = _renamed(tensors, f"{name}_shifted", inner, "int8", np.float32(1), -128)
    nodes.append(integer_graph.Node("QUANTIZE", f"{name}_shift", (pixels,), (shifted,)))

    scale, offset = preprocessing.affine(preprocess, channels)
    weight_scale = (np.abs(scale) / 127).astype(np.float32)
    matrix = np.diag(np.rint(scale / weight_scale)).astype(np.int8)
    if preprocess.bgr:
        matrix = matrix[:, ::-1]
    bias, bias_scale = affine.quantize_bias(offset, np.float32(1), weight_scale)
    weights = np.ascontiguousarray(matrix).reshape(channels, 1, 1, channels)
    for constant, data, constant_scale in (
        (f"{name}_normalize/kernel", weights, weight_scale),
        (f"{name}_normalize/bias", bias, bias_scale),
    ):
        quantization = integer_graph.Quantization(
            constant_scale, np.zeros(channels, np.int64), 0 if channels > 1 else None
        )
        tensors[constant] = integer_graph.Tensor(
            constant, data.shape, str(data.dtype), quantization, data
        )
    nodes.append(
        integer_graph.Node(
            "CONV_2D",
            f"{name}_normalize",
            (shifted, f"{name}_normalize/kernel", f"{name}_normalize/bias"),
            (name,),
            {"strides": (1, 1), "dilations": (1, 1), "padding": "VALID", "activation": None},
        )
    )
    nodes.extend(graph.nodes)
    outputs = []
    for output in graph.outputs:
        tensor = graph.tensors[output]
        outer = _renamed(
            tensors, f"{output}_uint8", tensor, "uint8", tensor.scale, tensor.zero_point + 128
        )
        nodes.append(integer_graph.Node("QUANTIZE", f"{output}_shift", (output,), (outer,)))
        outputs.append(outer)
    return dataclasses.replace(
        graph, tensors=tensors, nodes=tuple(nodes), inputs=(pixels,), outputs=tuple(outputs)
    )


def _renamed(tensors, name, like, dtype, scale=None, zero_point=0) -> str:
    quantization = None
    if dtype != "float32":
        quantization = integer_graph.Quantization(
            np.asarray([scale], np.float32), np.asarray([zero_point], np.int64)
        )
    tensors[name] = integer_graph.Tensor(name, like.shape, dtype, quantization)
    return name
