"""`kith convert-weights`: PyTorch weights of a network that Kith defines, as a Keras weights file."""

import os
import tempfile
from pathlib import Path
from typing import Any

from index_builder.datasets import storage
from index_builder.errors import ConfigError
from transforms.encoders.efficientnet_lite0 import build_model
from transforms.encoders.keras_runtime import output_to_stderr
from transforms.encoders.torch_ports import NETWORKS, find_port, set_weights
from transforms.encoders.torch_weights import read_torch_weights
from transforms.encoders.weights_files import file_weights_id, mark_network

SUFFIX = ".weights.h5"


def convert_weights(source: str, target: str, network: str | None = None) -> dict[str, Any]:
    """Writes the tensors of a `.pth` file as the `.weights.h5` file that `encoder.weights` takes.

    `network` overrides the one that goes with the tensors' names; the two differ in padding (see
    `efficientnet_lite0`). The file remembers its network, and equal weights give equal bytes.

    Raises:
        ConfigError: the network is unknown, or the target is no new local `.weights.h5` path.
        KithError: the source cannot be read, or is not of this network.
    """
    _check(source, target, network)
    tensors = read_torch_weights(Path(source))
    port = find_port(tensors)
    network = network or port.network
    with output_to_stderr():
        model = build_model(name=network)
    used = set_weights(model, port, tensors)
    with tempfile.TemporaryDirectory(prefix="kith-") as folder:
        made = Path(folder) / f"made{SUFFIX}"
        model.save_weights(made)
        mark_network(made, network)
        storage.write_bytes(target, made.read_bytes())
    return {
        "weights": target,
        "network": network,
        "naming": port.name,
        "tensors": used,
        "weights_id": file_weights_id(Path(target)),
    }


def _check(source: str, target: str, network: str | None) -> None:
    if network is not None and network not in NETWORKS:
        raise ConfigError(
            f"--network is {network!r}, which takes no PyTorch weights. Set one of: "
            f"{', '.join(NETWORKS)}."
        )
    for path in (source, target):
        if storage.is_remote(path):
            raise ConfigError(f"{path} is not local. Copy the file; give local paths.")
    if not target.endswith(SUFFIX):
        raise ConfigError(f"{target} does not end in {SUFFIX}, which Keras asks of weights. Rename it.")
    if os.path.exists(target):
        raise ConfigError(
            f"{target} exists already, and datasets may name it. Remove it, or choose another name."
        )
