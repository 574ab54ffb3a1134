"""The integer graph run in NumPy, giving the codes that a TFLite interpreter computes.

Two flavours, because "bit exact" needs a backend's name:

  reference   the interpreter with its reference kernels: fixed-point requantization
  xnnpack     the default interpreter: XNNPACK where its delegate takes the node, else the optimized
              built-in kernel; `placement_of` says which and why

| op                | reference and built-in                  | XNNPACK                            |
|-------------------|-----------------------------------------|------------------------------------|
| convolutions      | fixed point, two roundings              | rint(float32(accumulator) * scale) |
| FULLY_CONNECTED   | fixed point, one rounding               | the same                           |
| ADD, SUB          | both inputs * 2^20, three multipliers   | two 21-bit multipliers, one shift  |
| MUL               | fixed point, two roundings              | rint(float32(product) * scale)     |
| MEAN              | fixed point with 1/n in the multiplier  | rint(float32(sum) * scale / n)     |
| AVERAGE_POOL_2D   | sum / n, ties away from zero            | not delegated                      |
| RELU, RELU6       | fixed point, then clamp                 | not delegated                      |
| SOFTMAX           | reference: fixed-point exponential;     | not delegated                      |
|                   | built-in: float32 table of exponentials |                                    |
| LOGISTIC, TANH    | reference: fixed point;                 | float32 table                      |
|                   | built-in: float32 table                 |                                    |
| LEAKY_RELU        | fixed point, two roundings              | 8 fractional bits                  |
| GELU              | float32 table                           | not delegated                      |
| QUANTIZE, int8    | fixed point                             | 8 fractional bits (int8 to int8)   |
| QUANTIZE, float32 | divide, ties away from zero             | times 1/scale, ties to even        |
| the others        | move or select codes                    | the same                           |

All of these give the codes of an interpreter on x86 exactly, except the built-in ADD and MUL of
extreme scale ratios (see there).  On ARM these can differ by 1 near ties: XNNPACK's MUL, and its
convolutions and FULLY_CONNECTED with one scale for all channels, which are fixed point there
("rndnu"); MEAN where the compiler fuses multiply and add; SOFTMAX, which uses 16-bit tables.

Arrays have a free leading batch dimension, whatever batch the graph's shapes state; every image is
computed as a batch of 1 would be.  Accumulators are exact: products run in float32 where the
weights prove |accumulator| < 2^24, else in float64.  They are not wrapped to int32, as no kernel
defines that overflow.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lowbit import fixed_point, integer_graph

FLAVOURS = ("xnnpack", "reference")
BLOCK_BYTES = 64 * 2**20  # of a convolution's arrays at a time; larger blocks are no faster

# XNNPACK delegate's bounds on real multipliers; outside them it leaves the node, or fails.
CONVOLUTION_MULTIPLIER_BELOW = 2.0**8  # at or above it the interpreter refuses the whole model
ADD_RATIO_RANGE = (2.0**-10, 2.0**8)  # input scale / output scale, upper end excluded
MULTIPLY_RANGE = (2.0**-16, 2.0**8)  # product of input scales / output scale, upper end excluded
REQUANTIZE_RANGE = (2.0**-8, 2.0**7)  # input scale / output scale, both ends included
CONCATENATION_INPUTS = 5  # at most

_SAME_SCALE = (
    *("MAX_POOL_2D", "CONCATENATION", "PAD", "RESHAPE", "SLICE", "TRANSPOSE", "MAXIMUM", "MINIMUM"),
    "RESIZE_NEAREST_NEIGHBOR",
)
_JOINS = ("CONCATENATION", "MAXIMUM", "MINIMUM")  # every input has codes


# --- run ----------------------------------------------------------------------------------------


def run(
    graph: integer_graph.IntegerGraph,
    inputs: Mapping[str, np.ndarray],
    kernels: str = "xnnpack",
    outputs: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Returns the named tensors' codes; a tensor is freed when no later node reads it.

    Args:
      graph: nodes in running order.
      inputs: array of every graph input, (batch, ...), of the input tensor's dtype.
      kernels: one of `FLAVOURS`.
      outputs: tensors to return, also intermediate ones; the graph's outputs if None.

    Raises:
      ValueError: an input is missing, or has another dtype or shape than its tensor; an output is
        never computed; a node's operation is unknown or refused by the interpreter.
    """
    wanted = tuple(graph.outputs if outputs is None else outputs)
    _check_inputs(graph, inputs)
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    values = dict(inputs)
    for i, node in enumerate(graph.nodes):
        arrays = [_value(graph, node, name, values) for name in node.inputs]
        values.update(zip(node.outputs, run_node(graph, node, arrays, kernels), strict=True))
        for name in {*node.inputs, *node.outputs}:
            if last_use.get(name, -1) <= i and name not in wanted:
                values.pop(name, None)
    missing = [name for name in wanted if name not in values]
    if missing:
        raise ValueError(f"no node of graph {graph.name!r} computes {missing}")
    return {name: values[name] for name in wanted}


def run_node(
    graph: integer_graph.IntegerGraph,
    node: integer_graph.Node,
    inputs: Sequence[np.ndarray],
    kernels: str,
) -> list[np.ndarray]:
    """Returns the node's outputs as its kernel computes them; `inputs` include the constants.

    Raises:
      ValueError: the operation is unknown, or the default interpreter refuses the model for it.
    """
    if kernels not in FLAVOURS:
        raise ValueError(f"kernels must be one of {FLAVOURS}, got {kernels!r}")
    if node.op not in _KERNELS:
        raise ValueError(
            f"node {node.name!r}: no kernel for {node.op!r}; there is one for {sorted(_KERNELS)}"
        )
    kernel = kernels
    if kernels == "xnnpack":
        kernel, reason = placement_of(graph, node)
        if kernel == "refused":
            raise ValueError(f"node {node.name!r} ({node.op}): {reason}")
    return [_KERNELS[node.op](graph, node, list(inputs), kernel)]


def _check_inputs(graph, inputs):
    for name in graph.inputs:
        if name not in inputs:
            raise ValueError(f"input {name!r} is missing; given: {sorted(inputs)}")
        tensor, array = graph.tensors[name], inputs[name]
        if array.dtype.name != tensor.dtype or array.shape[1:] != tuple(tensor.shape[1:]):
            raise ValueError(
                f"input {name!r} must be {tensor.dtype} of shape (batch, "
                f"{', '.join(map(str, tensor.shape[1:]))}), got {array.dtype.name} {array.shape}"
            )


def _value(graph, node, name, values):
    if name in values:
        return values[name]
    tensor = graph.tensors.get(name)
    if tensor is None or tensor.data is None:
        raise ValueError(f"node {node.name!r} reads {name!r}, which nothing has computed")
    return tensor.data


# --- placement ----------------------------------------------------------------------------------


def placement_of(graph: integer_graph.IntegerGraph, node: integer_graph.Node) -> tuple[str, str]:
    """Returns (kernel, reason): what runs an 8-bit node in the default interpreter.

    The kernel is "xnnpack" (the reason is then empty), "builtin", or "refused" where the delegate
    claims the node but cannot prepare it, so that the whole model fails to load.  Found by
    experiment on ai-edge-litert 2.3, and equal to the bounds in the delegate's source.
    """
    if node.op in ("SOFTMAX", "RELU", "RELU6", "GELU", "AVERAGE_POOL_2D"):
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


def _ratio_reason(graph, node):
    if node.op in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
        largest = float(_weighted_scale_fp32(graph, node).max())
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
        ratio = _product_scale(graph, node)
        if not MULTIPLY_RANGE[0] <= ratio < MULTIPLY_RANGE[1]:
            return "builtin", (
                f"product of the input scales / output scale = {ratio:.6g} is outside "
                f"[{MULTIPLY_RANGE[0]:g}, {MULTIPLY_RANGE[1]:g})"
            )
        return None
    if node.op == "LEAKY_RELU":
        for ratio in _leaky_ratios(graph, node):
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
    differing = _differing_map(graph, node)
    if differing:
        kernel = "builtin" if node.op == "RESHAPE" else "refused"
        return kernel, f"{differing!r} has another scale or zero point than the output"
    return "xnnpack", ""


def _differing_map(graph, node):
    """Returns the first data input whose affine map is not the output's, or None."""
    output = graph.tensors[node.outputs[0]]
    names = node.inputs if node.op in _JOINS else node.inputs[:1]
    for name in names:
        tensor = graph.tensors[name]
        if tensor.scale != output.scale or tensor.zero_point != output.zero_point:
            return name
    return None


# --- scales, clamps and requantization ----------------------------------------------------------


def _product_scale(graph, node):
    """Returns scale_a * scale_b / scale_output in float32, as the kernels compute it for MUL."""
    first, second = (graph.tensors[name].scale for name in node.inputs)
    return first * second / graph.tensors[node.outputs[0]].scale


def _weighted_scale_fp32(graph, node):
    """Returns input_scale * weight_scale / output_scale in float32, (1,) or (channels,)."""
    source, weight, output = _names(graph, node, node.inputs[0], node.inputs[1], node.outputs[0])
    return source.scale * weight.quantization.scale / output.scale


def _weighted_scale_double(graph, node):
    """Returns input_scale * weight_scale / output_scale in float64, (1,) or (channels,).

    FULLY_CONNECTED with one weight scale multiplies the two float32 scales in float32 first.
    """
    source, weight, output = _names(graph, node, node.inputs[0], node.inputs[1], node.outputs[0])
    scale = weight.quantization.scale
    if node.op == "FULLY_CONNECTED" and scale.size == 1:
        return np.float64(source.scale * scale) / np.float64(output.scale)
    return np.float64(source.scale) * np.float64(scale) / np.float64(output.scale)


def _names(graph, node, *names):
    return tuple(graph.tensors[name] for name in names)


def _quantized_bound(value, tensor, kernel):
    """Returns the code of a clamp's real bound.

    XNNPACK rounds value / scale + zero_point with ties to even, the built-in kernels round
    value / scale with ties away from zero: RELU6 on scale 2.4 and zero point 3 is clamped at
    2.5 + 3 = 5.5, code 6 here and there, but at zero point 4 at code 6 or 7.
    """
    centred = np.float32(value) / tensor.scale
    if kernel == "xnnpack":
        return int(np.rint(centred + np.float32(tensor.zero_point)))
    return int(_round_half_away(centred)) + tensor.zero_point


def _clamp_range(node, tensor, kernel):
    """Returns the (lowest, highest) output code that the fused activation lets through."""
    low, high = np.iinfo(tensor.dtype).min, np.iinfo(tensor.dtype).max
    activation = node.attributes.get("activation")
    if node.op in ("RELU", "RELU6"):
        activation = node.op
    bounds = {None: (None, None), "RELU": (0, None), "RELU6": (0, 6), "RELU_N1_TO_1": (-1, 1)}
    if activation not in bounds:
        raise ValueError(
            f"node {node.name!r}: activation must be one of {sorted(map(str, bounds))}, "
            f"got {activation!r}"
        )
    lower, upper = bounds[activation]
    if lower is not None:
        low = max(low, _quantized_bound(lower, tensor, kernel))
    if upper is not None:
        high = min(high, _quantized_bound(upper, tensor, kernel))
    return low, high


def _round_half_away(x):
    """Returns x rounded to nearest, ties away from zero, in the dtype of x: C's round()."""
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= 0.5, np.sign(x), x.dtype.type(0))


def _finish(centred, node, tensor, kernel):
    """Returns codes: adds the zero point to `centred` codes, clamps, and casts."""
    low, high = _clamp_range(node, tensor, kernel)
    zero_point = tensor.zero_point
    # Clamping first keeps float32 exact: the sum with the zero point stays below 2^9.
    clamped = np.clip(centred, low - zero_point, high - zero_point)
    return (clamped + zero_point).astype(tensor.dtype)


def _requantize(accumulator, double_scale, node, tensor, kernel, fp32_scale):
    """Returns output codes of an accumulator.

    Args:
      accumulator: (..., channels); whole numbers, int64 unless the kernel is XNNPACK's.
      double_scale: real multiplier in float64, (channels,), (1,) or scalar, of fixed point.
      fp32_scale: real multiplier in float32, of the same shape, of XNNPACK.
    """
    if kernel == "xnnpack":
        centred = fixed_point.requantize_fp32(accumulator, fp32_scale)
    else:
        # Of the reference kernels only FULLY_CONNECTED rounds once.
        multiply = fixed_point.multiply_by_quantized_multiplier
        if node.op == "FULLY_CONNECTED":
            multiply = fixed_point.multiply_by_quantized_multiplier_single_rounding
        centred = multiply(accumulator, *fixed_point.quantize_multiplier(double_scale))
    return _finish(centred, node, tensor, kernel)


def _centred(array, tensor, dtype=np.int64):
    """Returns code - zero_point in the given dtype."""
    return np.subtract(array, tensor.zero_point, dtype=dtype)


# --- convolutions -------------------------------------------------------------------------------


def _same_padding(size, window, stride):
    """Returns (before, after) of SAME padding; an odd element goes after (TensorFlow)."""
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def _padding(node, shape, window):
    """Returns ((top, bottom), (left, right)) of an image (batch, height, width, channels).

    Args:
      window: (height, width) that the filter spans, dilation included.
    """
    kind = node.attributes["padding"]
    if kind == "VALID":
        return (0, 0), (0, 0)
    if kind != "SAME":
        raise ValueError(f"node {node.name!r}: padding must be SAME or VALID, got {kind!r}")
    strides = node.attributes["strides"]
    return tuple(_same_padding(*sizes) for sizes in zip(shape[1:3], window, strides, strict=True))


def _pad_image(image, padding, value=0):
    if padding == ((0, 0), (0, 0)):
        return image
    return np.pad(image, ((0, 0), *padding, (0, 0)), constant_values=value)


def _tap(image, row, column, strides, out_shape):
    """Returns the view (batch, rows, columns, channels) that one filter tap sees."""
    row_stop = row + strides[0] * (out_shape[0] - 1) + 1
    column_stop = column + strides[1] * (out_shape[1] - 1) + 1
    return image[:, row : row_stop : strides[0], column : column_stop : strides[1]]


def _output_size(image, span, strides):
    return tuple((image.shape[1 + i] - span[i]) // strides[i] + 1 for i in range(2))


def _accumulator_dtype(weight, axes, bias):
    """Returns float32 where every partial sum is provably below 2^24 and so exact, else float64.

    The bound is sum |w| * 255 + |bias|: no code lies further than 255 from its zero point.
    """
    bound = np.abs(weight.astype(np.int64)).sum(axis=axes).reshape(-1) * 255
    if bias is not None:
        bound = bound + np.abs(bias.astype(np.int64))
    return np.float32 if bound.max() < 2**24 else np.float64


def _weighted(graph, node, inputs, kernel, axes, accumulate):
    """Returns codes of a convolution or dense layer whose products `accumulate` sums.

    Args:
      axes: of the weights, to sum over for the bound on one output channel's accumulator.
      accumulate: (centred input, weight in the same dtype) -> (..., channels) sums.
    """
    source, output = _names(graph, node, node.inputs[0], node.outputs[0])
    weight = inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    dtype = _accumulator_dtype(weight, axes, bias)
    double_scale = _weighted_scale_double(graph, node)
    fp32_scale = _weighted_scale_fp32(graph, node)
    blocks = []
    images = _block_images(weight, output)
    for start in range(0, len(inputs[0]), images):
        image = _centred(inputs[0][start : start + images], source, dtype)
        sums = accumulate(image, weight.astype(dtype))
        if bias is not None:
            sums += bias.astype(dtype)
        if kernel != "xnnpack":
            sums = sums.astype(np.int64)
        blocks.append(_requantize(sums, double_scale, node, output, kernel, fp32_scale))
    return np.concatenate(blocks)


def _block_images(weight, output):
    """Returns how many images' patches, sums and eight arrays of requantization fit a block."""
    channels = output.shape[-1]
    positions = int(np.prod(output.shape[1:-1]))
    image_bytes = positions * (weight.size // channels + 8 * channels) * 8
    return max(1, BLOCK_BYTES // image_bytes)


def _conv_2d(graph, node, inputs, kernel):
    """CONV_2D: sum over a window of (x - zero_point) * w, plus bias; exact in both flavours."""
    return _weighted(graph, node, inputs, kernel, (1, 2, 3), functools.partial(_conv_sums, node))


def _conv_sums(node, image, weight):
    """Returns sums (batch, rows, columns, out) as one product of patches and weights."""
    strides, dilations = node.attributes["strides"], node.attributes["dilations"]
    out, height, width, channels = weight.shape
    if image.shape[3] != channels:
        raise ValueError(
            f"node {node.name!r}: the input has {image.shape[3]} channels, the weights {channels}"
        )
    span = (1 + (height - 1) * dilations[0], 1 + (width - 1) * dilations[1])
    image = _pad_image(image, _padding(node, image.shape, span))
    size = _output_size(image, span, strides)
    matrix = weight.reshape(out, -1).T
    if (height, width) == (1, 1):
        patches = _tap(image, 0, 0, strides, size)
        return (patches.reshape(-1, channels) @ matrix).reshape(*patches.shape[:3], out)
    taps = [
        _tap(image, i * dilations[0], j * dilations[1], strides, size)
        for i in range(height)
        for j in range(width)
    ]
    patches = np.stack(taps, axis=3).reshape(-1, matrix.shape[0])
    return (patches @ matrix).reshape(-1, *size, out)


def _depthwise_conv_2d(graph, node, inputs, kernel):
    """DEPTHWISE_CONV_2D: output channel c * depth_multiplier + m reads input channel c; exact."""
    return _weighted(
        graph, node, inputs, kernel, (0, 1, 2), functools.partial(_depthwise_sums, node)
    )


def _depthwise_sums(node, image, weight):
    """Returns sums (batch, rows, columns, channels * depth_multiplier), one image at a time.

    One image's sums stay in cache while the taps are added; the whole batch's would not.
    """
    strides, dilations = node.attributes["strides"], node.attributes["dilations"]
    depth_multiplier = node.attributes["depth_multiplier"]
    _, height, width, channels = weight.shape
    if image.shape[3] * depth_multiplier != channels:
        raise ValueError(
            f"node {node.name!r}: {image.shape[3]} input channels * depth_multiplier "
            f"{depth_multiplier} must be the weights' {channels} channels"
        )
    if depth_multiplier > 1:
        image = np.repeat(image, depth_multiplier, axis=3)
    span = (1 + (height - 1) * dilations[0], 1 + (width - 1) * dilations[1])
    image = _pad_image(image, _padding(node, image.shape, span))
    size = _output_size(image, span, strides)
    sums = np.zeros((image.shape[0], *size, channels), image.dtype)
    product = np.empty((1, *size, channels), image.dtype)
    for n in range(len(image)):
        for i in range(height):
            for j in range(width):
                tap = _tap(image[n : n + 1], i * dilations[0], j * dilations[1], strides, size)
                np.multiply(tap, weight[0, i, j], out=product)
                sums[n : n + 1] += product
    return sums


def _fully_connected(graph, node, inputs, kernel):
    """FULLY_CONNECTED: x (batch, in) times w (out, in) transposed, plus bias; exact."""
    rows = inputs[0].reshape(-1, inputs[1].shape[1])
    flat = _weighted(graph, node, [rows, *inputs[1:]], kernel, (1,), lambda x, weight: x @ weight.T)
    if node.attributes.get("keep_num_dims"):
        return flat.reshape(*inputs[0].shape[:-1], -1)
    return flat


# --- elementwise --------------------------------------------------------------------------------


def _add(graph, node, inputs, kernel):
    """ADD: a + b on two scales.

    Exact, but for the built-in kernel where an input's scale is 256 or more times the output's:
    its vectors hold sums in 16 bits, and wrap beyond 32767 codes where this saturates.
    """
    return _add_or_subtract(graph, node, inputs, kernel, sign=1)


def _subtract(graph, node, inputs, kernel):
    """SUB: a - b on two scales; exact in both flavours."""
    return _add_or_subtract(graph, node, inputs, kernel, sign=-1)


def _add_or_subtract(graph, node, inputs, kernel, sign):
    first, second, output = _names(graph, node, *node.inputs, node.outputs[0])
    centred = [_centred(inputs[0], first), _centred(inputs[1], second)]
    a, b = _aligned(graph, node, centred)
    if kernel == "xnnpack":
        # The larger multiplier has 21 bits, so that 2 * 255 * 2^21 still fits int32.
        ratios = np.array([first.scale / output.scale, second.scale / output.scale])
        shift = 21 - int(np.frexp(ratios.max())[1])
        multipliers = np.rint(np.ldexp(ratios.astype(np.float64), shift)).astype(np.int64)
        total = a * multipliers[0] + sign * b * multipliers[1] + (1 << (shift - 1))
        return _finish(total >> shift, node, output, kernel)
    # 2^20 keeps 8-bit codes within int32 and loses nothing; twice the larger scale makes both
    # multipliers at most 1/2.
    twice_larger = 2.0 * max(float(first.scale), float(second.scale))
    scaled = [
        fixed_point.multiply_by_quantized_multiplier(
            codes << 20, *fixed_point.quantize_multiplier(float(tensor.scale) / twice_larger)
        )
        for codes, tensor in ((a, first), (b, second))
    ]
    real = twice_larger / (2.0**20 * float(output.scale))
    total = fixed_point.multiply_by_quantized_multiplier(
        scaled[0] + sign * scaled[1], *fixed_point.quantize_multiplier(real)
    )
    return _finish(total, node, output, kernel)


def _multiply(graph, node, inputs, kernel):
    """MUL: a * b * scale_a * scale_b / scale_output.

    Exact, but for the built-in kernel at a multiplier of 256 or more: see ADD.
    """
    first, second, output = _names(graph, node, *node.inputs, node.outputs[0])
    centred = [_centred(inputs[0], first), _centred(inputs[1], second)]
    a, b = _aligned(graph, node, centred)
    product = a * b
    scale = _product_scale(graph, node)
    return _requantize(product, scale, node, output, kernel, scale)


def _relu(graph, node, inputs, kernel):
    """RELU and RELU6: requantizes, then clamps; always a built-in kernel; exact."""
    source, output = _names(graph, node, node.inputs[0], node.outputs[0])
    ratio = source.scale / output.scale
    return _requantize(_centred(inputs[0], source), ratio, node, output, kernel, ratio)


def _quantize(graph, node, inputs, kernel):
    """QUANTIZE: float32 to codes, or codes to codes on another scale; exact in both flavours.

    From float32, XNNPACK multiplies by float32(1 / scale) where the built-in kernel divides.
    """
    source, output = _names(graph, node, node.inputs[0], node.outputs[0])
    if source.dtype == "float32":
        if kernel == "xnnpack":
            centred = np.rint(inputs[0] * (np.float32(1) / output.scale))
        else:
            centred = _round_half_away(inputs[0] / output.scale)
        return _finish(centred, node, output, kernel)
    codes = _centred(inputs[0], source)
    if kernel == "xnnpack":
        multiplier = int(np.rint(np.float32(256) * (source.scale / output.scale)))
        return _finish((codes * multiplier + 128) >> 8, node, output, kernel)
    multiplier, shift = fixed_point.quantize_multiplier(float(source.scale) / float(output.scale))
    centred = fixed_point.multiply_by_quantized_multiplier(codes, multiplier, shift)
    if kernel == "builtin":
        # Vectors of 16 codes round ties upwards; what is left over at the end of an image does not.
        flat = codes.reshape(len(codes), -1)
        vectors = flat.shape[1] // 16 * 16
        centred.reshape(flat.shape)[:, :vectors] = (
            fixed_point.multiply_by_quantized_multiplier_ties_up(
                flat[:, :vectors], multiplier, shift
            )
        )
    return _finish(centred, node, output, kernel)


def _dequantize(graph, node, inputs, kernel):
    """DEQUANTIZE: scale * (code - zero_point) in float32; the same in all kernels."""
    source = graph.tensors[node.inputs[0]]
    return _centred(inputs[0], source, np.float32) * source.scale


# --- pooling and reduction ----------------------------------------------------------------------


def _pool_taps(node, image, value):
    """Returns the taps of a pooling window, each (batch, rows, columns, channels)."""
    window, strides = node.attributes["filter"], node.attributes["strides"]
    image = _pad_image(image, _padding(node, image.shape, window), value)
    size = _output_size(image, window, strides)
    for i in range(window[0]):
        for j in range(window[1]):
            yield _tap(image, i, j, strides, size)


def _average_pool_2d(graph, node, inputs, kernel):
    """AVERAGE_POOL_2D: code sum / n, ties away from zero; n counts only codes inside the image."""
    output = graph.tensors[node.outputs[0]]
    inside = np.ones((1, *inputs[0].shape[1:3], 1), np.int64)
    total = sum(tap for tap in _pool_taps(node, inputs[0].astype(np.int64), 0))
    count = sum(tap for tap in _pool_taps(node, inside, 0))
    mean = np.sign(total) * ((np.abs(total) + count // 2) // count)
    low, high = _clamp_range(node, output, kernel)
    return np.clip(mean, low, high).astype(output.dtype)


def _max_pool_2d(graph, node, inputs, kernel):
    """MAX_POOL_2D: the largest code of the window; the same in all kernels."""
    output = graph.tensors[node.outputs[0]]
    largest = functools.reduce(
        np.maximum, _pool_taps(node, inputs[0], np.iinfo(inputs[0].dtype).min)
    )
    low, high = _clamp_range(node, output, kernel)
    return np.clip(largest, low, high)


def _mean(graph, node, inputs, kernel):
    """MEAN over the constant axes: sum of (code - zero_point) times scale ratio / n; exact.

    XNNPACK rounds sum * scale + offset, all in float32, where the offset holds both zero points:
    ties in the output code, not in the centred one, go to even.  A build whose compiler fuses the
    multiplication and the addition (64-bit ARM) can differ by 1 at such ties.

    The reference kernel folds 1/n into the fixed-point multiplier with a truncating division.
    """
    source, output = _names(graph, node, node.inputs[0], node.outputs[0])
    axes = tuple(sorted({int(axis) % inputs[0].ndim for axis in np.ravel(inputs[1])}))
    count = int(np.prod([inputs[0].shape[axis] for axis in axes]))
    keep_dims = bool(node.attributes["keep_dims"])
    total = inputs[0].sum(axis=axes, keepdims=keep_dims, dtype=np.int64)
    if kernel == "xnnpack":
        scale = source.scale / output.scale * (np.float32(1) / np.float32(count))
        offset = np.float32(output.zero_point) - np.float32(count * source.zero_point) * scale
        codes = np.rint(total.astype(np.float32) * scale + offset)
        return _finish(codes - output.zero_point, node, output, kernel)
    total -= count * source.zero_point
    multiplier, shift = fixed_point.quantize_multiplier(float(source.scale) / float(output.scale))
    extra = min(count.bit_length() - 1, 32, 31 + int(shift))
    multiplier = np.int64((int(multiplier) << extra) // count)
    centred = fixed_point.multiply_by_quantized_multiplier(total, multiplier, int(shift) - extra)
    return _finish(centred, node, output, kernel)


# --- moving codes -------------------------------------------------------------------------------


def _concatenation(graph, node, inputs, kernel):
    """CONCATENATION: joins codes that share one scale; the same in all kernels."""
    if node.attributes.get("activation") is not None:
        raise ValueError(
            f"node {node.name!r}: CONCATENATION has no fused activation, "
            f"got {node.attributes['activation']!r}"
        )
    differing = _differing_map(graph, node)
    if differing:
        raise ValueError(
            f"node {node.name!r}: {differing!r} has another scale or zero point than the output; "
            "CONCATENATION joins codes as they are"
        )
    return np.concatenate(inputs, axis=node.attributes["axis"])


def _reshape(graph, node, inputs, kernel):
    """RESHAPE to (batch, ...): the rest of the shape is the output tensor's."""
    shape = graph.tensors[node.outputs[0]].shape
    batch = graph.tensors[node.inputs[0]].shape[0]
    return inputs[0].reshape(len(inputs[0]) * shape[0] // batch, *shape[1:])


def _pad(graph, node, inputs, kernel):
    """PAD with the code of real 0, the zero point; the same in all kernels."""
    zero_point = graph.tensors[node.outputs[0]].zero_point
    return np.pad(inputs[0], np.asarray(inputs[1]), constant_values=zero_point)


def _slice(graph, node, inputs, kernel):
    """SLICE from begin, `size` codes on each axis but the batch's; the same in all kernels."""
    begin, size = (np.ravel(array).tolist() for array in inputs[1:])
    ends = [
        None if count == -1 else first + count for first, count in zip(begin, size, strict=True)
    ]
    return inputs[0][(slice(None), *map(slice, begin[1:], ends[1:]))]


def _transpose(graph, node, inputs, kernel):
    """TRANSPOSE: axes in another order, the batch's first; the same in all kernels."""
    order = [int(axis) for axis in np.ravel(inputs[1])]
    if order[0] != 0:
        raise ValueError(f"node {node.name!r}: TRANSPOSE moves the batch axis: order {order}")
    return np.transpose(inputs[0], order)


def _maximum(graph, node, inputs, kernel):
    """MAXIMUM of codes that share one scale; the same in all kernels."""
    return np.maximum(*_aligned(graph, node, inputs))


def _minimum(graph, node, inputs, kernel):
    """MINIMUM of codes that share one scale; the same in all kernels."""
    return np.minimum(*_aligned(graph, node, inputs))


def _aligned(graph, node, arrays):
    """Returns two arrays that broadcast: one of fewer axes than the other gets them behind the batch's.

    A constant has no batch, and NumPy's own rule serves.
    """
    rank = max(x.ndim for x in arrays)
    return [
        x.reshape(len(x), *(1,) * (rank - x.ndim), *x.shape[1:])
        if graph.tensors[name].data is None
        else x
        for name, x in zip(node.inputs, arrays, strict=True)
    ]


def _resize_nearest_neighbor(graph, node, inputs, kernel):
    """RESIZE_NEAREST_NEIGHBOR: each output pixel is the input pixel at floor(i * in / out).

    Raises:
      ValueError: for corners that are aligned, or centres of pixels, which nothing here writes.
    """
    if node.attributes["align_corners"] or node.attributes["half_pixel_centers"]:
        raise ValueError(f"node {node.name!r}: align_corners and half_pixel_centers are not known")
    picked = inputs[0]
    for axis, size in zip((1, 2), np.ravel(inputs[1]).tolist(), strict=True):
        picked = np.take(picked, nearest(picked.shape[axis], size), axis=axis)
    return picked


def nearest(size: int, wanted: int) -> np.ndarray:
    """Returns which of `size` pixels each of `wanted` shows: floor(i * (size / wanted)) in float32."""
    places = np.arange(wanted, dtype=np.float32) * (np.float32(size) / np.float32(wanted))
    return np.minimum(np.floor(places).astype(np.int64), size - 1)


# --- functions of one code ----------------------------------------------------------------------


def _logistic(graph, node, inputs, kernel):
    """LOGISTIC: 1 / (1 + exp(-x)), to output scale 1/256 and zero point -128; exact."""
    return _looked_up(graph, node, inputs[0], kernel, _sigmoid, _logistic_fixed_point)


def _tanh(graph, node, inputs, kernel):
    """TANH, to output scale 1/128 and zero point 0; exact."""
    return _looked_up(graph, node, inputs[0], kernel, np.tanh, _tanh_fixed_point)


def _gelu(graph, node, inputs, kernel):
    """GELU: x / 2 * (1 + erf(x / sqrt(2))); exact."""
    if node.attributes["approximate"]:
        raise ValueError(f"node {node.name!r}: an approximate GELU is not known")
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return _looked_up(
        graph, node, inputs[0], kernel, lambda x: x / 2 * (1 + erf(x * math.sqrt(0.5)))
    )


def _leaky_relu(graph, node, inputs, kernel):
    """LEAKY_RELU: x, or alpha * x below zero; exact in both flavours."""
    source, output = _names(graph, node, node.inputs[0], node.outputs[0])
    codes = _centred(inputs[0], source)
    ratios = _leaky_ratios(graph, node)
    if kernel == "xnnpack":
        above, below = (int(np.rint(np.float32(256) * ratio)) for ratio in ratios)
        scaled = codes * np.where(codes >= 0, above, below)
        return _finish((scaled + 128) >> 8, node, output, kernel)
    above, below = (
        fixed_point.multiply_by_quantized_multiplier(
            codes, *fixed_point.quantize_multiplier(float(ratio))
        )
        for ratio in ratios
    )
    return _finish(np.where(codes >= 0, above, below), node, output, kernel)


def _leaky_ratios(graph, node):
    """Returns float32 (s_in / s_out, s_in * alpha / s_out)."""
    source, output = _names(graph, node, node.inputs[0], node.outputs[0])
    alpha = np.float32(node.attributes["alpha"])
    return source.scale / output.scale, source.scale * alpha / output.scale


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _looked_up(graph, node, codes, kernel, function, in_fixed_point=None):
    """Returns the function of every code, by the table of 256 that the kernel makes.

    With in_fixed_point the reference kernel computes with 4 integer bits: in_fixed_point(its real
    input with 27 fractional bits) gives the result with 31; far out it is saturated.  The others
    make float32 tables, XNNPACK with ties to even.
    """
    source, output = _names(graph, node, node.inputs[0], node.outputs[0])
    every = np.arange(-128, 128, dtype=np.int64) - source.zero_point
    if kernel == "reference" and in_fixed_point is not None:
        multiplier, shift = fixed_point.quantize_multiplier(float(source.scale) * 2.0**27)
        radius = int(np.floor(15 * 2.0 ** (27 - int(shift))))
        inside = np.clip(every, -radius, radius)
        real = fixed_point.multiply_by_quantized_multiplier(inside, multiplier, shift)
        bits = 31 + int(np.rint(np.log2(output.scale)))
        centred = fixed_point.rounding_divide_by_pot(in_fixed_point(real), bits)
        low, high = (np.iinfo(np.int8).min, np.iinfo(np.int8).max)
        centred = np.where(every <= -radius, low - output.zero_point, centred)
        centred = np.where(every >= radius, high - output.zero_point, centred)
    else:
        real = (every.astype(np.float32) * source.scale).astype(np.float64)
        values = function(real).astype(np.float32) * (np.float32(1) / output.scale)
        centred = np.rint(values) if kernel == "xnnpack" else _round_half_away(values)
    table = _finish(centred, node, output, kernel)
    return table[codes.astype(np.int64) + 128]


def _logistic_fixed_point(a):
    """Returns 1 / (1 + exp(-a)) with 31 fractional bits of a with 27 (gemmlowp, fixedpoint.h)."""
    exponential = _exp_on_negative_values(-np.abs(a), integer_bits=4)
    positive = np.minimum(_two_over_one_plus(exponential) << 1, fixed_point.INT32_MAX)
    result = np.where(a > 0, positive, fixed_point.INT32_MAX - positive)
    return np.where(a == 0, 1 << 30, result)


def _tanh_fixed_point(a):
    """Returns tanh(a) with 31 fractional bits of a with 27 (gemmlowp, fixedpoint.h)."""
    exponential = _exp_on_negative_values(-np.abs(a), integer_bits=5)  # the same bits are twice a
    magnitude = (_two_over_one_plus(exponential) - (1 << 29)) << 2
    magnitude = np.minimum(magnitude, fixed_point.INT32_MAX)
    return np.where(a == 0, 0, np.sign(a) * magnitude)


# --- softmax ------------------------------------------------------------------------------------


def _softmax(graph, node, inputs, kernel):
    """SOFTMAX over the last axis, to output scale 1/256 and zero point -128; int8."""
    source, output = _names(graph, node, node.inputs[0], node.outputs[0])
    beta = np.float32(node.attributes["beta"])
    below = inputs[0].astype(np.int64)
    below -= below.max(axis=-1, keepdims=True)
    if kernel == "reference":
        centred = _softmax_fixed_point(below, float(beta) * float(source.scale))
    else:
        centred = _softmax_table(below, source.scale * beta, output.scale)
    return _finish(centred, node, output, kernel)


def _softmax_table(below, scale, output_scale):
    """Returns codes above the zero point, from a float32 table of 256 exponentials (built-in).

    The sum is accumulated in float32 in the order of the elements, as the kernel does on x86; a
    build for 64-bit ARM uses 16-bit tables instead and can differ by 1.

    Args:
      below: code - largest code, int64, in [-255, 0].
      scale: real value of one input code, times beta.
    """
    steps = np.arange(256, dtype=np.float32) * -scale
    table = np.exp(steps.astype(np.float64)).astype(np.float32)
    exponentials = table[-below]
    total = np.add.accumulate(exponentials, axis=-1)[..., -1:]
    return _round_half_away(exponentials * (np.float32(1) / (total * output_scale)))


def _softmax_fixed_point(below, scale):
    """Returns codes above the zero point, by fixed-point arithmetic alone (reference).

    The kernel itself aborts where the exponentials sum to 512 or more: its last shift exceeds 31.

    Args:
      below: code - largest code, int64, in [-255, 0].
      scale: real value of one input code, times beta.
    """
    multiplier, shift = fixed_point.quantize_multiplier(min(scale * 2.0**26, 2.0**31 - 1))
    lowest = -int(np.floor(31 * 2.0 ** (26 - int(shift))))
    counted = below >= lowest  # further down the exponential is below 2^-44, and not evaluated
    scaled = fixed_point.multiply_by_quantized_multiplier(
        np.where(counted, below, 0), multiplier, shift
    )
    exponentials = np.where(counted, _exp_on_negative_values(scaled), 0)
    total = fixed_point.rounding_divide_by_pot(exponentials, 12).sum(axis=-1, keepdims=True)
    reciprocal, unit_bits = _reciprocal(total)
    product = fixed_point.saturating_rounding_doubling_high_mul(reciprocal, exponentials)
    return fixed_point.rounding_divide_by_pot(product, unit_bits + 31 - 8)


def _exp_on_negative_values(a, integer_bits=5):
    """Returns exp(a) with 31 fractional bits for a <= 0 with 31 - integer_bits of them, int64.

    exp(a) = exp(r) * product of exp(-2^k) over the bits of the multiple of 1/4 taken off a, with
    r in [-1/4, 0) by a polynomial around -1/8 (gemmlowp, fixedpoint.h).
    """
    fraction = 31 - integer_bits
    quarter = 1 << (fraction - 2)
    remainder = (a & (quarter - 1)) - quarter
    result = _exp_on_last_quarter(remainder << integer_bits)
    taken_off = remainder - a
    for exponent in range(-2, integer_bits):
        factor = int(np.floor(np.exp(-(2.0**exponent)) * 2.0**31 + 0.5))
        lowered = fixed_point.saturating_rounding_doubling_high_mul(result, np.int64(factor))
        result = np.where(taken_off & (1 << (fraction + exponent)), lowered, result)
    return np.where(a == 0, fixed_point.INT32_MAX, result)


def _exp_on_last_quarter(a):
    """Returns exp(a) for a in [-1/4, 0), both with 31 fractional bits, int64."""
    multiply = fixed_point.saturating_rounding_doubling_high_mul
    constant = np.int64(np.floor(np.exp(-0.125) * 2.0**31 + 0.5))
    third = np.int64(715827883)  # 1/3
    x = a + (1 << 28)
    x2 = multiply(x, x)
    x3 = multiply(x2, x)
    x4 = multiply(x2, x2)
    fourth_over_4 = fixed_point.rounding_divide_by_pot(x4, 2)
    tail = fixed_point.rounding_divide_by_pot(multiply(fourth_over_4 + x3, third) + x2, 1)
    return constant + multiply(constant, x + tail)


def _reciprocal(total):
    """Returns (1 / normalized total with 31 fractional bits, bits of the normalization), int64.

    Three Newton steps on 1 / (1 + x), x = 2^-unit_bits * total - 1 in [0, 1) (gemmlowp).

    Args:
      total: positive, with 19 fractional bits.
    """
    headroom = 32 - np.frexp(total.astype(np.float64))[1].astype(np.int64)
    unit_bits = 12 - headroom
    half_minus = (total << headroom) - (1 << 31)
    x = _two_over_one_plus(half_minus)
    return np.minimum(x << 1, fixed_point.INT32_MAX), unit_bits


def _two_over_one_plus(a):
    """Returns 2 / (1 + a) with 29 fractional bits for a in [0, 1) with 31: three Newton steps."""
    half_denominator = (a + fixed_point.INT32_MAX + 1) >> 1
    multiply = fixed_point.saturating_rounding_doubling_high_mul
    x = 1515870810 + multiply(half_denominator, np.int64(-1010580540))  # 48/17 - 32/17 * d
    for _ in range(3):
        step = (1 << 29) - multiply(half_denominator, x)
        x = x + (multiply(x, step) << 2)
    return x


_KERNELS = {
    "ADD": _add,
    "AVERAGE_POOL_2D": _average_pool_2d,
    "CONCATENATION": _concatenation,
    "CONV_2D": _conv_2d,
    "DEPTHWISE_CONV_2D": _depthwise_conv_2d,
    "DEQUANTIZE": _dequantize,
    "FULLY_CONNECTED": _fully_connected,
    "GELU": _gelu,
    "LEAKY_RELU": _leaky_relu,
    "LOGISTIC": _logistic,
    "MAXIMUM": _maximum,
    "MAX_POOL_2D": _max_pool_2d,
    "MEAN": _mean,
    "MINIMUM": _minimum,
    "MUL": _multiply,
    "PAD": _pad,
    "QUANTIZE": _quantize,
    "RELU": _relu,
    "RELU6": _relu,
    "RESHAPE": _reshape,
    "RESIZE_NEAREST_NEIGHBOR": _resize_nearest_neighbor,
    "SLICE": _slice,
    "SOFTMAX": _softmax,
    "SUB": _subtract,
    "TANH": _tanh,
    "TRANSPOSE": _transpose,
}
