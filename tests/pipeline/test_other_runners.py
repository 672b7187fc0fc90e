"""The same graph elsewhere: fused stages, a portable runner with its own worker, a bucket."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from index_builder.errors import DatasetError
from pipelines import embed_images, join_neighbors
from pipelines.embed_plan import plan_embedding
from pipelines.nightly import run_nightly
from pipelines.runners import describe_pipeline
from tests.pipeline.small_catalogue import dataset_bytes, load, session, write_config
from transforms.encoders.engines.choice import DEFAULT_CHOICE


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on {port}")


def fused_stages(define) -> list[list[str]]:
    """Returns the steps of each fused stage that runs user code."""
    _, stages = FnApiRunner().create_stages(describe_pipeline(define))
    names = [[step.unique_name for step in stage.transforms] for stage in stages]
    return [steps for steps in names if any("Shard" in step for step in steps)]


def test_embedding_is_one_fused_step(catalogue: Path, tmp_path: Path) -> None:
    plan = plan_embedding(
        load(write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w")), DEFAULT_CHOICE
    )
    stages = fused_stages(lambda root: embed_images.define_pipeline(root, plan.graph))
    working = [steps for steps in stages if any(s.endswith("EmbedShard") for s in steps)]
    assert len(working) == 1
    # The other stages list and spread descriptors; all the work is in one, so no pixels travel.
    rest = [step for steps in stages if steps not in working for step in steps]
    assert all(step.startswith(("ListShards", "SpreadShards")) for step in rest)
    proto = describe_pipeline(lambda root: embed_images.define_pipeline(root, plan.graph))
    embed = [t for n, t in proto.components.transforms.items() if t.unique_name.endswith("EmbedShard")]
    assert len(embed) == 1
    import pickle

    assert max(len(pickle.dumps(task)) for task in plan.graph.tasks) < 1000


def test_joining_is_one_fused_step(tmp_path: Path) -> None:
    from index_builder.search.join import JoinSpec
    from index_builder.steps.joining import JoinTask

    graph = join_neighbors.JoinConfig((0, 1), JoinTask("index", JoinSpec(3), "neighbors", "key"))
    stages = fused_stages(lambda root: join_neighbors.define_pipeline(root, graph))
    assert len([s for s in stages if any(n.endswith("JoinShard") for n in s)]) == 1


@pytest.fixture(scope="module")
def portable() -> Iterator[tuple[str, ...]]:
    """Beam options for a job server in one process and a worker pool in another."""
    job, pool = free_port(), free_port()
    module = "apache_beam.runners.portability.local_job_service_main"
    worker = "apache_beam.runners.worker.worker_pool_main"
    # The pool starts its workers as `python`, whichever comes first on its path.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    quiet = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "env": os.environ | {"PATH": path},
    }
    processes = [
        subprocess.Popen([sys.executable, "-m", module, "--port", str(job)], **quiet),
        subprocess.Popen([sys.executable, "-m", worker, "--service_port", str(pool)], **quiet),
    ]
    try:
        wait_for(job, processes[0])
        wait_for(pool, processes[1])
        yield (
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{job}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{pool}",
        )
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.timeout(240)
def test_a_portable_runner_gives_the_same_bytes(
    finished: Path, catalogue: Path, tmp_path: Path, portable: tuple[str, ...]
) -> None:
    config = load(write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w"))
    result = run_nightly(config, session(*portable))
    assert dataset_bytes(tmp_path / "w") == dataset_bytes(finished)
    assert result.run["stages"]["embed"]["counters"]["embed.images_in"] == 72
    part = sorted((tmp_path / "w" / "embeddings").rglob("*.parquet"))[0]
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    with pytest.raises(DatasetError, match="does not match its checksum"):
        run_nightly(load(tmp_path / "c.yaml", "index.seed=5"), session(*portable))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A storage emulator with an empty bucket; yields its address."""
    port = free_port()
    folder = tmp_path_factory.mktemp("bucket")
    command = [
        sys.executable, "-c",
        "from gcp_storage_emulator.server import create_server; import time, sys;"
        f"s = create_server('127.0.0.1', {port}, in_memory=False, default_bucket='kith',"
        f" data_dir={str(folder)!r}); s.start(); time.sleep(600)",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(240)
def test_everything_in_a_bucket(finished: Path, catalogue: Path, emulator: str, tmp_path: Path) -> None:
    environment = os.environ | {"STORAGE_EMULATOR_HOST": emulator}
    config = write_config(tmp_path / "c.yaml", "gs://kith/data", "gs://kith/w")
    script = (
        "import sys, pathlib\n"
        "from index_builder.datasets import storage\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "for path in sorted(root.glob('catalog/*')) + sorted(root.glob('hard/*')):\n"
        "    storage.write_bytes('gs://kith/data/' + str(path.relative_to(root)), path.read_bytes())\n"
    )
    subprocess.run([sys.executable, "-c", script, str(catalogue)], env=environment, check=True)
    command = [sys.executable, "-m", "pipelines.cli", "nightly", "--config", str(config), "--json"]
    first = subprocess.run(command, env=environment, capture_output=True, timeout=150, check=False)
    assert first.returncode == 0, first.stderr.decode()[-2000:]
    run = json.loads(first.stdout)
    assert run["run"]["images"]["read"] == 72
    assert run["pointer_path"] == "gs://kith/w/current.json"
    copy = (
        "import sys, pathlib\n"
        "from index_builder.datasets import storage\n"
        "for path in storage.glob('gs://kith/w/**'):\n"
        "    target = pathlib.Path(sys.argv[1]) / path.removeprefix('gs://kith/w/')\n"
        "    target.parent.mkdir(parents=True, exist_ok=True)\n"
        "    target.write_bytes(storage.read_bytes(path))\n"
    )
    subprocess.run([sys.executable, "-c", copy, str(tmp_path / "w")], env=environment, check=True)
    assert dataset_bytes(tmp_path / "w") == dataset_bytes(finished)
    assert (tmp_path / "w" / run["report_path"].removeprefix("gs://kith/w/")).exists()
    second = subprocess.run(command, env=environment, capture_output=True, timeout=150, check=True)
    stages = json.loads(second.stdout)["run"]["stages"]
    assert {stage["state"] for stage in stages.values()} == {"unchanged"}
