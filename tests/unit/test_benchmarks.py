"""The parts of the benchmarks that are no measurement: images, records, environments, arithmetic."""

import ast
import dataclasses
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorflow.core.example import example_pb2

from benchmarks import (
    embed,
    figures,
    join,
    join_options,
    join_parts,
    peer_runs,
    photographs,
    products,
    vectors,
)
from benchmarks.bfloat16_product import BFloat16Product
from benchmarks.embed import Compared, Ratio, chosen_shards, run_command, serial_limit
from benchmarks.embed_parts import write_config
from benchmarks.join_figures import (
    COMMAND,
    EQUAL_LISTS,
    KITH,
    KITH_HALF,
    LIBRARY,
    SEARCH,
    WHOLE,
    Product,
    Run,
    Summary,
)
from benchmarks.join_log import Log
from benchmarks.join_methods import judge_pick
from benchmarks.join_runs import JOIN_PEERS, lists_of
from benchmarks.peer_runs import PEERS, Peer, SkippedError, StoppedError
from benchmarks.peers import faiss_join, neighbors
from benchmarks.peers.records import find_records, parse_example, read_record
from index_builder import library
from index_builder.errors import ConfigError
from index_builder.index.goals import Encoding
from index_builder.index.shards import open_index
from index_builder.index.spec import IndexSpec
from index_builder.search.join import JoinSpec
from pipelines.config import Config
from transforms.encoders import efficientnet_lite0

ROOT = Path(__file__).parents[2]
PHOTOGRAPHS = ROOT / "benchmarks" / "photographs"
COUNT, SHARDS = 40, 2


@pytest.fixture(scope="module")
def originals() -> list[Image.Image]:
    return photographs.load_originals()


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs.make_catalogue(tmp_path_factory.mktemp("cache"), COUNT, SHARDS)


# The photographs


def test_every_photograph_is_credited_and_reduced() -> None:
    credits = (PHOTOGRAPHS / "README.md").read_text()
    notice = (ROOT / "NOTICE").read_text()
    paths = sorted(PHOTOGRAPHS.glob("*.jpg"))
    assert len(paths) == 9
    assert credits.count(".jpg` | `") == 9
    for path in paths:
        row = next(line for line in credits.splitlines() if line.startswith(f"| `{path.name}`"))
        assert row.endswith(("CC-BY-4.0 |", "CC0-1.0 |"))
        assert path.stem in notice
        with Image.open(path) as image:
            assert max(image.size) == 1024
            assert not image.getexif()
    assert sum(path.stat().st_size for path in paths) < 1_400_000


def test_a_photograph_depends_on_its_number_alone(originals: list[Image.Image]) -> None:
    first = [photographs.make_photograph(number, originals) for number in range(30)]
    again = [photographs.make_photograph(number, originals) for number in reversed(range(30))]
    assert first == again[::-1]
    assert len(set(first)) == 30


def test_sizes_qualities_and_codings_take_turns(originals: list[Image.Image]) -> None:
    seen = set()
    for number in range(0, 54, 9):  # One photograph in all its turns.
        with Image.open(io.BytesIO(photographs.make_photograph(number, originals))) as image:
            assert image.size == (800, 600)
            tables = image.quantization  # type: ignore[attr-defined]
            seen.add((tuple(tables[0]), "progressive" in image.info))
    assert len(seen) == 6
    assert {progressive for _, progressive in seen} == {False, True}
    for number in range(27, 54, 9):  # Progressive ones, when they take turns.
        data = photographs.make_photograph(number, originals, "baseline")
        assert data != photographs.make_photograph(number, originals)
        with Image.open(io.BytesIO(data)) as image:
            assert "progressive" not in image.info


def test_an_upright_photograph_stays_upright(originals: list[Image.Image]) -> None:
    number = next(n for n, image in enumerate(originals) if image.height > image.width)
    with Image.open(io.BytesIO(photographs.make_photograph(number, originals))) as image:
        assert image.size == (600, 800)


@pytest.mark.parametrize(
    ("count", "shards", "lengths"), [(10, 3, [3, 3, 4]), (8, 8, [1] * 8), (5, 1, [5])]
)
def test_shards_share_the_numbers_out(count: int, shards: int, lengths: list[int]) -> None:
    numbers = photographs.shard_numbers(count, shards)
    assert [len(each) for each in numbers] == lengths
    assert [number for each in numbers for number in each] == list(range(count))


def test_the_catalogue_is_whole_and_made_once(
    catalogue: Path, originals: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    about = json.loads((catalogue / "catalogue.json").read_text())
    found = [read_record(place) for place in find_records(catalogue)]
    assert [image_id for image_id, _ in found] == [photographs.image_id(n) for n in range(COUNT)]
    assert sum(len(data) for _, data in found) == about["jpeg_bytes"]
    assert found[7][1] == photographs.make_photograph(7, originals)
    monkeypatch.setattr(photographs, "load_originals", lambda: pytest.fail("made again"))
    assert photographs.make_catalogue(catalogue.parent, COUNT, SHARDS) == catalogue


def test_an_interrupted_catalogue_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(number: int, originals: list[Image.Image], coding: str) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(photographs, "make_photograph", interrupt)
    with pytest.raises(KeyboardInterrupt):
        photographs.make_catalogue(tmp_path, 4, 2)
    assert list(tmp_path.iterdir()) == []


def test_more_shards_than_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count is 3 and shards 4, wanted at least one image"):
        photographs.make_catalogue(tmp_path, 3, 4)


# What peers read


def test_peers_read_what_tensorflow_wrote(catalogue: Path) -> None:
    import tensorflow as tf

    paths = sorted(str(path) for path in catalogue.glob("*.tfrecord"))
    wanted = []
    for serialized in tf.data.TFRecordDataset(paths).as_numpy_iterator():
        features = tf.train.Example.FromString(serialized).features.feature
        values = [features[name].bytes_list.value[0] for name in ("image_id", "image/encoded")]
        wanted.append((values[0].decode(), values[1]))
    assert [read_record(place) for place in find_records(catalogue)] == wanted
    assert len(find_records(catalogue, 5)) == 5


def test_an_example_of_other_features_is_parsed_or_refused() -> None:
    example = example_pb2.Example()
    example.features.feature["long"].bytes_list.value.append(b"x" * 70_000)
    example.features.feature["two"].bytes_list.value.extend([b"first", b"second"])
    assert parse_example(example.SerializeToString()) == {"long": b"x" * 70_000, "two": b"first"}
    assert parse_example(b"") == {}
    with pytest.raises(ValueError, match="wire type 0, wanted bytes features only"):
        parse_example(b"\x08\x01")


def test_the_torch_network_has_the_encoders_architecture() -> None:
    tree = ast.parse((ROOT / "benchmarks" / "peers" / "torch_lite0.py").read_text())
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert values["STAGES"] == efficientnet_lite0.STAGES
    assert (values["INPUT_SIZE"],) * 2 == efficientnet_lite0.INPUT_SIZE
    assert values["HEAD_FILTERS"] == efficientnet_lite0.HEAD_FILTERS


def test_a_peer_with_the_same_libraries_has_the_same_versions() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if "==" in line and not line.startswith(" "))
    locked["tensorflow-cpu"] = locked["tensorflow"]
    beam = next(peer for peer in PEERS if peer.name == "beam")
    shared = [text.split("==") for text in beam.requirements]
    same = {name for name, version in shared if locked.get(name) == version}
    assert same >= {"apache-beam", "keras", "numpy", "pillow", "pyarrow", "tensorflow-cpu"}


# Environments and processes


@pytest.mark.parametrize("peer", [*PEERS, *JOIN_PEERS], ids=lambda peer: peer.name)
def test_a_peers_module_is_there_and_all_is_pinned(peer: Peer) -> None:
    assert (ROOT / "benchmarks" / "peers" / f"{peer.module}.py").is_file()
    assert all("==" in requirement for requirement in peer.requirements)


def test_other_pins_are_another_environment(tmp_path: Path) -> None:
    one, other = (Peer("a", "A", "a", (f"b=={n}",), ()) for n in (1, 2))
    folders = [peer_runs.environment_folder(tmp_path, peer) for peer in (one, other)]
    assert folders[0] != folders[1]
    assert folders[0] == peer_runs.environment_folder(tmp_path, one)


def test_what_cannot_be_installed_is_skipped_with_the_reason(tmp_path: Path) -> None:
    no_folder = tmp_path / "a file"
    no_folder.touch()
    peer = Peer("a", "A", "a", ("b==1",), ())
    with pytest.raises(SkippedError, match=r"cannot be installed: .*a file"):
        peer_runs.make_environment(no_folder, peer)


def test_a_finished_environment_is_not_made_again(tmp_path: Path) -> None:
    peer = Peer("a", "A", "a", ("no-such-package==0",), ())
    folder = peer_runs.environment_folder(tmp_path, peer)
    folder.mkdir(parents=True)
    (folder / "installed").touch()
    assert peer_runs.make_environment(tmp_path, peer) == str(folder / "bin" / "python")


def run_code(code: str) -> dict[str, object]:
    return peer_runs.run_for_json([sys.executable, "-c", code], 60)


def test_the_last_line_is_the_result() -> None:
    code = """print('{"not": "this"}'); print('50 % [###]{"images": 3}')"""
    assert run_code(code) == {"images": 3}


def test_what_takes_too_long_is_stopped_and_tells_how_far_it_came() -> None:
    code = """
import time
from benchmarks.peers.neighbors import Clock
clock = Clock()
with clock.stage("read"):
    pass
with clock.stage("build"):
    time.sleep(60)
"""
    with pytest.raises(StoppedError, match="stopped after 2 seconds") as stopped:
        peer_runs.run_for_json([sys.executable, "-c", code], 2)
    stages = stopped.value.stages()
    assert list(stages) == ["read", "build"]
    assert stages["read"] < 0.5
    # Starting Python is no part of the stage.
    assert 0.2 < stages["build"] < 2.5


def test_what_is_stopped_between_stages_has_those_that_ended() -> None:
    line = json.dumps({"clock": {"stages": {"build": 3.0}, "running": None, "at": 1.0}})
    assert StoppedError(9, ["a line", line]).stages() == {"build": 3.0}
    assert StoppedError(9, []).stages() == {}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('no such device')", "failed: no such device"),
        ("print('hello')", "printed no result but 'hello"),
        ("""print('{"skipped": "no bfloat16 here"}')""", "no bfloat16 here"),
    ],
)
def test_what_fails_is_skipped_with_the_reason(code: str, reason: str) -> None:
    with pytest.raises(SkippedError, match=reason):
        run_code(code)


# Arithmetic and options


def test_the_serial_limit_takes_the_fastest_engine_of_the_precision() -> None:
    compared = [
        Compared("a", "float32", 100, {"engine": 4.0}, 1.0),
        Compared("b", "float32", 100, {"engine": 3.0}, 1.0),
        Compared("c", "bfloat16", 100, {"engine": 1.0}, 1.0),
    ]
    assert serial_limit(compared, 2.0, "float32") == (5.0, "b")
    assert serial_limit(compared, 2.0, "bfloat16") == (3.0, "c")


def test_a_figure_against_another() -> None:
    figure = figures.Figure("part", "name", 300, "images", 2.0).against("half as fast", 75.0)
    assert (figure.per_second, figure.ratio, figure.peer) == (150.0, 2.0, "half as fast")
    assert figure.to_json()["per_second"] == 150.0


def test_the_machine_says_what_it_is() -> None:
    machine = figures.describe_machine()
    assert machine["cores"] >= 1
    assert machine["cpu"]
    assert machine["versions"]["tensorflow"]
    assert set(machine["flags"]) <= set(figures.CPU_FLAGS)


def test_lists_of_options() -> None:
    options = embed.parse(["--peers", "none", "--engines", "openvino", "--networks", ""])
    assert (options.peers, options.engines, options.networks) == ((), ("openvino",), ())
    assert embed.parse([]).peers == tuple(peer.name for peer in PEERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "torch,onnx"], "got 'onnx', wanted some of torch,beam,fastdup, or none"),
        (["--shards", "9"], "--shards 1 to 2"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_a_wrong_option_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        embed.parse(arguments)
    assert message in capsys.readouterr().err


def test_the_first_shards_can_be_taken_alone(catalogue: Path) -> None:
    with chosen_shards(str(catalogue), 1) as folder:
        assert len(find_records(Path(folder))) == COUNT // SHARDS
    assert not Path(folder).exists()


# The whole of it, on a few images


def test_everything_takes_turns_in_one_process(catalogue: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.embed_parts", "compare", "--shards", str(catalogue),
        "--network", "efficientnet_lite0", "--engine", "tensorflow", "--precision", "float32",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["images"] == COUNT
    assert set(found["seconds"]) == {"decode", "engine", "loop", "pipeline"}
    assert all(len(each) == 1 and each[0] > 0 for each in found["seconds"].values())
    assert len(found["load_seconds"]) == 1


def test_the_command_is_run_as_a_user_runs_it(catalogue: Path, tmp_path: Path) -> None:
    path, workspace = str(tmp_path / "bench.yaml"), str(tmp_path / "workspace")
    lite0 = "efficientnet_lite0"
    config = write_config(path, workspace, str(catalogue), lite0, "tensorflow", "float32")
    command = run_command(config, tmp_path)
    assert command.images == COUNT
    assert 0 < command.stage_seconds < command.seconds
    assert 2**27 < command.peak_bytes < 2**33


def test_a_command_that_fails_is_skipped_with_what_it_printed(tmp_path: Path) -> None:
    path = str(tmp_path / "bench.yaml")
    config = write_config(path, str(tmp_path), str(tmp_path), "no_network", "tensorflow", "float32")
    with pytest.raises(SkippedError, match="no_network"):
        run_command(config, tmp_path)


# The join: made vectors, exact neighbours, recall

TINY = vectors.VectorSet(2_000, 32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vectors.make_set(tmp_path_factory.mktemp("vectors"), TINY)


def test_made_vectors_are_of_unit_length_and_made_once(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = np.load(made / "vectors.npy")
    assert (matrix.shape, matrix.dtype) == ((2_000, 32), np.float16)
    np.testing.assert_allclose(np.linalg.norm(matrix.astype(float), axis=1), 1, atol=1e-5)
    assert (vectors.read_embeddings(str(made / "embeddings")) == matrix).all()
    assert (vectors.Mixture(TINY).block(0, 2_000) == matrix).all()
    monkeypatch.setattr(vectors, "Mixture", lambda made: pytest.fail("made again"))
    assert vectors.make_set(made.parent, TINY) == made


def test_other_numbers_are_another_set() -> None:
    others = [
        vectors.VectorSet(2_000, 33),
        vectors.VectorSet(2_000, 32, seed=1),
        vectors.VectorSet(2_000, 32, identical=0.05),
        vectors.VectorSet(2_000, 32, content="abc"),
    ]
    assert len({each.folder_name for each in (TINY, *others)}) == 5


def test_identical_rows_are_one_picture(tmp_path: Path) -> None:
    place = vectors.make_set(tmp_path, vectors.VectorSet(400, 8, identical=0.05))
    matrix = np.load(place / "vectors.npy")
    assert (matrix == matrix[0]).all(axis=1).sum() == 21  # Row 0 and its 20 copies.


def test_truth_is_what_brute_force_finds(made: Path) -> None:
    matrix = np.load(made / "vectors.npy").astype(np.float64)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    with np.load(made / "truth.npz") as truth:
        queries, scores = truth["queries"], truth["scores"]
    assert (len(queries), len(np.unique(queries))) == (1_000, 1_000)
    every = matrix[queries] @ matrix.T
    every[np.arange(len(queries)), queries] = -np.inf
    np.testing.assert_allclose(scores, -np.sort(-every, axis=1)[:, :64], atol=1e-12)


def test_recall_counts_each_right_neighbour_once(made: Path) -> None:
    matrix = np.load(made / "vectors.npy").astype(np.float32)
    every = matrix @ matrix.T
    exact = np.argsort(-every, axis=1)[:, :6]
    assert neighbors.recall(made, exact, 5) == 1.0
    worst = np.argsort(every, axis=1)[:, :2]
    padded = np.hstack([exact[:, :4], exact[:, 1:2], np.full((2_000, 1), -1), worst])
    assert neighbors.recall(made, padded, 5) == pytest.approx(0.6, abs=0.001)
    rows = np.asarray([0, 1])
    known = set(neighbors.read_queries(made).tolist())
    assert (neighbors.recall(made, exact[:2], 5, rows) is None) == (not known & {0, 1})


def test_a_long_search_is_measured_on_a_sample_and_multiplied(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def search(rows: Any) -> np.ndarray:
        numbers = np.arange(2_000)[rows]
        asked.append(numbers)
        time.sleep(len(numbers) * 1e-4)
        return numbers[:, None]

    clock = neighbors.Clock()
    found, rows, note = neighbors.timed_search(clock, made, 2_000, 1e9, search)
    assert (len(found), rows, note) == (2_000, None, "all queries")
    clock = neighbors.Clock()
    found, rows, note = neighbors.timed_search(clock, made, 2_000, 0.15, search)
    assert rows is not None
    assert 1_000 <= len(rows) < 2_000
    assert note == f"{len(rows):,} queries, multiplied"
    assert (found[:, 0] == rows).all()
    # Those whose neighbours are known are among them, and the time is that of all.
    assert len(np.unique(rows)) == len(rows)
    assert np.isin(neighbors.read_queries(made), rows).all()
    assert clock.stages["search"] >= 0.2
    lines = [json.loads(line)["clock"] for line in capsys.readouterr().out.splitlines()]
    assert [line["running"] for line in lines] == ["search", None] * 2


def test_tuning_takes_the_first_setting_that_is_good_enough(made: Path) -> None:
    matrix = np.load(made / "vectors.npy").astype(np.float32)
    exact = np.argsort(-(matrix @ matrix.T), axis=1)

    def search(rows: np.ndarray, setting: int) -> np.ndarray:
        return exact[rows, :setting]

    assert neighbors.tune(made, 0.75, 5, [2, 4, 5, 6], search) == 5
    assert neighbors.tune(made, 1.1, 5, [2, 4], search) == 4


# The join: methods, products, arithmetic


@pytest.mark.parametrize(("rows", "lists"), [(1, 2), (1_890, 32), (20_000, 512), (200_000, 1024)])
def test_lists_of_a_catalogue(rows: int, lists: int) -> None:
    assert lists_of(rows) == lists


@pytest.mark.parametrize("library", products.LIBRARIES)
def test_every_product_that_is_timed_is_the_product(library: str) -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((rows, 16), dtype=np.float32) for rows in (7, 5))
    found = list(products.ways(library, 2))
    assert "float32" in [precision for precision, _ in found]
    for precision, (_, make) in found:
        product = make(a, b)()
        product = np.vstack(product) if isinstance(product, list) else np.asarray(product)
        tolerance = 1e-4 if precision == "float32" else 0.2
        np.testing.assert_allclose(product.astype(np.float32), a @ b.T, atol=tolerance)


def run_part(part: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    join_parts.main([part, "--k", "5", "--threads", "2", *arguments])
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_kith_and_faiss_find_the_same_over_the_same_lists(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = library.build(
        str(made / "embeddings"), str(tmp_path / "index"), IndexSpec(nlist=32, nprobe=4)
    )
    given = ["--data", str(made), "--index", index, "--warm", index, "--out", str(tmp_path)]
    kith = run_part("search", capsys, *given)
    assert 0.5 < kith["recall"] <= 1
    spec = JoinSpec(5, threads=2)
    half = dataclasses.replace(spec, product=bfloat16_product())
    exact = join_parts.search_index(index, spec)
    assert (join_parts.search_index(index, half) == exact).all()
    assert list(run_part("library", capsys, *given)["stages"]) == ["join"]
    task = run_part("task", capsys, *given)
    assert (task["queries"], task["rows"]) == (2_000, 2_000)
    whole = run_part("whole", capsys, *given[:2], "--warm", index, "--out", str(tmp_path / "w"),
                     "--nlist", "32", "--nprobe", "4")  # fmt: skip
    assert list(whole["stages"]) == ["build", "search"]
    assert whole["recall"] == kith["recall"]
    centroids = str(tmp_path / "centroids.npy")
    run_part("export-centroids", capsys, "--index", index, "--out", centroids)
    for method in ("ivf", "batch"):
        line = ["faiss_join", "--data", str(made), "--out", str(tmp_path), "--centroids", centroids]
        line += ["--nlist", "32", "--nprobe", "4", "--k", "5", "--threads", "2"]
        monkeypatch.setattr(sys, "argv", [*line, "--method", method, "--work", "search"])
        faiss_join.main()
        faiss = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert faiss["recall"] == pytest.approx(kith["recall"], abs=0.002)
        assert faiss["pairs"] == pytest.approx(kith["pairs"], rel=0.001)


def test_methods_are_made_ready_for_a_recall(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(made), "--target", "0.9"]
    source, plain = str(made / "embeddings"), str(tmp_path / "plain")
    library.build(source, plain, IndexSpec(nlist=32, nprobe=4))
    about = run_part("describe", capsys, "--index", plain)
    assert (about["method"], about["nlist"], about["nprobe"]) == ("list_major", 32, 4)
    nprobes = run_part("calibrate", capsys, *given, "--index", plain)["nprobes"]
    assert 1 < nprobes["list_major"] < nprobes["compressed"] < 32
    request = IndexSpec(nlist=32, nprobe=nprobes["compressed"], encoding=Encoding.COMPRESSED)
    coded = library.build(source, str(tmp_path / "coded"), request)
    refine = run_part("refine", capsys, *given, "--index", coded)["refine"]
    assert refine in join_parts.REFINES
    found = run_part("search", capsys, *given, "--index", coded, "--warm", coded,
                     "--refine", str(refine))  # fmt: skip
    assert found["recall"] >= 0.9
    assert found["note"] == f"{nprobes['compressed']} of 32 lists, 1 shards, codes, refine {refine}"
    # Fewer proposals find less: the refine that is asked for is that of the search.
    spec = JoinSpec(5, threads=2)
    few = join_parts.origin_rows(open_index(coded), join_parts.search_index(coded, spec, 1))
    reached = neighbors.recall(made, few, 5)
    assert reached is not None
    assert reached < found["recall"]


def test_a_sample_of_the_queries_finds_what_all_of_them_do(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = library.build(
        str(made / "embeddings"), str(tmp_path / "index"), IndexSpec(nlist=32, nprobe=4, shards=3)
    )
    index, spec = open_index(folder), JoinSpec(5, threads=2)
    every = join_parts.origin_rows(index, join_parts.search_index(folder, spec))
    rows, origin = np.arange(3, 2_000, 7), join_parts.origin_of(index)
    assert (join_parts.search_rows(index, spec, rows, origin) == every[rows]).all()
    given = ["--data", str(made), "--index", folder, "--warm", folder]
    whole = run_part("search", capsys, *given)
    sample = run_part("sampled-search", capsys, *given, "--search-seconds", "1e-9")
    # The rows whose neighbours are known are searched for in any case.
    assert sample["note"].endswith("1,000 queries, multiplied")
    assert (sample["recall"], sample["pairs"]) == (whole["recall"], whole["pairs"])


def test_calibration_is_as_sure_as_a_build_is() -> None:
    assert Config(workspace="any").evaluate.max_attempts == join_parts.PROMISE_ATTEMPTS


def bfloat16_product() -> BFloat16Product | None:
    """Returns the product, or none, which is the default, where the CPU has no bfloat16."""
    try:
        return BFloat16Product(2)
    except ConfigError as error:
        assert "OpenVINO has no bfloat16 on this CPU" in str(error)
        return None


def a_run(row: str, method: str, seconds: float, **more: Any) -> Run:
    stages = more.pop("stages", {})
    return Run("9 x 4", 4, 9, 0, row, method, seconds, stages, **more)


def test_the_ratios_of_a_join() -> None:
    runs = [
        a_run(SEARCH, KITH, 4.0, pairs=50, recall=0.98),
        a_run(SEARCH, KITH, 2.0, pairs=50, recall=0.96),
        a_run(SEARCH, KITH, 3.0, pairs=50, recall=0.97),
        a_run(SEARCH, "peer", 6.0, recall=0.97),
        a_run(LIBRARY, KITH, 10.0, cpu_seconds=15.0),
        a_run(COMMAND, KITH, 18.0, stages={"start": 7.0, "work": 11.0}, cpu_seconds=18.0),
        a_run(WHOLE, KITH, 5.0),
        a_run(WHOLE, "slow", 20.0, at_least=True),
    ]
    limits = [Product("9 x 4", "float32", rate, "numpy", "one call", 4) for rate in (100.0, 200.0)]
    summary = Summary(runs, limits)
    ratios = {ratio.name: ratio for ratio in summary.ratios()}
    # 2 x 4 operations for each of 50 pairs, 200 a second: 2 seconds.
    assert ratios["9 x 4: limit, float32 / Kith, search only"].value == pytest.approx(2 / 3)
    assert ratios["9 x 4: peer / Kith, search only"].value == pytest.approx(2.0)
    assert ratios["9 x 4: peer / Kith, search only"].note == "recall 0.9700 against 0.9700: 1.0000"
    # At most 5 seconds of a start are left out.
    assert ratios["9 x 4: kith join / library call"].value == pytest.approx(1.3)
    assert ratios["9 x 4: kith join / library call, CPU time"].value == pytest.approx(1.2)
    assert ratios["9 x 4: slow / Kith, from vectors"].value == pytest.approx(4.0)
    assert ratios["9 x 4: slow / Kith, from vectors"].note == "at least"
    by_name = {figure.name: figure for figure in summary.figures()}
    assert by_name["search only: peer"].ratio == pytest.approx(0.5)
    assert by_name["limit, float32"].seconds == pytest.approx(2.0)


def test_the_growth_is_that_of_a_pair_and_dimension() -> None:
    small = a_run(SEARCH, KITH, 4.0, pairs=50)
    large = dataclasses.replace(small, set="90 x 4", rows=90, seconds=50.0, pairs=500)
    ratios = {ratio.name: ratio.value for ratio in Summary([large, small], []).ratios()}
    assert list(ratios)[-3:] == [
        "ps a pair and dimension, 9 x 4",
        "ps a pair and dimension, 90 x 4",
        "ps a pair and dimension, most / least, dim 4",
    ]
    assert ratios["ps a pair and dimension, 9 x 4"] == pytest.approx(4.0 / 50 / 4 * 1e12)
    assert ratios["ps a pair and dimension, most / least, dim 4"] == pytest.approx(1.25)
    # Equal lists and the other product stand by themselves, with what a query scores in words.
    equal = [
        dataclasses.replace(
            run, row=EQUAL_LISTS, method=KITH_HALF, seconds=run.seconds / 2, note="1 list"
        )
        for run in (small, dataclasses.replace(large, pairs=450))
    ]
    found = {ratio.name: ratio for ratio in Summary([large, small, *equal], []).ratios()}
    kind = "ps a pair and dimension, equal lists, bfloat16"
    assert found[f"{kind}, 90 x 4"].value == pytest.approx(25.0 / 450 / 4 * 1e12)
    assert found[f"{kind}, 90 x 4"].note == "5 pairs a query; 1 list"
    assert found["ps a pair and dimension, most / least, dim 4"].value == pytest.approx(1.25)


def test_the_pick_is_held_against_the_fastest_that_reaches_the_recall() -> None:
    runs = {
        "exact": [a_run("recall 0.9", "exact", seconds, recall=1.0) for seconds in (6.0, 4.0, 9.0)],
        "list_major": [a_run("recall 0.9", "list_major", 3.0, recall=0.91)],
        "compressed": [a_run("recall 0.9", "compressed", 1.0, recall=0.89)],
    }
    ratio, note = judge_pick("exact", runs, 0.9)
    assert ratio == pytest.approx(4 / 3)  # The fastest run of each.
    assert note == (
        "auto picks exact, best is list_major: exact 4.00 s at 1.0000; list_major 3.00 s at 0.9100; "
        "compressed 1.00 s at 0.8900, too low"
    )
    # What auto picked counts whatever it reached, so it is never better than itself.
    assert judge_pick("compressed", runs, 0.9)[0] == 1.0
    summary = Summary([run for each in runs.values() for run in each], [])
    assert {figure.name: figure.seconds for figure in summary.figures()} == {
        "recall 0.9: exact": 6.0,
        "recall 0.9: list_major": 3.0,
        "recall 0.9: compressed": 1.0,
    }


def test_what_was_measured_is_read_back(tmp_path: Path) -> None:
    path, machine = tmp_path / "runs.jsonl", {"cpu": "some", "cores": 2, "python": "3.11"}
    quiet = Console(quiet=True)
    log = Log(path, machine, quiet)
    log.add_run(a_run(SEARCH, KITH, 4.0, pairs=50, recall=0.9), {"faiss-cpu": "1"})
    log.add_product(Product("9 x 4", "float32", 1e9, "numpy", "one call", 4))
    log.add_ratio(Ratio("memory", 2.0))
    log.skip("a peer", "is not there")
    # Killed here, then continued: a ratio that is measured again is replaced.
    again = Log(path, machine, quiet)
    again.add_ratio(Ratio("memory", 1.0))
    for found in (again, Log(path, machine, quiet)):
        assert found.runs == log.runs
        assert found.products == log.products
        assert found.ratios == [Ratio("memory", 1.0)]
        assert (found.skipped, found.versions) == (log.skipped, log.versions)
        assert found.recall("9 x 4") == 0.9
    with pytest.raises(ValueError, match="holds runs of .*'cores': 2.*this machine is .*'cores': 3"):
        Log(path, machine | {"cores": 3}, quiet)


def test_kept_runs_are_shown_without_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.jsonl"
    kept = Log(path, figures.describe_machine(), Console(quiet=True))
    kept.add_run(a_run(SEARCH, KITH, 4.0, pairs=50), {})
    join.main(["--only", "none", "--runs", str(path), "--folder", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [run["seconds"] for run in found["runs"]] == [4.0]
    assert [figure["name"] for figure in found["figures"]] == ["search only: Kith"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "search,all"], "got 'all', wanted some of search,vectors,beam,growth,methods,"),
        (["--memory", "sample"], "--grid, --growth and --memory take sizes, not sample"),
        (["--goals", "0.9,1"], "got 1, wanted recalls between 0 and 1, such as 0.9,0.99"),
        (["--sizes", "200000"], "got '200000', wanted sizes such as 200000x256, or sample"),
        (["--peers", "annoy"], "got 'annoy', wanted some of ivf,batch,knn,autofaiss,hnswlib,scann"),
        (["--rounds", "0"], "--rounds, --k and --nprobe must be at least 1"),
    ],
)
def test_a_wrong_option_of_the_join_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        join_options.parse(arguments)
    assert message in " ".join(capsys.readouterr().err.split())
