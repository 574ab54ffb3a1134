"""The peers, as their users run them: two post-training quantizers, and tfmot's training.

    float_tflite         Keras 3 model -> float32 .tflite with a serving signature
    converter_ptq        Keras 3 model -> int8 .tflite by the TFLite converter of TensorFlow
    litert_quantizer_ptq float .tflite -> int8 .tflite by litert-quantizer (was ai-edge-quantizer)
    tfmot_trainees       MobileNet-v2 of tf_keras in float, and quantized for training by tfmot

Both give static int8 files: weights per channel, activations per tensor, int8 input and output.
Both see the same float graph: static batch of 1, batch norm folded by the converter.
Calibration batches are float32 arrays (1, H, W, 3), already preprocessed, in a fixed order:
litert-quantizer's ranges are a moving average, so their order is part of the recipe.
TensorFlow and litert-quantizer are imported where they are used, so that one peer runs without
the other.
"""

import sys
from collections.abc import Iterable
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    Ranges = dict[str, dict[str, Any]]  # tensor name -> {"min": array, "max": array}

SIGNATURE = "serving_default"
INPUT_NAME = "image"
OUTPUT_NAME = "output"
DISTRIBUTIONS = (
    "tensorflow",
    "keras",
    "ai-edge-litert",
    "litert-quantizer",
    "numpy",
    "flatbuffers",
    "protobuf",
)


def versions() -> dict[str, str]:
    """Returns distribution name -> installed version of all that decides the peers' bytes."""
    return {name: metadata.version(name) for name in DISTRIBUTIONS}


def frozen_converter(keras_model: "keras.Model") -> "tf.lite.TFLiteConverter":
    """Returns a TFLite converter of the model's inference graph with a static batch of 1.

    The converter gets no trackable object: with it, a Keras 3 model's variables are not frozen.
    The warning that this path is deprecated is expected.
    """
    import tensorflow as tf

    (model_input,) = keras_model.inputs
    specification = tf.TensorSpec((1, *model_input.shape[1:]), tf.float32, name=INPUT_NAME)
    function = tf.function(lambda image: keras_model(image, training=False))
    concrete_function = function.get_concrete_function(specification)
    return tf.lite.TFLiteConverter.from_concrete_functions([concrete_function])


def with_signature(tflite_model: bytes) -> bytes:
    """Adds a serving signature to a .tflite file with one input and one output.

    litert-quantizer calibrates through a signature, and frozen concrete functions have none.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(tflite_model)
    (input_index,) = model.subgraphs[0].inputs
    (output_index,) = model.subgraphs[0].outputs
    model.signatureDefs = [
        schema.SignatureDefT(
            signatureKey=SIGNATURE,
            subgraphIndex=0,
            inputs=[schema.TensorMapT(name=INPUT_NAME, tensorIndex=int(input_index))],
            outputs=[schema.TensorMapT(name=OUTPUT_NAME, tensorIndex=int(output_index))],
        )
    ]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def float_tflite(keras_model: "keras.Model") -> bytes:
    """Converts a model (N, H, W, 3) -> (N, classes) to float32 .tflite, (1, H, W, 3) in."""
    return with_signature(frozen_converter(keras_model).convert())


def converter_ptq(keras_model: "keras.Model", calibration_batches: Iterable[np.ndarray]) -> bytes:
    """Quantizes with the TFLite converter: int8 input (1, H, W, 3), int8 output (1, classes).

    Ranges are the minimum and maximum over all batches, each float32 (1, H, W, 3).
    """
    import tensorflow as tf

    converter = frozen_converter(keras_model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([batch] for batch in calibration_batches)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.int8
    converter.inference_output_type = tf.int8
    return converter.convert()


def litert_quantizer_recipe(weight_bits: int = 8):
    """Returns litert-quantizer's static recipe: 8-bit activations, weights of 8 or 4 bits.

    At 4 bits its policy takes convolution, dense and, where it allows it, depthwise weights; what
    it refuses stays at 8.
    """
    from litert_quantizer import recipe

    if weight_bits == 8:
        return recipe.static_wi8_ai8()
    manager = recipe.recipe_manager.RecipeManager()
    names = recipe.TFLOperationName
    manager.add_static_config(".*", names.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    for name in (names.CONV_2D, names.FULLY_CONNECTED, names.DEPTHWISE_CONV_2D):
        try:
            manager.add_static_config(
                ".*", name, activation_num_bits=8, weight_num_bits=weight_bits
            )
        except ValueError as error:
            print(f"litert_quantizer leaves {name} at 8 bits: {error}", file=sys.stderr)
    return manager.get_quantization_recipe()


def litert_quantizer_calibrate(
    float_tflite_model: bytes,
    calibration_batches: Iterable[np.ndarray],
    weight_bits: int = 8,
) -> "Ranges":
    """Returns the activation ranges that litert-quantizer's static recipe asks for.

    Ranges are moving averages (0.95 old, 0.05 new) over the batches, each float32 (1, H, W, 3).
    The samples go in as a list: the calibrator reads them twice, and a generator, spent after
    the first reading, would calibrate on nothing.
    """
    from litert_quantizer import quantizer

    samples = [{INPUT_NAME: batch} for batch in calibration_batches]
    static = quantizer.Quantizer(float_tflite_model, litert_quantizer_recipe(weight_bits))
    return static.calibrate({SIGNATURE: samples})


def litert_quantizer_quantize(
    float_tflite_model: bytes, ranges: "Ranges", weight_bits: int = 8
) -> bytes:
    """Quantizes with given ranges: int8 input (1, H, W, 3), int8 output (1, classes)."""
    from litert_quantizer import quantizer

    static = quantizer.Quantizer(float_tflite_model, litert_quantizer_recipe(weight_bits))
    result = static.quantize(ranges, enable_progress_report=False)
    return bytes(result.quantized_model)


def litert_quantizer_ptq(
    float_tflite_model: bytes,
    calibration_batches: Iterable[np.ndarray],
    weight_bits: int = 8,
) -> bytes:
    """Quantizes with litert-quantizer's own static recipe (weights 8 or 4 bits, activations 8).

    Takes a float file with a signature, as `float_tflite` writes it, and batches of float32
    (1, H, W, 3). Returns a file with int8 input (1, H, W, 3) and int8 output (1, classes).
    """
    ranges = litert_quantizer_calibrate(float_tflite_model, calibration_batches, weight_bits)
    return litert_quantizer_quantize(float_tflite_model, ranges, weight_bits)


def litert_quantizer_weights(float_tflite_model: bytes, recipe_name: str) -> bytes:
    """Quantizes the weights alone, by a recipe of litert-quantizer that needs no data."""
    from litert_quantizer import quantizer, recipe

    weights = quantizer.Quantizer(float_tflite_model, getattr(recipe, recipe_name)())
    return bytes(weights.quantize(enable_progress_report=False).quantized_model)


def tfmot_trainees(shape: tuple[int, int, int]):
    """Returns (float, quantized) MobileNet-v2 of tf_keras, random weights, compiled for SGD.

    tfmot refuses Keras 3's models; both Keras run side by side in one process.

    Args:
      shape: of an image: height, width, channels.
    """
    import tensorflow_model_optimization as tfmot
    import tf_keras

    def compiled(model):
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(tf_keras.optimizers.SGD(1e-4, 0.9), loss)
        return model

    tf_keras.utils.set_random_seed(0)
    network = tf_keras.applications.MobileNetV2(shape, weights=None, classifier_activation=None)
    quantized = tfmot.quantization.keras.quantize_model(network)
    return compiled(network), compiled(quantized)
