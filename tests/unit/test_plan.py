"""Plans: what a build and a join will take, and specs that are refused for it."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from index_builder.datasets import embeddings, manifests
from index_builder.datasets.manifests import Manifest, Part
from index_builder.errors import ConfigError, DatasetError
from index_builder.index.goals import Goal, TransformSpec
from index_builder.index.memory import readable_memory
from index_builder.index.shards import IndexDataset, open_shard
from index_builder.index.spec import IndexSpec, ResolvedSpec
from index_builder.recall.calibration import CalibrationSpec
from index_builder.recall.recall import Promise
from index_builder.rules.rules import JoinRules
from index_builder.steps import build_spec, building, nprobe_choice, plan
from index_builder.steps.build_spec import BuildSpec, Retry
from index_builder.steps.host_speed import HostSpeed, measure_host
from index_builder.steps.plan import Source
from pipelines.plan_report import readable_bytes, show_plan
from tests.index_fixtures import build_index, clustered_catalogue, write_embeddings

# A host that does a million of everything a second.
STEADY = HostSpeed(1e6, 1e6, 1e6, 1e6, 1e6, 1e6, 1e6, 1e6, 1e6, cores=2, seconds=0.0)
LARGE = Source(2_000_000, 256, 2, 100_000, 4096, 80.0, 2_000_000 * 560)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    spec = IndexSpec(nlist=20, nprobe=4, shards=5, seed=1)
    return build_index(tmp_path_factory.mktemp("i"), clustered_catalogue(900, 48, centres=15), spec)


def limited(memory_limit_bytes: int, **given: int) -> ResolvedSpec:
    return IndexSpec(**given).resolve(LARGE.rows, 256, Goal(20, 0.0, memory_limit_bytes))


def test_automatic_choices_fit_into_the_limit() -> None:
    for limit in (512 << 20, 1 << 30, 8 << 30):
        plan.check_memory(limited(limit, training_rows=100_000), LARGE)


@pytest.mark.parametrize("nprobe", [8, 200])
def test_a_shard_that_does_not_fit_is_refused(nprobe: int) -> None:
    spec = limited(1 << 30, shards=1, nprobe=nprobe, training_rows=100_000)
    with pytest.raises(ConfigError) as raised:
        plan.check_memory(spec, LARGE)
    assert raised.value.exit_status == 2
    told = re.search(
        r"^(Building|Joining) one shard would take (\d+\.\d+) GiB \(2000000 vectors of 256 numbers, "
        rf"nprobe {nprobe}, k 20\), index\.memory_limit_gib allows 1\.00 GiB\. Set index\.shards to "
        r"auto or at least (\d+), or raise the limit\.$",
        str(raised.value),
    )
    assert told is not None, raised.value
    assert float(told[2]) > 1
    # Building and joining may need different numbers; what is named is enough for its own.
    needed = int(told[3])
    for _ in range(2):
        try:
            plan.check_memory(dataclasses.replace(spec, shards=needed), LARGE)
            break
        except ConfigError as error:
            needed = int(re.search(r"at least (\d+)", str(error))[1])  # type: ignore[index]
    assert 1 < needed < 20
    with pytest.raises(ConfigError):
        plan.check_memory(dataclasses.replace(spec, shards=needed // 2), LARGE)


def test_a_row_group_that_does_not_fit_is_refused() -> None:
    wide = dataclasses.replace(LARGE, group_rows=2_000_000, part_rows=2_000_000)
    spec = limited(1 << 30, training_rows=100_000)
    told = (
        r"Assigning one part would take 2\.\d\d GiB \(row groups of 2000000 embeddings of 256 numbers"
    )
    with pytest.raises(ConfigError, match=told):
        plan.check_memory(spec, wide)


@pytest.mark.parametrize(
    ("step", "queries", "told"),
    [
        ("check", 0, r"Checking the embeddings would take .* smaller row groups, or raise"),
        (
            "calibrate",
            9,
            r"Choosing nprobe on 9 queries would take .*, lower evaluate\.sample, or ",
        ),
    ],
)
def test_every_step_of_the_plan_fits_into_the_limit(step: str, queries: int, told: str) -> None:
    # A row group is far more than what the other steps take.
    source = Source(20_000, 1280, 2, 16_384, 16_384, 80.0, 20_000 * 2600)
    request = IndexSpec(nlist=20, nprobe=4, training_rows=1000, shards=200)
    goal = Goal(5, 0.0, 8 << 30)
    memory = plan.build_memory(request.resolve(20_000, 1280, goal), source, queries)
    assert memory[step] == max(memory.values())
    for limit in (memory[step], memory[step] - 1):
        spec = request.resolve(20_000, 1280, dataclasses.replace(goal, memory_limit_bytes=limit))
        if limit == memory[step]:
            plan.check_memory(spec, source, calibrated_on=queries)
            continue
        with pytest.raises(ConfigError, match=told):
            plan.check_memory(spec, source, calibrated_on=queries)


def test_training_is_looked_at_first() -> None:
    spec = limited(256 << 20, shards=1)
    with pytest.raises(ConfigError, match="Training the index would take"):
        plan.check_memory(spec, LARGE)


def test_the_memory_of_a_task_does_not_grow_with_the_corpus() -> None:
    small, large = (
        plan.build_memory(
            IndexSpec(nlist=1000, nprobe=16, training_rows=50_000).resolve(rows, 256),
            dataclasses.replace(LARGE, rows=rows),
        )
        for rows in (2_097_152, 4 * 2_097_152)
    )
    assert small == large


def test_a_plan_is_the_sum_of_its_steps() -> None:
    request = IndexSpec(transform=TransformSpec("pca", 64))
    planned = plan.plan_build(request.resolve(LARGE.rows, 256), LARGE, STEADY)
    document = json.loads(json.dumps(planned.to_json()))
    assert [step["name"] for step in document["steps"]] == ["check", "train", "assign", "build shards"]
    assert document["seconds"] == pytest.approx(
        sum(step["seconds"] for step in document["steps"]), 0.01
    )
    assert document["memory_bytes"] == max(step["memory_bytes"] for step in document["steps"])
    assert document["reasons"] == list(planned.reasons)
    # Twice the work takes twice the time, but for what starting costs.
    twice = dataclasses.replace(LARGE, rows=2 * LARGE.rows, file_bytes=2 * LARGE.file_bytes)
    given = IndexSpec(nlist=100, nprobe=5, training_rows=1000)
    times = [
        {step.name: step.seconds for step in plan.plan_build(spec, source, STEADY).steps}
        for spec, source in (
            (given.resolve(LARGE.rows, 256), LARGE),
            (given.resolve(twice.rows, 256), twice),
        )
    ]
    assert times[1]["assign"] == pytest.approx(2 * times[0]["assign"], 0.01)


def test_choosing_nprobe_is_planned_where_it_is_done() -> None:
    spec = IndexSpec(nlist=100, training_rows=1000).resolve(LARGE.rows, 256, Goal(20, 0.95))
    plain = plan.plan_build(spec, LARGE, STEADY)
    assert "calibrate" not in [step.name for step in plain.steps]
    promised = CalibrationSpec(Promise(0.95, sample=1000), 20, JoinRules())
    assert [promised.most_queries(rows) for rows in (700, 2000, 10**6)] == [700, 500, 1000]
    times = []
    for queries in (1000, 2000):
        planned = plan.plan_build(spec, LARGE, STEADY, queries)
        assert [step.name for step in planned.steps][:3] == ["check", "train", "calibrate"]
        (step,) = (step for step in planned.steps if step.name == "calibrate")
        assert planned.seconds == pytest.approx(plain.seconds + step.seconds)
        assert planned.memory_bytes >= step.memory_bytes > 0
        times.append(step.seconds)
    assert times[0] < times[1] < 2 * times[0]


def test_the_bytes_on_disk_are_as_planned(tmp_path: Path) -> None:
    catalogue = clustered_catalogue(3000, 64, centres=15)
    request = IndexSpec(nlist=30, nprobe=6, shards=4)
    index = build_index(tmp_path, catalogue, request)
    parts = tuple(
        Part(path.stem, "k", 1000, (manifests.describe_file(str(path.parent), path.name),))
        for path in sorted((tmp_path / "embeddings").glob("*.parquet"))
    )
    manifest = Manifest(embeddings.KIND, "f", {}, [], parts, {"dim": 64})
    source = plan.describe_source(str(tmp_path / "embeddings"), manifest)
    assert (source.rows, source.dim, source.number_bytes, source.group_rows) == (3000, 64, 2, 97)
    planned = plan.plan_build(request.resolve(3000, 64), source, STEADY).disk_bytes
    actual = {
        "shards": sum(file.bytes for part in index.parts for file in part.files),
        "trained": Path(index.folder, "trained.npz").stat().st_size,
    }
    for name, size in actual.items():
        assert 0.7 < planned[name] / size < 1.3, (name, planned[name], size)


def test_the_work_of_a_join_is_counted_from_the_probes(index: IndexDataset) -> None:
    sizes = np.diff(index.layout.list_offsets)
    shard_of_list = [
        {number for number in range(5) if len(range(*index.layout.list_rows(number, one)))}
        for one in range(index.trained.nlist)
    ]
    pairs, touched = 0, []
    for number in range(5):
        with open_shard(index, number, ("probes",)) as shard:
            probes = shard.probes()
        pairs += int(sizes[probes].sum())
        touched.append(len(set().union(*(shard_of_list[one] for one in np.unique(probes)))))
    work = plan.count_join_work(index)
    assert work.pairs == pairs
    assert work.fan_out == sum(touched) / 5
    planned = plan.plan_join(index, work, 10, STEADY)
    assert planned.figures["pairs"] == pairs
    assert planned.figures["flop"] == 2 * 48 * pairs
    assert planned.seconds > pairs / STEADY.joined_pairs


def test_embeddings_that_cannot_be_read(tmp_path: Path) -> None:
    parts = tuple(write_embeddings(tmp_path / "e", clustered_catalogue(30, 8, centres=2), parts=1))
    manifest = Manifest(embeddings.KIND, "f", {}, [], parts, {"dim": 8})
    path = tmp_path / "e" / parts[0].files[0].path
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        DatasetError, match=r"part-00000\.parquet cannot be read: .*make the embeddings"
    ):
        plan.describe_source(str(tmp_path / "e"), manifest)
    path.unlink()
    with pytest.raises(DatasetError, match=r"part-00000\.parquet cannot be read"):
        plan.describe_source(str(tmp_path / "e"), manifest)


def test_this_host_is_measured_and_nothing_stays_behind(tmp_path: Path) -> None:
    for rows in (1000, 100_000):
        speed = measure_host(rows, 32, 8, 3, 5, str(tmp_path), 0.001)
        assert list(tmp_path.iterdir()) == []
        for name, value in dataclasses.asdict(speed).items():
            assert value > 0, (rows, name)
        assert speed.seconds < 60
    # A bucket holds no scratch; the temporary folder serves.
    assert measure_host(100_000, 8, 2, 1, 3, "gs://bucket/none", 0.001).written_bytes > 0


def test_a_plan_for_people(index: IndexDataset) -> None:
    console = Console(record=True, width=100, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    spec = IndexSpec().resolve(LARGE.rows, 256)
    show_plan(plan.plan_build(spec, LARGE, STEADY).to_json(), console)
    work = plan.count_join_work(index)
    show_plan(plan.plan_join(index, work, 10, STEADY).to_json(), console)
    text = console.export_text()
    for told in ("Plan of kith build", "method list_major", "build shards", "Plan of kith join",
                 f"{work.pairs:,}", "memory of a join task", "8.0 GiB"):  # fmt: skip
        assert told in text, told


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5,120.0 TiB")],
)
def test_bytes_for_people(size: int, text: str) -> None:
    assert readable_bytes(size) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(1, "0.00 MiB"), (7 << 20, "7.00 MiB"), (64_424_509, "61.4 MiB"), (700 << 20, "700 MiB"),
     (1 << 30, "1.00 GiB"), (47 << 28, "11.8 GiB"), (5000 << 30, "5,000 GiB")],
)  # fmt: skip
def test_memory_is_told_with_three_digits(size: int, text: str) -> None:
    assert readable_memory(size) == text


def test_a_higher_nprobe_gets_smaller_shards() -> None:
    spec = limited(1 << 30, nlist=1000, training_rows=100_000)
    assert spec.settled(spec.nprobe, None).shards == spec.shards
    assert spec.settled(1, None).shards == spec.shards
    settled = spec.settled(1000, None)
    assert (settled.nprobe, settled.nlist) == (1000, 1000)
    assert settled.shards > 2 * spec.shards
    plan.check_memory(settled, LARGE)
    with pytest.raises(ConfigError, match=r"nprobe 1000 of attempt 2"):
        plan.check_memory(dataclasses.replace(settled, shards=spec.shards), LARGE, " of attempt 2")
    # Proposals of a retry take room, too; shards as configured stay as they are.
    assert spec.settled(spec.nprobe, 500).shards > spec.shards
    assert limited(8 << 30, shards=3, nlist=1000).settled(1000, None).shards == 3


def test_the_limit_counts_only_where_it_may_decide_the_shards() -> None:
    source = Manifest(embeddings.KIND, "f", {}, [], (Part("p", "k", 100_000, (), {}),), {"dim": 32})

    def identity(limit: int, request: IndexSpec, retry: Retry | None = None) -> str:
        calibration = CalibrationSpec(Promise(0.95), 20, JoinRules())
        goal = Goal(20, 0.95, limit)
        return build_spec.index_identity(source, request, None, goal, calibration, retry)

    few, many = IndexSpec(nlist=400), IndexSpec(nlist=400, shards=7)
    large, huge = 600 << 20, 4 << 30
    resolved = few.resolve(100_000, 32, Goal(20, 0.95, large))
    assert resolved.shards == few.resolve(100_000, 32, Goal(20, 0.95, huge)).shards
    assert resolved.settled(400, None).shards > resolved.shards
    assert identity(large, few) != identity(huge, few)
    assert identity(huge, few) == identity(2 * huge, few)
    assert identity(large, many) == identity(huge, many)
    # What a retry makes is known from the start.
    again = Retry(2, 40, "first")
    assert identity(large, few, again) == identity(huge, few, again)
    again = Retry(2, 400, "first")
    assert identity(large, few, again) != identity(huge, few, again)


def test_an_nprobe_that_calibration_raised_is_checked_and_gets_its_shards(tmp_path: Path) -> None:
    """What is built takes no more than the limit; with shards as configured it is refused."""
    catalogue = clustered_catalogue(3000, 16, centres=40)
    parts = tuple(write_embeddings(tmp_path / "source", catalogue))
    goal = Goal(20, 0.99, 24 << 20)
    calibration = CalibrationSpec(Promise(0.99), 20, JoinRules())
    for given in (None, 1):
        request = IndexSpec(nlist=300, shards=given)
        resolved = dataclasses.replace(request.resolve(3000, 16, goal), nprobe=1, shards=1)
        made = tmp_path / f"made-{given}"
        spec = BuildSpec(
            str(tmp_path / "source"), parts, resolved, str(made), "key", calibration=calibration
        )
        manifests.mark_part(spec.index_folder, Part("calibrated", "key", 0, (), {"nprobe": 290}))
        settled = nprobe_choice.settled_spec(spec, 280)
        assert settled.nprobe == 280
        if given is None:
            assert building.plan(spec, np.full(280, 11)).shards == settled.shards > 1
            nprobe_choice.check_memory(spec, 280)
        else:
            with pytest.raises(ConfigError, match=r"one shard .* nprobe 280 by calibration, k 20\), "):
                nprobe_choice.check_memory(spec, 280)
