"""The gallery: example queries with their neighbours, by group and kind."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report.figures import score, shorten

# In the order of the page.
KINDS = {"best": "Best", "typical": "Typical", "worst": "Worst"}

_MAX_VALUE_CHARACTERS = 80
# The first of these metadata columns that an image has is its caption.
_CAPTION_COLUMNS = ("name", "title", "label")


@dataclass(frozen=True)
class Picture:
    """One image of the gallery as text and picture; `thumbnail` is a data URI or None."""

    image_id: str
    caption: str
    columns: Sequence[tuple[str, str]]
    thumbnail: str | None
    score: str = ""
    right: bool = False

    @property
    def details(self) -> str:
        """Everything known about the image, one column a line."""
        return "\n".join([self.image_id, *(f"{name}: {value}" for name, value in self.columns)])

    @property
    def alt(self) -> str:
        """What a reader who does not see the picture hears."""
        parts = [self.caption]
        if self.score:
            parts.append(f"score {self.score}")
        if self.right:
            parts.append("right answer")
        return ", ".join(parts)


@dataclass(frozen=True)
class Example:
    """One query and its neighbours, best first."""

    query: Picture
    neighbors: Sequence[Picture]


@dataclass(frozen=True)
class GalleryGroup:
    """The examples of one group by kind, in the order of KINDS; kinds without any are absent."""

    name: str
    kinds: Mapping[str, Sequence[Example]]


# How the group of images without a value is named, and the only one where there are no groups.
UNGROUPED = "Without a group"


def arrange_gallery(
    examples: Iterable[Mapping[str, Any]], thumbnails: Mapping[str, str]
) -> list[GalleryGroup]:
    """The examples by group, in the order of first appearance, and in it by kind, best first.

    Raises:
        ValueError: an example's kind is none of KINDS.
    """
    by_group: dict[str, dict[str, list[Example]]] = {}
    for example in examples:
        group, kind = example.get("group"), str(example.get("kind"))
        if kind not in KINDS:
            raise ValueError(f"The kind of an example is {kind!r}; wanted one of {list(KINDS)}.")
        kinds = by_group.setdefault(UNGROUPED if group is None else str(group), {})
        kinds.setdefault(kind, []).append(
            Example(
                query=_picture(example["query"], thumbnails),
                neighbors=[_picture(neighbor, thumbnails) for neighbor in example["neighbors"]],
            )
        )
    return [
        GalleryGroup(name, {kind: kinds[kind] for kind in KINDS if kind in kinds})
        for name, kinds in by_group.items()
    ]


def _picture(image: Mapping[str, Any], thumbnails: Mapping[str, str]) -> Picture:
    image_id = str(image["image_id"])
    columns = {
        str(name): shorten(str(value), _MAX_VALUE_CHARACTERS)
        for name, value in (image.get("columns") or {}).items()
        if value is not None and value != ""
    }
    uri = thumbnails.get(image_id)
    return Picture(
        image_id=image_id,
        caption=next((columns[name] for name in _CAPTION_COLUMNS if name in columns), image_id),
        columns=[item for item in columns.items() if item[0] not in _CAPTION_COLUMNS],
        thumbnail=uri if is_picture(uri) else None,
        score=score(image["score"]) if "score" in image else "",
        right=image.get("right") is True,
    )


def is_picture(uri: str | None) -> bool:
    """Whether a thumbnail is a picture inside the page, not a reference to something outside."""
    return uri is not None and uri.startswith("data:image/")
