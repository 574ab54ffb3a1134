"""The form float16: the operators of the form qdq with nothing quantized between them."""

import numpy as np
from onnx import TensorProto

from lowbit.onnx_file import qdq

_BOUNDS = {"RELU": (0, None), "RELU6": (0, 6), "RELU_N1_TO_1": (-1, 1)}


class Float16(qdq.Qdq):
    """The network in float16, with the real numbers that the weights' codes stand for.

    A value stands for itself where the form qdq has codes; so do the model's inputs and outputs.
    """

    real = np.float16

    def dtype_outside(self, tensor):
        return TensorProto.FLOAT16

    def dequantized(self, codes, tensor, wanted, dtype=None):
        return codes

    def quantized(self, real, tensor, wanted, dtype=None):
        return real

    def read(self, name):
        return self.values[name]

    def read_constant(self, tensor, array):
        real = (array.astype(np.float64) - tensor.zero_point) * np.float64(tensor.scale)
        return self.constant(real.astype(np.float16), tensor.name)

    def clamped(self, node, codes):
        activation = node.attributes["activation"]
        if activation is None:
            return codes
        low, high = _BOUNDS[activation]
        if high is None:
            return self.add("Relu", [codes], f"{node.name}_clamped")
        bounds = [self.constant(np.float16(bound)) for bound in (low, high)]
        return self.add("Clip", [codes, *bounds], f"{node.name}_clamped")

    def _weights(self, node, kernel):
        source, weight = (self.tensor(name) for name in node.inputs[:2])
        scale = np.asarray(weight.quantization.scale, np.float64)
        real = kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1))
        bias = np.zeros(self.tensor(node.outputs[0]).shape[-1])
        if len(node.inputs) > 2:
            bias = np.asarray(self.tensor(node.inputs[2]).data) * (source.scale * scale)
        largest = max(np.abs(real).max(), np.abs(bias).max())
        if largest > np.finfo(np.float16).max:
            raise ValueError(
                f"node {node.name} ({node.op}): weights or biases reach {largest:.4g}, which float16 "
                "cannot hold"
            )
        return [
            self.constant(array.astype(np.float16), f"{node.name}_{what}")
            for what, array in (("kernel", real), ("bias", bias))
        ]
