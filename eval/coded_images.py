"""The first images of a data set as the input codes of a `.tflite` file, the same for every device."""

import numpy as np

from lowbit import integer_graph, runtimes
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing


def load(
    graph: integer_graph.IntegerGraph,
    name: str,
    dataset: str,
    images: int,
    preprocess: str | None,
    facts: dict,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (what the file takes, (images, h, w, c); labels, int64 (images,)).

    Args:
      graph: of the file, with one input.
      name: of the file, for error messages.
      dataset: a name or a path; of one with splits, the validation images.
      images: how many, fewer where the data set has fewer.
      preprocess: the normalization; None: as saved with the file.
      facts: the file's manifest.

    Raises:
      ValueError: where the file takes no images, there are none, or the normalization is not known.
    """
    check(graph, name)
    if images < 1:
        raise ValueError(f"{images} images; at least 1 is needed")
    shape = graph.tensors[graph.inputs[0]].shape
    text = preprocessing.first_known(name, preprocess, facts.get("preprocess"))
    opened = datasets.open_dataset(dataset, datasets.default_split(dataset))
    opened = datasets.renumbered(opened, facts.get("class_names"))
    parts = [
        (runtimes.graph_codes(graph, x), labels)
        for x, labels in pipeline.batches(
            opened,
            input_size=shape[1:3],
            channels=shape[3],
            batch_size=16,
            preprocess=preprocessing.parse(text),
            indices=np.arange(min(images, len(opened))),
        )
    ]
    codes, labels = zip(*parts, strict=True)
    return np.concatenate(codes), np.concatenate(labels)


def check(graph: integer_graph.IntegerGraph, name: str) -> None:
    """Raises ValueError unless a file computes codes of one image: one input of 4 axes, one output."""
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise ValueError(
            f"{name} has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; one of each is "
            "needed"
        )
    for end in (*graph.inputs, *graph.outputs):
        if graph.tensors[end].dtype not in ("int8", "uint8"):
            raise ValueError(
                f"{name}: {end} is {graph.tensors[end].dtype}; devices are compared by codes of 8 "
                "bits: quantize with 8-bit activations, export with --io=int8"
            )
    check_images(graph, name)


def check_images(graph: integer_graph.IntegerGraph, name: str) -> None:
    """Raises ValueError unless a file's first input is one image: (1, height, width, channels)."""
    shape = graph.tensors[graph.inputs[0]].shape
    if len(shape) != 4 or shape[0] != 1:
        raise ValueError(
            f"{name} takes input of shape {shape}; images are (1, height, width, channels)"
        )
