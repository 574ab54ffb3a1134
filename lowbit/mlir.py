"""The second route: TensorFlow's MLIR converter on a fake-quant twin of the integer graph.

The twin computes in float what the graph computes in integers, each tensor between fake-quant
operations with its range.  The converter's result is never trusted unchecked: weight codes are
compared with the graph's, since its fake-quant path has silent faults (a bias whose entries are
all equal and not zero is quantized with channel 0's scale; 6-bit weights land on the 8-bit grid).
"""

import numpy as np

from lowbit import affine, integer_graph, tflite_file

PERTURBATION = 1e-3  # of a bias code: breaks the tie of a splat bias, and rounds away


def convert(graph: integer_graph.IntegerGraph) -> bytes:
    """Returns the `.tflite` bytes that the MLIR converter makes of the graph's twin.

    Input and output are int8, or float32 where the graph's are.

    Raises:
      ValueError: names the node that the twin or the converter cannot express, or whose weights
        came out changed.
    """
    import tensorflow as tf

    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise ValueError(
            f"--route=mlir takes one input and one output, not {len(graph.inputs)} and "
            f"{len(graph.outputs)}"
        )
    (name,) = graph.inputs
    twin = tf.function(
        _twin(graph), input_signature=[tf.TensorSpec(graph.tensors[name].shape, tf.float32)]
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([twin.get_concrete_function()])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    kinds = {"int8": tf.int8, "uint8": tf.uint8, "float32": tf.float32}
    if any(graph.tensors[key].dtype == "uint8" for key in (*graph.inputs, *graph.outputs)):
        raise ValueError("--route=mlir has no raw uint8 pixels; use --io=int8 or --route=direct")
    converter.inference_input_type = kinds[graph.tensors[name].dtype]
    converter.inference_output_type = kinds[graph.tensors[graph.outputs[0]].dtype]
    try:
        content = converter.convert()
    except Exception as error:  # ConverterError derives from Exception alone
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"the MLIR converter refuses the model: {line}") from error
    _check(graph, tflite_file.read(content))
    return content


def _twin(graph):
    import tensorflow as tf

    def fake_quantize(x, tensor):
        low, high = (
            affine.dequantize(np.array(code), tensor.scale, tensor.zero_point)
            for code in (-128, 127)
        )
        return tf.quantization.fake_quant_with_min_max_vars(x, float(low), float(high))

    def twin(x):
        (name,) = graph.inputs
        values = {name: x}
        if graph.tensors[name].dtype == "int8":
            values[name] = fake_quantize(x, graph.tensors[name])
        for node in graph.nodes:
            output = graph.tensors[node.outputs[0]]
            if node.op not in _TWINS:
                raise ValueError(f"node {node.name}: {node.op} has no twin for --route=mlir")
            y = _TWINS[node.op](node, [values.get(key) for key in node.inputs], graph)
            y = _activate(y, node.attributes.get("activation"))
            # Operations that keep their input's scale take no fake-quant of their own: it would
            # become a QUANTIZE operation.
            if node.op in _COMPUTES and output.dtype == "int8":
                y = fake_quantize(y, output)
            elif node.op == "QUANTIZE":
                y = fake_quantize(y, output)
            values[node.outputs[0]] = y
        return values[graph.outputs[0]]

    return twin


_COMPUTES = (
    *("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "SUB", "MUL", "MEAN", "SOFTMAX"),
    *("LOGISTIC", "TANH", "GELU", "LEAKY_RELU", "ELU", "PRELU", "RSQRT"),
)


def _activate(y, activation):
    import tensorflow as tf

    if activation == "RELU":
        return tf.nn.relu(y)
    if activation == "RELU6":
        return tf.nn.relu6(y)
    return y


def _weights(node, graph, as_convolution=False):
    """Returns the kernel fake-quantized, channels last, and the float bias."""
    import tensorflow as tf

    tensor, bias = (graph.tensors[key] for key in node.inputs[1:3])
    codes, scale = tensor.data, tensor.quantization.scale
    real = affine.dequantize(
        codes, scale, np.zeros(scale.shape, np.int64), tensor.quantization.axis
    )
    if tensor.quantization.axis == 0 or node.op != "DEPTHWISE_CONV_2D":
        real = np.moveaxis(real, 0, -1)
    if as_convolution:
        real = real[None, None]
    limit = 127 * scale
    if scale.size > 1:
        kernel = tf.quantization.fake_quant_with_min_max_vars_per_channel(
            real, -limit, limit, num_bits=8, narrow_range=True
        )
    else:
        kernel = tf.quantization.fake_quant_with_min_max_vars(
            real, float(-limit[0]), float(limit[0]), num_bits=8, narrow_range=True
        )
    steps = np.broadcast_to(bias.quantization.scale, bias.shape)
    values = bias.data * steps.astype(np.float64)
    if len(values) > 1 and values[0] != 0 and (values == values[0]).all():
        values[0] += PERTURBATION * steps[0]
    return kernel, values.astype(np.float32)


def _conv(node, inputs, graph):
    import tensorflow as tf

    kernel, bias = _weights(node, graph)
    attributes = node.attributes
    y = tf.nn.conv2d(
        inputs[0],
        kernel,
        attributes["strides"],
        attributes["padding"],
        dilations=attributes["dilations"],
    )
    return tf.nn.bias_add(y, bias)


def _depthwise(node, inputs, graph):
    import tensorflow as tf

    kernel, bias = _weights(node, graph)
    attributes = node.attributes
    _, height, width, channels = graph.tensors[node.inputs[1]].shape
    multiplier = attributes["depth_multiplier"]
    kernel = tf.reshape(kernel, (height, width, channels // multiplier, multiplier))
    y = tf.nn.depthwise_conv2d(
        inputs[0],
        kernel,
        (1, *attributes["strides"], 1),
        attributes["padding"],
        dilations=attributes["dilations"],
    )
    return tf.nn.bias_add(y, bias)


def _dense(node, inputs, graph):
    import tensorflow as tf

    per_channel = graph.tensors[node.inputs[1]].quantization.scale.size > 1
    kernel, bias = _weights(node, graph, as_convolution=per_channel)
    if not per_channel:
        return tf.nn.bias_add(tf.linalg.matmul(inputs[0], kernel), bias)
    # The converter cannot express a dense layer with a scale for each output ("tfl.transpose op
    # has mismatched quantized axes"): it becomes a 1x1 convolution between two reshapes.
    x = tf.reshape(inputs[0], (-1, 1, 1, inputs[0].shape[-1]))
    y = tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "VALID"), bias)
    return tf.reshape(y, graph.tensors[node.outputs[0]].shape)


def _pool(function):
    def pool(node, inputs, graph):
        import tensorflow as tf

        attributes = node.attributes
        return getattr(tf.nn, function)(
            inputs[0], attributes["filter"], attributes["strides"], attributes["padding"]
        )

    return pool


def _mean(node, inputs, graph):
    import tensorflow as tf

    axes = graph.tensors[node.inputs[1]].data.tolist()
    return tf.reduce_mean(inputs[0], axes, keepdims=node.attributes["keep_dims"])


def _prelu(node, inputs, graph):
    import tensorflow as tf

    alpha = graph.tensors[node.inputs[1]]
    below = alpha.data.astype(np.float32) * alpha.scale
    return tf.where(inputs[0] >= 0, inputs[0], inputs[0] * below)


def _with_tf(function):
    def apply(node, inputs, graph):
        import tensorflow as tf

        return function(tf, node, inputs, graph)

    return apply


_TWINS = {
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "FULLY_CONNECTED": _dense,
    "ADD": lambda node, inputs, graph: inputs[0] + inputs[1],
    "SUB": lambda node, inputs, graph: inputs[0] - inputs[1],
    "MUL": lambda node, inputs, graph: inputs[0] * inputs[1],
    "MAXIMUM": _with_tf(lambda tf, node, inputs, graph: tf.maximum(*inputs)),
    "MINIMUM": _with_tf(lambda tf, node, inputs, graph: tf.minimum(*inputs)),
    "TRANSPOSE": _with_tf(
        lambda tf, node, inputs, graph: tf.transpose(inputs[0], graph.tensors[node.inputs[1]].data)
    ),
    "RESIZE_NEAREST_NEIGHBOR": _with_tf(
        lambda tf, node, inputs, graph: tf.compat.v1.image.resize_nearest_neighbor(
            inputs[0], graph.tensors[node.inputs[1]].data
        )
    ),
    "MEAN": _mean,
    "AVERAGE_POOL_2D": _pool("avg_pool2d"),
    "MAX_POOL_2D": _pool("max_pool2d"),
    "CONCATENATION": _with_tf(
        lambda tf, node, inputs, graph: tf.concat(inputs, node.attributes["axis"])
    ),
    "PAD": _with_tf(
        lambda tf, node, inputs, graph: tf.pad(inputs[0], graph.tensors[node.inputs[1]].data)
    ),
    "SLICE": _with_tf(
        lambda tf, node, inputs, graph: tf.slice(
            inputs[0], *(graph.tensors[key].data for key in node.inputs[1:])
        )
    ),
    "RESHAPE": _with_tf(
        lambda tf, node, inputs, graph: tf.reshape(inputs[0], node.attributes["new_shape"])
    ),
    "LOGISTIC": _with_tf(lambda tf, node, inputs, graph: tf.sigmoid(inputs[0])),
    "GELU": _with_tf(lambda tf, node, inputs, graph: tf.nn.gelu(inputs[0])),
    "LEAKY_RELU": _with_tf(
        lambda tf, node, inputs, graph: tf.nn.leaky_relu(inputs[0], node.attributes["alpha"])
    ),
    "ELU": _with_tf(lambda tf, node, inputs, graph: tf.nn.elu(inputs[0])),
    "RSQRT": _with_tf(lambda tf, node, inputs, graph: tf.math.rsqrt(inputs[0])),
    "PRELU": _prelu,
    "STRIDED_SLICE": _with_tf(
        lambda tf, node, inputs, graph: tf.strided_slice(
            inputs[0], *(graph.tensors[key].data for key in node.inputs[1:])
        )
    ),
    "DEPTH_TO_SPACE": _with_tf(
        lambda tf, node, inputs, graph: tf.nn.depth_to_space(
            inputs[0], node.attributes["block_size"]
        )
    ),
    "SPACE_TO_DEPTH": _with_tf(
        lambda tf, node, inputs, graph: tf.nn.space_to_depth(
            inputs[0], node.attributes["block_size"]
        )
    ),
    "TANH": _with_tf(lambda tf, node, inputs, graph: tf.tanh(inputs[0])),
    "SOFTMAX": _with_tf(lambda tf, node, inputs, graph: tf.nn.softmax(inputs[0])),
    "RELU": _with_tf(lambda tf, node, inputs, graph: tf.nn.relu(inputs[0])),
    "RELU6": _with_tf(lambda tf, node, inputs, graph: tf.nn.relu6(inputs[0])),
    "QUANTIZE": lambda node, inputs, graph: inputs[0],
    "DEQUANTIZE": lambda node, inputs, graph: inputs[0],
}


def _check(graph, converted):
    def weighted(nodes):
        ops = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
        return [node for node in nodes if node.op in ops]

    ours, theirs = weighted(graph.nodes), weighted(converted.nodes)
    if len(ours) != len(theirs):
        raise ValueError(
            f"the MLIR converter made {len(theirs)} operations with weights of {len(ours)}"
        )
    for node, other in zip(ours, theirs, strict=True):
        codes = graph.tensors[node.inputs[1]].data
        converted_codes = converted.tensors[other.inputs[1]].data
        bias = graph.tensors[node.inputs[2]].data
        converted_bias = converted.tensors[other.inputs[2]].data
        if converted_codes is None or converted_codes.size != codes.size:
            raise ValueError(f"node {node.name}: the MLIR converter changed the weights' size")
        differing = int((converted_codes.reshape(-1) != codes.reshape(-1)).sum())
        if differing:
            raise ValueError(
                f"node {node.name}: the MLIR converter changed {differing} of {codes.size} weight codes"
            )
        worst = int(np.abs(converted_bias.astype(np.int64) - bias).max())
        if worst > 1:
            raise ValueError(
                f"node {node.name}: the MLIR converter moved a bias by {worst} codes (1 is allowed)"
            )
