"""The step of a build that chooses nprobe: on a sample of queries, in tasks a part, and only once."""

import dataclasses
from typing import Any

import pyarrow as pa

from index_builder.datasets import manifests
from index_builder.datasets.manifests import Part
from index_builder.index.method_cost import LEAST_GAIN
from index_builder.index.spec import ResolvedSpec
from index_builder.index.training import TrainedIndex
from index_builder.recall import calibration
from index_builder.recall.calibration import CalibrationSpec
from index_builder.recall.query_sample import choose_queries
from index_builder.steps import plan
from index_builder.steps.build_spec import BuildSpec

# The marker of an nprobe that was chosen.
_CALIBRATED = "calibrated"


def calibrates(spec: BuildSpec) -> bool:
    """Tells whether nprobe has to be chosen, and no earlier attempt did."""
    wanted = spec.calibration is not None and spec.retry is None
    return wanted and manifests.finished_part(spec.index_folder, _CALIBRATED, spec.key) is None


def draw_queries(spec: BuildSpec, number: int) -> pa.Table:
    """Returns what one part of the embeddings has for the sample that nprobe is chosen on."""
    assert spec.calibration is not None
    return calibration.draw_queries(spec.corpus, number, spec.calibration, spec.calibration_sample)


def add_excluded(spec: BuildSpec, queries: pa.Table) -> pa.Table:
    """Returns that sample with the pairs that it excludes."""
    assert spec.calibration is not None
    return calibration.add_excluded(queries, spec.calibration)


def search_part(spec: BuildSpec, number: int, queries: pa.Table, trained: TrainedIndex) -> pa.Table:
    """Finds the exact neighbours of the sample in one part of the embeddings."""
    assert spec.calibration is not None
    return calibration.search_part(spec.corpus, number, queries, spec.calibration, trained)


def choose_nprobe(spec: BuildSpec, queries: pa.Table, found: pa.Table, trained: TrainedIndex) -> None:
    """Chooses nprobe from the sample and its exact neighbours, and keeps it.

    Then it is known how many rows are looked through, and so whether codes are faster. Where they are,
    lists may miss half of what the promise lets a join miss: codes miss some, too.
    """
    assert spec.calibration is not None
    figures = _calibrated(spec, spec.calibration, queries, found, trained)
    if spec.index.may_have_codes:
        index, promise = spec.index, spec.calibration.promise
        aim = (1 + promise.target) / 2
        stricter = dataclasses.replace(promise, target=aim)
        aimed = dataclasses.replace(spec.calibration, promise=stricter)
        by_codes = _calibrated(spec, aimed, queries, found, trained)
        nprobes = int(figures["nprobe"]), int(by_codes["nprobe"])
        gain = index.request.gain_of_codes(
            index.rows, trained.dim, trained.nlist, *nprobes, index.goal.k
        )
        with_codes = index.has_codes or gain >= LEAST_GAIN
        if with_codes:
            figures = by_codes | {"target": promise.target, "target_of_lists": aim}
        figures |= {
            "gain_of_codes": round(gain, 3),
            "refine": index.request.refine if with_codes else None,
        }
    manifests.mark_part(spec.index_folder, Part(_CALIBRATED, spec.key, 0, (), figures))


def _calibrated(
    spec: BuildSpec, wanted: CalibrationSpec, queries: pa.Table, found: pa.Table, trained: TrainedIndex
) -> dict[str, Any]:
    return calibration.calibrate(spec.corpus, queries, found, wanted, spec.calibration_sample, trained)


def calibrate(spec: BuildSpec, trained: TrainedIndex) -> None:
    """Chooses nprobe where that is asked for, in a plain loop over the parts."""
    if not calibrates(spec) or spec.calibration is None:
        return
    numbers = range(len(spec.embeddings_parts))
    queries = choose_queries((draw_queries(spec, n) for n in numbers), spec.calibration_sample)
    queries = add_excluded(spec, queries)
    found = calibration.merge_found(
        (search_part(spec, n, queries, trained) for n in numbers), spec.corpus, spec.calibration
    )
    choose_nprobe(spec, queries, found, trained)


def settled_calibration(spec: BuildSpec) -> dict[str, Any] | None:
    """Returns the figures by which nprobe was chosen, or None where it was not."""
    if spec.retry is not None:
        return spec.retry.calibration
    if spec.calibration is None:
        return None
    part = manifests.finished_part(spec.index_folder, _CALIBRATED, spec.key)
    assert part is not None, "parts are assigned after calibration"
    return part.properties


def effective_nprobe(spec: BuildSpec, trained: TrainedIndex) -> int:
    """Returns nprobe as given or chosen, no more than the lists that training left."""
    return _nprobe(spec, trained.nlist)


def _nprobe(spec: BuildSpec, nlist: int) -> int:
    wanted = spec.index.nprobe
    figures = settled_calibration(spec)
    if spec.retry is not None:
        wanted = spec.retry.nprobe
    elif figures is not None:
        wanted = int(figures["nprobe"])
    return min(wanted, nlist)


def settled_spec(spec: BuildSpec, nlist: int) -> ResolvedSpec:
    """Returns what is indexed with the nprobe and refine that were chosen, and shards sized for them.

    `nlist`: the lists that training left.
    """
    if spec.calibration is None and spec.retry is None:
        return spec.index
    return spec.index.settled(_nprobe(spec, nlist), effective_refine(spec))


def check_memory(spec: BuildSpec, nlist: int) -> None:
    """Raises ConfigError where calibration chose an nprobe that the memory limit does not allow.

    That is before a part is assigned; a lower nprobe than was expected has been checked already.
    """
    settled = settled_spec(spec, nlist)
    if settled.nprobe <= spec.index.nprobe:
        return
    source = plan.describe_parts(spec.embeddings_folder, spec.embeddings_parts, spec.index.encoder_dim)
    plan.check_memory(settled, source, chosen=" by calibration")


def effective_refine(spec: BuildSpec) -> int | None:
    """Returns how many proposals by codes are scored for each neighbour; None without codes."""
    if spec.retry is not None:
        return spec.retry.refine
    figures = settled_calibration(spec) if spec.index.may_have_codes else None
    return spec.index.refine if figures is None else figures["refine"]
