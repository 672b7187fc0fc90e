"""Which engine runs the network, in which precision, and what this machine can do of it."""

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from index_builder.errors import KithError
from transforms.encoders.keras_runtime import import_tensorflow

EngineName = Literal["tensorflow", "openvino", "jax"]
Precision = Literal["float32", "bfloat16"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# CPU flags, as Linux names them, of hardware that multiplies bfloat16.
_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")
_CPUINFO = "/proc/cpuinfo"


@dataclass(frozen=True)
class EngineChoice:
    """An engine and the precision of its arithmetic: one for a whole dataset, never mixed."""

    engine: EngineName = "tensorflow"
    precision: Precision = "float32"

    def fingerprint(self) -> dict[str, object]:
        """What decides whether two vectors are comparable; JSON-able."""
        return {"engine": self.engine, "precision": self.precision}


DEFAULT_CHOICE = EngineChoice()


def auto_engine(refused: Sequence[EngineName] = ()) -> tuple[EngineName, str]:
    """Chooses the engine for the machine that this runs on, and says why.

    `refused` are engines that cannot run the model at hand.
    """
    gpus = visible_gpus()
    if gpus:
        return "tensorflow", f"{gpus} GPU{'s' * (gpus > 1)} found"
    if "openvino" in refused:
        return "tensorflow", "openvino cannot run this model"
    if importlib.util.find_spec("openvino") is not None:
        return "openvino", "no GPU here, and openvino, the fastest on a CPU, is installed"
    return "tensorflow", "neither a GPU nor openvino is here"


def require_engine(choice: EngineChoice) -> None:
    """Refuses a choice that this machine cannot honour, rather than to fall back to another one.

    Raises:
        KithError: the engine is not installed, or the hardware has no bfloat16.
    """
    if importlib.util.find_spec(choice.engine) is None:
        raise KithError(
            f"encoder.engine is {choice.engine}, but this worker has no {choice.engine}. Install it "
            f"there (pip install 'kith-index[{choice.engine}]'), or set encoder.engine to another "
            "one; vectors of two engines are never mixed in one dataset."
        )
    on_cpu = choice.engine == "openvino" or (choice.engine == "tensorflow" and not visible_gpus())
    if choice.precision == "bfloat16" and on_cpu and not cpu_has_bfloat16():
        raise KithError(
            f"encoder.precision is bfloat16, but the CPU of this worker has none of "
            f"{', '.join(_BFLOAT16_FLAGS)}. Use workers whose CPU has it, or set encoder.precision: "
            "float32; vectors of two precisions are never mixed in one dataset."
        )


def visible_gpus() -> int:
    """The number of GPUs that TensorFlow sees."""
    return len(import_tensorflow().config.list_physical_devices("GPU"))


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Tells whether the CPU multiplies bfloat16 in hardware; false where Linux does not say."""
    try:
        with open(_CPUINFO, encoding="ascii", errors="replace") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return any(flag in flags for flag in _BFLOAT16_FLAGS)
