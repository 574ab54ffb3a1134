"""The form qdq: float operators between DequantizeLinear and QuantizeLinear."""

import numpy as np

from lowbit.kernels import requantization
from lowbit.onnx_file import common


class Qdq(common.Writer):
    """Float operators between DequantizeLinear and QuantizeLinear."""

    real = np.float32  # what the operators compute in

    def __init__(self, graph, layout, activations):
        super().__init__(graph, layout)
        self.dtype = activations
        self._real: dict[str, str] = {}

    def parameters(self, tensor, dtype=None):
        """Returns the names of a tensor's scale and zero point inside the model, or of `dtype`."""
        dtype = dtype or self.dtype
        scale = self.constant(np.float32(tensor.scale), f"{tensor.name}_scale")
        zero_point = tensor.zero_point - common.LOWEST[tensor.dtype] + common.LOWEST[dtype]
        return scale, self.constant(np.array(zero_point, dtype), f"{tensor.name}_zero_point")

    def dequantized(self, codes, tensor, wanted, dtype=None):
        inputs = [codes, *self.parameters(tensor, dtype)]
        return self.add("DequantizeLinear", inputs, f"{wanted}_real")

    def quantized(self, real, tensor, wanted, dtype=None):
        inputs = [real, *self.parameters(tensor, dtype)]
        return self.add("QuantizeLinear", inputs, f"{wanted}_codes")

    def requantized(self, real, tensor, wanted):
        """Returns the same numbers with codes in between: runtimes fuse an operator between two."""
        return self.dequantized(self.quantized(real, tensor, wanted), tensor, wanted)

    def read(self, name):
        codes = self.values[name]
        if codes not in self._real:
            self._real[codes] = self.dequantized(codes, self.tensor(name), name)
        return self._real[codes]

    def read_constant(self, tensor, array):
        # Of the type that the other input has: the compiler for Hexagon mixes two in its own way.
        moved = array.astype(np.int16) - common.LOWEST[tensor.dtype] + common.LOWEST[self.dtype]
        return self.dequantized(self.constant(moved.astype(self.dtype)), tensor, tensor.name)

    def widened(self, name, shape):
        tensor = self.tensor(name)
        real = self._reshaped(self.read(name), tensor.shape, shape, f"{name}_wide")
        return self.requantized(real, tensor, f"{name}_wide")

    def enter(self, tensor, value):
        return self._converted(tensor, value, tensor.dtype, self.dtype)

    def leave(self, tensor, value):
        return self._converted(tensor, value, self.dtype, tensor.dtype)

    def _converted(self, tensor, codes, before, after):
        """Returns codes of one type as codes of another, for the same real numbers."""
        if tensor.dtype == "float32" or before == after:
            return codes
        real = self.dequantized(codes, tensor, f"{tensor.name}_{before}", before)
        return self.quantized(real, tensor, f"{tensor.name}_{after}", after)

    def finished(self, node, result):
        return self.quantized(result, self.tensor(node.outputs[0]), node.name)

    def clamped(self, node, codes):
        """Returns codes clamped in a step of its own, so that the one before it can be fused."""
        tensor = self.tensor(node.outputs[0])
        low, high = requantization.clamp_range(node, tensor, "xnnpack")
        limits = np.iinfo(tensor.dtype)
        if (low, high) == (limits.min, limits.max):
            return codes
        real = self.dequantized(codes, tensor, f"{node.name}_unclamped")
        # The compiler for Hexagon drops a Clip whose upper bound no code reaches, the lower one too.
        if (low, high) == (tensor.zero_point, limits.max):
            return self.finished(node, self.add("Relu", [real], f"{node.name}_clamped"))
        bounds = [np.float32(bound - tensor.zero_point) * tensor.scale for bound in (low, high)]
        clipped = self.add("Clip", [real, *map(self.constant, bounds)], f"{node.name}_clamped")
        return self.finished(node, clipped)

    def real_zero(self, tensor):
        return self.real(0)

    def _bias(self, node, scale):
        """Returns the name of the dequantized bias, zeros where the node has none."""
        channels = self.tensor(node.outputs[0]).shape[-1]
        data = np.zeros(channels, np.int32)
        if len(node.inputs) > 2:
            data = np.asarray(self.tensor(node.inputs[2]).data, np.int32)
        inputs = [
            self.constant(data, f"{node.name}_bias"),
            self.constant(scale, f"{node.name}_bias_scale"),
            self.constant(np.zeros(scale.shape, np.int32)),
        ]
        return self.add("DequantizeLinear", inputs, f"{node.name}_bias_real", **_axis(scale, 0))

    def _weights(self, node, kernel):
        """Returns (dequantized weights, dequantized bias), the names."""
        source, weight = (self.tensor(name) for name in node.inputs[:2])
        scale = np.asarray(weight.quantization.scale, np.float32)
        scale = scale if scale.size > 1 else scale.reshape(())
        # Of its own each: ONNX Runtime, when it moves weights to uint8, replaces them in place.
        constants = {"": kernel, "_scale": scale, "_zero_point": np.zeros(scale.shape, np.int8)}
        inputs = [
            self.constant(array, f"{node.name}_kernel{what}", shared=False)
            for what, array in constants.items()
        ]
        real = self.add("DequantizeLinear", inputs, f"{node.name}_kernel_real", **_axis(scale, 0))
        return real, self._bias(node, source.scale * scale)

    def convolution(self, node):
        kernel, attributes = self.convolution_options(node)
        inputs = [self.read(node.inputs[0]), *self._weights(node, kernel)]
        result = self.add("Conv", inputs, node.name, **attributes)
        return self.clamped(node, self.finished(node, result))

    def fully_connected(self, node):
        source, output = self.tensor(node.inputs[0]), self.tensor(node.outputs[0])
        rows, reshaped = self.dense_input(node)
        real = self.read(source.name)
        if reshaped:
            real = self._reshaped(real, source.shape, rows, f"{node.name}_rows")
            real = self.requantized(real, source, f"{node.name}_rows")
        weights = self._weights(node, np.asarray(self.tensor(node.inputs[1]).data))
        codes = self.finished(node, self.add("Gemm", [real, *weights], node.name, transB=1))
        codes = self.clamped(node, codes)
        shape = (rows[0], output.shape[-1])
        if tuple(output.shape) == shape:
            return codes
        real = self.dequantized(codes, output, f"{node.name}_shaped")
        return self.finished(node, self._reshaped(real, shape, output.shape, f"{node.name}_shaped"))

    def arithmetic(self, node):
        operator = {"ADD": "Add", "SUB": "Sub", "MUL": "Mul"}[node.op]
        result = self.add(operator, self.aligned(node), node.name)
        return self.clamped(node, self.finished(node, result))

    def average_pool(self, node):
        return self.pooled(node, "AveragePool")

    def mean(self, node):
        source, output = self.tensor(node.inputs[0]), self.tensor(node.outputs[0])
        rank = len(source.shape)
        axes = sorted({int(axis) % rank for axis in np.ravel(self.tensor(node.inputs[1]).data)})
        keeps = bool(node.attributes["keep_dims"])
        if rank == 4 and axes == [1, 2]:
            result = self.add("GlobalAveragePool", [self.read(source.name)], node.name)
            if keeps:
                return self.finished(node, result)
            real = self.requantized(result, output, f"{node.name}_pooled")
            flat = self.add("Flatten", [real], f"{node.name}_flat")
            return self.finished(node, flat)
        value = self.read(source.name)
        if rank == 4 and keeps:
            axes = [self.axis(axis, rank) for axis in axes]
        elif rank == 4:
            value = self.channels_last(value, f"{node.name}_nhwc")
        inputs = [value, self.constant(np.array(axes, np.int64))]
        result = self.add("ReduceMean", inputs, node.name, keepdims=int(keeps))
        return self.finished(node, result)

    def softmax(self, node):
        tensor = self.tensor(node.inputs[0])
        value = self.read(tensor.name)
        beta = self.real(node.attributes["beta"])
        if beta != 1:
            value = self.add("Mul", [value, self.constant(beta)], f"{node.name}_beta")
        axis = self.axis(-1, len(tensor.shape))
        return self.finished(node, self.add("Softmax", [value], node.name, axis=axis))

    def function(self, node):
        value = self.read(node.inputs[0])
        if node.op == "GELU" and node.attributes["approximate"]:
            raise ValueError(f"node {node.name}: an approximate GELU is not known")
        if node.op == "RELU6":
            bounds = [self.constant(self.real(bound)) for bound in (0, 6)]
            return self.finished(node, self.add("Clip", [value, *bounds], node.name))
        attributes = {"alpha": node.attributes["alpha"]} if node.op == "LEAKY_RELU" else {}
        return self.finished(node, self.add(_FUNCTIONS[node.op], [value], node.name, **attributes))

    def resize(self, node):
        source, output = self.tensor(node.inputs[0]), self.tensor(node.outputs[0])
        common.check_nearest(node)
        sizes = self.reordered(np.array(output.shape, np.int64), 4)
        result = self.add(
            "Resize",
            [self.read(source.name), "", "", self.constant(sizes)],
            node.name,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        return self.finished(node, result)

    def quantize(self, node):
        source = self.tensor(node.inputs[0])
        real = self.values[source.name] if source.dtype == "float32" else self.read(source.name)
        return self.finished(node, real)

    def dequantize(self, node):
        return self.dequantized(self.values[node.inputs[0]], self.tensor(node.inputs[0]), node.name)


_FUNCTIONS = {
    "GELU": "Gelu",
    "LEAKY_RELU": "LeakyRelu",
    "LOGISTIC": "Sigmoid",
    "RELU": "Relu",
    "TANH": "Tanh",
}


def _axis(scale, axis):
    return {"axis": axis} if np.ndim(scale) else {}
