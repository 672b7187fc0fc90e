"""Bad images cost themselves and nobody else, also when it is the engine that finds out."""

from collections.abc import Callable

import numpy as np
import pytest

from index_builder.errors import ImageError, KithError
from transforms.encode import EncodeAhead, encode_batch
from transforms.encoders.encoder import Encoder
from transforms.encoders.engines.choice import EngineChoice
from transforms.encoders.engines.engine import EncodingError, OutOfMemoryError
from transforms.encoders.engines.tensorflow_engine import load_tensorflow
from transforms.encoders.family import Network
from transforms.reuse import FoundVector, SeenVectors

POISON = 13


class MeanEngine:
    """The mean colour of each image; refuses a batch by the rules it is given."""

    dim = 3
    streams = 2

    def __init__(self, batch_size: int, refuse: Callable[[np.ndarray], Exception | None]) -> None:
        self.batch_size = batch_size
        self.calls = 0
        self._refuse = refuse

    def run(self, images: np.ndarray) -> np.ndarray:
        self.calls += 1
        error = self._refuse(images)
        if error is not None:
            raise error
        return images.mean(axis=(1, 2), dtype=np.float32)


def poisoned(images: np.ndarray) -> Exception | None:
    return EncodingError("poison") if (images == POISON).any() else None


def encoder_of(refuse: Callable[[np.ndarray], Exception | None], batch_size: int = 8) -> Encoder:
    return Encoder(lambda size: MeanEngine(size, refuse), (2, 2), batch_size)


def images_of(values: list[int]) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), value, np.uint8) for value in values])


@pytest.mark.parametrize("bad", [[0], [7], [3, 4], [0, 2, 5, 7], list(range(8))])
def test_a_poisoned_image_costs_itself(bad: list[int]) -> None:
    values = [POISON if place in bad else 50 + place for place in range(8)]
    results = encode_batch(encoder_of(poisoned), images_of(values))
    for place, result in enumerate(results):
        if place in bad:
            assert isinstance(result, ImageError)
            assert result.reason == "encoding_failed"
            assert "poison" in result.message
        else:
            np.testing.assert_allclose(result, np.full(3, 3**-0.5), atol=1e-3)


def test_an_engine_that_refuses_everything_is_no_bad_image() -> None:
    with pytest.raises(KithError, match="whatever image it is given: device lost"):
        encode_batch(encoder_of(lambda images: EncodingError("device lost")), images_of([1, 2]))


def test_vectors_without_direction_are_failures() -> None:
    def numbers(images: np.ndarray) -> Exception | None:
        return None

    encoder = encoder_of(numbers)
    zero, good = encode_batch(encoder, images_of([0, 9]))
    assert isinstance(zero, ImageError)
    assert zero.reason == "zero_vector"
    assert not isinstance(good, ImageError)


def test_not_a_number_is_a_failure_of_its_image_alone() -> None:
    def root(images: object) -> object:
        import keras

        return keras.ops.sqrt(images - 50.0)

    network = Network((2, 2), lambda images: images, root)
    encoder = Encoder(
        lambda size: load_tensorflow(lambda: network, "avg", size, EngineChoice()), (2, 2), 4
    )
    results = encode_batch(encoder, images_of([60, 40, 70]))
    assert [isinstance(result, ImageError) for result in results] == [False, True, False]
    assert isinstance(results[1], ImageError)
    assert results[1].reason == "non_finite"


def test_a_batch_that_does_not_fit_is_halved_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    def too_large(images: np.ndarray) -> Exception | None:
        return OutOfMemoryError("no room") if len(images) > 2 else None

    sizes = []

    def compile_engine(size: int) -> MeanEngine:
        sizes.append(size)
        return MeanEngine(size, too_large)

    encoder = Encoder(compile_engine, (2, 2), 8)
    vectors = encoder.encode(images_of(list(range(1, 8))))
    np.testing.assert_allclose(vectors[:, 0], range(1, 8))
    assert sizes == [8, 4, 2]
    assert [record.args for record in caplog.records] == [(8, 4), (4, 2)]
    encoder.encode(images_of([1, 2, 3]))
    assert sizes == [8, 4, 2]


def test_compiling_that_does_not_fit_is_halved_too() -> None:
    def compile_engine(size: int) -> MeanEngine:
        if size > 3:
            raise OutOfMemoryError("no room")
        return MeanEngine(size, lambda images: None)

    assert len(Encoder(compile_engine, (2, 2), 8).encode(images_of([1] * 8))) == 8


def test_one_image_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(KithError, match="one image does not fit .*: no room. Free memory"):
        encoder_of(lambda images: OutOfMemoryError("no room"), 4).encode(images_of([1]))


@pytest.mark.parametrize("batches", [0, 1, 3, 8])
def test_results_come_in_order_and_none_is_lost(batches: int) -> None:
    ahead = EncodeAhead(encoder_of(poisoned))
    found = []
    for number in range(batches):
        for results in ahead.submit([np.full((2, 2, 3), 20 + number, np.uint8)] * (number + 1)):
            found.append(len(results))
    found += [len(results) for results in ahead.finish()]
    ahead.close()
    assert found == list(range(1, batches + 1))
    assert ahead.calls == batches


def mean_encoder() -> Encoder:
    return encoder_of(lambda images: None)


def test_without_normalising_the_numbers_are_the_encoders_own() -> None:
    results = encode_batch(mean_encoder(), images_of([0, 9, 250]), normalize=False)
    for value, result in zip((0, 9, 250), results, strict=True):
        # A zero vector has a length, if no direction.
        assert isinstance(result, np.ndarray)
        assert result.dtype == np.float32
        assert result.tolist() == [value] * 3
    halved = encode_batch(encoder_of(poisoned), images_of([9, POISON]), normalize=False)
    assert isinstance(halved[0], np.ndarray)
    assert halved[0].dtype == np.float32
    assert isinstance(halved[1], ImageError)


def test_vectors_survive_an_engine_that_uses_its_output_again() -> None:
    encoder = mean_encoder()
    output = np.empty((2, 3), np.float32)

    def encode(pixels: np.ndarray) -> np.ndarray:
        output[:] = pixels.mean(axis=(1, 2))
        return output

    encoder.encode = encode  # type: ignore[method-assign]
    first = encode_batch(encoder, images_of([1, 2]), normalize=False)
    encode_batch(encoder, images_of([3, 4]), normalize=False)
    assert [vector.tolist() for vector in first] == [[1] * 3, [2] * 3]


@pytest.mark.parametrize("normalize", [True, False])
def test_numbers_that_are_not_finite_are_failures_either_way(normalize: bool) -> None:
    encoder = mean_encoder()
    encoder.encode = lambda pixels: np.array(  # type: ignore[method-assign]
        [[1, np.nan, 0], [1, 2, 2], [np.inf, 0, 0]], np.float32
    )
    bad, good, worse = encode_batch(encoder, images_of([1, 2, 3]), normalize)
    for result in (bad, worse):
        assert isinstance(result, ImageError)
        assert result.reason == "non_finite"
    wanted = [1 / 3, 2 / 3, 2 / 3] if normalize else [1, 2, 2]
    np.testing.assert_allclose(good, wanted, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_of_the_shard_come_back_bit_for_bit(dtype: type) -> None:
    seen = SeenVectors(3, dtype)
    vectors = np.array([[1.5, -0.0, 3e-5], [7, 8, 9]], dtype)
    for number, vector in enumerate(vectors):
        seen.add(bytes([number]), FoundVector(vector, 4, 5, "png"))
    for number in (1, 0):
        found = seen.read(bytes([number]))
        assert found.vector.dtype == dtype
        assert found.vector.tobytes() == vectors[number].tobytes()
        assert (found.width, found.height, found.format) == (4, 5, "png")
    seen.close()
