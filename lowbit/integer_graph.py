"""The frozen integer graph: the one form between Keras and every consumer.

Lowering writes it, and so does the `.tflite` reader; the flatbuffer writer, the simulator, the
MLIR twin and the checker read it.  A graph holds integer codes and the affine map of each tensor,

    real = scale * (code - zero_point)                       (Jacob et al., eq. 1)

and names its operations as TFLite does.  Attributes that each operation carries:

| op                               | attributes                                                    |
|----------------------------------|---------------------------------------------------------------|
| CONV_2D                          | strides, dilations, padding, activation                       |
| DEPTHWISE_CONV_2D                | strides, dilations, padding, activation, depth_multiplier     |
| TRANSPOSE_CONV                   | strides, padding, activation; inputs: shape, weights, x, bias |
| FULLY_CONNECTED                  | activation, keep_num_dims                                     |
| ADD, SUB, MUL                    | activation                                                    |
| AVERAGE_POOL_2D, MAX_POOL_2D     | filter, strides, padding, activation                          |
| MEAN (second input: axes)        | keep_dims                                                     |
| CONCATENATION                    | axis, activation                                              |
| RESHAPE (second input: shape)    | new_shape                                                     |
| SOFTMAX                          | beta                                                          |
| SLICE (inputs 2, 3: begin, size) | -                                                             |
| STRIDED_SLICE (begin, end, strides) | five masks, all 0                                          |
| DEPTH_TO_SPACE, SPACE_TO_DEPTH   | block_size                                                    |
| TRANSPOSE (second input: order)  | -                                                             |
| RESIZE_NEAREST_NEIGHBOR, RESIZE_BILINEAR (second input: size) | align_corners, half_pixel_centers |
| LEAKY_RELU                       | alpha                                                         |
| GELU                             | approximate                                                   |
| MAXIMUM, MINIMUM, LOGISTIC, TANH, ELU, RSQRT | -                                                 |
| PRELU (second input: alpha)      | -                                                             |
| RELU, RELU6, RELU_0_TO_1         | -                                                             |
| PAD (second input: paddings), QUANTIZE, DEQUANTIZE | -                                           |

Pairs are (height, width); padding is "SAME" or "VALID"; activation is None, "RELU", "RELU6" or
"RELU_N1_TO_1".  Weights lie as in TFLite: convolutions (out, h, w, in), depthwise
(1, h, w, in * depth_multiplier), dense (out, in).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Affine map of a tensor's codes: real = scale * (code - zero_point)."""

    scale: np.ndarray  # float32, shape (1,), or (channels,) along `axis`
    zero_point: np.ndarray  # int64, shape of `scale`
    axis: int | None = None  # None: one scale for the whole tensor


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A named array of codes: a constant where `data` is set, an activation where it is None."""

    name: str
    shape: tuple[int, ...]
    # NumPy's name: "int8", "uint8", "int16", "int32", "int64", "float16", "float32"; "int4" and
    # "int2" for codes that a file packs, whose `data` is int8.
    dtype: str
    quantization: Quantization | None = None
    data: np.ndarray | None = None
    # What 1 of the network that this was lowered from is here.  Activations of fewer than 8 bits are
    # scaled so that RELU6 leaves exactly their codes; the weights around them make up for it.  A
    # file does not hold it.
    unit: float = 1.0

    @property
    def network_scale(self) -> np.float32:
        """The single scale, float32, in the units of the network that this was lowered from."""
        return np.float32(np.float64(self.scale) / self.unit)

    @property
    def scale(self) -> np.float32:
        """The single scale of a per-tensor quantized tensor, float32."""
        return np.float32(self._single().scale[0])

    @property
    def zero_point(self) -> int:
        """The single zero point of a per-tensor quantized tensor, in codes."""
        return int(self._single().zero_point[0])

    def _single(self) -> Quantization:
        if self.quantization is None or self.quantization.scale.size != 1:
            count = 0 if self.quantization is None else self.quantization.scale.size
            raise ValueError(f"tensor {self.name!r} has {count} scales where exactly 1 is needed")
        return self.quantization


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation; `op` is the TFLite builtin operator's name, inputs and outputs tensor names."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class IntegerGraph:
    """Tensors by name, and nodes in an order in which they can run."""

    tensors: Mapping[str, Tensor]
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str = "main"
    description: str = ""
