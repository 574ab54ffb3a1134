"""Layers without an integer form: TensorFlow's converter makes their operations, which run in float.

Each is converted alone, by itself, with batch size 1; what comes back is checked (built-in operations,
one subgraph, float32 in and out) and put between a DEQUANTIZE and a QUANTIZE with our ranges.
"""

from collections.abc import Sequence

import keras

from lowbit import integer_graph, tflite_file
from lowbit.functional import UnsupportedModelError


def converted(
    layer: keras.layers.Layer, shapes: Sequence[tuple[int, ...]]
) -> integer_graph.IntegerGraph:
    """Returns the operations of a layer, float32, as a graph with an input for each shape.

    Args:
      layer: in inference; takes one tensor, or a list of them.
      shapes: of its inputs, the batch of 1 counted.

    Raises:
      UnsupportedModelError: names the layer and what the converter, or the file format, cannot do.
    """
    if keras.backend.backend() != "tensorflow":
        raise UnsupportedModelError(
            f"layer {layer.name} has no integer form, and only KERAS_BACKEND=tensorflow has a "
            "converter that keeps it in float"
        )
    import tensorflow as tf

    @tf.function(
        input_signature=[
            tf.TensorSpec(shape, tf.float32, name=f"input_{number}")
            for number, shape in enumerate(shapes)
        ]
    )
    def computed(*tensors):
        return layer(list(tensors) if len(tensors) > 1 else tensors[0], training=False)

    try:
        # Without the layer as trackable: its variables become constants.
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [computed.get_concrete_function()]
        )
        content = converter.convert()
    except Exception as error:  # ConverterError derives from Exception alone
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedModelError(
            f"layer {layer.name} has no integer form, and the converter refuses it: {lines[0][:300]}"
        ) from error
    subgraphs = len(tflite_file.parse(content, layer.name).subgraphs)
    graph = tflite_file.read(content, layer.name, verbatim=True)
    custom = [node.op for node in graph.nodes if node.op == "CUSTOM"]
    ends = [graph.tensors[name] for name in (*graph.inputs, *graph.outputs)]
    if subgraphs > 1 or custom or len(graph.outputs) != 1 or len(graph.inputs) != len(shapes):
        raise UnsupportedModelError(
            f"layer {layer.name} has no integer form, and in float it becomes {subgraphs} subgraphs "
            f"with {len(custom)} custom operations, {len(graph.inputs)} inputs and "
            f"{len(graph.outputs)} outputs; 1 subgraph of built-in operations with 1 output is allowed"
        )
    if any(tensor.dtype != "float32" or -1 in tensor.shape for tensor in ends):
        raise UnsupportedModelError(
            f"layer {layer.name} has no integer form, and in float it has other than float32 tensors "
            "of fixed shapes at its ends"
        )
    return graph
