import base64
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.report import figures
from pipelines.report.page import MAX_FAILURES_SHOWN, render_page, thumbnail

VOID = {"br", "col", "hr", "img", "input", "link", "meta"}
HOSTILE = "</style></script><script>alert('x')</script>\" onerror=\"alert(1)' & \ud800\x00"


class Page(HTMLParser):
    """Checks that tags balance and keeps what the assertions ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.extend(data.split())

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def having(self, **wanted: str) -> list[dict[str, str | None]]:
        """The attributes of the tags whose class (a word of it) or other attributes are these."""

        def matches(attrs: dict[str, str | None]) -> bool:
            return all(value in (attrs.get(key) or "").split() for key, value in wanted.items())

        return [a for _, a in self.tags if matches({**a, "class_": a.get("class")})]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def references(self) -> Iterator[str]:
        names = ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background")
        for _, attrs in self.tags:
            yield from (attrs[name] or "" for name in names if name in attrs)


def jpeg(width: int = 300, height: int = 200) -> bytes:
    encoded = io.BytesIO()
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (200, 30, 30)
    Image.fromarray(pixels).save(encoded, "JPEG")
    return encoded.getvalue()


def full_run(**changes: Any) -> dict[str, Any]:
    recall = {"estimate": 0.998, "lower_bound": 0.994, "queries": 1000, "rows": 1898, "k": 10}
    return {
        "schema_version": 1,
        "run_id": "20261123T091500Z",
        "status": "published",
        "started_at": "2026-11-23T10:15:00+01:00",
        "ended_at": "2026-11-23T10:15:41+01:00",
        "seconds": 41.2,
        "kith_version": "0.1.0",
        "versions": {"tensorflow": "2.16.2"},
        "workspace": "gs://bucket/kith",
        "config": {"index": {"nlist": "auto"}, "join": {"k": 10}},
        "images": {
            "read": 1902,
            "embedded": 1800,
            "reused": 98,
            "failed": 4,
            "failed_by_reason": {"truncated": 3, "empty": 1},
            "unreadable_regions": 0,
            "per_second": 151.0,
        },
        "encoder": {"name": "efficientnet_lite0", "dim": 1280, "pooling": "avg"},
        "index": {"shards": 4, "nlist": 48, "nprobe": 28, "rows": 1898, "fan_out": 3.2},
        "join": {
            "k": 10,
            "queries": 1898,
            "pairs": 18980,
            "filled": 1898,
            "rules": {"same": [], "different": ["brand"]},
        },
        "recall": {**recall, "seed": 0, "minimum": 0.95},
        "truth": {
            "column": "object_id",
            "queries": 1890,
            "hit_rate_at_1": 0.493,
            "hit_rate_at_k": 0.83,
            "k": 10,
        },
        "export": {"queries": 1898, "pairs": 18970, "files": ["export/part-00000.parquet"]},
        "stages": {
            "embed": {"seconds": 24.1, "state": "made", "path": "embeddings"},
            "build": {"seconds": 3.2, "state": "resumed", "path": "index"},
            "join": {"seconds": 0.31, "state": "unchanged", "path": "neighbors"},
        },
        "fingerprints": {"embeddings": "9d" * 32},
        **changes,
    }


def example(group: str | None, kind: str, query: str, right: bool | None = None) -> dict[str, Any]:
    neighbors: list[dict[str, Any]] = [
        {"image_id": f"{query}-{n}", "score": 0.9 - n / 100, "columns": {}, "right": right}
        for n in range(10)
    ]
    columns = {"name": f"name of {query}", "maker": "noto"}
    return {
        "group": group,
        "kind": kind,
        "query": {"image_id": query, "columns": columns},
        "neighbors": neighbors,
    }


def full_evaluation(**changes: Any) -> dict[str, Any]:
    run = full_run()
    return {
        "recall": run["recall"],
        "truth": run["truth"],
        "group_by": "category",
        "groups": [
            {
                "name": "Food & Drink",
                "queries": 381,
                "hit_rate_at_1": 0.5,
                "hit_rate_at_k": 0.8125,
                "mean_top_score": 0.714,
            }
        ],
        "scores": {
            "edges": [n / 20 for n in range(21)],
            "counts": [0] * 10 + [5, 40, 55] + [0] * 7,
        },
        "examples": [
            example("Food & Drink", "worst", "pear"),
            example("Food & Drink", "best", "apple", right=True),
            example("Objects", "typical", "hammer", right=False),
        ],
        **changes,
    }


def failure(reason: str, image_id: str | None = "broken-1", **changes: Any) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "source_shard": "catalog/images-00000",
        "row": 3,
        "stage": "decode",
        "reason": reason,
        "error": f"why {image_id}",
        **changes,
    }


def test_every_figure_of_the_run_is_on_the_page() -> None:
    page = Page(render_page(full_run(), full_evaluation(), [failure("truncated")], {}))
    for figure in (
        "1,898 images and their 10 nearest neighbours",
        "23 November 2026, 09:15 UTC",
        "published",
        "1,902 images read = 1,800 embedded + 98 reused + 4 failed The books balance",
        "Recall @10 99.8% at least 99.4% (95% bound), minimum 95.0%",
        "Same-object hit rate 83.0% same object_id in the first 10; 49.3% in first place",
        "Pairs 18,970 10 a query",
        "Images a second 151 efficientnet_lite0, 1280 numbers",
        "Whole run 41.2 s 4 index shards, 48 lists",
        "embed made 24.1 s build resumed 3.2 s join unchanged 0.31 s",
        "100 queries; scores from 0.50 to 0.65, the median between 0.60 and 0.65",
        "Food & Drink 381 50.0% 81.2% 0.71",
        "embeddings " + "9d" * 32,
        "rules.same none rules.different brand",
        "tensorflow 2.16.2",
        "export/part-00000.parquet",
        "nlist: auto",
    ):
        assert figure in page.text


def test_the_stage_bars_share_one_time_line() -> None:
    html = render_page(full_run(seconds=48.2), full_evaluation(), [], {})
    assert 'class="made" style="margin-left:0.000%;width:50.000%"' in html
    assert 'class="resumed" style="margin-left:50.000%;width:6.639%"' in html
    assert 'class="unchanged" style="margin-left:56.639%;width:0.643%"' in html


def test_the_histogram_leaves_out_the_empty_ends_and_scales_to_the_fullest_bin() -> None:
    page = Page(render_page(full_run(), full_evaluation(), [], {}))
    columns = page.having(class_="column")
    assert [float(bar["height"] or 0) for bar in columns] == pytest.approx([14.18, 113.45, 156.0])


@pytest.mark.parametrize(
    ("estimate", "lower_bound", "minimum", "tone"),
    [
        (0.99, 0.97, 0.95, "good"),
        (0.96, 0.94, 0.95, "warn"),
        (0.93, 0.91, 0.95, "bad"),
        (0.93, 0.91, None, "neutral"),
    ],
)
def test_recall_is_held_against_its_minimum(
    estimate: float, lower_bound: float, minimum: float | None, tone: str
) -> None:
    recall = {"estimate": estimate, "lower_bound": lower_bound, "minimum": minimum, "k": 5}
    page = Page(render_page(full_run(recall=recall), full_evaluation(recall=recall), [], {}))
    assert page.having(class_="tile")[0]["class"] == f"tile {tone}"
    assert bool(page.having(class_="scale")) == (minimum is not None)


def test_the_certificate_is_shown_with_its_attempts_and_values() -> None:
    values = [
        {"value": "shoes", "queries": 700, "rows": 1300, "estimate": 0.981, "lower_bound": 0.969},
        {"value": None, "queries": 300, "rows": 598, "estimate": 0.9, "lower_bound": 0.871},
    ]
    recall = {
        **full_run()["recall"],
        "target": 0.95, "confidence": 0.9875, "nprobe": 42, "nlist": 64, "attempt": 2,
        "by": "kind", "values": values, "encoder_recall": 0.874, "encoder_queries": 250,
    }  # fmt: skip
    attempts = [{"nprobe": 28, "lower_bound": 0.941}, {"nprobe": 42, "lower_bound": 0.994}]
    run = full_run(recall=recall, attempts=attempts)
    text = Page(render_page(run, full_evaluation(recall=recall), [], {})).text
    for piece in (
        "Recall certificate", "At least (98.75%)", "42 of 64", "1,000 of 1,898", "98.75% bound",
        "In the encoder's space (250 queries)", "87.4%", "94.1% with 28, 99.4% with 42",
        "shoes", "98.1%", "96.9%", "87.1%",
    ):  # fmt: skip
        assert piece in text, piece
    without = Page(render_page(full_run(), full_evaluation(), [], {})).text
    assert "Recall certificate" not in without


def test_recall_is_never_rounded_up_to_all() -> None:
    recall = {"estimate": 0.9999, "lower_bound": 1.0, "minimum": 0.95, "k": 10}
    text = Page(render_page(full_run(recall=recall), full_evaluation(recall=recall), [], {})).text
    assert "Recall @10 >99.9% at least 100% (95% bound)" in text


def test_books_that_do_not_balance_are_said_so() -> None:
    images = {"read": 10, "embedded": 7, "reused": 0, "failed": 2, "unreadable_regions": 1}
    page = Page(render_page(full_run(images=images, status="refused"), full_evaluation(), [], {}))
    assert "10 images read ≠ 7 embedded" in page.text
    assert "The books do not balance" in page.text
    assert "The books balance" not in page.text
    assert "This run was not published" in page.text
    assert "1 unreadable region of a container was skipped" in page.text


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"run_id": "r", "status": "failed", "images": None, "join": None, "recall": None},
        full_run(truth=None, recall=None, stages={}, export=None, index=None, encoder=None),
        full_run(started_at=None, seconds=None, config=None, versions=None),
        full_run(seconds=0, images={"read": 0, "embedded": 0, "reused": 0, "failed": 0}),
    ],
)
@pytest.mark.parametrize(
    "evaluation",
    [
        {},
        {
            "recall": None,
            "truth": None,
            "group_by": None,
            "groups": [],
            "scores": {"edges": [0.0, 0.5, 1.0], "counts": [0, 0]},
            "examples": [],
        },
    ],
)
def test_a_run_that_stopped_early_still_has_a_page(
    run: dict[str, Any], evaluation: dict[str, Any]
) -> None:
    page = Page(render_page(run, evaluation, [], {}))
    assert "Failures" in page.text
    assert not page.having(class_="gallery")
    assert not page.having(class_="histogram")
    assert not page.having(class_="groups")
    assert "None " not in page.text.replace("None: every image", "")


def test_without_truth_nothing_speaks_of_right_answers() -> None:
    groups = [{"name": "all", "queries": 3, "hit_rate_at_1": None, "mean_top_score": 0.5}]
    evaluation = full_evaluation(truth=None, groups=groups, examples=[example(None, "best", "q")])
    page = Page(render_page(full_run(truth=None), evaluation, [], {}))
    assert "hit rate" not in page.text.lower()
    assert "right answer" not in page.text
    assert not page.having(class_="right")
    assert "Without a group" in page.text
    assert not page.having(name="group")


def test_no_failures_and_failures_without_rows() -> None:
    images = {"read": 5, "embedded": 5, "reused": 0, "failed": 0}
    text = Page(render_page(full_run(images=images), full_evaluation(), [], {})).text
    assert "None: every image that was read has a vector." in text
    text = Page(render_page(full_run(), full_evaluation(), [], {})).text
    assert "4 images could not be embedded; 0 of them are shown" in text
    assert "truncated 3 0 shown empty 1 0 shown" in text
    images = full_run()["images"] | {"failed_by_reason": {}}
    text = Page(render_page(full_run(images=images), full_evaluation(), [], {})).text
    assert "4 images could not be embedded; the failures dataset has the reasons." in text


def test_right_answers_are_marked_by_more_than_colour() -> None:
    uri = thumbnail(jpeg(), 10**6)
    assert uri is not None
    page = Page(render_page(full_run(), full_evaluation(), [], {"apple-0": uri}))
    assert len(page.having(class_="right")) == 10
    [picture] = page.all("img")
    assert picture["src"] == uri
    assert picture["alt"] == "apple-0, score 0.90, right answer"
    checks = page.having(class_="check")
    assert len(checks) == 12  # The ten answers, the legend and the books.


def test_an_image_without_a_thumbnail_shows_its_id() -> None:
    thumbnails = {"hammer": "javascript:alert(1)", "hammer-1": "https://example.org/a.png"}
    html = render_page(full_run(), full_evaluation(), [], thumbnails)
    page = Page(html)
    assert not page.all("img")
    assert len(page.having(class_="placeholder")) == 3 * 11
    labels = {attrs["aria-label"] for attrs in page.having(class_="placeholder")}
    assert "Query: name of hammer, no picture" in labels
    assert "hammer-1, score 0.89, no picture" in labels
    assert "javascript:" not in html
    assert "example.org" not in html


def test_an_example_of_an_unknown_kind_is_refused() -> None:
    evaluation = full_evaluation(examples=[example(None, "median", "q")])
    with pytest.raises(ValueError, match="kind of an example is 'median'; wanted one of"):
        render_page(full_run(), evaluation, [], {})


def test_the_filters_name_every_kind_and_group_and_what_is_missing() -> None:
    html = render_page(full_run(), full_evaluation(), [], {})
    page = Page(html)
    assert [a["id"] for a in page.having(name="kind")] == [
        "kind-all",
        "kind-best",
        "kind-typical",
        "kind-worst",
    ]
    assert [a["id"] for a in page.having(name="group")] == ["group-all", "group-0", "group-1"]
    assert {attrs["data-group"] for attrs in page.having(class_="group")} == {"0", "1"}
    # Best stands before worst, whatever the order given; Objects has no best query.
    assert [attrs["data-kind"] for attrs in page.having(class_="kind")] == [
        "best",
        "worst",
        "typical",
    ]
    assert ":has(#kind-best:checked):has(#group-1:checked) .nothing { display: block; }" in html
    assert ":has(#kind-best:checked):has(#group-0:checked) .nothing" not in html


def test_ids_and_references_inside_the_page_agree() -> None:
    page = Page(render_page(full_run(), full_evaluation(), [failure("empty")], {}))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = [attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs]
    inside = [ref[1:] for ref in page.references() if ref.startswith("#")]
    assert inside
    assert set(named) | set(inside) <= set(ids)


def test_failures_are_grouped_by_reason_with_every_reason_shown() -> None:
    failures = [failure("truncated", f"t-{n}") for n in range(3000)]
    failures += [failure("empty", None, row=None), failure("corrupt", "c-0", error="e" * 1000)]
    images = {**full_run()["images"], "failed_by_reason": {"truncated": 4000, "empty": 1}}
    html = render_page(full_run(images=images), full_evaluation(), failures, {})
    page = Page(html)
    assert "4,002 images could not be embedded; 200 of them are shown" in page.text
    assert "truncated 4,000 198 shown Image Where" in page.text
    assert page.text.index("truncated 4,000") < page.text.index("corrupt 1 ")
    row = "– catalog/images-00000 decode why None"
    assert f"empty 1 Image Where Stage What happened {row}" in page.text
    assert "t-0 catalog/images-00000, row 3 decode why t-0" in page.text
    assert "e" * 399 + "…" in page.text
    assert "e" * 400 not in page.text
    assert html.count('<td class="quiet">decode</td>') == MAX_FAILURES_SHOWN


def test_a_failed_image_that_can_be_seen_is_shown() -> None:
    uri = thumbnail(jpeg(), 10**6)
    assert uri is not None
    html = render_page(full_run(), full_evaluation(examples=[]), [failure("encode")], {"broken-1": uri})
    assert [attrs["src"] for attrs in Page(html).all("img")] == [uri]


def test_hostile_text_stays_text_everywhere() -> None:
    hostile_example = {
        "group": HOSTILE,
        "kind": "best",
        "query": {"image_id": HOSTILE, "columns": {HOSTILE: HOSTILE, "name": HOSTILE}},
        "neighbors": [
            {"image_id": HOSTILE, "score": 0.5, "columns": {"name": HOSTILE}, "right": True},
            {"image_id": "seen", "score": 0.4, "columns": {"name": HOSTILE}, "right": False},
        ],
    }
    run = full_run(
        run_id=HOSTILE,
        status=HOSTILE,
        started_at=HOSTILE,
        kith_version=HOSTILE,
        workspace=HOSTILE,
        config={HOSTILE: HOSTILE},
        fingerprints={HOSTILE: HOSTILE},
        stages={HOSTILE: {"seconds": 1.0, "state": HOSTILE}},
        export={"files": [HOSTILE], "pairs": 1},
        truth={**full_run()["truth"], "column": HOSTILE},
    )
    evaluation = full_evaluation(
        truth=run["truth"],
        group_by=HOSTILE,
        groups=[{**full_evaluation()["groups"][0], "name": HOSTILE}],
        examples=[hostile_example],
    )
    failures = [
        failure(HOSTILE, HOSTILE, source_shard=HOSTILE, stage=HOSTILE, error=HOSTILE),
    ]
    thumbnails = {"seen": f"data:image/jpeg;base64,{HOSTILE}"}
    html = render_page(run, evaluation, failures, thumbnails)
    page = Page(html)
    assert not page.all("script")
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert page.text.count("alert('x')") >= 15
    # Its sides are text: what no browser or encoder can carry was replaced.
    assert b"\x00" not in html.encode("utf-8")
    assert len(page.all("style")) == html.count("</style>") == 2


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    uri = thumbnail(jpeg(), 10**6)
    assert uri is not None
    html = render_page(full_run(), full_evaluation(), [failure("empty")], {"apple": uri})
    page = Page(html)
    assert not page.all("script")
    assert not re.search(r"https?://|@import|url\(", html)
    assert all(ref.startswith(("#", "data:")) for ref in page.references())
    policy = page.having(**{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_same_run_gives_the_same_page() -> None:
    failures = [failure("empty"), failure("truncated")]
    first = render_page(full_run(), full_evaluation(), failures, {})
    assert render_page(full_run(), full_evaluation(), failures, {}) == first


@pytest.mark.parametrize(
    ("width", "height", "small"),
    [(300, 200, (128, 85)), (200, 300, (85, 128)), (100, 40, (100, 40)), (1, 1, (1, 1))],
)
def test_a_thumbnail_is_a_small_jpeg_of_the_same_shape(
    width: int, height: int, small: tuple[int, int]
) -> None:
    uri = thumbnail(jpeg(width, height), 10**6)
    assert uri is not None
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(body, validate=True))) as image:
        assert image.format == "JPEG"
        assert image.size == small
        if width > 1:
            left = np.asarray(image)[small[1] // 2, small[0] // 4]
            np.testing.assert_allclose(left, (200, 30, 30), atol=12)


@pytest.mark.parametrize("data", [b"", b"not an image", jpeg()[:200]])
def test_what_cannot_be_decoded_has_no_thumbnail(data: bytes) -> None:
    assert thumbnail(data, 10**6) is None


def test_an_image_over_the_pixel_limit_has_no_thumbnail() -> None:
    assert thumbnail(jpeg(300, 200), 300 * 200) is not None
    assert thumbnail(jpeg(300, 200), 300 * 200 - 1) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.994, "0.99 s"),
        (0.999, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (11100, "3 h 05 min"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert figures.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0%"), (0.0001, "<0.1%"), (0.5, "50.0%"), (0.9996, ">99.9%"), (1.0, "100%"), (None, "–")],
)
def test_percentages(value: float | None, text: str) -> None:
    assert figures.percent(value) == text


def test_scores_have_no_negative_zero() -> None:
    assert [figures.score(value) for value in (-0.001, -0.12, 0.999)] == ["0.00", "-0.12", "1.00"]


@pytest.mark.parametrize(
    ("iso", "text"),
    [
        ("2026-11-23T01:15:00+02:00", "22 November 2026, 23:15 UTC"),
        ("2026-11-23T01:15:00Z", "23 November 2026, 01:15 UTC"),
        ("2026-11-23T01:15:00", "23 November 2026, 01:15"),
        ("yesterday", "yesterday"),
        (None, ""),
    ],
)
def test_dates(iso: str | None, text: str) -> None:
    assert figures.date(iso) == text


def test_the_style_defines_every_colour_it_uses() -> None:
    css = resources.files("pipelines.report").joinpath("style.css").read_text("utf-8")
    light, dark = re.findall(r":root \{(.*?)\n *\}", css, re.DOTALL)
    used = set(re.findall(r"var\((--[a-z-]+)\)", css))
    defined = set(re.findall(r"(--[a-z-]+):", light))
    assert used == defined
    assert set(re.findall(r"(--[a-z-]+):", dark)) == defined - {"--mono"}
