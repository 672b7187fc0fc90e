"""Reads weights that PyTorch's `torch.save` wrote, without PyTorch and without running their code.

Both layouts are read: the ZIP archive (PyTorch 1.6 and later) and the stream of pickles before
it. A pickle can name any function of the process; here it may name only ordered dictionaries,
tensors and their storages, and whatever else it names is refused before it is looked up.
"""

import io
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from index_builder.errors import KithError

_DTYPES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "bf16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_NATIVE = "<" if sys.byteorder == "little" else ">"
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_VERSION = 1001
# The pickle of a state dict takes about 150 bytes a tensor.
_MAX_PICKLE_BYTES = 16 << 20


class _RefusedError(Exception):
    """The file is not one of weights alone; the text says why."""


@dataclass(frozen=True)
class _StorageType:
    """A dtype of `_DTYPES`, as NumPy writes it; bfloat16, which NumPy lacks, is `bf16`."""

    dtype: str

    @property
    def raw(self) -> np.dtype[Any]:
        return np.dtype("u2" if self.dtype == "bf16" else self.dtype)


@dataclass(frozen=True)
class _Storage:
    """A flat run of numbers, somewhere in the file."""

    key: str
    type: _StorageType
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides in numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_weights(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a state dict, by name, in the order of the file.

    The state dict may stand alone or under `state_dict` of a checkpoint, and its names may begin
    with the `module.` of DataParallel, which is removed. bfloat16 becomes float32.

    Raises:
        KithError: the file is missing, damaged, or holds anything but tensors.
    """
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    return _read_archive(archive)
            file.seek(0)
            return _read_stream(file)
    except FileNotFoundError as error:
        raise KithError(f"{path} does not exist, wanted a file of PyTorch weights.") from error
    except _RefusedError as error:
        reason = str(error)
    except Exception as error:  # A damaged pickle may raise anything, as Python's manual says.
        reason = f"it is damaged ({type(error).__name__}: {error})"
    raise KithError(
        f"{path} cannot be read as PyTorch weights: {reason}. Save the weights alone, with "
        "torch.save(model.state_dict(), 'name.pth')."
    )


def _read_archive(archive: zipfile.ZipFile) -> dict[str, NDArray[Any]]:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise _RefusedError("it is a ZIP archive without PyTorch's data.pkl")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise _RefusedError("its entries are compressed, which torch.save never does")
    folder = names[0].removesuffix("data.pkl")
    if archive.getinfo(names[0]).file_size > _MAX_PICKLE_BYTES:
        raise _RefusedError(f"its data.pkl is larger than {_MAX_PICKLE_BYTES} bytes")
    order = "<"
    if f"{folder}byteorder" in archive.namelist():
        order = ">" if archive.read(f"{folder}byteorder") == b"big" else "<"
    tensors = _state_dict(_Unpickler(io.BytesIO(archive.read(names[0]))).load())
    keys = {tensor.storage.key for tensor in tensors.values()}
    contents = {key: archive.read(f"{folder}data/{key}") for key in keys}
    return {name: _resolve(name, tensor, contents, order) for name, tensor in tensors.items()}


def _read_stream(file: IO[bytes]) -> dict[str, NDArray[Any]]:
    try:
        magic = _Unpickler(file).load()
    except pickle.UnpicklingError as error:
        raise _RefusedError("it is neither a ZIP archive nor a pickle") from error
    if magic != _STREAM_MAGIC or _Unpickler(file).load() != _STREAM_VERSION:
        raise _RefusedError("it is a pickle, but not one that torch.save wrote")
    system = _Unpickler(file).load()
    order = "<" if system["little_endian"] else ">"
    tensors = _state_dict(_Unpickler(file).load())
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    contents = {}
    for key in _Unpickler(file).load():
        (count,) = np.frombuffer(file.read(8), f"{order}i8")
        if key not in storages:
            raise _RefusedError("it holds tensors beside those of its state dict")
        contents[key] = file.read(int(count) * storages[key].type.raw.itemsize)
    return {name: _resolve(name, tensor, contents, order) for name, tensor in tensors.items()}


class _Unpickler(pickle.Unpickler):
    """Builds dictionaries of `_Tensor`, and nothing that the file could choose to run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        raise _RefusedError(
            f"it names {module}.{name}, wanted nothing but tensors and their dictionary"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, count, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or any(view):
            raise _RefusedError(f"it holds a {kind!r} that is no plain storage of numbers")
        return _Storage(str(key), storage_type, int(count))


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise _RefusedError("it holds a tensor of an impossible shape")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


def _state_dict(loaded: Any) -> dict[str, _Tensor]:
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded:
        raise _RefusedError(f"it holds {type(loaded).__name__}, wanted a dictionary of tensors")
    others = [name for name, value in loaded.items() if not isinstance(value, _Tensor)]
    if others:
        raise _RefusedError(f"its entry {others[0]!r} is no tensor")
    prefixed = all(str(name).startswith("module.") for name in loaded)
    return {str(name).removeprefix("module." if prefixed else ""): loaded[name] for name in loaded}


def _resolve(name: str, tensor: _Tensor, contents: dict[str, bytes], order: str) -> NDArray[Any]:
    """The numbers of a tensor, row-major, in the byte order of this machine."""
    storage = tensor.storage
    dtype = storage.type.raw
    if order != _NATIVE:
        dtype = dtype.newbyteorder()
    data = contents[storage.key]
    last = tensor.offset + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    size = math.prod(tensor.shape)
    fits = size == 0 or (last < storage.count and size <= storage.count)
    if len(data) != storage.count * dtype.itemsize or not fits:
        raise _RefusedError(f"the numbers of {name!r} are cut off or do not fill its shape")
    flat = np.frombuffer(data, dtype)[tensor.offset if size else 0 :]
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
    if storage.type.dtype == "bf16":
        return (view.astype(np.uint32) << 16).view(np.float32)
    return np.array(view, storage.type.raw, order="C")
