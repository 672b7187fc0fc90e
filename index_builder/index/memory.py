"""The memory of a row in the task that joins it, and how memory is written for people."""

from index_builder.index.product_quantizer import code_bytes
from index_builder.index.proposals import room


def join_row_bytes(dim: int, nprobe: int, k: int, refine: int | None = None) -> int:
    """Memory that one row of a shard takes in the task that joins it, with a shard of equal size.

    As a query: its float16 code (mapped, most often), its probes twice, and k slots of score, row and
    id, which become Arrow columns at the end (105 bytes a slot were seen, with ids of 18 bytes); or,
    before there are slots and a corpus, 17 bytes a probe while Parquet decodes them (seen), if that is
    more. As a row of the corpus: its code, mapped, and about 100 bytes of id, norm and rule codes.
    With codes of 4 bits there are those, mapped and prepared, and room for its proposals.
    """
    plain = 2 * dim + max(8 * nprobe + 105 * k + 2 * dim + 100, 17 * nprobe)
    return plain if refine is None else plain + code_bytes(dim) + dim // 4 + 8 * room(refine * k)


def readable_memory(size: int) -> str:
    """Returns bytes of memory in GiB, or in MiB where they are less than one, with three digits."""
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    number = size / unit
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f} {name}"
