"""Beam runners: the pinned in-process one, and any other by its own options.

Beam's own `DirectRunner` is a switch that may download and start another engine, so that machines
differ. In Kith `DirectRunner` always means `FnApiRunner`, in this process.
"""

import contextlib
import dataclasses
import errno
import glob
import itertools
import os
import re
from collections.abc import Callable
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, StandardOptions
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo
from apache_beam.runners.portability.portable_runner import JobServiceHandle
from apache_beam.runners.runner import PipelineState
from apache_beam.transforms.environments import Environment

from index_builder import errors
from index_builder.datasets import storage
from index_builder.errors import ConfigError, KithError
from transforms.counters import NAMESPACE_PREFIX

LOCAL_RUNNER = "DirectRunner"
Define = Callable[[beam.Pipeline], object]


@dataclasses.dataclass(frozen=True)
class RunnerSpec:
    """A runner by name, and the Beam options that were given after `--`."""

    name: str = LOCAL_RUNNER
    beam_options: tuple[str, ...] = ()

    def options(self) -> PipelineOptions:
        """Returns Beam's options; a `--runner` among them wins over the configuration."""
        options = PipelineOptions([f"--runner={self.name}", *self.beam_options])
        # Beam adds what stands on its own process's command line when it gets no flags; here it
        # always gets some.
        return options

    @property
    def is_local(self) -> bool:
        """Tells whether workers run in this process."""
        return bool(self.options().view_as(StandardOptions).runner == LOCAL_RUNNER)


def make_pipeline(spec: RunnerSpec) -> beam.Pipeline:
    """Returns an empty pipeline for a runner. Raises ConfigError for a runner Beam has not."""
    pipeline = _new_pipeline(spec)
    # A folder for steps in other languages, of which Kith has none; a run that is killed would
    # leave it behind.
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(pipeline.local_tempdir)
    return pipeline


def _new_pipeline(spec: RunnerSpec) -> beam.Pipeline:
    options = spec.options()
    if not spec.is_local:
        try:
            return beam.Pipeline(options=options)
        except (ValueError, ImportError, AttributeError) as error:
            name = options.view_as(StandardOptions).runner
            raise ConfigError(
                f"runner: Beam cannot make a pipeline for {name!r}: {error}. Set runner: "
                f"{LOCAL_RUNNER}, or a runner of Beam with the options that it needs after --."
            ) from error
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    provision = ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded))
    runner = FnApiRunner(_worker_environment(options), provision_info=provision)
    return beam.Pipeline(runner=runner, options=options)


def _worker_environment(options: PipelineOptions) -> Environment | None:
    """Returns where `--environment_type` puts the local runner's workers; None: in this process."""
    portable = options.view_as(PortableOptions)
    return Environment.from_options(portable) if portable.environment_type else None


def run_pipeline(define: Define, spec: RunnerSpec) -> dict[str, int]:
    """Runs one pipeline to its end and returns its counters, `stage.name` to value.

    Raises KithError, or the very kind of it that a worker raised, when the pipeline fails, and
    KeyboardInterrupt when somebody stopped it.
    """
    pipeline = make_pipeline(spec)
    define(pipeline)
    try:
        result = pipeline.run()
        state = result.wait_until_finish()
    except Exception as error:  # Every runner raises kinds of its own; _failure tells them apart.
        raise _failure(error) from error
    if state not in (None, PipelineState.DONE):
        raise KithError(
            f"The pipeline ended as {state}. Look at the runner's log; then run again: finished "
            "parts are kept."
        )
    return _counters(result)


def _counters(result: Any) -> dict[str, int]:
    totals: dict[str, int] = {}
    for metric in result.metrics().query()["counters"]:
        namespace = metric.key.metric.namespace
        if namespace.startswith(NAMESPACE_PREFIX):
            name = f"{namespace.removeprefix(NAMESPACE_PREFIX)}.{metric.key.metric.name}"
            totals[name] = totals.get(name, 0) + int(metric.result or 0)
    return dict(sorted(totals.items()))


_WHILE_RUNNING = re.compile(r" \[while running '[^']*'[^\]]*\]")
# How an exception of ours looks in the traceback text that a remote worker sends.
_REMOTE_ERROR = re.compile(
    r"index_builder\.errors\.(\w+): (.*?)(?= \[while running|\n\S+Error|\n\n|\nTraceback|\Z)",
    re.DOTALL,
)
# How an OSError looks then, and also with the in-process runner, which cannot rebuild it.
_SYSTEM_ERROR = re.compile(r"Error: (?P<text>\[Errno (?P<number>\d+)\] .*?)(?= \[while running|\n|\Z)")


def _failure(error: Exception) -> BaseException:
    """Returns what to raise for an exception that a pipeline ended with.

    The in-process runner passes a worker's exception on with a note of the step in its text; other
    runners send the text of a traceback, in which ours are found by name.
    """
    text = _WHILE_RUNNING.sub("", str(error))
    if text == KeyboardInterrupt.__name__:
        return KeyboardInterrupt()
    if isinstance(error, KithError):
        return type(error)(text)
    remote = _REMOTE_ERROR.search(str(error))
    if remote:
        kind = getattr(errors, remote.group(1), KithError)
        if isinstance(kind, type) and issubclass(kind, KithError):
            return kind(remote.group(2).strip())
    system = _SYSTEM_ERROR.search(str(error))
    if system is None:
        return error
    if int(system["number"]) == errno.ENOSPC:
        return KithError(
            f"No space left on the device: {system['text']}. Free some space, then run again: "
            "finished parts are kept."
        )
    return KithError(
        f"A worker was refused a file: {system['text']}. Check the path and its permissions, then run "
        "again: finished parts are kept."
    )


def describe_pipeline(define: Define) -> Any:
    """Returns the proto of the graph that `define` builds, for tests and dry runs."""
    pipeline = make_pipeline(RunnerSpec())
    define(pipeline)
    return pipeline.to_runner_api()


@contextlib.contextmanager
def workspace_lock(workspace: str) -> Any:
    """Holds a local workspace for one run at a time; the lock ends with the process.

    Raises KithError when another run holds it. A bucket has no such lock: there the swap of the
    pointer is conditional.
    """
    if storage.is_remote(workspace):
        yield
        return
    import fcntl

    os.makedirs(workspace, exist_ok=True)
    with open(os.path.join(workspace, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise KithError(
                f"Another run of Kith holds the workspace {workspace}. Wait for it to end, or set "
                "another workspace."
            ) from error
        _sweep(workspace)
        yield


def _sweep(workspace: str) -> None:
    """Removes the unfinished files of killed runs that no dataset's commit comes by.

    They are those of the pointer, of `runs/` and of what else is kept beside the datasets.
    """
    escaped = glob.escape(workspace)
    beside = [glob.glob(os.path.join(escaped, *names)) for names in (["*"], ["runs", "*"])]
    for folder in (workspace, *itertools.chain(*beside)):
        storage.sweep_temporary(folder)
