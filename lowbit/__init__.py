"""lowbit: train, quantize, export and measure integer networks with Keras 3 and LiteRT.

The files, in the order of the pipeline; imports point up this list only (tests/test_layering.py):

    spec           what is quantized and how: QuantSpec, Scheme, the named schemes     NumPy only
    affine         THE arithmetic: scale, zero point, quantize, bias                   NumPy only
    histogram      counts of a stream of values, in bounded memory                     NumPy only
    ranges, clipping, fold     range estimators of activations and of weights; folding NumPy only
    metrics        top-1, top-5, KL, paired errors                                     NumPy only
    diagnosis      SQNR, mean shift and outliers of channels; memory                   NumPy only
    fixed_point    the integer multiplier of the kernels                               NumPy only
    integer_graph  the one form between Keras and every consumer                       NumPy only
    kernels/       the simulator: codes as the kernels compute them                    NumPy only
    fakequant      the same arithmetic in keras.ops, with gradients
    lsq, pact, dsq, stochastic, binary     other gradients of the same rounding
    batch_statistics       batch normalization by a batch's own statistics
    quantizers, layers     what a quantized Keras model is made of
    recorded, functional   a Keras model as calls of layers
    network, reading, rewrites, placement      float model to quantized model
    auto_ranges    of several ranges the one that hurts the next layers least
    calibration    ranges from images
    walk           a quantized and a float model side by side, operation by operation
    operator_versions, runtime_versions, tflite_file     integer graph to `.tflite` and back
    foreign        a layer without an integer form, as the operations that TensorFlow makes of it
    lowering       quantized model to integer graph
    tflite_view, census, lint      any tool's file: what it holds, costs, and does wrong
    targets        what of any tool's file a runtime or a chip does not take
    onnx_file/             integer graph to ONNX, quantize-dequantize pairs or exact
    extension      a layer that none of these know, from a file of the user's
    boundary, mlir         uint8 and float32 input and output; the MLIR route
    data, models   images; networks
    files, results, plots, progress    files written whole; rows, pictures, bars
    runtimes       a model over images, in Keras, the interpreter or the simulator
    micro          a file in TensorFlow Lite Micro's interpreter
    devices/       phones through adb, the emulated lab: what runs a file elsewhere
    checkpoint, manifest, cli      saved runs, saved models, commands
"""

import os

# Quiet before TensorFlow is first imported: its notes about missing GPUs drown a tool's own lines.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__version__ = "0.1.0"
