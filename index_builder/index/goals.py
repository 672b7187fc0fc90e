"""What an index is to reach, and the words for how: method, encoding, transform."""

import dataclasses
import enum
from typing import Any

_TRANSFORMS = ("none", "pca")


def require_least(spec: Any, name: str, least: int) -> None:
    """Raises ValueError when a number of a spec is given and below the least that makes sense."""
    got = getattr(spec, name)
    if got is not None and got < least:
        raise ValueError(
            f"{type(spec).__name__}.{name} is {got}, wanted at least {least}. Raise it, or leave it "
            "out."
        )


class Method(enum.StrEnum):
    """How the nearest rows of a query are found.

    exact: every list is searched. list_major: the nprobe nearest lists are, and rows are scored list
    by list. compressed: the rows of these lists are looked through by codes of 4 bits for four numbers,
    and the float16 vectors of the likeliest decide.
    """

    EXACT = "exact"
    LIST_MAJOR = "list_major"
    COMPRESSED = "compressed"


class Encoding(enum.StrEnum):
    """What of a row is looked at first: its vector, or a code of a sixteenth of its size."""

    FLOAT16 = "float16"
    COMPRESSED = "compressed"


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the choices aim at.

    k neighbours with a recall of at least `min_recall` (0: not stated), made by tasks that take at
    most `memory_limit_bytes` each. Raises ValueError.
    """

    k: int = 20
    min_recall: float = 0.0
    memory_limit_bytes: int = 8 << 30

    def __post_init__(self) -> None:
        require_least(self, "k", 1)
        require_least(self, "memory_limit_bytes", 1)
        if not 0 <= self.min_recall <= 1:
            raise ValueError(
                f"Goal.min_recall is {self.min_recall}, wanted 0 to 1. Give a share, such as 0.95."
            )


@dataclasses.dataclass(frozen=True)
class TransformSpec:
    """The index's linear transform: `none`, or `pca` to `dim` dimensions.

    `eigen_power` scales each component by its eigenvalue to that power before normalising, in the
    terms of FAISS's PCAMatrix: 0 keeps the plain PCA, -0.25 whitens by half, -0.5 in full. Raises
    ValueError.
    """

    kind: str = "none"
    dim: int = 256
    eigen_power: float = -0.25

    def __post_init__(self) -> None:
        require_least(self, "dim", 1)
        if self.kind not in _TRANSFORMS:
            raise ValueError(
                f"TransformSpec.kind is {self.kind!r}, wanted one of {', '.join(_TRANSFORMS)}. Correct "
                "it."
            )
