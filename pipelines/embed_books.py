"""The books of the embed stage, and the gates on them."""

import dataclasses
from collections import Counter
from collections.abc import Collection

from index_builder.datasets.manifests import Manifest
from index_builder.errors import GateError, KithError

_NAMED_SHARDS = 3


@dataclasses.dataclass(frozen=True)
class Books:
    """Where every image went: read = embedded + reused + failed, exactly.

    `embedded` were encoded for this dataset by this run or the one it resumed; the vectors of
    `reused` were taken over, from an earlier dataset or from an equal picture of the same shard.
    """

    read: int
    embedded: int
    reused: int
    failed: int
    failed_by_reason: dict[str, int]
    unreadable_regions: int

    def check(self) -> None:
        """Raises GateError when the books do not balance."""
        if self.read != self.embedded + self.reused + self.failed:
            raise GateError(
                f"The books do not balance: {self.read} images read, {self.embedded} embedded, "
                f"{self.reused} reused, {self.failed} failed. Nothing was published; this is a "
                "defect of Kith."
            )


def add_up(made: Manifest, failed: Manifest, carried_over: Collection[str] | None) -> Books:
    """Adds up the books of all parts; what was counted is held against the rows on disk.

    `carried_over` names the parts that this run took over whole; None when that is all of them.
    """
    reasons: Counter[str] = Counter()
    read = embedded = reused = 0
    for part in made.parts:
        read += part.properties["images_read"]
        reasons.update(part.properties["images_failed"])
        if carried_over is None or part.name in carried_over:
            reused += part.rows
        else:
            embedded += part.rows - part.properties["images_reused"]
            reused += part.properties["images_reused"]
    regions = sum(part.properties["unreadable_regions"] for part in made.parts)
    reasons_in_order = dict(sorted(reasons.items()))
    return Books(read, embedded, reused, failed.rows - regions, reasons_in_order, regions)


def refuse_emptiness(books: Books, failures_folder: str) -> None:
    """Raises KithError for a catalogue without images, or without a single good one."""
    if books.read == 0:
        regions = f" ({books.unreadable_regions} unreadable regions)" * bool(books.unreadable_regions)
        raise KithError(
            f"The catalogue is empty: no image was found in its files{regions}. Check images.sources; "
            f"what could not be read is listed in {failures_folder}."
        )
    if books.failed == books.read:
        raise KithError(
            f"Every one of the {books.read} images failed ({_reasons(books)}), wanted at least one "
            f"embedding. Look at {failures_folder}; the reasons are explained in docs/images.md."
        )


def check_failed_fractions(
    books: Books, made: Manifest, overall: float, per_shard: float, failures_folder: str
) -> None:
    """Raises GateError where too large a part of all images, or of one shard's, failed."""
    if books.failed > overall * books.read:
        raise GateError(
            f"{books.failed} of {books.read} images failed ({books.failed / books.read:.2%}: "
            f"{_reasons(books)}), wanted at most {overall:.2%}. Nothing was published. Look at "
            f"{failures_folder}; then mend the images, or raise embeddings.max_failed_fraction."
        )
    bad = []
    for part in made.parts:
        read, failed = part.properties["images_read"], sum(part.properties["images_failed"].values())
        if failed > per_shard * read:
            bad.append((failed / read, f"{part.properties['source_shard']} {failed} of {read}"))
    if bad:
        bad.sort(key=lambda found: (-found[0], found[1]))
        worst = ", ".join(text for _, text in bad[:_NAMED_SHARDS])
        more = f" and {len(bad) - _NAMED_SHARDS} more" * (len(bad) > _NAMED_SHARDS)
        raise GateError(
            f"Too many images of {len(bad)} input shards failed: {worst}{more}; wanted at most "
            f"{per_shard:.2%} of each. Nothing was published. Look at {failures_folder}; then mend the "
            "images, or raise embeddings.max_failed_fraction_per_shard."
        )


def _reasons(books: Books) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in books.failed_by_reason.items())
