"""Tensors of a PyTorch checkpoint (`torch.save`), read without PyTorch and without running its pickle.

A pickle is a program.  The unpickler here knows four names, those that rebuild tensors, and refuses
any other, so that a hostile file can do no more than name wrong numbers.  Both formats are read:
the zip archive (`archive/data.pkl`, `archive/data/KEY`), and the one before PyTorch 1.6, which is
five pickles (magic number, protocol, system, the tensors, their storages' keys) and then each
storage: its length, int64, and its bytes.
"""

import collections
import dataclasses
import io
import math
import os
import pickle
import zipfile

import numpy as np

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
}
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError),
    *(AttributeError, OverflowError, zipfile.BadZipFile, MemoryError),
)


class TorchFileError(ValueError):
    """The file holds no dictionary of tensors that can be read safely."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _View:
    storage: _Storage
    offset: int  # in elements, as are the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dictionary by name, as arrays of their own.

    Raises:
      FileNotFoundError: where there is no such file.
      TorchFileError: for damage, or a pickle that asks for more than tensors: names what it asks.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            views, storages = _read_zip(content)
        else:
            views, storages = _read_legacy(content)
        return {name: _array(view, storages) for name, view in views.items()}
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise TorchFileError(f"{path}: damaged, or no PyTorch checkpoint: {error}") from error


class _Unpickler(pickle.Unpickler):
    """Rebuilds nothing but descriptions of tensors."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) in (
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_tensor"),
        ):
            return _view
        if module == "torch" and name in _DTYPES:
            return _StorageKind(_DTYPES[name])
        raise TorchFileError(f"its pickle asks for {module}.{name}; only tensors are read")

    def persistent_load(self, saved):
        kind, dtype, key, _, count, *_ = saved
        if kind != "storage" or not isinstance(dtype, _StorageKind) or int(count) < 0:
            raise TorchFileError(f"its pickle refers to a {kind!r}; only storages are read")
        return _Storage(dtype.dtype, str(key), int(count))


@dataclasses.dataclass(frozen=True)
class _StorageKind:
    dtype: str


def _view(storage, offset, shape, strides, *_):
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _read_zip(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        views = _checked(_Unpickler(io.BytesIO(archive.read(member))).load())
        folder = member.removesuffix("data.pkl") + "data/"
        storages = {
            view.storage.key: np.frombuffer(
                archive.read(folder + view.storage.key), view.storage.dtype
            )
            for view in views.values()
        }
    return views, storages


def _read_legacy(content):
    file = io.BytesIO(content)
    magic, _, system = (_Unpickler(file).load() for _ in range(3))
    if magic != _MAGIC_NUMBER:
        raise TorchFileError("no PyTorch checkpoint: its magic number is missing")
    if not system.get("little_endian", True):
        raise TorchFileError("its numbers are big-endian; only little-endian ones are read")
    views = _checked(_Unpickler(file).load())
    dtypes = {view.storage.key: view.storage.dtype for view in views.values()}
    storages = {}
    for key in _Unpickler(file).load():
        (count,) = np.frombuffer(file.read(8), "<i8")
        dtype = np.dtype(dtypes[key])
        data = file.read(int(count) * dtype.itemsize) if count >= 0 else b""
        storages[key] = np.frombuffer(data, dtype, int(count))
    return views, storages


def _checked(loaded):
    if not isinstance(loaded, dict) or not all(isinstance(v, _View) for v in loaded.values()):
        raise TorchFileError("holds something else than a dictionary of tensors")
    return {str(name): view for name, view in loaded.items()}


def _array(view, storages):
    data = storages[view.storage.key]
    last = view.offset + sum(
        (size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)
    )
    count = math.prod(view.shape)
    smallest = min((view.offset, *view.shape, *view.strides), default=0)
    # More elements than stored numbers: a stride of 0 would make gigabytes of one number.
    if smallest < 0 or count > data.size or (count and last >= data.size):
        raise TorchFileError(
            f"a tensor of shape {view.shape}, strides {view.strides} and offset {view.offset} "
            f"reaches beyond its {data.size} stored numbers"
        )
    bytes_apart = tuple(stride * data.itemsize for stride in view.strides)
    return np.lib.stride_tricks.as_strided(data[view.offset :], view.shape, bytes_apart).copy()
