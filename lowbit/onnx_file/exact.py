"""The form exact: XNNPACK's arithmetic in whole numbers, correctly rounded float32, and tables."""

import dataclasses
import itertools

import numpy as np
from onnx import helper

from lowbit import integer_graph, kernels
from lowbit.kernels import delegate, requantization, resizing, windows
from lowbit.onnx_file import common

EXACT_BELOW = 2**24  # whole numbers that float32 holds, and so sums of them in any order


class Exact(common.Writer):
    """Operators on codes that compute what the XNNPACK kernel computes."""

    def __init__(self, graph, layout):
        super().__init__(graph, layout)
        for node in graph.nodes:
            placed, reason = delegate.placement_of(graph, node)
            if placed == "refused":
                raise ValueError(f"node {node.name} ({node.op}): {reason}")

    def read(self, name):
        return self.values[name]

    def read_constant(self, tensor, array):
        return self.constant(array, tensor.name)

    def finished(self, node, result):
        return result

    def real_zero(self, tensor):
        return np.array(tensor.zero_point, tensor.dtype)

    def whole(self, name):
        return self.cast(name, "int32")

    def narrow(self, name):
        return self.cast(name, "int8")

    def cast(self, name, dtype):
        to = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.add("Cast", [name], f"{name}_{np.dtype(dtype).name}", to=to)

    def centred(self, codes, tensor):
        """Returns code - zero_point in float32, exact."""
        one = self.constant(np.float32(1))
        zero_point = self.constant(np.array(tensor.zero_point, tensor.dtype))
        return self.add("DequantizeLinear", [codes, one, zero_point], f"{codes}_centred")

    def rounded(self, node, value, zero_point=None):
        """Returns rint(value) + zero_point, saturated and clamped, as codes."""
        tensor = self.tensor(node.outputs[0])
        zero_point = tensor.zero_point if zero_point is None else zero_point
        inputs = [
            value,
            self.constant(np.float32(1)),
            self.constant(np.array(zero_point, tensor.dtype)),
        ]
        return self.clamped(node, self.add("QuantizeLinear", inputs, f"{node.name}_codes"))

    def operation(self, operator, value, operand, wanted):
        """Returns operator(value, constant)."""
        return self.add(operator, [value, self.constant(operand)], wanted)

    def _weighted(self, node, x, kernel, operator, **attributes):
        """Returns codes of a convolution or product of matrices of centred codes `x`, axis 1 summed."""
        source = self.tensor(node.inputs[0])
        bias = np.zeros(len(kernel), np.int64)
        if len(node.inputs) > 2:
            bias = np.asarray(self.tensor(node.inputs[2]).data, np.int64)
        farthest = max(abs(each) for each in _reach(1, source))
        parts = _parts(kernel, farthest)
        bound = np.abs(kernel.astype(np.int64)).reshape(len(kernel), -1).sum(axis=1) * farthest
        together = len(parts) == 1 and (bound + np.abs(bias)).max() < EXACT_BELOW
        sums = []
        for begin, end in parts:
            inputs = [x, self._float_constant(kernel[:, begin:end], f"{node.name}_kernel")]
            if len(parts) > 1:
                if attributes.get("group", 1) != 1:
                    raise ValueError(f"node {node.name}: sums of a group reach 2^24")
                limits = [self.constant(np.array([each], np.int64)) for each in (begin, end, 1)]
                inputs[0] = self.add("Slice", [x, *limits], f"{node.name}_channels")
            if together:
                inputs.append(self.constant(bias.astype(np.float32), f"{node.name}_bias"))
            sums.append(self.add(operator, inputs, node.name, **attributes))
        ones = (1,) * (kernel.ndim - 2)
        if together:
            total = self.add("Round", sums, f"{node.name}_sum")
        else:
            total = self.constant(bias.astype(np.int32).reshape(1, -1, *ones), f"{node.name}_bias")
            for part in sums:
                total = self.add("Add", [total, self.cast(part, "int32")], f"{node.name}_sum")
            total = self.cast(total, "float32")
        scale = np.asarray(requantization.weighted_scale_fp32(self.graph, node), np.float32)
        scale = scale.reshape(1, -1, *ones) if scale.size > 1 else scale.reshape(())
        return self.rounded(node, self.operation("Mul", total, scale, f"{node.name}_scaled"))

    def convolution(self, node):
        source = self.tensor(node.inputs[0])
        kernel, attributes = self.convolution_options(node)
        x = self.centred(self.values[source.name], source)
        return self._weighted(node, x, kernel, "Conv", **attributes)

    def _float_constant(self, codes, wanted):
        """Returns whole numbers in float32 that the file holds in int8."""
        return self.cast(self.constant(codes.astype(np.int8), wanted), "float32")

    def fully_connected(self, node):
        source, output = self.tensor(node.inputs[0]), self.tensor(node.outputs[0])
        rows, reshaped = self.dense_input(node)
        codes = self.values[source.name]
        if reshaped:
            codes = self._reshaped(codes, source.shape, rows, f"{node.name}_rows")
        x = self.centred(codes, source)
        weight = np.asarray(self.tensor(node.inputs[1]).data)
        codes = self._weighted(node, x, weight, "Gemm", transB=1)
        shape = (rows[0], output.shape[-1])
        if tuple(output.shape) == shape:
            return codes
        return self._reshaped(codes, shape, output.shape, f"{node.name}_shaped")

    def arithmetic(self, node):
        kernel, _ = delegate.placement_of(self.graph, node)
        if kernel != "xnnpack":
            return self._pair_table(node)
        if node.op == "MUL":
            return self._product(node)
        first, second, output = (self.tensor(name) for name in (*node.inputs[:2], node.outputs[0]))
        # As kernels.elementwise: the larger multiplier has 21 bits.
        ratios = np.array([first.scale / output.scale, second.scale / output.scale])
        shift = 21 - int(np.frexp(ratios.max())[1])
        factors = np.rint(np.ldexp(ratios.astype(np.float64), shift)).astype(np.int64)
        factors[1] *= -1 if node.op == "SUB" else 1
        # Div rounds towards zero: sums are moved up by whole codes, until none is negative whose code
        # is not the lowest anyway.
        reach = [
            _reach(factor, tensor) for factor, tensor in zip(factors, (first, second), strict=True)
        ]
        half = 1 << (shift - 1)
        least = half + sum(low for low, _ in reach)
        moved = max(0, min(output.zero_point - common.LOWEST[output.dtype] + 1, -(least >> shift)))
        offset = half + (moved << shift)
        largest = max(offset + sum(high for _, high in reach), -least)
        dtype = np.int32 if largest < 2**31 else np.int64
        offset -= int(factors[0]) * first.zero_point + int(factors[1]) * second.zero_point
        terms = [
            self.operation("Mul", self.cast(value, dtype), dtype(factor), f"{node.name}_term")
            for value, factor in zip(self.aligned(node), factors, strict=True)
        ]
        total = self.add("Add", terms, f"{node.name}_sum")
        total = self.operation("Add", total, dtype(offset), f"{node.name}_moved")
        quotient = self.operation("Div", total, dtype(1 << shift), f"{node.name}_shifted")
        centred = self.cast(quotient, "float32")
        return self.rounded(node, self.operation("Sub", centred, np.float32(moved), node.name))

    def _product(self, node):
        factors = [
            self.centred(value, self.tensor(name))
            for value, name in zip(self.aligned(node), node.inputs, strict=True)
        ]
        product = self.add("Mul", factors, f"{node.name}_product")
        scale = np.float32(requantization.product_scale(self.graph, node))
        return self.rounded(node, self.operation("Mul", product, scale, f"{node.name}_scaled"))

    def _pair_table(self, node):
        """Returns codes looked up for each pair of codes: of kernels that are not XNNPACK's."""
        every = np.arange(-128, 128, dtype=np.int8)
        pairs = [np.repeat(every, 256)[None], np.tile(every, 256)[None]]
        names = dict(zip(("a", "b", "out"), (*node.inputs, *node.outputs), strict=True))
        small = {
            name: dataclasses.replace(self.tensor(other), name=name, shape=(1, 65536), data=None)
            for name, other in names.items()
        }
        alone = dataclasses.replace(node, inputs=("a", "b"), outputs=("out",))
        graph = integer_graph.IntegerGraph(small, (alone,), ("a", "b"), ("out",))
        (table,) = kernels.run_node(graph, alone, pairs, "xnnpack")
        a, b = (self.cast(value, "int32") for value in self.aligned(node))
        row = self.operation("Mul", a, np.int32(256), f"{node.name}_row")
        place = self.add("Add", [row, b], f"{node.name}_place")
        index = self.operation("Add", place, np.int32(128 * 257), f"{node.name}_index")
        table = self.constant(table.reshape(-1), f"{node.name}_table")
        return self.add("Gather", [table, index], node.name)

    def average_pool(self, node):
        source = self.tensor(node.inputs[0])
        channels = source.shape[-1]
        size, strides = node.attributes["filter"], node.attributes["strides"]
        codes = self.cast(self.values[source.name], "float32")
        ones = self._float_constant(np.ones((channels, 1, *size), np.int8), f"{node.name}_ones")
        pads = self.pads(node, size)
        options = {"kernel_shape": size, "strides": strides, "pads": pads, "group": channels}
        total = self.add("Conv", [codes, ones], f"{node.name}_sum", **options)
        inside = np.ones((1, *source.shape[1:3], 1))
        inside = np.pad(inside, ((0, 0), (pads[0], pads[2]), (pads[1], pads[3]), (0, 0)))
        rows_columns = self.tensor(node.outputs[0]).shape[1:3]
        taps = itertools.product(range(size[0]), range(size[1]))
        count = sum(windows.tap(inside, *tap, strides, rows_columns) for tap in taps)
        count = count.max() if count.min() == count.max() else np.moveaxis(count, 3, 1)
        magnitude = self.add("Abs", [total], f"{node.name}_magnitude")
        magnitude = self.operation("Add", magnitude, np.float32(count // 2), f"{node.name}_half")
        magnitude = self.operation("Div", magnitude, np.float32(count), f"{node.name}_quotient")
        magnitude = self.add("Floor", [magnitude], f"{node.name}_whole")
        value = self.add(
            "Mul", [magnitude, self.add("Sign", [total], f"{node.name}_sign")], node.name
        )
        return self.rounded(node, value, 0)

    def mean(self, node):
        source, output = self.tensor(node.inputs[0]), self.tensor(node.outputs[0])
        rank = len(source.shape)
        axes = sorted({int(axis) % rank for axis in np.ravel(self.tensor(node.inputs[1]).data)})
        count = int(np.prod([source.shape[axis] for axis in axes]))
        keeps = bool(node.attributes["keep_dims"])
        value = self.values[source.name]
        if rank == 4 and (keeps or axes == [1, 2]):
            axes = [self.axis(axis, rank) for axis in axes]
        elif rank == 4:
            value = self.channels_last(value, f"{node.name}_nhwc")
        inputs = [self.cast(value, "int32"), self.constant(np.array(axes, np.int64))]
        total = self.add("ReduceSum", inputs, f"{node.name}_sum", keepdims=int(keeps))
        total = self.cast(total, "float32")
        # As kernels.pooling: all in float32, in this order.
        scale = source.scale / output.scale * (np.float32(1) / np.float32(count))
        offset = np.float32(output.zero_point) - np.float32(count * source.zero_point) * scale
        value = self.operation("Mul", total, np.float32(scale), f"{node.name}_scaled")
        return self.rounded(node, self.operation("Add", value, np.float32(offset), node.name), 0)

    def softmax(self, node):
        """As kernels.softmax, built-in."""
        source, output = self.tensor(node.inputs[0]), self.tensor(node.outputs[0])
        axis = self.axis(-1, len(source.shape))
        steps = np.arange(256, dtype=np.float32) * -(
            source.scale * np.float32(node.attributes["beta"])
        )
        table = np.exp(steps.astype(np.float64)).astype(np.float32)
        codes = self.cast(self.values[source.name], "int32")
        axes = self.constant(np.array([axis], np.int64))
        largest = self.add("ReduceMax", [codes, axes], f"{node.name}_largest", keepdims=1)
        below = self.add("Sub", [largest, codes], f"{node.name}_below")
        table = self.constant(table, f"{node.name}_table")
        exponentials = self.add("Gather", [table, below], f"{node.name}_exponentials")
        # One element behind another, as the kernel adds them.
        sums = self.add(
            "CumSum", [exponentials, self.constant(np.int64(axis))], f"{node.name}_sums"
        )
        last = [self.constant(np.array([each], np.int64)) for each in (-1, 2**31 - 1, axis)]
        total = self.add("Slice", [sums, *last], f"{node.name}_sum")
        total = self.operation("Mul", total, output.scale, f"{node.name}_unit")
        reciprocal = self.add(
            "Div", [self.constant(np.float32(1)), total], f"{node.name}_reciprocal"
        )
        value = self.add("Mul", [exponentials, reciprocal], f"{node.name}_scaled")
        # Ties away from zero, of numbers that are not negative.
        whole = self.add("Floor", [value], f"{node.name}_floor")
        rest = self.add("Sub", [value, whole], f"{node.name}_rest")
        up = self.operation("GreaterOrEqual", rest, np.float32(0.5), f"{node.name}_up")
        return self.rounded(node, self.add("Add", [whole, self.cast(up, "float32")], node.name))

    def function(self, node):
        """Returns codes looked up in a table of the node's 256 results."""
        source, output = self.tensor(node.inputs[0]), self.tensor(node.outputs[0])
        every = np.arange(256).astype(np.uint8).view(source.dtype)  # negative codes from the end
        tables = []
        for shape in ((1, 256), (256, 1)):  # some kernels compute otherwise at the end of an image
            small = {
                tensor.name: dataclasses.replace(tensor, shape=(1, *shape[1:]))
                for tensor in (source, output)
            }
            graph = integer_graph.IntegerGraph(small, (node,), node.inputs[:1], node.outputs)
            tables += kernels.run_node(graph, node, [every.reshape(shape)], "xnnpack")
        if (tables[0].reshape(-1) != tables[1].reshape(-1)).any():
            raise ValueError(
                f"node {node.name} ({node.op}): the kernel's codes depend on where they lie"
            )
        index = self.cast(self.values[source.name], "int32")
        table = self.constant(tables[0].reshape(-1), f"{node.name}_table")
        return self.add("Gather", [table, index], node.name)

    def resize(self, node):
        source, output = self.tensor(node.inputs[0]), self.tensor(node.outputs[0])
        common.check_nearest(node)
        value = self.values[source.name]
        for axis in (1, 2):
            places = resizing.nearest(source.shape[axis], output.shape[axis])
            places = self.constant(places.astype(np.int64), f"{node.name}_places")
            value = self.add("Gather", [value, places], node.name, axis=axis + 1)
        return value

    def quantize(self, node):
        source, output = self.tensor(node.inputs[0]), self.tensor(node.outputs[0])
        if source.dtype != "float32":
            return self.function(node)
        # As XNNPACK: times float32(1 / scale).
        reciprocal = np.float32(1) / output.scale
        value = self.values[source.name]
        return self.rounded(node, self.operation("Mul", value, reciprocal, f"{node.name}_scaled"))

    def dequantize(self, node):
        tensor = self.tensor(node.inputs[0])
        inputs = [
            self.values[tensor.name],
            self.constant(np.float32(tensor.scale)),
            self.constant(np.array(tensor.zero_point, tensor.dtype)),
        ]
        return self.add("DequantizeLinear", inputs, node.name)


def _reach(factor, tensor):
    """Returns the (smallest, largest) factor * (code - zero_point)."""
    limits = np.iinfo(tensor.dtype)
    ends = [int(factor) * (int(end) - tensor.zero_point) for end in (limits.min, limits.max)]
    return min(ends), max(ends)


def _parts(kernel, farthest):
    """Returns (begin, end) of input channels, few enough that all sums of products are exact.

    Args:
      kernel: (out, in, ...) codes.
      farthest: the largest |code - zero_point| of the input.
    """
    each = np.abs(kernel.astype(np.int64)).reshape(*kernel.shape[:2], -1).sum(axis=2) * farthest
    parts, begin, sums = [], 0, np.zeros(len(kernel), np.int64)
    for channel in range(kernel.shape[1]):
        if channel > begin and (sums + each[:, channel]).max() >= EXACT_BELOW:
            parts.append((begin, channel))
            begin, sums = channel, np.zeros_like(sums)
        sums = sums + each[:, channel]
    if each.max(initial=0) >= EXACT_BELOW:
        raise ValueError("the products of one channel alone sum to 2^24 or more")
    return [*parts, (begin, kernel.shape[1])]
