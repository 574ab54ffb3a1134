"""What both forms share: names, layouts, the model's ends, and operations that move codes.

Tensors of four axes lie as (batch, channels, height, width), all others as in the graph.
"""

import numpy as np
from onnx import helper, numpy_helper

from lowbit.kernels import delegate, requantization, windows

TO_CHANNELS_FIRST = (0, 3, 1, 2)
TO_CHANNELS_LAST = (0, 2, 3, 1)
DTYPES = {
    name: helper.np_dtype_to_tensor_dtype(np.dtype(name)) for name in ("int8", "uint8", "float32")
}
LOWEST = {"int8": -128, "uint8": 0}
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
# Each operation and the method that writes it.
OPERATIONS = {
    "ADD": "arithmetic",
    "AVERAGE_POOL_2D": "average_pool",
    "CONCATENATION": "concatenation",
    "CONV_2D": "convolution",
    "DEPTHWISE_CONV_2D": "convolution",
    "DEQUANTIZE": "dequantize",
    "FULLY_CONNECTED": "fully_connected",
    "GELU": "function",
    "LEAKY_RELU": "function",
    "LOGISTIC": "function",
    "MAXIMUM": "selected",
    "MAX_POOL_2D": "max_pool",
    "MEAN": "mean",
    "MINIMUM": "selected",
    "MUL": "arithmetic",
    "PAD": "pad",
    "QUANTIZE": "quantize",
    "RELU": "function",
    "RELU6": "function",
    "RESHAPE": "reshape",
    "RESIZE_NEAREST_NEIGHBOR": "resize",
    "SLICE": "slice",
    "SOFTMAX": "softmax",
    "SUB": "arithmetic",
    "TANH": "function",
    "TRANSPOSE": "transpose",
}


class Writer:
    """What the forms share: names, layouts, and operations that move codes.

    The method of an operation takes its node, adds operators, and returns the name of its codes.
    """

    def __init__(self, graph, layout):
        self.graph, self.layout = graph, layout
        self.nodes, self.initializers, self.inputs, self.outputs = [], [], [], []
        self.values: dict[str, str] = {}  # ONNX name of each of the graph's tensors
        self._constants: dict[tuple, str] = {}
        self._used: set[str] = {*graph.inputs, *graph.outputs}

    # What a form decides.

    def read(self, name):
        """Returns the name of a tensor as the form's operators take it."""
        raise NotImplementedError

    def finished(self, node, result):
        """Returns the name of the codes of a node's result."""
        raise NotImplementedError

    def real_zero(self, tensor):
        """Returns what stands for real 0, an array without axes."""
        raise NotImplementedError

    def dtype_outside(self, tensor):
        """Returns ONNX's number of the type that one of the model's ends has."""
        return DTYPES[tensor.dtype]

    def enter(self, tensor, value):
        """Returns what the form computes with, of a model's input that is laid out as inside."""
        return value

    def leave(self, tensor, value):
        """Returns codes of the tensor's own type, of the value that stands for it inside."""
        return value

    # Names and nodes.

    def name(self, wanted):
        """Returns a name that no other value has."""
        count, found = 1, wanted
        while found in self._used:
            count += 1
            found = f"{wanted}_{count}"
        self._used.add(found)
        return found

    def add(self, op, inputs, wanted, **attributes):
        """Adds an operator with one result; returns its name."""
        output = self.name(wanted)
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, array, wanted="constant", shared=True):
        """Returns the name of a constant; equal small ones are stored once if they may be shared."""
        array = np.asarray(array, order="C")  # an array without axes stays one
        shared = shared and array.size <= 4096
        key = (array.dtype.str, array.shape, array.tobytes()) if shared else None
        if key is None or key not in self._constants:
            name = self.name(wanted)
            self.initializers.append(numpy_helper.from_array(array, name))
            if key is None:
                return name
            self._constants[key] = name
        return self._constants[key]

    # The graph.

    def add_graph(self):
        for name in self.graph.inputs:
            self._add_input(self.graph.tensors[name])
        for node in self.graph.nodes:
            if any(
                name not in self.values and self.graph.tensors[name].data is None
                for name in node.inputs
            ):
                raise ValueError(f"node {node.name} reads what nothing has computed")
            result = getattr(self, OPERATIONS[node.op])(node)
            self.values[node.outputs[0]] = self._renamed(result, f"{node.outputs[0]}_codes")
        for name in self.graph.outputs:
            self._add_output(self.graph.tensors[name])

    def _renamed(self, value, wanted):
        """Returns the new name of what the last operator gave, which nothing has read yet."""
        last = self.nodes[-1]
        if last.output[0] != value or value in self.values.values() or wanted in self._used:
            return value
        last.name = last.output[0] = self.name(wanted)
        return last.output[0]

    def _shape_outside(self, tensor):
        if len(tensor.shape) == 4 and self.layout == "NCHW":
            return [tensor.shape[axis] for axis in TO_CHANNELS_FIRST]
        return list(tensor.shape)

    def _add_input(self, tensor):
        self.inputs.append(
            helper.make_tensor_value_info(
                tensor.name, self.dtype_outside(tensor), self._shape_outside(tensor)
            )
        )
        value = tensor.name
        if len(tensor.shape) == 4 and self.layout == "NHWC":
            value = self.channels_first(tensor.name, f"{tensor.name}_nchw")
        self.values[tensor.name] = self.enter(tensor, value)

    def _add_output(self, tensor):
        self.outputs.append(
            helper.make_tensor_value_info(
                tensor.name, self.dtype_outside(tensor), self._shape_outside(tensor)
            )
        )
        outside = len(tensor.shape) == 4 and self.layout == "NHWC"
        value = self.leave(tensor, self.values[tensor.name])
        operation = ("Transpose", {"perm": TO_CHANNELS_LAST}) if outside else ("Identity", {})
        self.nodes.append(
            helper.make_node(
                operation[0],
                [value],
                [tensor.name],
                name=self.name(f"{tensor.name}_output"),
                **operation[1],
            )
        )

    def channels_first(self, name, wanted):
        return self.add("Transpose", [name], wanted, perm=TO_CHANNELS_FIRST)

    def channels_last(self, name, wanted):
        return self.add("Transpose", [name], wanted, perm=TO_CHANNELS_LAST)

    def tensor(self, name):
        return self.graph.tensors[name]

    def axis(self, axis, rank):
        """Returns where an axis of the graph lies in ONNX."""
        axis = axis % rank
        return TO_CHANNELS_FIRST.index(axis) if rank == 4 else axis

    def reordered(self, values, rank):
        """Returns values for each axis of the graph in the order of ONNX's axes."""
        values = np.asarray(values)
        return values[list(TO_CHANNELS_FIRST)] if rank == 4 else values

    def pads(self, node, span):
        """Returns ONNX's pads of a window over the node's first input."""
        (top, bottom), (left, right) = windows.padding(
            node, self.tensor(node.inputs[0]).shape, span
        )
        return [top, left, bottom, right]

    # Operations that move or select codes: one operator on what the form reads.

    def concatenation(self, node):
        rank = len(self.tensor(node.outputs[0]).shape)
        self._check_one_map(node)
        inputs = [self.read(name) for name in node.inputs]
        axis = self.axis(node.attributes["axis"], rank)
        return self.finished(node, self.add("Concat", inputs, node.name, axis=axis))

    def _check_one_map(self, node):
        differing = delegate.differing_map(self.graph, node)
        if differing:
            raise ValueError(
                f"node {node.name} ({node.op}): {differing} has another scale or zero point than "
                "the output"
            )

    def selected(self, node):
        self._check_one_map(node)
        operator = "Max" if node.op == "MAXIMUM" else "Min"
        result = self.add(operator, [self.whole(x) for x in self.aligned(node)], node.name)
        return self.finished(node, self.narrow(result))

    def whole(self, name):
        """Returns values of a type that Max and Min take, which int8 is not everywhere."""
        return name

    def narrow(self, name):
        return name

    def max_pool(self, node):
        return self.pooled(node, "MaxPool")

    def pooled(self, node, operator):
        """Returns the codes of a pooling window's largest value or mean."""
        result = self.add(
            operator,
            [self.read(node.inputs[0])],
            node.name,
            kernel_shape=node.attributes["filter"],
            strides=node.attributes["strides"],
            pads=self.pads(node, node.attributes["filter"]),
        )
        return self.clamped(node, self.finished(node, result))

    def pad(self, node):
        tensor = self.tensor(node.outputs[0])
        paddings = np.asarray(self.tensor(node.inputs[1]).data)
        amounts = self.reordered(paddings, len(tensor.shape)).T.reshape(-1).astype(np.int64)
        inputs = [
            self.read(node.inputs[0]),
            self.constant(amounts),
            self.constant(self.real_zero(tensor)),
        ]
        return self.finished(node, self.add("Pad", inputs, node.name))

    def slice(self, node):
        source, output = self.tensor(node.inputs[0]), self.tensor(node.outputs[0])
        begin = np.ravel(self.tensor(node.inputs[1]).data).astype(np.int64)
        axes = [axis for axis, size in enumerate(output.shape) if size != source.shape[axis]]
        if not axes:
            return self.values[source.name]
        parts = [begin[axes], begin[axes] + np.array(output.shape)[axes]]
        parts.append(np.array([self.axis(axis, len(output.shape)) for axis in axes]))
        constants = [self.constant(part.astype(np.int64)) for part in parts]
        return self.finished(
            node, self.add("Slice", [self.read(source.name), *constants], node.name)
        )

    def transpose(self, node):
        order = [int(axis) for axis in np.ravel(self.tensor(node.inputs[1]).data)]
        if len(order) == 4:
            order = [TO_CHANNELS_FIRST.index(order[axis]) for axis in TO_CHANNELS_FIRST]
        inputs = [self.read(node.inputs[0])]
        return self.finished(node, self.add("Transpose", inputs, node.name, perm=order))

    def reshape(self, node):
        source, output = self.tensor(node.inputs[0]), self.tensor(node.outputs[0])
        value = self._reshaped(self.read(source.name), source.shape, output.shape, node.name)
        return self.finished(node, value)

    def _reshaped(self, value, before, after, wanted):
        """Returns codes in another shape, in the order that they have in the graph."""
        if len(before) == 4 and not _is_vector(before):
            value = self.channels_last(value, f"{wanted}_nhwc")
        if len(after) != 4:
            return self.add("Reshape", [value, self.constant(np.array(after, np.int64))], wanted)
        if _is_vector(after):
            after = tuple(after[axis] for axis in TO_CHANNELS_FIRST)
            return self.add("Reshape", [value, self.constant(np.array(after, np.int64))], wanted)
        shape = self.constant(np.array(after, np.int64))
        return self.channels_first(self.add("Reshape", [value, shape], f"{wanted}_nhwc"), wanted)

    def aligned(self, node):
        """Returns a node's two inputs as the form reads them, of axes that broadcast."""
        shapes = [self.tensor(name).shape for name in node.inputs[:2]]
        rank = max(map(len, shapes))
        found = []
        for name, shape in zip(node.inputs[:2], shapes, strict=True):
            tensor = self.tensor(name)
            ones = (1,) * (rank - len(shape))
            if tensor.data is not None:  # NumPy's rule: axes are added in front
                array = tensor.data.reshape(*ones, *shape)
                array = array.transpose(TO_CHANNELS_FIRST) if rank == 4 else array
                found.append(self.read_constant(tensor, array))
            elif ones:  # they are added behind the batch's
                wider = (shape[0], *ones, *shape[1:])
                found.append(self.widened(name, wider))
            else:
                found.append(self.read(name))
        return found

    def widened(self, name, shape):
        """Returns what `read` returns of a tensor in another shape."""
        tensor = self.tensor(name)
        return self._reshaped(self.read(name), tensor.shape, shape, f"{name}_wide")

    def read_constant(self, tensor, array):
        """Returns a constant's codes, in another shape, as the form's operators take them."""
        raise NotImplementedError

    def clamped(self, node, codes):
        """Returns codes clamped as the node's activation function asks, where it asks anything."""
        tensor = self.tensor(node.outputs[0])
        low, high = requantization.clamp_range(node, tensor, "xnnpack")
        limits = np.iinfo(tensor.dtype)
        if (low, high) == (limits.min, limits.max):
            return codes
        bounds = [self.constant(np.array(bound, tensor.dtype)) for bound in (low, high)]
        return self.add("Clip", [codes, *bounds], f"{node.name}_clamped")

    def dense_input(self, node):
        """Returns (shape of the rows, whether it takes a reshape) of FULLY_CONNECTED's input."""
        source, weight = (self.tensor(name) for name in node.inputs[:2])
        channels = weight.shape[1]
        rows = int(np.prod(source.shape)) // channels
        return (rows, channels), tuple(source.shape) != (rows, channels)

    def convolution_options(self, node):
        """Returns (weights in ONNX's layout, attributes of Conv)."""
        source, weight = (self.tensor(name) for name in node.inputs[:2])
        channels = source.shape[-1]
        if node.op == "DEPTHWISE_CONV_2D":
            kernel, groups = np.transpose(weight.data, (3, 0, 1, 2)), channels
        else:
            kernel, groups = np.transpose(weight.data, (0, 3, 1, 2)), channels // weight.shape[3]
        size, dilations = kernel.shape[2:], node.attributes["dilations"]
        span = [1 + (size[i] - 1) * dilations[i] for i in range(2)]
        return kernel, {
            "kernel_shape": size,
            "strides": node.attributes["strides"],
            "dilations": dilations,
            "group": groups,
            "pads": self.pads(node, span),
        }


def _is_vector(shape):
    """Returns whether four axes hold the same order with the channels first as with them last."""
    return shape[1] * shape[2] == 1 or shape[3] == 1


def check_nearest(node):
    if node.attributes["align_corners"] or node.attributes["half_pixel_centers"]:
        raise ValueError(f"node {node.name}: align_corners and half_pixel_centers are not known")
