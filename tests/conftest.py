"""Shared fixtures: a fixed seed, images that look like images, weights as of a trained model."""

import io
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import numpy as np
import pytest
from PIL import Image

# No deadlines: a loaded machine is not a failing test.  CI draws the same examples every time.
hypothesis.settings.register_profile(
    "lowbit", deadline=None, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("lowbit")


@pytest.fixture
def rng():
    """A NumPy generator, the same in every test."""
    return np.random.default_rng(20260101)


@pytest.fixture
def smooth_images(rng):
    """Returns images(n, size, channels): float32 in [-1, 1], sums of a few low frequencies."""

    from eval import conformance

    def images(count, height=8, width=None, channels=3):
        return conformance.smooth_images(rng, count, height, width or height, channels)

    return images


@pytest.fixture
def randomize(rng):
    """Returns a function that gives a model the weights and statistics of one that was trained."""

    from eval import conformance

    return lambda model: conformance.randomized(model, rng)


def _jpegs(count, size, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((size, size)).save(file, "JPEG")
        yield file.getvalue()


@pytest.fixture
def jpegs():
    """A function that gives pictures of noise as the bytes of JPEG files."""
    return _jpegs


@pytest.fixture
def small_cifar():
    """A function that writes a few pictures in the layout of cifar10_jpeg.npz."""

    def write(path, **counts):
        arrays = {"classes": np.array([str(i) for i in range(10)])}
        for split, count in counts.items():
            files = list(_jpegs(count, 32))
            arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
            arrays[f"{split}_end"] = np.cumsum([len(file) for file in files])
            arrays[f"{split}_label"] = np.arange(count) % 10
        np.savez(path, **arrays)

    return write


@pytest.fixture(scope="session")
def adb_daemons():
    """Skips, by name, where this host cannot run adb's daemon; in CI that is a failure."""
    from lowbit.devices import debian, namespace

    try:
        with namespace.phone(namespace.amd64_system()):
            pass
    except (debian.DebianError, namespace.NamespaceError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NO ADB DAEMON ON THIS HOST: {error}")


@pytest.fixture(scope="session")
def adb_words(adb_daemons, tmp_path_factory):
    """Returns the words that start Debian's adb client, with a home of its own."""
    from lowbit.devices import cache, debian

    folder = cache.cache_folder() / "adb"
    debian.unpack(["adb"], folder)
    libraries = folder / "usr/lib/x86_64-linux-gnu/android"
    program = folder / "usr/lib/android-sdk/platform-tools/adb"
    home = tmp_path_factory.mktemp("home")
    # TMPDIR: its log would go to the host's, under a name that users share.
    return ["env", f"HOME={home}", f"TMPDIR={home}", f"LD_LIBRARY_PATH={libraries}", str(program)]


@pytest.fixture(scope="session")
def qualcomm():
    """Skips, by name, where Qualcomm's libraries are missing; in CI that is a failure.

    They come under a licence of their own (docs/hexagon.md): set-up leaves them out, `make slow` does
    not.
    """
    try:
        import onnxruntime_qnn  # noqa: F401
    except ImportError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NO EMULATED HTP: pip install 'lowbit[hexagon]' ({error})")


@pytest.fixture(scope="session")
def digits_files(tmp_path_factory):
    """A folder with float.keras, which knows the digits a little, its ptq.keras and its m.tflite.

    It is shared: write beside a copy.
    """
    import keras

    from export import tflite
    from lowbit import manifest
    from lowbit.data import datasets, pipeline, preprocess
    from ptq import quantize

    folder = tmp_path_factory.mktemp("digits")
    keras.utils.set_random_seed(0)
    x = image = keras.Input((16, 16, 3))
    for index in range(2):
        x = keras.layers.Conv2D(12, 3, strides=2, padding="same", name=f"conv{index}")(x)
        x = keras.layers.BatchNormalization(momentum=0.8, name=f"bn{index}")(x)
        x = keras.layers.ReLU(name=f"relu{index}")(x)
    x = keras.layers.AveragePooling2D(2, name="pool")(x)
    x = keras.layers.Dense(10, name="logits")(keras.layers.Flatten(name="flatten")(x))
    model = keras.Model(image, x)
    data = datasets.open_dataset("digits", "train")
    model.compile(
        keras.optimizers.SGD(0.1, 0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    batches = pipeline.train_batches(
        data,
        input_size=(16, 16),
        batch_size=64,
        preprocess=preprocess.parse("tf"),
        seed=0,
        augment=False,
    )
    for _, (pixels, labels) in zip(range(100), batches, strict=False):
        model.train_on_batch(pixels, labels)
    batches.close()
    manifest.save_model(model, folder / "float.keras", {})
    row = quantize.quantize(
        quantize.Config(
            model=str(folder / "float.keras"),
            dataset="digits",
            preprocess="tf",
            output=str(folder / "ptq.keras"),
        )
    )
    assert row["images"] == 100
    row = tflite.export(
        tflite.Config(model=str(folder / "ptq.keras"), output=str(folder / "m.tflite"))
    )
    assert row["size_bytes"] == (folder / "m.tflite").stat().st_size
    return folder
