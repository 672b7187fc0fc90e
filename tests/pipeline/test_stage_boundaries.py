"""What travels between the fused stages of each pipeline: descriptors and blocks, never pixels."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner, execution

from index_builder.datasets import storage
from index_builder.datasets.manifests import WORK_FOLDER
from index_builder.index.shards import open_index
from index_builder.steps.joining import JoinTask
from index_builder.steps.queries import QueriesSpec
from pipelines import build_index, embed_images, export_neighbors, join_neighbors, join_queries
from pipelines.build_index import IdCheck
from pipelines.embed_plan import EmbedPlan, plan_embedding
from pipelines.runners import RunnerSpec, describe_pipeline, run_pipeline
from tests.catalog_fixtures import Published
from tests.pipeline.small_catalogue import load, write_config
from transforms.duplicates import IdPart
from transforms.encoders.engines.choice import DEFAULT_CHOICE
from transforms.index import BuildSpec

Define = Callable[[beam.Pipeline], object]
# A prepared image of the default encoder, and what a descriptor may weigh.
PIXELS_BYTES = 224 * 224 * 3
DESCRIPTOR_BYTES = 1000


@pytest.fixture
def boundary(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of everything that a stage hands to the runner, bundle by bundle."""
    sizes: list[int] = []
    for buffer in (
        execution.ListBuffer,
        execution.GroupingBuffer,
        execution.WindowGroupingBuffer,
    ):
        append = buffer.append

        def recording(self: object, data: bytes, append: Callable[..., None] = append) -> None:
            sizes.append(len(data))
            append(self, data)

        monkeypatch.setattr(buffer, "append", recording)
    return sizes


def fused_stages(define: Define) -> list[list[str]]:
    """Returns the labels of the steps of each fused stage, as the local runner would run them."""
    _, stages = FnApiRunner().create_stages(describe_pipeline(define))
    return [[step.unique_name for step in stage.transforms] for stage in stages]


def stages_with(stages: list[list[str]], label: str) -> list[list[str]]:
    return [stage for stage in stages if any(name.endswith(label) for name in stage)]


def embed_graph(catalogue: Path, folder: Path, **sections: Any) -> tuple[EmbedPlan, Define]:
    config = load(write_config(folder / "c.yaml", catalogue, folder / "w", **sections))
    plan = plan_embedding(config, DEFAULT_CHOICE)
    return plan, lambda root: embed_images.define_pipeline(root, plan.graph)


def test_embedding_is_one_fused_stage_that_nothing_follows(catalogue: Path, tmp_path: Path) -> None:
    _, define = embed_graph(catalogue, tmp_path)
    stages = fused_stages(define)
    working = stages_with(stages, "EmbedShard")
    assert len(working) == 1
    assert stages.index(working[0]) == len(stages) - 1
    # Before it, only the shards are listed and spread.
    for stage in stages[:-1]:
        assert all("ListShards" in name or "SpreadShards" in name for name in stage), stage
    # The whole of the work is one step: nothing between reading and writing is a PCollection.
    proto = describe_pipeline(define)
    outputs = {
        output: transform.unique_name
        for transform in proto.components.transforms.values()
        if not transform.subtransforms
        for output in transform.outputs.values()
        if "EmbedImages" in transform.unique_name
    }
    assert list(outputs.values()) == ["EmbedImages/EmbedShard"]


def test_resource_hints_leave_the_work_in_one_stage(catalogue: Path, tmp_path: Path) -> None:
    _, plain = embed_graph(catalogue, tmp_path)
    hints = {"min_ram": "8GB", "accelerator": "type:nvidia-l4;count:1"}
    _, hinted = embed_graph(catalogue, tmp_path, embeddings={"resource_hints": hints})
    # Other workers read the tasks once more; from reading to writing it is one stage as before.
    assert len(fused_stages(hinted)) == len(fused_stages(plain)) + 1
    (working,) = stages_with(fused_stages(hinted), "EmbedShard")
    assert [name for name in working if not name.startswith("ref_")] == ["EmbedImages/EmbedShard"]
    proto = describe_pipeline(hinted)
    (embed,) = (
        transform
        for transform in proto.components.transforms.values()
        if transform.unique_name == "EmbedImages/EmbedShard"
    )
    stated = proto.components.environments[embed.environment_id].resource_hints
    assert stated == {
        "beam:resources:min_ram_bytes:v1": b"8000000000",
        "beam:resources:accelerator:v1": b"type:nvidia-l4;count:1",
    }


def test_no_pixels_leave_the_embed_stage(catalogue: Path, tmp_path: Path, boundary: list[int]) -> None:
    plan, define = embed_graph(catalogue, tmp_path)
    counters = run_pipeline(define, RunnerSpec())
    assert counters["embed.images_in"] == 72
    assert boundary
    # 72 images and their vectors crossed in not even the bytes of one of them.
    assert sum(boundary) < PIXELS_BYTES / 2
    assert max(boundary) < DESCRIPTOR_BYTES * len(plan.graph.tasks)
    assert max(len(pickle.dumps(task)) for task in plan.graph.tasks) < DESCRIPTOR_BYTES


def test_building_moves_list_sizes_and_no_vectors(
    finished: Path, catalogue: Path, tmp_path: Path, boundary: list[int]
) -> None:
    snapshot = Published(finished)
    source = snapshot.manifest("embeddings")
    config = load(write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w"))
    spec = config.index_spec().resolve(source.rows, source.properties["dim"])
    folder = str(tmp_path / "index")
    graph = BuildSpec(str(snapshot.folder("embeddings")), source.parts, spec, folder, "k" * 64)
    counters = run_pipeline(lambda root: build_index.define_pipeline(root, graph), RunnerSpec())
    assert counters["build.vectors_out"] == source.rows
    vector_bytes = source.rows * spec.request.transform.dim * 2
    # Parts come out of the last stages, list sizes are 8 bytes a list; the vectors stay in files.
    assert max(boundary) < min(vector_bytes / 2, 4 * DESCRIPTOR_BYTES)
    assert storage.glob(storage.join(folder, WORK_FOLDER, "assigned-*.parquet"))
    stages = fused_stages(lambda root: build_index.define_pipeline(root, graph))
    assert [len(stages_with(stages, name)) for name in ("AssignPart", "BuildShard")] == [1, 1]
    assert stages_with(stages, "AssignPart") != stages_with(stages, "BuildShard")


def test_making_queries_moves_list_sizes_and_no_vectors(
    finished: Path, tmp_path: Path, boundary: list[int]
) -> None:
    snapshot = Published(finished)
    folder, source = str(snapshot.folder("embeddings")), snapshot.manifest("embeddings")
    index = str(snapshot.folder("index"))
    graph = QueriesSpec(folder, source.parts, index, 2, str(tmp_path / "queries"), "k" * 64)
    counters = run_pipeline(lambda root: join_queries.define_pipeline(root, graph), RunnerSpec())
    assert counters["queries.vectors_in"] == counters["queries.queries"] == source.rows
    vector_bytes = source.rows * open_index(index).trained.dim * 2
    assert 0 < max(boundary) < min(vector_bytes / 2, 4 * DESCRIPTOR_BYTES)


def test_the_id_check_moves_ids_alone(finished: Path, tmp_path: Path, boundary: list[int]) -> None:
    snapshot = Published(finished)
    folder, source = str(snapshot.folder("embeddings")), snapshot.manifest("embeddings")
    check = IdCheck(tuple(IdPart(folder, part) for part in source.parts), str(tmp_path / "found"))
    run_pipeline(lambda root: build_index.define_id_check(root, check), RunnerSpec())
    # A block has half a kilobyte of Arrow's framing; the vectors alone would be four times as much.
    vector_bytes = source.rows * source.properties["dim"] * 2
    assert 0 < sum(boundary) < vector_bytes / 4


def test_joining_and_exporting_move_descriptors(
    finished: Path, catalogue: Path, tmp_path: Path, boundary: list[int]
) -> None:
    snapshot = Published(finished)
    config = load(write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w"))
    index = open_index(str(snapshot.folder("index")))
    join = join_neighbors.JoinConfig(
        tuple(range(index.layout.shards)),
        JoinTask(index.folder, config.join_spec(), str(tmp_path / "n"), "key"),
    )
    parts = snapshot.manifest("neighbors").parts
    export = export_neighbors.ExportConfig(
        str(snapshot.folder("neighbors")), parts, config.export_spec(), str(tmp_path / "e"), "key"
    )
    graphs: list[tuple[tuple[str, ...], Define, str, int]] = [
        (("JoinShard", "WidenShard"), lambda root: join_neighbors.define_pipeline(root, join),
         "join.pairs_out", 345),
        (("ExportPart",), lambda root: export_neighbors.define_pipeline(root, export),
         "export.pairs_out", 345),
    ]  # fmt: skip
    for labels, define, counter, pairs in graphs:
        boundary.clear()
        assert run_pipeline(define, RunnerSpec())[counter] == pairs
        assert 0 < max(boundary) < DESCRIPTOR_BYTES * len(parts)
        stages = fused_stages(define)
        # Every step of work is a stage of its own, so that it is spread over the workers.
        working = [stages_with(stages, label) for label in labels]
        assert all(len(found) == 1 for found in working)
        places = [stages.index(found[0]) for found in working]
        assert places == sorted(set(places))
        assert places[-1] == len(stages) - 1
        for stage in stages:
            steps = [name for name in stage if not ("/List" in f"/{name}" or "/Spread" in f"/{name}")]
            assert len(steps) == any(label in name for name in stage for label in labels), stage


def test_the_recording_sees_what_crosses_a_boundary(boundary: list[int]) -> None:
    def define(root: beam.Pipeline) -> None:
        (
            root
            | beam.Create([1])
            | beam.Map(lambda number: (number, bytes(PIXELS_BYTES)))
            | beam.GroupByKey()
        )

    run_pipeline(define, RunnerSpec())
    assert max(boundary) > PIXELS_BYTES
