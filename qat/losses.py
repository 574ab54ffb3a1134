"""What a network in training is compared with: labels, or the float network's own outputs.

labels         cross entropy over the classes that the training images have
distillation   T^2 * KL(softmax(t / T) || softmax(s / T)), t and s the logits of teacher and student
               (Hinton et al. 1503.02531); the labels are not looked at
features       + weight * mean((f_s - f_t)^2) / mean(f_t^2), f the input of the last layer with
               weights
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from absl import logging
from keras import ops

from lowbit import layers, quantizers

_LAST = (keras.layers.Dense, keras.layers.Conv2D, *layers.WEIGHTED)


@dataclasses.dataclass(frozen=True)
class Target:
    """What `trainee(model)`'s outputs are compared with."""

    wanted: Callable  # (x, labels) -> what `losses` gets as its first argument
    losses: Callable | list[Callable]  # one for each output of the trainee
    trainee: Callable[[keras.Model], keras.Model]


def labels(present: np.ndarray, classes: int) -> Target:
    """Returns the target that labels are.

    Images of 10 of ImageNet's 1,000 classes would teach a network that the other 990 never occur:
    200 steps at a rate of 1e-5 took MobileNet-v2 from 0.84 to 0.71 on images of all classes.  So
    the softmax runs over the classes that are there.

    Args:
      present: the classes of the training images, integers.
      classes: the number of logits.
    """
    absent = np.full(classes, -1e9, np.float32)
    absent[present] = 0
    if len(present) < classes:
        logging.info("the training images have %d of %d classes", len(present), classes)

    def loss(labels, logits):
        return keras.losses.sparse_categorical_crossentropy(
            labels, logits + absent, from_logits=True
        )

    return Target(lambda x, labels: labels, loss, logits_model)


def distillation(teacher: keras.Model, temperature: float = 1.0, features: float = 0.0) -> Target:
    """Returns the target that the float network's outputs are.

    Args:
      teacher: the float model; it is run in inference, on the student's own batches.
      temperature: T above.
      features: the weight of the features' term; 0 leaves them out.
    """

    def divergence(teacher_logits, logits):
        wanted = ops.softmax(teacher_logits / temperature)
        difference = ops.log_softmax(teacher_logits / temperature) - ops.log_softmax(
            logits / temperature
        )
        return temperature**2 * ops.sum(wanted * difference, axis=-1)

    def distance(wanted, found):
        size = ops.mean(ops.square(wanted)) + 1e-12
        return features * ops.mean(ops.square(found - wanted)) / size

    trainee, losses = logits_model, divergence
    if features:
        trainee, losses = _with_features, [divergence, distance]
    source = trainee(teacher)
    return Target(lambda x, labels: source.predict_on_batch(x), losses, trainee)


def logits_model(model: keras.Model) -> keras.Model:
    """Returns the model up to its logits: a last softmax belongs to the loss.

    Raises:
      ValueError: where a layer's own activation is the softmax: names it.
    """
    tensor = model.outputs[0]
    operation = tensor._keras_history.operation
    if isinstance(operation, quantizers.ActivationQuantizer):
        node = operation._inbound_nodes[tensor._keras_history.node_index]
        tensor = node.arguments.keras_tensors[0]
        operation = tensor._keras_history.operation
    if isinstance(operation, keras.layers.Softmax):
        return type(model)(model.input, operation.input)
    if isinstance(operation, keras.layers.Activation | keras.layers.Dense) and (
        operation.activation is keras.activations.softmax
    ):
        raise ValueError(
            f"layer {operation.name} computes the softmax itself; for float training end the model "
            "in logits, or in a Softmax layer"
        )
    return model


def _with_features(model):
    """Returns the model with two outputs: its logits, and what its last layer with weights reads."""
    model = logits_model(model)
    last = [layer for layer in model.layers if isinstance(layer, _LAST)][-1]
    return type(model)(model.input, [model.outputs[0], last.input])
