"""The metrics by which neighbours are ranked."""

import enum


class Metric(enum.StrEnum):
    """How two vectors are compared; a higher score is nearer for all three.

    cosine: the cosine of the angle. euclidean: minus the squared distance, in the units of the
    embeddings. inner_product: the dot product, in the same units.
    """

    COSINE = "cosine"
    EUCLIDEAN = "euclidean"
    INNER_PRODUCT = "inner_product"

    @property
    def code(self) -> int:
        """The metric's number, 0, 1 or 2 in the order above, for compiled kernels."""
        return _CODES[self]

    @property
    def is_scaled(self) -> bool:
        """Whether lengths count, so that the index keeps a power-of-two scale of its vectors."""
        return self is not Metric.COSINE


_CODES = {metric: code for code, metric in enumerate(Metric)}
