"""PyTorch weights: what is read, what is refused, and that the converted network computes the same."""

import io
import json
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import correlate

from index_builder.errors import ConfigError, KithError
from pipelines import cli
from pipelines.convert_weights import convert_weights
from tests.unit.images_for_tests import picture
from transforms.encoders import efficientnet_lite0 as lite0
from transforms.encoders.keras_runtime import import_keras
from transforms.encoders.registry import EncoderSpec, check_encoder, load_encoder
from transforms.encoders.torch_ports import PORTS, find_port
from transforms.encoders.torch_weights import read_torch_weights

FLAT, STAGED = PORTS
TYPES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}
Array = NDArray[Any]


class Word:
    """Something that the pickle below names as `module name`."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Stored:
    """A storage, which torch.save writes as a persistent id."""

    def __init__(self, kind: str, key: str, count: int) -> None:
        self.kind, self.key, self.count = kind, key, count


class Call:
    """What the pickle rebuilds by calling a function."""

    def __init__(self, function: Word, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments


class Pickler(pickle._Pickler):  # The one in Python: the one in C cannot be taught opcodes.
    """Writes the pickles of torch.save: protocol 2, globals by name, storages by persistent id."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def __init__(self, file: io.BytesIO, *, view: bool) -> None:
        super().__init__(file, protocol=2)
        self.view = view

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Stored):
            pid = ("storage", Word("torch", obj.kind), obj.key, "cpu", obj.count)
            return (*pid, None) if self.view else pid
        return None

    def save_word(self, obj: Word) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj: Call) -> None:
        self.save(obj.function)
        self.save(obj.arguments)
        self.write(pickle.REDUCE)

    dispatch[Word] = save_word
    dispatch[Call] = save_call


def dumps(value: Any, view: bool = False) -> bytes:
    file = io.BytesIO()
    Pickler(file, view=view).dump(value)
    return file.getvalue()


def tensor(array: Array, key: str, kind: str = "", strides: tuple[int, ...] | None = None) -> Call:
    strides = strides or tuple(stride // array.itemsize for stride in array.strides)
    storage = Stored(kind or TYPES[array.dtype.name], key, array.size)
    rebuild = Word("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, 0, array.shape, strides, False, OrderedDict())


def write_archive(path: Path, value: Any, arrays: Mapping[str, Array], **options: Any) -> Path:
    """The layout of torch.save since PyTorch 1.6."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("name/data.pkl", dumps(value))
        archive.writestr("name/byteorder", sys.byteorder)
        for key, array in arrays.items():
            archive.writestr(f"name/data/{key}", array.tobytes())
        archive.writestr("name/version", "3\n")
    return path


def write_stream(path: Path, value: Any, arrays: Mapping[str, Array]) -> Path:
    """The layout of torch.save before PyTorch 1.6."""
    system = {"protocol_version": 1001, "little_endian": sys.byteorder == "little"}
    head = [dumps(0x1950A86A20F9469CFC6C), dumps(1001), dumps(system), dumps(value, view=True)]
    body = [struct.pack("=q", array.size) + array.tobytes() for array in arrays.values()]
    path.write_bytes(b"".join([*head, dumps(list(arrays)), *body]))
    return path


def write_state(
    path: Path, state: Mapping[str, Array], write: Callable[..., Path] = write_archive
) -> Path:
    """A state dict, as torch.save writes it."""
    keys = {name: str(number) for number, name in enumerate(state)}
    value = OrderedDict((name, tensor(array, keys[name])) for name, array in state.items())
    return write(path, value, {keys[name]: array for name, array in state.items()})


def state_of(model: Any, port: Any) -> dict[str, Array]:
    """The weights of our network as a port has them, transposed to PyTorch's order of axes."""
    state: dict[str, Array] = {}
    for ours, theirs in port.layers.items():
        values = model.get_layer(ours).get_weights()
        kind = type(model.get_layer(ours)).__name__
        if kind == "BatchNormalization":
            ends = ("weight", "bias", "running_mean", "running_var")
            state |= {f"{theirs}.{end}": value for end, value in zip(ends, values, strict=True)}
            state[f"{theirs}.num_batches_tracked"] = np.array(7, np.int64)
            continue
        axes = {"Conv2D": (3, 2, 0, 1), "DepthwiseConv2D": (2, 3, 0, 1), "Dense": (1, 0)}[kind]
        state[f"{theirs}.weight"] = np.ascontiguousarray(values[0].transpose(axes))
        if kind == "Dense":
            state[f"{theirs}.bias"] = values[1]
    return state


@pytest.fixture(scope="module")
def shipped() -> Any:
    model = lite0.build_model()
    model.load_weights(lite0.IMAGENET_WEIGHTS)
    return model


@pytest.fixture(scope="module")
def flat_state(shipped: Any) -> dict[str, Array]:
    return state_of(shipped, FLAT)


def images() -> Array:
    pictures = [picture(224, 224, seed=seed) for seed in range(2)]
    return lite0.preprocess_input(np.stack(pictures).astype(np.float32))


def loaded(path: str, name: str) -> Any:
    model = lite0.build_model(name=name)
    model.load_weights(path)
    return model


@pytest.mark.parametrize("write", [write_archive, write_stream])
def test_the_converted_network_computes_the_same(
    write: Any, shipped: Any, flat_state: dict[str, Array], tmp_path: Path
) -> None:
    source = write_state(tmp_path / "lite0.pth", flat_state, write)
    targets = [str(tmp_path / f"{number}.weights.h5") for number in range(2)]
    results = [convert_weights(str(source), target) for target in targets]
    assert {result["network"] for result in results} == {lite0.NAME}
    assert {result["naming"] for result in results} == {"flat"}
    assert {result["tensors"] for result in results} == {len(shipped.weights)}
    assert results[0]["weights_id"] == results[1]["weights_id"]
    wanted = np.asarray(shipped(images()))
    np.testing.assert_allclose(
        np.asarray(loaded(targets[0], lite0.NAME)(images())), wanted, rtol=0, atol=1e-4
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.weights.h5",
        "1.weights.h5",
        "lite0.pth",
    ]


def test_the_converted_file_is_an_encoder_of_its_own_network(shipped: Any, tmp_path: Path) -> None:
    """RangiLyu's names mean padding on both sides, and the file remembers that."""
    source = write_state(tmp_path / "lite0.pth", state_of(shipped, STAGED))
    target = str(tmp_path / "lite0.weights.h5")
    result = convert_weights(str(source), target)
    assert (result["network"], result["naming"]) == (lite0.PYTORCH_NAME, "staged")

    size = (64, 64)
    spec = EncoderSpec(lite0.PYTORCH_NAME, target, input_size=size)
    check_encoder(spec)
    pixels = np.stack([picture(*size, seed=1)])
    got = load_encoder(spec, 1).encode(pixels)
    keras = import_keras()
    model = lite0.build_model(size, lite0.PYTORCH_NAME)
    model.load_weights(target)
    head = keras.Model(model.input, model.get_layer("head").output)
    prepared = (pixels.astype(np.float32) / 255 - 0.498) / 0.502
    wanted = np.asarray(head(prepared)).mean(axis=(1, 2))
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)

    with pytest.raises(KithError, match=r"made for the network efficientnet_lite0_pytorch, but"):
        load_encoder(EncoderSpec(lite0.NAME, target), 1)
    with pytest.raises(ConfigError, match="no weights of efficientnet_lite0_pytorch ship"):
        check_encoder(EncoderSpec(lite0.PYTORCH_NAME))


@pytest.mark.parametrize("name", [lite0.NAME, lite0.PYTORCH_NAME])
def test_the_first_layers_pad_as_is_said(name: str, shipped: Any) -> None:
    """Against SciPy: the stem, the first block and the first depthwise convolution of stride 2."""
    even = name == lite0.PYTORCH_NAME
    keras = import_keras()
    model = lite0.build_model(name=name)
    model.set_weights(shipped.get_weights())
    weights = {layer.name: layer.get_weights() for layer in model.layers}
    x = images()[0].astype(np.float64)
    steps = [("stem_conv", "stem_bn", 2), ("b0_dw", "b0_dw_bn", 1), ("b0_project_conv", None, 1)]
    steps += [("b1_expand_conv", "b1_expand_bn", 1), ("b1_dw", "b1_dw_bn", 2)]
    for conv, norm, stride in steps:
        x = convolve(x, weights[conv][0], stride, even, depthwise=conv.endswith("_dw"))
        gamma, beta, mean, variance = weights[norm or "b0_project_bn"]
        x = (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
        x = np.clip(x, 0, 6) if norm else x
    # What follows the normalisation of b1_dw is its ReLU.
    names = [layer.name for layer in model.layers]
    relu = model.layers[names.index("b1_dw_bn") + 1]
    got = np.asarray(keras.Model(model.input, relu.output)(images()[:1]))[0]
    assert x.shape == (56, 56, 96)
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-4)


def convolve(x: Array, kernel: Array, stride: int, even: bool, depthwise: bool) -> Array:
    """[h, w, c] by [k, k, in, out] or, depthwise, [k, k, c, 1], for even sides and an odd kernel."""
    size = kernel.shape[0]
    total = max(size - stride, 0)
    before = (size - 1) // 2 if even else total // 2
    after = (size - 1) // 2 if even else total - total // 2
    padded = np.pad(x, ((before, after), (before, after), (0, 0)))
    if depthwise:
        planes = [correlate(padded[..., c], kernel[..., c, 0], "valid") for c in range(x.shape[2])]
    else:
        planes = [correlate(padded, kernel[..., c], "valid")[..., 0] for c in range(kernel.shape[3])]
    return np.stack(planes, -1)[::stride, ::stride]


def test_a_network_can_be_named_against_the_names(flat_state: dict[str, Array], tmp_path: Path) -> None:
    source = write_state(tmp_path / "lite0.pth", flat_state)
    target = str(tmp_path / "w.weights.h5")
    assert convert_weights(str(source), target, lite0.PYTORCH_NAME)["network"] == lite0.PYTORCH_NAME
    load_encoder(EncoderSpec(lite0.PYTORCH_NAME, target, input_size=(32, 32)), 1)


def test_what_state_dicts_look_like(tmp_path: Path) -> None:
    """Checkpoints, DataParallel's names, parameters, shared storages, strides, half precision."""
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    half = np.array([1.5, -2.0], np.float16)
    # bfloat16 is the upper half of a float32.
    brain = (np.array([1.5, -3.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    storage = Stored("FloatStorage", "0", 6)
    rebuild = Word("torch._utils", "_rebuild_tensor_v2")
    parameter = Word("torch._utils", "_rebuild_parameter")
    state = OrderedDict(
        {
            "module.rows": tensor(numbers, "0"),
            "module.columns": Call(rebuild, storage, 0, (3, 2), (1, 3), False, OrderedDict()),
            "module.last": Call(rebuild, storage, 4, (2,), (1,), False, OrderedDict()),
            "module.half": Call(parameter, tensor(half, "1"), False, OrderedDict()),
            "module.brain": tensor(brain, "2", "BFloat16Storage"),
            "module.count": tensor(np.array(3, np.int64), "3"),
        }
    )
    value = {"epoch": 3, "state_dict": state, "loss": 0.5}
    arrays = {"0": numbers, "1": half, "2": brain, "3": np.array(3, np.int64)}
    for write in (write_archive, write_stream):
        found = read_torch_weights(write(tmp_path / "c.pth", value, arrays))
        assert list(found) == ["rows", "columns", "last", "half", "brain", "count"]
        np.testing.assert_array_equal(found["rows"], numbers)
        np.testing.assert_array_equal(found["columns"], numbers.T)
        np.testing.assert_array_equal(found["last"], [4, 5])
        np.testing.assert_array_equal(found["half"], half)
        np.testing.assert_array_equal(found["brain"], np.array([1.5, -3.0], np.float32))
        assert found["brain"].dtype == np.float32
        assert found["count"] == 3


def test_a_file_runs_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    attacks = [
        Call(Word("builtins", "eval"), f"open({str(marker)!r}, 'w')"),
        Call(Word("os", "system"), f"touch {marker}"),
        Call(Word("torch.nn.modules.container", "Sequential")),
        Call(Word("numpy", "load"), str(marker)),
        Call(Word("collections", "OrderedDict.fromkeys"), ["a"]),
    ]
    for attack in attacks:
        named = f"{attack.function.module}.{attack.function.name}"
        for write in (write_archive, write_stream):
            path = write(tmp_path / "a.pth", OrderedDict(a=attack), {})
            with pytest.raises(KithError, match="wanted nothing but tensors") as caught:
                read_torch_weights(path)
            assert f"it names {named}," in str(caught.value)
            assert "torch.save(model.state_dict(), 'name.pth')" in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "neither a ZIP archive nor a pickle|damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "neither a ZIP archive nor a pickle|damaged"),
        (pickle.dumps({"a": 1}), "not one that torch.save wrote"),
        (dumps(0x1950A86A20F9469CFC6C) + dumps(1001), "damaged"),
    ],
)
def test_other_files_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(KithError, match=words):
        read_torch_weights(path)


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    numbers = np.arange(6, dtype=np.float32)
    one = {"a": tensor(numbers, "0")}
    path = tmp_path / "w.pth"
    rebuild = Word("torch._utils", "_rebuild_tensor_v2")

    def view(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> dict[str, Call]:
        return {"a": Call(rebuild, Stored("FloatStorage", "0", 6), offset, shape, strides)}

    cases: list[tuple[Any, Array, str]] = [
        (one, numbers[:5], "cut off"),
        (view(1, (6,), (1,)), numbers, "do not fill its shape"),
        (view(0, (1 << 40,), (0,)), numbers, "do not fill its shape"),
        (view(-1, (2,), (1,)), numbers, "impossible shape"),
        ({"a": 1}, numbers, "'a' is no tensor"),
        ([], numbers, "holds list"),
        ({}, numbers, "holds dict"),
    ]
    for value, stored, words in cases:
        with pytest.raises(KithError, match=words):
            read_torch_weights(write_archive(path, value, {"0": stored}))
    with pytest.raises(KithError, match=r"damaged \(KeyError"):
        read_torch_weights(write_archive(path, one, {}))
    write_archive(path, one, {"0": numbers}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(KithError, match="compressed"):
        read_torch_weights(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(KithError, match=r"without PyTorch's data\.pkl"):
        read_torch_weights(path)
    with pytest.raises(KithError, match="does not exist"):
        read_torch_weights(tmp_path / "none.pth")


def test_every_tensor_is_used_once(flat_state: dict[str, Array], tmp_path: Path) -> None:
    def convert(state: Mapping[str, Array]) -> str:
        source = write_state(tmp_path / "w.pth", state)
        with pytest.raises(KithError) as caught:
            convert_weights(str(source), str(tmp_path / "w.weights.h5"))
        return str(caught.value)

    fewer = {name: array for name, array in flat_state.items() if name != "_fc.bias"}
    assert "missing _fc.bias; unexpected none" in convert(fewer)
    more = {**flat_state, "_blocks.16._bn2.weight": np.zeros(3, np.float32)}
    assert "missing none; unexpected _blocks.16._bn2.weight" in convert(more)
    renamed = {name.replace("_blocks", "layers"): array for name, array in flat_state.items()}
    message = convert(renamed)
    assert "missing _blocks.0._bn1.bias, " in message
    assert "unexpected layers.0._bn1.bias, " in message
    assert " and 231 more" in message
    classes = {**flat_state, "_fc.weight": np.zeros((10, 1280), np.float32)}
    assert "_fc.weight has shape [10, 1280], wanted [1000, 1280]" in convert(classes)
    swapped = {**flat_state}
    swapped["_conv_head.weight"] = swapped["_conv_head.weight"].transpose(1, 0, 2, 3).copy()
    assert "shape [320, 1280, 1, 1], wanted [1280, 320, 1, 1]" in convert(swapped)
    diverged = {**flat_state, "_fc.bias": np.full(1000, np.nan, np.float32)}
    assert "_fc.bias (float32) holds other than finite" in convert(diverged)
    whole = {**flat_state, "_fc.bias": np.zeros(1000, np.int64)}
    assert "_fc.bias (int64) holds other than finite" in convert(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_older_files_lack_the_count_of_batches(flat_state: dict[str, Array]) -> None:
    names = [name for name in flat_state if not name.endswith("num_batches_tracked")]
    assert find_port(dict.fromkeys(names)) is FLAT


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command(
    flat_state: dict[str, Array],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    source = write_state(tmp_path / "lite0.pth", flat_state)
    target = tmp_path / "lite0.weights.h5"
    assert run("convert-weights", source, target, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["command"] == "convert-weights"
    assert (document["status"], document["network"]) == ("done", lite0.NAME)
    assert document["weights"] == str(target)
    spec = EncoderSpec(lite0.NAME, str(target))
    assert document["weights_id"] == lite0.FAMILY.weights_id(spec)

    refused: list[tuple[list[str | Path], int, str]] = [
        ([source, target], 2, "exists already"),
        ([source, tmp_path / "x.h5"], 2, "does not end in .weights.h5"),
        ([source, tmp_path / "x.weights.h5", "--network", "vgg16"], 2, "--network is 'vgg16'"),
        ([source, "gs://b/x.weights.h5"], 2, "is not local"),
        ([tmp_path / "none.pth", tmp_path / "x.weights.h5"], 1, "does not exist"),
        ([target, tmp_path / "x.weights.h5"], 1, "cannot be read as PyTorch weights"),
    ]
    for arguments, status, words in refused:
        assert run("convert-weights", *arguments) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("kith convert-weights: ")
        assert words in captured.err
    assert run("convert-weights", "--help") == 0
    assert "--network" in capsys.readouterr().out
