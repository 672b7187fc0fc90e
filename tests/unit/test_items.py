"""Items whose images disagree on the capped column are found before the join."""

from pathlib import Path

import pytest

from index_builder.errors import ConfigError
from index_builder.index.spec import IndexSpec
from index_builder.rules.rules import JoinRules
from index_builder.search import items
from index_builder.search.items import check_items
from tests.index_fixtures import Catalogue, build_index, gaussian_catalogue
from tests.unit.rules_for_tests import several_images

CAPPED = JoinRules(max_per=(("brand", 2),))


def test_items_that_agree_pass_wherever_their_images_are(tmp_path: Path) -> None:
    index = build_index(tmp_path, several_images(60, 12), IndexSpec(nlist=6, shards=4))
    assert not index.single_images
    check_items(index, CAPPED)
    check_items(index, JoinRules(max_per=(("item_id", 2),)))


@pytest.mark.parametrize("other", [None, "b"])
@pytest.mark.parametrize("colliding", [False, True])
def test_a_torn_item_is_named(
    other: str | None, colliding: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = gaussian_catalogue(30, 12)
    brands: list[str | None] = ["a"] * 30
    brands[17] = other
    named = [f"item{row % 15}" for row in range(30)]
    index = build_index(
        tmp_path,
        Catalogue(base.vectors, base.image_ids, item_ids=named, brands=brands),
        IndexSpec(nlist=5, shards=3),
    )
    if colliding:
        # Items whose hashes meet are told apart by their ids.
        monkeypatch.setattr(
            items, "hash", lambda text: len(text) if "item" in text else hash(text), raising=False
        )
    with pytest.raises(ConfigError) as caught:
        check_items(index, CAPPED)
    values = " and ".join(sorted(["'a'", repr(other)]))
    assert str(caught.value) == (
        f"join.rules.max_per: in {index.folder} the images of 1 items have different values of "
        "'brand', wanted one value an item, or the best cannot be kept exactly; the first: 'item2' has "
        f"{values}. Correct the metadata, or cap another column."
    )
    check_items(index, JoinRules())


def test_values_whose_hashes_are_equal_as_numbers(tmp_path: Path) -> None:
    base = gaussian_catalogue(4, 12)
    catalogue = Catalogue(
        base.vectors, base.image_ids, item_ids=["i", "j", "j", "j"], sizes=[7, -1, -2, -1]
    )
    index = build_index(tmp_path, catalogue, IndexSpec(nlist=1, shards=1))
    with pytest.raises(ConfigError, match="'j' has -1 and -2"):
        check_items(index, JoinRules(max_per=(("size", 2),)))


def test_groups_that_part_an_item_have_a_remedy_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = gaussian_catalogue(4, 12)
    catalogue = Catalogue(
        base.vectors, base.image_ids, item_ids=["i", "j", "j", "j"], brands=["g", "h", "h", "g"]
    )
    index = build_index(tmp_path, catalogue, IndexSpec(nlist=1, shards=1))
    monkeypatch.setattr(items, "COLUMNS", ("brand",))
    with pytest.raises(ConfigError, match=r"'j' has 'g' and 'h'\. Keep one .*is_representative"):
        check_items(index, CAPPED)


def test_items_of_one_image_need_no_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build_index(tmp_path, gaussian_catalogue(30, 12), IndexSpec(nlist=5, shards=2))
    assert index.single_images
    monkeypatch.setattr(items, "read_shard_table", None)
    check_items(index, CAPPED)
