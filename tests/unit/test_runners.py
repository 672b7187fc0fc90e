"""Running pipelines: errors that stay readable, counters that come back, one run at a time."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from index_builder.errors import ConfigError, DatasetError, GateError, KithError
from pipelines.runners import (
    RunnerSpec,
    describe_pipeline,
    make_pipeline,
    run_pipeline,
    workspace_lock,
)
from transforms.counters import count, timed

MESSAGE = "part-00003 of /data/index is damaged [3 of 4 rows]. Delete it:\nrun the stage again."


class Raise(beam.DoFn):
    """Raises an error for each element."""

    def __init__(self, make: Callable[[], BaseException]) -> None:
        self._make = make

    def process(self, element: int) -> Iterator[int]:
        raise self._make()


def run_raising(make: Callable[[], BaseException]) -> None:
    def define(root: beam.Pipeline) -> None:
        _ = root | beam.Create([1]) | beam.Reshuffle() | "Break [it]" >> beam.ParDo(Raise(make))

    run_pipeline(define, RunnerSpec())


@pytest.mark.parametrize("kind", [DatasetError, GateError, ConfigError, KithError])
def test_an_error_of_ours_reaches_the_driver_as_it_was(kind: type[KithError]) -> None:
    with pytest.raises(KithError) as caught:
        run_raising(lambda: kind(MESSAGE))
    assert type(caught.value) is kind
    assert str(caught.value) == MESSAGE
    assert caught.value.exit_status == kind.exit_status


def test_a_full_disk_is_told_as_one() -> None:
    with pytest.raises(KithError) as caught:
        run_raising(lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/part"))
    message = str(caught.value)
    assert message.startswith("No space left on the device: ")
    assert message.endswith("Free some space, then run again: finished parts are kept.")
    assert "while running" not in message


def test_a_file_that_vanished_is_told_without_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(KithError) as caught:
        run_raising(lambda: FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/data/a b"))
    assert str(caught.value) == (
        "A worker was refused a file: [Errno 2] No such file or directory: '/data/a b'. Check the path "
        "and its permissions, then run again: finished parts are kept."
    )


def test_an_interrupt_in_the_middle_of_a_step_is_one() -> None:
    # Beam makes a RuntimeError of it.
    with pytest.raises(KeyboardInterrupt):
        run_raising(KeyboardInterrupt)


def test_a_defect_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError, match="division"):
        run_raising(lambda: ZeroDivisionError("division"))


def test_an_error_in_the_text_of_a_remote_traceback_is_found() -> None:
    remote = (
        "Traceback (most recent call last):\n"
        '  File "worker.py", line 7, in process\n'
        f"index_builder.errors.DatasetError: {MESSAGE} [while running 'JoinShard-ptransform-7']\n"
    )
    with pytest.raises(DatasetError) as caught:
        run_raising(lambda: RuntimeError(remote))
    assert str(caught.value) == MESSAGE


def test_a_graph_that_cannot_be_built_fails_before_it_runs() -> None:
    def define(root: beam.Pipeline) -> None:
        raise DatasetError("no parts")

    with pytest.raises(DatasetError, match="no parts"):
        run_pipeline(define, RunnerSpec())


class Count(beam.DoFn):
    """Counts as every stage does."""

    def process(self, element: int) -> Iterator[int]:
        with timed("embed"):
            count("embed", "images_in", element)
        count("join", "queries", 1)
        beam.metrics.Metrics.counter("someone.else", "images_in").inc(1)
        yield element


def test_counters_come_back_summed_by_stage() -> None:
    def define(root: beam.Pipeline) -> None:
        numbers = root | beam.Create([1, 2, 3]) | beam.Reshuffle()
        _ = numbers | "First" >> beam.ParDo(Count())
        _ = numbers | "Second" >> beam.ParDo(Count())

    counters = run_pipeline(define, RunnerSpec())
    assert list(counters) == ["embed.images_in", "embed.milliseconds", "join.queries"]
    assert counters["embed.images_in"] == 12
    assert counters["join.queries"] == 6
    assert 0 <= counters["embed.milliseconds"] < 1000


def test_a_pipeline_without_counters_has_none() -> None:
    assert run_pipeline(lambda root: root | beam.Create([1]), RunnerSpec()) == {}


def test_the_local_runner_is_pinned_and_runs_in_this_process(tmp_path: Path) -> None:
    assert isinstance(make_pipeline(RunnerSpec()).runner, FnApiRunner)
    path = tmp_path / "pid"

    def define(root: beam.Pipeline) -> None:
        _ = root | beam.Create([path]) | beam.Map(lambda p: p.write_text(str(os.getpid())))

    run_pipeline(define, RunnerSpec())
    assert path.read_text() == str(os.getpid())


def test_options_after_the_dashes_reach_the_pipeline() -> None:
    spec = RunnerSpec(beam_options=("--job_name=nightly-7", "--temp_location=gs://b/tmp"))
    options = make_pipeline(spec).options.get_all_options(drop_default=True)
    assert options["job_name"] == "nightly-7"
    assert options["temp_location"] == "gs://b/tmp"


def test_a_runner_given_after_the_dashes_wins() -> None:
    assert RunnerSpec().is_local
    assert not RunnerSpec("FlinkRunner").is_local
    assert not RunnerSpec("DirectRunner", ("--runner=FlinkRunner",)).is_local
    assert RunnerSpec("FlinkRunner", ("--runner=DirectRunner",)).is_local


@pytest.mark.parametrize(
    "spec", [RunnerSpec("FlonkRunner"), RunnerSpec(beam_options=("--runner=FlonkRunner",))]
)
def test_an_unknown_runner_is_refused(spec: RunnerSpec) -> None:
    with pytest.raises(ConfigError) as caught:
        make_pipeline(spec)
    message = str(caught.value)
    assert message.startswith("runner: Beam cannot make a pipeline for 'FlonkRunner': ")
    assert message.endswith(
        ". Set runner: DirectRunner, or a runner of Beam with the options that it needs after --."
    )


def test_the_graph_can_be_looked_at_without_running_it() -> None:
    proto = describe_pipeline(
        lambda root: root | "List" >> beam.Create([1]) | "Break" >> beam.ParDo(Raise(KithError))
    )
    names = {transform.unique_name for transform in proto.components.transforms.values()}
    assert {"List", "Break"} <= names


HOLD = (
    "import sys, time\n"
    "from pipelines.runners import workspace_lock\n"
    "with workspace_lock(sys.argv[1]):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


def test_a_workspace_belongs_to_one_run_until_its_process_ends(tmp_path: Path) -> None:
    workspace = str(tmp_path / "new" / "workspace")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, workspace], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(KithError) as caught, workspace_lock(workspace):
            pass
        assert str(caught.value) == (
            f"Another run of Kith holds the workspace {workspace}. Wait for it to end, or set another "
            "workspace."
        )
        with workspace_lock(str(tmp_path / "other")):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        with workspace_lock(workspace):
            pass
    finally:
        holder.kill()
        holder.wait(10)
        assert holder.stdout is not None
        holder.stdout.close()


def test_a_lock_ends_with_its_block_also_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(GateError), workspace_lock(str(tmp_path)):
        raise GateError("refused")
    with workspace_lock(str(tmp_path)), pytest.raises(KithError, match="Another run"):
        # flock belongs to the open file, so a second run in this very process is refused as well.
        with workspace_lock(str(tmp_path)):
            pass
    with workspace_lock(str(tmp_path)):
        pass


def test_a_bucket_has_no_lock() -> None:
    with workspace_lock("gs://bucket/w"), workspace_lock("gs://bucket/w"):
        pass
