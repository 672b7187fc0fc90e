"""From an encoder's choice of engine to the module that has it."""

from index_builder.errors import KithError
from transforms.encoders.engines.choice import EngineChoice
from transforms.encoders.engines.engine import LoadEngine
from transforms.encoders.engines.jax_engine import load_jax
from transforms.encoders.engines.openvino_engine import load_openvino
from transforms.encoders.engines.tensorflow_engine import load_tensorflow

_LOADERS: dict[str, LoadEngine] = {
    "tensorflow": load_tensorflow,
    "openvino": load_openvino,
    "jax": load_jax,
}


def engine_loader(choice: EngineChoice) -> LoadEngine:
    """Returns the function that loads and compiles a network on the chosen engine."""
    try:
        return _LOADERS[choice.engine]
    except KeyError:
        raise KithError(
            f"encoder.engine is {choice.engine!r}, wanted one of {', '.join(_LOADERS)}."
        ) from None
