"""The report page: figures and pictures of one run as one self-contained HTML document.

The page loads nothing and runs nothing: pictures are data URIs, the filters are CSS, and a content
security policy forbids the rest. Whatever the catalogue holds is shown as text.
"""

import base64
import io
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from index_builder.errors import ImageError
from pipelines.report import figures
from pipelines.report.gallery import KINDS, UNGROUPED, arrange_gallery, is_picture
from transforms.decoding import DecodePolicy, decode_image

MAX_FAILURES_SHOWN = 200
THUMBNAIL_SIZE = 128
_THUMBNAIL_QUALITY = 80
_MAX_ERROR_CHARACTERS = 400

_GOOD, _WARN, _BAD, _NEUTRAL = "good", "warn", "bad", "neutral"
_STATUS_TONES = {"published": _GOOD, "refused": _BAD, "failed": _BAD}


@dataclass(frozen=True)
class _Tile:
    title: str
    figure: str
    note: str
    tone: str = _NEUTRAL


@dataclass(frozen=True)
class _RecallScale:
    """Positions on the recall tile's scale, in per cent of its width."""

    lower_bound: float
    estimate: float
    minimum: float | None
    label: str


@dataclass(frozen=True)
class _StageBar:
    """One stage on the time line; `start` and `width` in per cent of the whole run."""

    name: str
    state: str
    time: str
    start: float
    width: float


@dataclass(frozen=True)
class _HistogramBar:
    """One bar; `x`, `width` and `height` are fractions of the plot."""

    x: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class _Histogram:
    bars: Sequence[_HistogramBar]
    ticks: Sequence[tuple[float, str]]
    peak: int
    label: str


@dataclass(frozen=True)
class _FailureGroup:
    reason: str
    total: int
    shown: Sequence[Mapping[str, Any]]


def render_page(
    run: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    failures: Sequence[Mapping[str, Any]],
    thumbnails: Mapping[str, str],
) -> str:
    """The report of one run as one HTML document without scripts or outside references.

    `run` is the content of run.json, `evaluation` that of the evaluation, `failures` the rows of
    the failures dataset (at most MAX_FAILURES_SHOWN of them are shown, every reason among them);
    `thumbnails` maps image_id to a data URI. A section that a run has not reached (None or absent)
    is left out, and an image without a thumbnail is shown as a placeholder with its id.
    """
    truth = _section(evaluation, "truth") or _section(run, "truth")
    recall = _section(run, "recall") or _section(evaluation, "recall")
    gallery = arrange_gallery(evaluation.get("examples") or (), thumbnails)
    images = _images(run)
    failure_groups = _failure_groups(failures, images["failed_by_reason"])
    folder = resources.files("pipelines.report")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=figures.printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=figures.count,
        percent=figures.percent,
        score=figures.score,
        shorten=lambda value: figures.shorten(str(value), _MAX_ERROR_CHARACTERS),
    )
    template = environment.from_string(folder.joinpath("template.html.j2").read_text("utf-8"))
    return template.render(
        ungrouped=UNGROUPED,
        css=Markup(folder.joinpath("style.css").read_text("utf-8")),
        run_id=str(run.get("run_id", "")),
        version=str(run.get("kith_version", "")),
        status=str(run.get("status") or "unknown"),
        status_tone=_STATUS_TONES.get(str(run.get("status")), _NEUTRAL),
        reason=run.get("reason"),
        started_at=run.get("started_at"),
        date=figures.date(run.get("started_at")),
        headline=_headline(run),
        tiles=_tiles(run, recall, truth),
        recall_scale=_recall_scale(recall),
        images=images,
        stages=_stage_bars(run),
        certificate=_certificate(run, recall),
        recall_values=(recall or {}).get("values") or (),
        recall_by=(recall or {}).get("by"),
        histogram=_histogram(_section(evaluation, "scores")),
        groups=evaluation.get("groups") or (),
        group_by=evaluation.get("group_by"),
        truth=truth,
        gallery=gallery,
        kinds=KINDS,
        gaps=[
            (kind, number)
            for kind in KINDS
            for number, group in enumerate(gallery)
            if kind not in group.kinds
        ],
        absent_kinds=[kind for kind in KINDS if not any(kind in g.kinds for g in gallery)],
        failure_groups=failure_groups,
        failures_total=sum(group.total for group in failure_groups),
        failures_shown=sum(len(group.shown) for group in failure_groups),
        thumbnails={id_: uri for id_, uri in thumbnails.items() if is_picture(uri)},
        provenance=_provenance(run),
        files=(_section(run, "export") or {}).get("files") or (),
        config=_as_yaml(run.get("config") or {}),
    )


def thumbnail(data: bytes, max_pixels: int) -> str | None:
    """A data URI of a small JPEG (longer side at most THUMBNAIL_SIZE pixels) of an encoded image.

    None when the image cannot be decoded or its header states more than `max_pixels` pixels.
    """
    try:
        pixels = decode_image(data, DecodePolicy(max_pixels)).pixels
    except ImageError:
        return None
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=_THUMBNAIL_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def _headline(run: Mapping[str, Any]) -> str:
    join = _section(run, "join")
    if join is None:
        return f"{figures.counted(_images(run)['read'], 'image', 'images')} read"
    k = join.get("k")
    neighbors = "nearest neighbour" if k == 1 else f"{figures.count(k)} nearest neighbours"
    return f"{figures.counted(join.get('queries'), 'image', 'images')} and their {neighbors}"


def _images(run: Mapping[str, Any]) -> dict[str, Any]:
    """The books of the run, with `balanced` and each part's share of the images in per cent."""
    images = dict(_section(run, "images") or {})
    parts = ("embedded", "reused", "failed")
    for name in ("read", *parts, "unreadable_regions"):
        images[name] = images.get(name) or 0
    images["balanced"] = images["read"] == sum(images[name] for name in parts)
    images["shares"] = [
        (name, 100 * images[name] / max(images["read"], 1)) for name in parts if images[name]
    ]
    images["failed_by_reason"] = images.get("failed_by_reason") or {}
    return images


def _tiles(
    run: Mapping[str, Any], recall: Mapping[str, Any] | None, truth: Mapping[str, Any] | None
) -> list[_Tile]:
    tiles = []
    if recall is not None:
        minimum = recall.get("minimum")
        against = "no minimum set" if minimum is None else f"minimum {figures.percent(minimum)}"
        sure = f"{100 * (recall.get('confidence') or 0.95):g}% bound"
        note = f"at least {figures.percent(recall.get('lower_bound'))} ({sure}), {against}"
        tiles.append(
            _Tile(
                f"Recall @{figures.count(recall.get('k'))}",
                figures.percent(recall.get("estimate")),
                note,
                _recall_tone(recall),
            )
        )
    if truth is not None:
        note = (
            f"same {truth.get('column')} in the first {figures.count(truth.get('k'))}; "
            f"{figures.percent(truth.get('hit_rate_at_1'))} in first place"
        )
        tiles.append(_Tile("Same-object hit rate", figures.percent(truth.get("hit_rate_at_k")), note))
    join = _section(run, "join")
    if join is not None:
        pairs = (_section(run, "export") or join).get("pairs")
        short = (join.get("queries") or 0) - (join.get("filled") or 0)
        k = figures.count(join.get("k"))
        fewer = f"{figures.counted(short, 'query', 'queries')} with fewer than {k}"
        note = fewer if short > 0 else f"{k} a query"
        tiles.append(_Tile("Pairs", figures.count(pairs), note))
    speed = (_section(run, "images") or {}).get("per_second")
    if speed:
        tiles.append(_Tile("Images a second", figures.number(speed), _encoder_name(run)))
    tiles.append(_Tile("Whole run", figures.duration(run.get("seconds")), _index_size(run)))
    return tiles


def _encoder_name(run: Mapping[str, Any]) -> str:
    encoder = _section(run, "encoder") or {}
    parts = [encoder.get("name"), f"{encoder['dim']} numbers" if encoder.get("dim") else None]
    return ", ".join(str(part) for part in parts if part)


def _index_size(run: Mapping[str, Any]) -> str:
    index = _section(run, "index")
    if index is None:
        return ""
    shards = figures.counted(index.get("shards"), "index shard", "index shards")
    return f"{shards}, {figures.counted(index.get('nlist'), 'list', 'lists')}"


def _certificate(run: Mapping[str, Any], recall: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The recall certificate as lines of (what, figure); none for a run without one."""
    if recall is None or recall.get("confidence") is None:
        return []
    target = figures.percent(recall["target"]) if recall.get("target") else "none set"
    lists = f"{figures.count(recall.get('nprobe'))} of {figures.count(recall.get('nlist'))}"
    asked = f"{figures.count(recall.get('queries'))} of {figures.count(recall.get('rows'))}"
    lines = [
        ("Target", target),
        (f"Recall @{figures.count(recall.get('k'))}", figures.percent(recall.get("estimate"))),
        (f"At least ({100 * recall['confidence']:g}%)", figures.percent(recall.get("lower_bound"))),
        ("Queries measured", asked),
        ("Lists searched", lists),
        ("Seed", str(recall.get("seed"))),
    ]
    if recall.get("encoder_recall") is not None:
        number = figures.counted(recall.get("encoder_queries"), "query", "queries")
        lines.append((f"In the encoder's space ({number})", figures.percent(recall["encoder_recall"])))
    tried = run.get("attempts") or ()
    if len(tried) > 1:
        steps = ", ".join(
            f"{figures.percent(one.get('lower_bound'))} with {figures.count(one.get('nprobe'))}"
            for one in tried
        )
        lines.append(("Attempts, at least", steps))
    return lines


def _recall_tone(recall: Mapping[str, Any]) -> str:
    minimum = recall.get("minimum")
    if minimum is None:
        return _NEUTRAL
    if (recall.get("estimate") or 0) < minimum:
        return _BAD
    return _GOOD if (recall.get("lower_bound") or 0) >= minimum else _WARN


def _recall_scale(recall: Mapping[str, Any] | None) -> _RecallScale | None:
    if recall is None or not figures.finite(recall.get("estimate")):
        return None
    estimate = float(recall["estimate"])
    lower = float(recall["lower_bound"]) if figures.finite(recall.get("lower_bound")) else estimate
    minimum = float(recall["minimum"]) if figures.finite(recall.get("minimum")) else None
    worst = min(lower, estimate, 1.0 if minimum is None else minimum)
    left = max(0.0, worst - 0.25 * max(1.0 - worst, 0.01))
    span = max(1.0 - left, 1e-9)

    def position(value: float) -> float:
        return 100 * (value - left) / span

    return _RecallScale(
        lower_bound=position(lower),
        estimate=position(estimate),
        minimum=None if minimum is None else position(minimum),
        label=f"Recall from {figures.percent(left)} to 100%: estimate {figures.percent(estimate)}, "
        f"lower bound {figures.percent(lower)}, minimum {figures.percent(minimum)}",
    )


def _stage_bars(run: Mapping[str, Any]) -> list[_StageBar]:
    stages = _section(run, "stages") or {}
    seconds = {name: float((stage or {}).get("seconds") or 0) for name, stage in stages.items()}
    whole = max(sum(seconds.values()), float(run.get("seconds") or 0), 1e-9)
    starts = itertools.accumulate(seconds.values(), initial=0.0)
    return [
        _StageBar(
            name=name,
            state=str((stages[name] or {}).get("state") or "unknown"),
            time=figures.duration(seconds[name]),
            start=100 * start / whole,
            width=100 * seconds[name] / whole,
        )
        for name, start in zip(seconds, starts, strict=False)
    ]


def _histogram(scores: Mapping[str, Any] | None) -> _Histogram | None:
    """The histogram without the empty bins at both of its ends; None when nothing was counted."""
    if scores is None or not any(scores["counts"]):
        return None
    edges, counts = scores["edges"], scores["counts"]
    filled = [number for number, count in enumerate(counts) if count]
    first, last = filled[0], filled[-1]
    low, span = edges[first], max(edges[last + 1] - edges[first], 1e-9)
    peak, total = max(counts), sum(counts)
    bars = [
        _HistogramBar(
            x=(edges[number] - low) / span,
            width=(edges[number + 1] - edges[number]) / span,
            height=counts[number] / peak,
            label=f"{figures.score(edges[number])} to {figures.score(edges[number + 1])}: "
            f"{figures.counted(counts[number], 'query', 'queries')}",
        )
        for number in range(first, last + 1)
    ]
    step = math.ceil(len(bars) / 8)
    ticks = [((e - low) / span, figures.score(e)) for e in edges[first : last + 2 : step]]
    cumulated = itertools.accumulate(counts)
    middle = next(number for number, count in enumerate(cumulated) if 2 * count >= total)
    ends = f"{figures.score(low)} to {figures.score(edges[last + 1])}"
    label = (
        f"{figures.counted(total, 'query', 'queries')}; scores from {ends}, "
        f"the median between {figures.score(edges[middle])} and {figures.score(edges[middle + 1])}"
    )
    return _Histogram(bars, ticks, peak, label)


def _failure_groups(
    failures: Sequence[Mapping[str, Any]], counted: Mapping[str, int]
) -> list[_FailureGroup]:
    """The failures by reason, commonest first, with a fair share of the shown rows for each.

    `counted` is what the run counted by reason; `failures` may be fewer rows than that.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {reason: [] for reason in counted}
    for failure in failures:
        rows.setdefault(str(failure.get("reason")), []).append(failure)
    groups = []
    left = MAX_FAILURES_SHOWN
    fewest_first = sorted(rows, key=lambda reason: (len(rows[reason]), reason))
    for number, reason in enumerate(fewest_first):
        shown = rows[reason][: left // (len(rows) - number)]
        left -= len(shown)
        total = max(len(rows[reason]), counted.get(reason, 0))
        if total:
            groups.append(_FailureGroup(reason, total, shown))
    return sorted(groups, key=lambda group: (-group.total, group.reason))


def _provenance(run: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    names = ("run_id", "status", "started_at", "ended_at", "workspace", "kith_version")
    sections: list[tuple[str, Mapping[str, Any]]] = [
        ("Run", {name: run[name] for name in names if name in run})
    ]
    for name in ("encoder", "index", "join", "recall", "fingerprints", "versions"):
        section = _section(run, name)
        if section:
            # Lists of figures have a table of their own.
            plain = {
                key: value for key, value in section.items() if (name, key) != ("recall", "values")
            }
            sections.append((name.capitalize(), plain))
    return [(title, list(_facts(section))) for title, section in sections]


def _facts(section: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """The leaves of nested mappings as (dotted name, text)."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _facts(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{name}", figures.MISSING if value is None else str(value)


def _as_yaml(config: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(config, default=str))
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)) if plain else ""


def _section(record: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    value = record.get(name)
    return value if isinstance(value, Mapping) else None
