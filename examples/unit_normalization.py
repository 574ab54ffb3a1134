"""Teaches lowbit `keras.layers.UnitNormalization`, x / |x| over the channels: L2_NORMALIZATION.

    python -m eval.conformance --extensions=examples/unit_normalization.py --cases='unit normalization'

docs/adding_a_layer.md walks through this file.
"""

import keras
import numpy as np

from lowbit import extension, fixed_point, functional, lowering, network
from lowbit.kernels import requantization


def read(call, inputs, fresh):
    """Returns the layer as one operation; its values lie in [-1, 1], which the kernel has fixed."""
    axes = {int(axis) % call.rank for axis in np.ravel(call.layer.axis)}
    if axes != {call.rank - 1}:
        raise functional.UnsupportedModelError(
            f"layer {call.name} normalizes over axes {sorted(axes)}; allowed is the last axis alone"
        )
    return [
        network.Operation(
            "unit_normalization",
            call.name,
            inputs,
            call.output,
            call.layer,
            label=call.name,
            config={"fixed": "tanh"},  # scale 1/128, zero point 0
        )
    ]


def lower(builder, call, arguments, shape):
    """Adds the node once the quantizer behind the layer has given its output's scale."""

    def finish(output, activation):
        builder.node("L2_NORMALIZATION", call.name, [arguments[0].name], output, activation=None)

    return lowering.Pending(finish)


def run(graph, node, inputs, kernel):
    """L2_NORMALIZATION: x * (1 / sqrt(sum of x^2)) in 31-bit fixed point, times 128."""
    source, output = requantization.ends(graph, node)
    codes = requantization.centred(inputs[0], source)
    total = (codes**2).sum(axis=-1)
    distinct, place = np.unique(total, return_inverse=True)
    roots = np.array([fixed_point.reciprocal_root(int(value)) for value in distinct])
    multiplier, shift = (roots[:, i][place].reshape(*total.shape, 1) for i in range(2))
    centred = fixed_point.multiply_by_quantized_multiplier(codes, multiplier, shift + 7)
    return requantization.finish(centred, node, output, kernel)


EXTENSIONS = (
    extension.Extension(
        layer=keras.layers.UnitNormalization,
        read=read,
        lower=lower,
        kind="unit_normalization",
        operators=(
            extension.Operator(
                "L2_NORMALIZATION",
                run,
                options=("L2NormOptions", {"activation": "fusedActivationFunction"}),
                versions={"int8": 2},
                fixed_output={"int8": (1 / 128, 0)},
            ),
        ),
        cases={
            "unit normalization": (
                lambda x: keras.layers.UnitNormalization()(x),
                ["L2_NORMALIZATION"],
            ),
        },
    ),
)
