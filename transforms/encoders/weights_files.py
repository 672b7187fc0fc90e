"""Weights on disk: their identity in fingerprints, and the checks before they are loaded."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

from index_builder.errors import ConfigError, KithError
from transforms.encoders.family import EncoderSpec

_CHUNK_BYTES = 1 << 20
# Keras's own messages go on with all the numbers of a layer.
_SHOWN_CHARACTERS = 200

# An attribute of the HDF5 file; Keras does not look at it.
_NETWORK_MARK = "kith_network"


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """The SHA-256 of a folder's files: relative names and contents, in the order of the names."""
    digest = hashlib.sha256()
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    for name in sorted(name for name, path in files.items() if path.is_file()):
        digest.update(f"{name}\0{sha256_of_file(files[name])}\n".encode())
    return digest.hexdigest()


def file_weights_id(path: Path) -> str:
    """The identity of a weights file or of a SavedModel folder: its content, not its place."""
    digest = sha256_of_folder(path) if path.is_dir() else sha256_of_file(path)
    return f"sha256:{digest}"


def check_weights_path(spec: EncoderSpec) -> Path:
    """The existing local path that `spec.weights` names.

    Raises:
        ConfigError: it is not local, or nothing is there.
    """
    if "://" in spec.weights:
        raise ConfigError(
            f"encoder.weights is {spec.weights!r}, but weights are read from local paths. "
            "Copy the file to each worker and set encoder.weights to the local path."
        )
    path = Path(spec.weights).expanduser()
    if not path.exists():
        raise ConfigError(
            f"encoder.weights is {spec.weights!r}, but nothing is there. "
            "Set it to an existing file, to imagenet, or to random."
        )
    return path


def check_h5_weights(spec: EncoderSpec) -> None:
    """Refuses weights of a built-in network that are neither a keyword nor a local .h5 file.

    Raises:
        ConfigError: the path is missing, a folder, or has another suffix.
    """
    if spec.weights_path() is None:
        return
    path = check_weights_path(spec)
    if path.is_dir() or path.suffix != ".h5":
        raise ConfigError(
            f"encoder.weights is {spec.weights!r}, but {spec.name} takes a Keras weights file "
            "(.weights.h5, or an .h5 file of keras.applications). For a whole model "
            "(.keras or SavedModel) set encoder.name: custom."
        )


def check_network_spec(spec: EncoderSpec, min_size: int) -> None:
    """Refuses what no built-in network takes; `min_size` is its smallest height and width.

    Raises:
        ConfigError: `preprocessing` is set, the input size is too small, or the weights are wrong.
    """
    if spec.preprocessing is not None:
        raise ConfigError(
            f"encoder.preprocessing is {spec.preprocessing!r}, but {spec.name} has its own. "
            "Remove the key, or set encoder.name: custom."
        )
    if spec.input_size is not None and min(spec.input_size) < min_size:
        raise ConfigError(
            f"encoder.input_size is {list(spec.input_size)}, but {spec.name} takes at least "
            f"{min_size} x {min_size}. Set a larger size, or remove the key."
        )
    check_h5_weights(spec)


def network_weights_id(spec: EncoderSpec, imagenet: str) -> str:
    """The identity of a built-in network's weights; `imagenet` names its published ones."""
    path = spec.weights_path()
    if path is not None:
        return file_weights_id(path)
    return imagenet if spec.weights == "imagenet" else f"random:{spec.seed}"


def mark_network(path: Path, network: str) -> None:
    """Writes into a .weights.h5 file for which network it was made."""
    import h5py

    with h5py.File(path, "r+") as file:
        file.attrs[_NETWORK_MARK] = network


def check_network_mark(path: Path, network: str) -> None:
    """Refuses a file that was made for another network, even where all its shapes would fit.

    A file without a mark passes, and one that is no HDF5 file: loading it says what is wrong.

    Raises:
        KithError: the file's mark names another network.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            mark = str(file.attrs.get(_NETWORK_MARK, network))
    except OSError:
        return
    if mark != network:
        raise KithError(
            f"{path} was made for the network {mark}, but encoder.name is {network}. "
            f"Set encoder.name: {mark}, or other weights."
        )


def load_weights_file(model: Any, network: str, path: Path, remedy: str) -> None:
    """Gives a Keras model the weights of a file; `remedy` ends the message where they do not fit.

    Raises:
        KithError: the file was made for another network, or is damaged.
    """
    check_network_mark(path, network)
    try:
        with warnings.catch_warnings():
            # Keras warns of the groups that it looks for beside the layers and does not find.
            warnings.simplefilter("ignore")
            model.load_weights(path)
    except (ValueError, OSError, KeyError, AttributeError) as error:
        what = " ".join(str(error).split())
        what = f"{what[:_SHOWN_CHARACTERS]}..." if len(what) > _SHOWN_CHARACTERS else what.rstrip(".")
        raise KithError(f"{path} does not hold weights of {network}: {what}. {remedy}") from error
