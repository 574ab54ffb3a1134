"""A placed model run operation by operation over calibration images, beside its float form.

Corrections go through the network from input to output: each layer is corrected with the inputs
that the corrected layers before it give, against the outputs that the float network gives.  So two
streams run side by side, and each operation runs once in each.  What a quantizer puts out waits on
disk until its last reader has run: memory holds one batch at a time, however many images there are.

    float stream:      float weights, activations clipped to the ranges but not rounded; kept as
                       float16 (float32 where the range is below 2**-6 or above 2**14)
    quantized stream:  int16 multiples of the quantizer's scale: exact

The float stream is clipped because what a range cuts off, no weight brings back.  Fitted to
unclipped outliers, MobileNet-v2's layers got worse: mean KL to float 0.67 at 8 bits, unfitted 0.015.
"""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator

import keras
import numpy as np
from keras import ops

from lowbit import fakequant, functional, layers, quantizers

# Largest values that float16 holds with 11 significant bits and without falling to zero soon.
FLOAT16_LIMITS = (2.0**-6, 2.0**14)


@dataclasses.dataclass(frozen=True)
class Step:
    """A weighted layer whose turn it is; what is assigned to it before the next step counts."""

    layer: keras.layers.Layer  # of the quantized model
    float_layer: keras.layers.Layer  # the same of the float model
    activation: str | None  # fused behind it
    inputs: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
    calls: int  # of the layer; `inputs` are those of the first
    index: int  # 0 for the first step
    count: int  # steps in all

    # `inputs()` yields (quantized, float) pairs of the layer's input, float32 (batch, ...).


def walk(
    quantized: keras.Model, reference: keras.Model, batches: Iterable[np.ndarray], images: int
) -> Iterator[Step]:
    """Yields a Step for each weighted layer, from the input on; a layer called twice, once.

    Args:
      quantized: from `placement.place`, with ranges set; runs with its weights of the moment.
      reference: placed in the same way from the same float model; gets `quantized`'s ranges.
      batches: of normalized float32 images (n, h, w, c), `images` in all.
      images: their number.

    Raises:
      ValueError: where the two models differ in their operations, or there are fewer images.
    """
    trace, other = functional.trace(quantized), functional.trace(reference)
    if [call.name for call in trace.calls] != [call.name for call in other.calls]:
        raise ValueError(f"{quantized.name} and {reference.name} have different operations")
    pairs = (quantizers.activation_quantizers(model) for model in (quantized, reference))
    for ours, theirs in zip(*pairs, strict=True):
        theirs.minimum.assign(ours.minimum)
        theirs.maximum.assign(ours.maximum)
    with (
        tempfile.TemporaryDirectory(prefix="lowbit-") as folder,
        layers.in_float(reference),
        fakequant.without_retracing_warnings(),
    ):
        streams = (
            _Stream(trace, images, pathlib.Path(folder) / "quantized"),
            _Stream(other, images, pathlib.Path(folder) / "float"),
        )
        slices = []
        start = 0
        for batch in batches:
            rows = slice(start, start + len(batch))
            slices.append(rows)
            start = rows.stop
            if start > images:
                raise ValueError(f"more than the {images} images that were announced")
            for stream in streams:
                stream.put(trace.inputs[0], rows, batch)
        if start != images:
            raise ValueError(f"{start} images came, {images} were announced")
        last_use = _last_uses(trace)
        behind = {call.inputs[0]: call for call in trace.calls if _is_quantizer(call)}
        weighted = {}  # each layer's first call
        for index, call in enumerate(trace.calls):
            if isinstance(call.layer, layers.WEIGHTED):
                weighted.setdefault(call.layer, index)
        steps = {index: step for step, index in enumerate(weighted.values())}
        for index, (call, twin) in enumerate(zip(trace.calls, other.calls, strict=True)):
            if index in steps:
                yield Step(
                    call.layer,
                    twin.layer,
                    behind[call.output].keywords.get("activation"),
                    lambda value=call.inputs[0]: (
                        tuple(ops.convert_to_numpy(stream.get(value, rows)) for stream in streams)
                        for rows in slices
                    ),
                    len(call.layer._inbound_nodes),
                    steps[index],
                    len(steps),
                )
            if _is_quantizer(call):
                for stream in streams:
                    for rows in slices:
                        stream.put(call.output, rows, stream.compute(call.output, rows))
            for stream in streams:
                stream.drop(value for value, last in last_use.items() if last <= index)


def _is_quantizer(call):
    return isinstance(call.layer, quantizers.ActivationQuantizer)


def _last_uses(trace):
    """Returns for each value the index of the last call behind which it is not needed any more."""
    last: dict[int, int] = {}
    for index in reversed(range(len(trace.calls))):
        call = trace.calls[index]
        # Only quantizers' outputs are kept; others are computed anew where they are read.
        end = index if _is_quantizer(call) else max(index, last.get(call.output, index))
        for value in call.inputs:
            last[value] = max(last.get(value, 0), end)
        last.setdefault(call.output, index)
    return last


class _Stream:
    """The values of one model that later operations still read, on disk."""

    def __init__(self, trace: functional.Trace, images: int, folder: pathlib.Path):
        self.trace, self.images, self.folder = trace, images, folder
        self.producers = {call.output: call for call in trace.calls}
        self.arrays: dict[int, tuple[np.ndarray, np.float32]] = {}
        folder.mkdir()

    def get(self, value: int, rows: slice):
        """Returns a value for some images, a float32 tensor."""
        if value not in self.arrays:
            return self.compute(value, rows)
        array, scale = self.arrays[value]
        x = ops.cast(ops.convert_to_tensor(array[rows]), "float32")
        return x * scale if array.dtype == np.int16 else x

    def compute(self, value: int, rows: slice):
        """Returns a value from its inputs, a float32 tensor."""
        call = self.producers[value]
        inputs = [self.get(one, rows) for one in call.inputs]
        # The training form: floats in fewer passes over memory (a third of the time), one code in a
        # million off the kernels'.  Nothing learns: ranges are frozen.
        training = getattr(call.layer, "batch_norm", None) is None
        y = functional.run_call(call, inputs, training=training)
        if _is_quantizer(call) and call.layer.spec is not None and not call.layer.enabled:
            y = ops.clip(y, *call.layer.range())
        return y

    def put(self, value: int, rows: slice, x) -> None:
        """Keeps a value for some images; the model's inputs in float32."""
        if value not in self.arrays:
            dtype, scale = np.float32, np.float32(1)
            call = self.producers.get(value)
            if call is not None:
                layer = call.layer
                low, high = (abs(float(ops.convert_to_numpy(bound))) for bound in layer.range())
                if layer.enabled and layer.spec is not None:
                    dtype, scale = np.int16, np.float32(layer.scale_and_zero_point()[0])
                elif FLOAT16_LIMITS[0] < max(low, high) < FLOAT16_LIMITS[1]:
                    dtype = np.float16
            self.arrays[value] = (self._array(str(value), dtype, x.shape[1:]), scale)
        array, scale = self.arrays[value]
        if array.dtype == np.int16:
            x = ops.round(x / scale)
        array[rows] = ops.convert_to_numpy(ops.cast(x, str(array.dtype)))

    def _array(self, name, dtype, shape):
        """Returns an array on disk, (images, *shape), whose file goes with it."""
        shape = (self.images, *shape)
        path, size = self.folder / name, int(np.prod(shape)) * np.dtype(dtype).itemsize
        with open(path, "wb") as file:
            try:
                os.posix_fallocate(
                    file.fileno(), 0, size
                )  # a full disk would kill the process later
            except OSError as error:
                raise OSError(
                    f"activations of {self.images} images need {size / 2**20:.0f} MiB more in "
                    f"{self.folder.parent.parent} ({error.strerror}); set TMPDIR, or take fewer images"
                ) from error
        array = np.memmap(path, dtype, "r+", shape=shape)
        path.unlink()  # even a killed process leaves no data behind
        return array

    def drop(self, values: Iterable[int]) -> None:
        for value in list(values):
            self.arrays.pop(value, None)
