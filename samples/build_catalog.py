"""Builds the sample catalogue: 630 objects, each in three drawings by three makers.

Run by hand, once, by a maintainer; a user of Kith never needs it, because what it writes is
committed. A rerun with the same packages writes the same bytes.

What it takes, each unpacked into a folder of its own:

* Debian package `fonts-noto-color-emoji` 2.042 (`apt-get download`, then `dpkg-deb -x`);
* npm package `@discordapp/twemoji` 16.0.1 (`npm pack`, then `tar x`; each of the three alike);
* npm package `@lobehub/fluent-emoji-3d` 1.1.0;
* npm package `emoji-datasource-google` 16.0.0 (names and categories only);
* the wheel of `scikit-image` 0.26.0 and the wheel of `pydicom` 3.0.2 (`pip download --no-deps`,
  then `unzip`), from which the hard images are made.

Python packages: Kith's own environment (numpy, opencv, pillow, tensorflow) and, for this script
only, `resvg-py` 0.5.0 and `fonttools` 4.68.0.

    python samples/build_catalog.py --noto noto/ --twemoji twemoji/ --fluent fluent/ \
        --datasource datasource/ --skimage skimage/ --pydicom pydicom/

`--formats-only` takes none of the packages: it writes the slices in other formats (`webdataset/`,
`parquet/`, `table/`) again from the catalogue that is there.

Other versions are refused, because they would write other bytes under the same names.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import hashlib
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SHARDS = 6
CANVAS_PX = 160
CONTENT_PX = round(0.92 * CANVAS_PX)
VISIBLE_ALPHA = 8
RASTER_PX = 256
JPEG_QUALITY = 85
HARD_PX = 256

NOTO_FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NOTO_SHA256 = "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec"
CT_SLICE_SHA256 = "3dd31e5cc835b3f2cdd46c9da1982f59251e78518fefa8163d914631c66437d6"
PHOTO_SHA256 = {
    "chelsea": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
}

# The concrete subcategories of each category. Left out as a whole: signs, weather, maps,
# landscapes and city views, events, medals, mail, sound symbols, medical things, and what is
# neither (smoking, death, amulets).
SUBCATEGORIES = {
    "Animals & Nature": {
        "animal-mammal",
        "animal-bird",
        "animal-amphibian",
        "animal-reptile",
        "animal-marine",
        "animal-bug",
        "plant-flower",
        "plant-other",
    },
    "Food & Drink": {
        "food-fruit",
        "food-vegetable",
        "food-prepared",
        "food-asian",
        "food-sweet",
        "drink",
        "dishware",
    },
    "Activities": {"sport", "game", "arts & crafts"},
    "Objects": {
        "clothing",
        "music",
        "musical-instrument",
        "phone",
        "computer",
        "light & video",
        "book-paper",
        "money",
        "writing",
        "office",
        "lock",
        "tool",
        "science",
        "household",
    },
    "Travel & Places": {
        "place-building",
        "transport-ground",
        "transport-water",
        "transport-air",
        "hotel",
        "time",
    },
}

# Short names left out of those subcategories, by reason.
LEFT_OUT = {
    "clock faces": {f"clock{hour}{half}" for hour in range(1, 13) for half in ("", "30")},
    "card suits": {"spades", "hearts", "diamonds", "clubs"},
    "weapons": {"gun", "hocho", "dagger_knife", "crossed_swords", "bomb", "bow_and_arrow"},
    "medical": {"microbe", "hospital"},
    "religious buildings": {"wedding"},
    "signs": {"busstop", "octagonal_sign", "construction"},
    "sound symbols": {"musical_score", "musical_note", "notes"},
    "landscapes": {"motorway", "railway_track"},
    "user-interface symbols": {
        "chart",
        "chart_with_upwards_trend",
        "chart_with_downwards_trend",
        "bar_chart",
    },
    # The one that stays is named beside those that go.
    "near-duplicate variants": {
        "green_book",  # closed_book
        "blue_book",
        "orange_book",
        "dollar",  # yen
        "euro",
        "pound",
        "low_battery",  # battery
        "calling",  # iphone
        "camera_with_flash",  # camera
        "lock_with_ink_pen",  # lock
        "closed_lock_with_key",
        "page_with_curl",  # page_facing_up
        "date",  # calendar
        "hammer_and_pick",  # hammer, pick
        "hammer_and_wrench",  # hammer, wrench
    },
    # Another picture of the same maker has cosine > 0.95 (EfficientNet-Lite0, 1280-d):
    # mag, lock, file_folder and the other pens. Found by measuring, listed so that the build
    # needs no network.
    "twins of one maker": {
        "mag_right",
        "unlock",
        "open_file_folder",
        "lower_left_fountain_pen",
    },
}

# Two objects of each category, committed as plain files too.
SLICE = (
    "dog2",
    "butterfly",
    "pizza",
    "strawberry",
    "soccer",
    "teddy_bear",
    "guitar",
    "camera",
    "steam_locomotive",
    "rocket",
)

# Four of these, in three drawings each, committed in the other formats.
FORMAT_SLICE = ("1f415", "1f353", "26bd", "1f3b8")
FORMAT_COLUMNS = (
    "image_id",
    "object_id",
    "name",
    "category",
    "drawing",
    "licence",
    "copyright",
    "sha256",
)
FOLDERS = ("catalog", "files", "hard", "webdataset", "parquet", "table")

PICTURE_STEPS = (
    "composited on white, trimmed to its visible pixels, resized to "
    f"{CONTENT_PX} px on the longer side, centred on a white {CANVAS_PX} x {CANVAS_PX} px "
    f"square, saved as JPEG quality {JPEG_QUALITY}"
)


class BuildError(Exception):
    """A package is missing, has another version, or lacks a picture."""


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One object of the catalogue, as the data source names it."""

    object_id: str  # code points in lower case, joined by "-", without FE0F
    name: str
    short_name: str
    category: str
    subcategory: str
    unified: str  # lower case, as published
    non_qualified: str  # lower case, or empty

    def spellings(self) -> Iterator[str]:
        """File stems under which a package may hold this object, most likely first."""
        yield self.unified
        if self.non_qualified:
            yield self.non_qualified
        yield self.object_id


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One maker's picture set: who made it, and how to get a picture of an object."""

    name: str
    package: str
    licence: str  # SPDX
    copyright: str
    modifications: str
    find: Callable[[Emoji], tuple[str, bytes] | None]  # source path, PNG or WebP bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One image of the catalogue: the JPEG and its metadata columns, in order."""

    jpeg: bytes
    columns: dict[str, str]


def require_npm(folder: Path, name: str, version: str) -> None:
    """Refuses an unpacked npm package of another name or version."""
    path = folder / "package.json"
    if not path.is_file():
        raise BuildError(f"{folder} holds no package.json. Unpack npm {name} {version} there.")
    found = json.loads(path.read_text(encoding="utf-8"))
    if (found["name"], found["version"]) != (name, version):
        raise BuildError(f"{folder} holds {found['name']} {found['version']}, wanted {name} {version}.")


def read_verified(path: Path, sha256: str) -> bytes:
    """Reads a source file and refuses other bytes than those that were used first."""
    if not path.is_file():
        raise BuildError(f"{path} is missing. Unpack the package into the folder given.")
    data = path.read_bytes()
    got = hashlib.sha256(data).hexdigest()
    if got != sha256:
        raise BuildError(f"{path} has sha256 {got}, wanted {sha256}. Take the version named.")
    return data


def read_emoji(datasource: Path) -> list[Emoji]:
    """All entries of the chosen categories, in the order of the data source."""
    require_npm(datasource, "emoji-datasource-google", "16.0.0")
    rows = json.loads((datasource / "emoji.json").read_text(encoding="utf-8"))
    return [
        Emoji(
            object_id=row["unified"].lower().replace("-fe0f", ""),
            name=row["name"].lower(),
            short_name=row["short_name"],
            category=row["category"],
            subcategory=row["subcategory"],
            unified=row["unified"].lower(),
            non_qualified=(row["non_qualified"] or "").lower(),
        )
        for row in sorted(rows, key=lambda row: row["sort_order"])
        if row["category"] in SUBCATEGORIES
    ]


def select(emoji: Iterable[Emoji], drawings: Iterable[Drawing]) -> list[Emoji]:
    """Applies the rules: a concrete subcategory, not left out, drawn by every maker.

    Raises:
        BuildError: A name in `LEFT_OUT` or `SLICE` is not in the data source, or not kept.
    """
    emoji = list(emoji)
    drawings = list(drawings)
    excluded = set[str]().union(*LEFT_OUT.values())
    unknown = (excluded | set(SLICE)) - {e.short_name for e in emoji}
    if unknown:
        raise BuildError(f"The data source has no {', '.join(sorted(unknown))}.")
    kept = [
        e
        for e in emoji
        if e.subcategory in SUBCATEGORIES[e.category]
        and e.short_name not in excluded
        and all(drawing.find(e) for drawing in drawings)
    ]
    missing = set(SLICE) - {e.short_name for e in kept}
    if missing:
        raise BuildError(f"SLICE names what the rules drop: {', '.join(sorted(missing))}.")
    return kept


def noto_drawing(folder: Path) -> Drawing:
    """Google's drawings: the PNG strike of the font, sequences through its ligatures."""
    from fontTools.ttLib import TTFont

    font = TTFont(io.BytesIO(read_verified(folder / NOTO_FONT, NOTO_SHA256)))
    (strike,) = font["CBDT"].strikeData
    glyph_of = font.getBestCmap()
    ligatures: dict[tuple[str, ...], str] = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, sets in getattr(table, "ligatures", {}).items():
                for ligature in sets:
                    ligatures[first, *ligature.Component] = ligature.LigGlyph

    def find(emoji: Emoji) -> tuple[str, bytes] | None:
        glyphs = tuple(glyph_of.get(int(c, 16), "") for c in emoji.object_id.split("-"))
        glyph = glyphs[0] if len(glyphs) == 1 else ligatures.get(glyphs)
        if glyph not in strike:
            return None
        return f"{NOTO_FONT}#{glyph}", strike[glyph].imageData

    return Drawing(
        name="noto",
        package="Debian fonts-noto-color-emoji 2.042",
        licence="Apache-2.0",
        copyright="Copyright Google Inc.",
        modifications=f"the font's 136 x 128 px bitmap, {PICTURE_STEPS}",
        find=find,
    )


def twemoji_drawing(folder: Path) -> Drawing:
    """Twitter's drawings: SVG, rasterised here."""
    import resvg_py

    require_npm(folder, "@discordapp/twemoji", "16.0.1")

    def find(emoji: Emoji) -> tuple[str, bytes] | None:
        for stem in emoji.spellings():
            path = folder / "dist" / "svg" / f"{stem}.svg"
            if path.is_file():
                png = resvg_py.svg_to_bytes(
                    svg_string=path.read_text(encoding="utf-8"),
                    width=RASTER_PX,
                    height=RASTER_PX,
                    skip_system_fonts=True,
                )
                return f"dist/svg/{stem}.svg", bytes(png)
        return None

    return Drawing(
        name="twemoji",
        package="npm @discordapp/twemoji 16.0.1",
        licence="CC-BY-4.0",
        copyright="Twemoji, (c) Twitter, Inc. and other contributors, CC-BY 4.0, resized",
        modifications=f"the SVG rasterised at {RASTER_PX} px, {PICTURE_STEPS}",
        find=find,
    )


def fluent_drawing(folder: Path) -> Drawing:
    """Microsoft's 3D drawings: WebP. Trimming makes the one 256 x 264 canvas harmless."""
    require_npm(folder, "@lobehub/fluent-emoji-3d", "1.1.0")

    def find(emoji: Emoji) -> tuple[str, bytes] | None:
        for stem in emoji.spellings():
            path = folder / "assets" / f"{stem}.webp"
            if path.is_file():
                return f"assets/{stem}.webp", path.read_bytes()
        return None

    return Drawing(
        name="fluent3d",
        package="npm @lobehub/fluent-emoji-3d 1.1.0",
        licence="MIT",
        copyright="Copyright (c) Microsoft Corporation.",
        modifications=f"the {RASTER_PX} px WebP, {PICTURE_STEPS}",
        find=find,
    )


def draw_on_white(encoded: bytes) -> bytes:
    """Turns a transparent picture into the catalogue's JPEG.

    Compositing comes before resizing, so that the colour of invisible pixels cannot bleed in.

    Raises:
        BuildError: No pixel is visible.
    """
    image = Image.open(io.BytesIO(encoded)).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > VISIBLE_ALPHA)).getbbox()
    if box is None:
        raise BuildError("The picture has no visible pixel.")
    white = Image.new("RGBA", image.size, "white")
    content = Image.alpha_composite(white, image).convert("RGB").crop(box)
    scale = CONTENT_PX / max(content.size)
    width, height = (max(1, round(side * scale)) for side in content.size)
    content = content.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (CANVAS_PX, CANVAS_PX), "white")
    canvas.paste(content, ((CANVAS_PX - width) // 2, (CANVAS_PX - height) // 2))
    return encode(canvas, "JPEG", quality=JPEG_QUALITY, optimize=True)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encodes with Pillow into memory."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_record(emoji: Emoji, drawing: Drawing) -> Record:
    """Draws one picture and describes it.

    Raises:
        BuildError: The maker lacks the picture, or it is empty.
    """
    found = drawing.find(emoji)
    if found is None:
        raise BuildError(f"{drawing.package} has no picture of {emoji.short_name}.")
    source_path, encoded = found
    try:
        jpeg = draw_on_white(encoded)
    except BuildError as error:
        raise BuildError(f"{drawing.package}, {source_path}: {error}") from error
    return Record(
        jpeg,
        {
            "image_id": f"{drawing.name}-{emoji.object_id}",
            "object_id": emoji.object_id,
            "name": emoji.name,
            "category": emoji.category,
            "subcategory": emoji.subcategory,
            "drawing": drawing.name,
            "source_package": drawing.package,
            "source_path": source_path,
            "licence": drawing.licence,
            "copyright": drawing.copyright,
            "modifications": drawing.modifications,
            "sha256": hashlib.sha256(jpeg).hexdigest(),
        },
    )


def write_shards(records: Iterable[Record], folder: Path) -> None:
    """Writes plain TFRecord shards of equal size, mixed by the hash of `image_id`."""
    import tensorflow as tf

    def key(record: Record) -> str:
        return hashlib.sha256(record.columns["image_id"].encode()).hexdigest()

    ordered = sorted(records, key=key)
    size = -(-len(ordered) // SHARDS)
    for shard in range(SHARDS):
        path = folder / f"images-{shard:05d}-of-{SHARDS:05d}.tfrecord"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in ordered[shard * size : (shard + 1) * size]:
                example = tf.train.Example()
                feature = example.features.feature
                feature["image/encoded"].bytes_list.value.append(record.jpeg)
                for name, value in record.columns.items():
                    feature[name].bytes_list.value.append(value.encode())
                writer.write(example.SerializeToString(deterministic=True))


def write_slice(records: Iterable[Record], objects: set[str], folder: Path) -> None:
    """Writes the pictures of a few objects as plain files, one folder a category."""
    for record in records:
        if record.columns["object_id"] in objects:
            path = folder / plain_name(record)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(record.jpeg)


def plain_name(record: Record) -> str:
    """The path of a picture among the plain files."""
    slug = record.columns["category"].lower().replace("&", "and").replace(" ", "-")
    return f"{slug}/{record.columns['image_id']}.jpg"


def read_catalog(folder: Path) -> list[Record]:
    """The records of shards that were written before."""
    import tensorflow as tf

    records = []
    for serialized in tf.data.TFRecordDataset([str(path) for path in sorted(folder.iterdir())]):
        features = tf.train.Example.FromString(serialized.numpy()).features.feature
        columns = {name: value.bytes_list.value[0] for name, value in features.items()}
        jpeg = columns.pop("image/encoded")
        records.append(Record(jpeg, {name: value.decode() for name, value in columns.items()}))
    return records


def write_formats(records: Iterable[Record], out: Path) -> None:
    """Writes a few pictures as a WebDataset, as Parquet, and as a table that names the plain files."""
    chosen = sorted(
        (record for record in records if record.columns["object_id"] in FORMAT_SLICE),
        key=lambda record: record.columns["image_id"],
    )
    if len(chosen) != 3 * len(FORMAT_SLICE):
        raise BuildError(f"The catalogue has {len(chosen)} pictures of FORMAT_SLICE, wanted 3 each.")
    for name in ("webdataset", "parquet", "table"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    rows = [{name: record.columns[name] for name in FORMAT_COLUMNS} for record in chosen]
    write_webdataset(chosen, rows, out / "webdataset" / "images-000000.tar")
    write_parquet(chosen, rows, out / "parquet" / "images.parquet")
    with open(out / "table" / "images.csv", "w", encoding="utf-8", newline="") as file:
        names = ("image_id", "item_id", "uri", *FORMAT_COLUMNS[1:])
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for record, row in zip(chosen, rows, strict=True):
            uri = f"../files/{plain_name(record)}"
            writer.writerow(row | {"item_id": row["object_id"], "uri": uri})


def write_webdataset(records: list[Record], rows: list[dict[str, str]], path: Path) -> None:
    """Writes a tar of samples, each a picture and its columns in JSON, without owners and times."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for record, row in zip(records, rows, strict=True):
            for extension, data in (("jpg", record.jpeg), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{row['image_id']}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_parquet(records: list[Record], rows: list[dict[str, str]], path: Path) -> None:
    """Writes pictures and columns, the picture as Hugging Face does, in two row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), *((name, pa.string()) for name in FORMAT_COLUMNS)])
    values = [
        {"image": {"bytes": record.jpeg, "path": plain_name(record)}, **row}
        for record, row in zip(records, rows, strict=True)
    ]
    table = pa.Table.from_pylist(values, schema=schema)
    pq.write_table(
        table, path, row_group_size=len(records) // 2, use_dictionary=False, write_statistics=False
    )


def hard_images(skimage: Path, pydicom: Path) -> dict[str, bytes]:
    """The twelve hard images by file name: each a real file that a catalogue may hold."""
    photos = {
        name: Image.open(
            io.BytesIO(read_verified(skimage / "skimage" / "data" / f"{name}.png", sha256))
        ).convert("RGB")
        for name, sha256 in PHOTO_SHA256.items()
    }
    for photo in photos.values():
        photo.thumbnail((HARD_PX, HARD_PX), Image.Resampling.LANCZOS)
    cat, cup = photos["chelsea"], photos["coffee"]
    whole = encode(cat, "JPEG", quality=JPEG_QUALITY)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to show
    frames = [cat, cat.transpose(Image.Transpose.FLIP_LEFT_RIGHT), cat.convert("L").convert("RGB")]
    frames = [frame.resize((128, 85), Image.Resampling.LANCZOS) for frame in frames]
    return {
        "truncated.jpg": whole[: len(whole) // 2],
        "not_an_image.jpg": b"This is a text file, whatever its name says.\n",
        "zero_bytes.jpg": b"",
        "cmyk.jpg": encode(cup.convert("CMYK"), "JPEG", quality=JPEG_QUALITY),
        "exif_rotated.jpg": encode(
            cat.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=JPEG_QUALITY, exif=exif
        ),
        "gray16.png": encode(gray16(cat), "PNG"),
        "palette_alpha.png": encode(vignette(cup).quantize(method=Image.Quantize.FASTOCTREE), "PNG"),
        "animated.gif": encode(
            frames[0], "GIF", save_all=True, append_images=frames[1:], duration=200, loop=0
        ),
        "photo.webp": encode(cup, "WEBP", quality=JPEG_QUALITY),
        "photo.tif": tiff16(cup),
        "ct_slice.dcm": read_verified(
            pydicom / "pydicom" / "data" / "test_files" / "CT_small.dcm", CT_SLICE_SHA256
        ),
        "one_pixel.png": encode(Image.new("RGB", (1, 1), (200, 60, 20)), "PNG"),
    }


def gray16(photo: Image.Image) -> Image.Image:
    """Luma of an RGB photograph in 16 bits, low bits in use."""
    luma = np.asarray(photo, np.float64) @ [0.299, 0.587, 0.114]
    return Image.fromarray(np.round(luma * 257).astype(np.uint16))


def vignette(photo: Image.Image) -> Image.Image:
    """The photograph in an ellipse: opaque inside, soft at the rim, transparent outside."""
    width, height = photo.size
    y, x = np.mgrid[:height, :width]
    radius = np.hypot((2 * x + 1) / width - 1, (2 * y + 1) / height - 1)
    alpha = np.clip((1 - radius) / 0.1, 0, 1) * 255
    return Image.fromarray(np.dstack([np.asarray(photo), alpha.astype(np.uint8)]))


def tiff16(photo: Image.Image) -> bytes:
    """A 16-bit RGB TIFF; Pillow writes none, OpenCV does."""
    import cv2

    wide = np.asarray(photo).astype(np.uint16)[:, :, ::-1] * 257
    _, encoded = cv2.imencode(".tif", wide)
    return bytes(encoded)


def write_checksums(out: Path) -> None:
    """Writes SHA256SUMS over every image file, in the format of `sha256sum`."""
    paths = sorted(
        path.relative_to(out).as_posix()
        for folder in FOLDERS
        for path in (out / folder).rglob("*")
        if path.is_file()
    )
    lines = [f"{hashlib.sha256((out / p).read_bytes()).hexdigest()}  {p}\n" for p in paths]
    (out / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def build(args: argparse.Namespace) -> None:
    """Builds everything under `args.out` and prints the counts."""
    drawings = [
        noto_drawing(args.noto),
        twemoji_drawing(args.twemoji),
        fluent_drawing(args.fluent),
    ]
    kept = select(read_emoji(args.datasource), drawings)
    records = [make_record(emoji, drawing) for emoji in kept for drawing in drawings]
    hard = hard_images(args.skimage, args.pydicom)

    for name in ("catalog", "files", "hard"):
        shutil.rmtree(args.out / name, ignore_errors=True)
        (args.out / name).mkdir(parents=True)
    write_shards(records, args.out / "catalog")
    objects = {emoji.object_id for emoji in kept if emoji.short_name in SLICE}
    write_slice(records, objects, args.out / "files")
    for name, data in hard.items():
        (args.out / "hard" / name).write_bytes(data)
    write_formats(records, args.out)
    write_checksums(args.out)

    counts = collections.Counter(emoji.category for emoji in kept)
    for category, count in counts.most_common():
        print(f"{count:5d} objects  {category}")
    print(
        f"{len(kept):5d} objects, {len(records)} images, "
        f"{sum(len(record.jpeg) for record in records)} bytes of JPEG"
    )


def main() -> int:
    """Parses the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, what in {
        "--noto": "root of the unpacked Debian package fonts-noto-color-emoji",
        "--twemoji": "unpacked npm package @discordapp/twemoji",
        "--fluent": "unpacked npm package @lobehub/fluent-emoji-3d",
        "--datasource": "unpacked npm package emoji-datasource-google",
        "--skimage": "unpacked wheel of scikit-image",
        "--pydicom": "unpacked wheel of pydicom",
    }.items():
        parser.add_argument(option, type=Path, metavar="FOLDER", help=what)
    parser.add_argument(
        "--formats-only", action="store_true", help="write the slices in other formats again"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="where to write"
    )
    args = parser.parse_args()
    packages = ("noto", "twemoji", "fluent", "datasource", "skimage", "pydicom")
    missing = [name for name in packages if getattr(args, name) is None]
    if missing and not args.formats_only:
        parser.error(f"--{missing[0]} is missing. Give every package, or --formats-only.")
    try:
        if args.formats_only:
            write_formats(read_catalog(args.out / "catalog"), args.out)
            write_checksums(args.out)
        else:
            build(args)
    except BuildError as error:
        print(f"build_catalog: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
