"""The configuration: what loads, what is refused, and what a refusal says."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from index_builder.errors import ConfigError
from index_builder.rules.conditions import Condition
from index_builder.rules.exclusions import ExclusionSpec
from index_builder.rules.rules import JoinRules
from index_builder.scoring.metrics import Metric
from index_builder.search.join import JoinSpec
from index_builder.steps.graph import GraphSpec
from index_builder.steps.pairs import PairSpec
from pipelines.config import Config
from pipelines.config_loading import load_config
from transforms.decoding import DecodePolicy
from transforms.encoders.engines.choice import EngineChoice
from transforms.encoders.registry import encoder_names
from transforms.item_rows import ItemRows
from transforms.sources.files import FilesSource
from transforms.sources.tfrecord import TFRecordSource

REPOSITORY = Path(__file__).parents[2]
WORKSPACE = "workspace: w\n"
ONE_SOURCE = WORKSPACE + "images: {sources: [{format: files, paths: pictures/*}]}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "kith.yaml"
    path.write_text(text)
    return load_config(str(path), overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    """What a wrong configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_what_is_left_out_has_its_documented_default(tmp_path: Path) -> None:
    config = load(tmp_path, WORKSPACE)
    assert config.model_dump() == {
        "runner": "DirectRunner",
        "workspace": str(tmp_path / "w"),
        "images": {
            "sources": (),
            "metadata": {},
            "max_pixels": 178_956_970,
            "truncated": "fail",
            "scaled_decoding": True,
            "dicom_frame": "first",
            "decode_timeout_sec": 120.0,
        },
        "catalog": {"metadata": {"paths": (), "key": "item_id", "id_column": None, "columns": {}}},
        "encoder": {
            "name": "efficientnet_lite0",
            "weights": "imagenet",
            "pooling": "avg",
            "engine": "auto",
            "precision": "float32",
            "input_size": None,
            "preprocessing": None,
            "resize": "crop",
            "interpolation": "bicubic",
            "seed": 0,
            "batch_size": 32,
            "decode_threads": None,
        },
        "embeddings": {
            "reuse": True,
            "normalize": True,
            "max_failed_fraction": 1.0,
            "max_failed_fraction_per_shard": 1.0,
            "resource_hints": {},
        },
        "index": {
            "metric": "cosine",
            "transform": {"type": "none", "dim": 256, "whitening": "half"},
            "nlist": None,
            "nprobe": None,
            "shards": None,
            "encoding": None,
            "refine": 10,
            "training_rows": 500_000,
            "seed": 0,
            "memory_limit_gib": 8.0,
        },
        "join": {
            "k": 20,
            "rules": {
                "same": (),
                "different": (),
                "queries": (),
                "candidates": (),
                "max_per": {},
                "exclude": {
                    "paths": (),
                    "by": "image_id",
                    "query_column": "query_id",
                    "neighbor_column": "neighbor_id",
                    "symmetric": False,
                    "unknown_ids": "error",
                },
            },
            "max_probe": None,
            "evidence": (),
            "threads": None,
        },
        "evaluate": {
            "sample": 1000,
            "seed": 1,
            "min_recall": 0.0,
            "max_attempts": 3,
            "recall_by": None,
            "truth": None,
            "truth_k": 10,
            "group_by": None,
            "examples": 3,
        },
        "export": {
            "formats": ("parquet", "jsonl"),
            "columns": (),
            "min_score": None,
            "by": "image",
        },
        "duplicates": {"threshold": None, "nprobe": None},
        "graph": {"enabled": False, "max_reverse": 100},
        "nightly": {"publish": True, "report": True},
    }


def test_each_source_has_its_documented_defaults(tmp_path: Path) -> None:
    text = WORKSPACE + (
        "images:\n  sources:\n"
        "    - {format: files, paths: a/*.png}\n"
        "    - {format: tfrecord, paths: [b/*.tfrecord, b/x], name: records}\n"
    )
    files, records = load(tmp_path, text).images.sources
    assert isinstance(files, FilesSource)
    assert files.model_dump() == {
        "format": "files",
        "paths": (str(tmp_path / "a/*.png"),),
        "name": None,
        "files_per_shard": 1024,
    }
    assert isinstance(records, TFRecordSource)
    assert records.model_dump() == {
        "format": "tfrecord",
        "paths": (str(tmp_path / "b/*.tfrecord"), str(tmp_path / "b/x")),
        "name": "records",
        "compression": "auto",
        "features": {
            "image": "image/encoded",
            "image_id": "image_id",
            "item_id": None,
            "metadata": {},
        },
    }
    assert files.label == "a"
    assert records.label == "records"


def test_auto_stands_for_the_default_of_a_count(tmp_path: Path) -> None:
    text = WORKSPACE + "index: {nlist: auto, nprobe: auto, shards: auto}\njoin: {threads: auto}\n"
    assert load(tmp_path, text) == load(tmp_path, WORKSPACE)


def test_every_key_can_be_set_and_reaches_its_stage(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        WORKSPACE
        + """
images:
  sources: [{format: files, paths: p/*}]
  metadata: {brand: string, price: float64, kind: string}
  max_pixels: 1000
  truncated: accept
  scaled_decoding: false
  dicom_frame: middle
  decode_timeout_sec: 9.5
encoder: {name: resnet50, weights: random, pooling: max, input_size: [64, 96], resize: pad,
          interpolation: area, seed: 3, batch_size: 7, decode_threads: 2}
embeddings: {normalize: false}
index: {metric: euclidean, transform: {type: pca, dim: 12, whitening: full}, nlist: 9, nprobe: 3,
        shards: 2, training_rows: 100, seed: 5}
join:
  k: 4
  rules:
    same: [kind]
    different: [brand]
    queries: [{column: price, is_null: false}]
    candidates: [{column: brand, in: [a, b]}, {column: price, at_least: 2, at_most: 9.5}]
    max_per: {kind: 3}
    exclude: {paths: pairs.parquet, by: item_id, query_column: a, neighbor_column: b,
              symmetric: true, unknown_ids: ignore}
  max_probe: 6
  evidence: [margin]
  threads: 1
evaluate: {sample: 10, seed: 6, min_recall: 0.8, max_attempts: 4, recall_by: brand, truth: kind,
  truth_k: 9, group_by: brand, examples: 1}
duplicates: {threshold: -0.5, nprobe: 2}
graph: {max_reverse: 7}
export: {formats: [jsonl], columns: [price, kind], min_score: 0.25, by: item}
""",
    )
    embed = config.embed_spec(EngineChoice("openvino", "bfloat16"))
    assert embed.metadata == (("brand", "string"), ("price", "float64"), ("kind", "string"))
    assert embed.preparation.policy == DecodePolicy(1000, "accept", False, "middle")
    assert embed.timeout_sec == 9.5
    assert embed.normalize is False
    assert embed.choice == EngineChoice("openvino", "bfloat16")
    assert (embed.encoder.name, embed.encoder.weights, embed.encoder.pooling) == (
        "resnet50",
        "random",
        "max",
    )
    assert (embed.encoder.seed, embed.batch_size, embed.threads) == (3, 7, 2)
    assert embed.preparation.preprocessing.input_size == (64, 96)
    assert (embed.preparation.preprocessing.resize, embed.preparation.preprocessing.interpolation) == (
        "pad",
        "area",
    )

    index = config.index_spec()
    assert index.metric is Metric.EUCLIDEAN
    assert (index.transform.kind, index.transform.dim) == ("pca", 12)
    assert index.transform.eigen_power == -0.5
    assert (index.nlist, index.nprobe, index.shards) == (9, 3, 2)
    assert (index.training_rows, index.seed) == (100, 5)

    rules = JoinRules(
        ("kind",),
        ("brand",),
        (Condition("price", is_null=False),),
        (Condition("brand", one_of=("a", "b")), Condition("price", at_least=2, at_most=9.5)),
        (("kind", 3),),
    )
    # The join carries what export and evaluation will need, each column once.
    carried = ("price", "kind", "brand", "item_id")
    assert config.join_spec() == JoinSpec(4, rules, carried, 1, 6, ("margin",))
    assert config.join.rules.exclude.spec() == ExclusionSpec(
        (str(tmp_path / "pairs.parquet"),), "item_id", ("a", "b"), symmetric=True, ignore_unknown=True
    )

    assert config.pair_spec() == PairSpec(-0.5, 2, 1)
    assert config.graph_spec() == GraphSpec(7)

    evaluate = config.evaluate_spec()
    promise = evaluate.promise
    assert (promise.sample, promise.seed, evaluate.examples) == (10, 6, 1)
    assert (promise.target, promise.attempts, evaluate.recall_by) == (0.8, 1, "brand")
    assert (evaluate.truth, evaluate.group_by) == ("kind", "brand")
    # No more neighbours than k can be looked at.
    assert evaluate.truth_k == 4

    export = config.export_spec()
    assert (export.formats, export.columns, export.min_score) == (("jsonl",), ("price", "kind"), 0.25)
    assert export.items == ItemRows(4, (("kind", 3),))


def test_the_configuration_of_the_repository_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    config = load_config(str(REPOSITORY / "configs/local.yaml"))
    assert config.workspace == str(REPOSITORY / "workspace")
    records, files = config.images.sources
    assert len(records.find_files()) == 6
    assert len(files.find_files()) == 12
    assert config.evaluate.truth in config.images.metadata


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "join: {kk: 1}",
            "join.kk: unknown key. Did you mean 'k'? Known keys here: evidence, k, max_probe, rules, "
            "threads.",
        ),
        (
            "nightli: {publish: false}",
            "nightli: unknown key. Did you mean 'nightly'? Known keys here: catalog, duplicates, "
            "embeddings, encoder, evaluate, export, graph, images, index, join, nightly, runner, "
            "workspace.",
        ),
        (
            "join: {rules: {zzz: [a]}}",
            "join.rules.zzz: unknown key. Known keys here: candidates, different, exclude, max_per, "
            "queries, same.",
        ),
        (
            "index: {transform: {type: pca, whitning: full}}",
            "index.transform.whitning: unknown key. Did you mean 'whitening'? "
            "Known keys here: dim, type, whitening.",
        ),
        (
            "images: {sources: [{format: files, paths: a}, {format: tfrecord, paths: b, "
            "features: {imag: x}}]}",
            "images.sources.1.features.imag: unknown key. Did you mean 'image'? "
            "Known keys here: image, image_id, item_id, metadata.",
        ),
        (
            # A key of the other format is no key here, and must not be suggested.
            "images: {sources: [{format: files, paths: a, compression: gzip}]}",
            "images.sources.0.compression: unknown key. "
            "Known keys here: files_per_shard, format, name, paths.",
        ),
    ],
)
def test_unknown_keys_are_refused_with_their_path(tmp_path: Path, text: str, wanted: str) -> None:
    message = refusal(tmp_path, WORKSPACE + text)
    assert message == f"The configuration {tmp_path}/kith.yaml is wrong:\n  {wanted}"


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("join: {k: many}", "join.k: got 'many', wanted: "),
        ("join: {k: 0}", "join.k: got 0, wanted: "),
        ("join: {k: 2.5}", "join.k: got 2.5, wanted: "),
        ("join: {k: true}", "join.k: got True, wanted: Input should be a valid integer"),
        ("join: {rules: {max_per: {brand: yes}}}", "join.rules.max_per.brand: got True, wanted: "),
        ("join: {threads: on}", "join.threads: got True, wanted: "),
        ("encoder: {input_size: [224, true]}", "encoder.input_size.1: got True, wanted: "),
        ("evaluate: {min_recall: true}", "evaluate.min_recall: got True, wanted: Input should be a"),
        ("duplicates: {threshold: false}", "duplicates.threshold: got False, wanted: "),
        (
            "images: {sources: [{format: files, paths: a, files_per_shard: true}]}",
            "images.sources.0.files_per_shard: got True, wanted: ",
        ),
        ("join: {rules: {same: brand}}", "join.rules.same: got 'brand', wanted: "),
        ("join:", "join: got None, wanted: "),
        ("nightly: {publish: maybe}", "nightly.publish: got 'maybe', wanted: "),
        ("index: {nlist: 0}", "index.nlist: got 0, wanted: "),
        ("index: {nlist: Auto}", "index.nlist: got 'Auto', wanted: "),
        ("index: {metric: l1}", "index.metric: got 'l1', wanted: Input should be 'cosine'"),
        ("index: {transform: {type: opq}}", "index.transform.type: got 'opq', wanted: "),
        ("index: {seed: 2147483648}", "index.seed: got 2147483648, wanted: "),
        ("encoder: {pooling: mean}", "encoder.pooling: got 'mean', wanted: "),
        ("encoder: {input_size: 224}", "encoder.input_size: got 224, wanted: "),
        ("encoder: {batch_size: 5000}", "encoder.batch_size: got 5000, wanted: "),
        ("evaluate: {min_recall: 95}", "evaluate.min_recall: got 95, wanted: "),
        ("evaluate: {min_recall: .nan}", "evaluate.min_recall: got nan, wanted: "),
        ("export: {min_score: .nan}", "export.min_score: got nan, wanted: "),
        ("export: {formats: [csv]}", "export.formats.0: got 'csv', wanted: "),
        ("export: {formats: []}", "export.formats: got [], wanted: "),
        ("images: {metadata: {files: text}}", "images.metadata.files: got 'text', wanted: "),
        ("images: {max_pixels: 0}", "images.max_pixels: got 0, wanted: "),
        ("images: {sources: 3}", "images.sources: got 3, wanted: "),
        ("images: {sources: [{format: files, paths: []}]}", "images.sources.0.paths: got [], "),
        ("images: {sources: [{format: files, paths: ''}]}", "images.sources.0.paths.0: got '', "),
        (
            "images: {sources: [{format: files, paths: a, name: 'a b'}]}",
            "images.sources.0.name: got 'a b', wanted: ",
        ),
    ],
)
def test_a_wrong_value_says_key_got_wanted_and_remedy(tmp_path: Path, text: str, got: str) -> None:
    lines = refusal(tmp_path, WORKSPACE + text).splitlines()
    assert len(lines) == 2, "one problem, one line"
    assert lines[1].startswith(f"  {got}")
    assert lines[1].endswith(". Correct the value (docs/configuration.md).")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "join: {k: 0, q: 1}\nindex: {nlist: 0}\n")
    assert re.findall(r"^  ([\w.]+):", message, re.MULTILINE) == [
        "workspace",
        "index.nlist",
        "join.k",
        "join.q",
    ]


def test_a_workspace_is_needed(tmp_path: Path) -> None:
    assert refusal(tmp_path, "join: {k: 3}\n").endswith(
        "\n  workspace: missing. It has no default: set it."
    )


@pytest.mark.parametrize(("entry", "got"), [("format: zip, ", "'zip'"), ("", "None")])
def test_a_source_needs_a_known_format(tmp_path: Path, entry: str, got: str) -> None:
    message = refusal(tmp_path, WORKSPACE + f"images: {{sources: [{{{entry}paths: a}}]}}\n")
    assert message.endswith(
        f"\n  images.sources.0.format: got {got}, wanted one of ['files', 'parquet', 'table', "
        "'tfrecord', 'webdataset']. Set it."
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            WORKSPACE + "join: {rules: {same: [b, a], different: [a]}}",
            "join.rules: 'a' is in `same` and in `different`, so no pair could be neighbours. "
            "Remove it from one of them.",
        ),
        (
            WORKSPACE + "index: {nlist: 4, nprobe: 5}",
            "index.nprobe: got 5, wanted at most index.nlist (4). Lower it, or set it to auto.",
        ),
        (
            WORKSPACE + "encoder: {name: resnet51}",
            f"encoder.name: got 'resnet51', wanted one of {', '.join(encoder_names())}. "
            "Correct the name.",
        ),
        (
            WORKSPACE + "export: {columns: [brand, price, brand]}",
            "export.columns: got 'brand' more than once, wanted each column once. Remove one.",
        ),
        (
            WORKSPACE + "images: {metadata: {vector: string}}",
            "images.metadata: 'vector' is a column that Kith writes itself, wanted a name of your "
            "own. Rename it with the metadata mapping of the source (`features`, `fields` or "
            "`columns`).",
        ),
        (
            WORKSPACE + "images: {sources: [{format: files, paths: a/*}, {format: files, paths: a/b}]}",
            "images.sources: 2 sources are named 'a', wanted different names. Set `name` of each "
            "source.",
        ),
    ],
)
def test_impossible_combinations_are_refused(tmp_path: Path, text: str, wanted: str) -> None:
    assert refusal(tmp_path, text) == wanted


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("join: {rules: {same: [brandt]}}", "join.rules.same"),
        ("join: {rules: {different: [brandt]}}", "join.rules.different"),
        ("export: {columns: [row, brandt]}", "export.columns"),
        ("evaluate: {truth: brandt}", "evaluate.truth"),
        ("evaluate: {group_by: brandt}", "evaluate.group_by"),
        ("evaluate: {recall_by: brandt}", "evaluate.recall_by"),
    ],
)
def test_columns_that_the_catalogue_will_not_have_are_refused(
    tmp_path: Path, text: str, key: str
) -> None:
    source = "images: {sources: [{format: files, paths: a/*}], metadata: {brand: string}}\n"
    assert refusal(tmp_path, WORKSPACE + source + text) == (
        f"{key}: got 'brandt', wanted one of the columns brand, image_id, item_id, row, "
        "source_shard. Add it to images.metadata or catalog.metadata.columns, or correct the name."
    )
    # Datasets made elsewhere have columns of their own, which no configuration lists.
    load(tmp_path, WORKSPACE + text)


@pytest.mark.parametrize("name", ["image_id", "item_id", "row", "source_shard", "format", "width"])
def test_a_metadata_column_cannot_take_a_name_of_ours(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, WORKSPACE + f"images: {{metadata: {{{name}: string}}}}")
    assert message.startswith(f"images.metadata: {name!r} is a column that Kith writes itself")


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    text = WORKSPACE + "join: {k: 3, rules: {same: [a]}}\n"
    config = load(tmp_path, text, "join.k=7", "index.transform.type=pca", "join.k=8")
    assert config.join.k == 8
    assert config.join.rules.same == ("a",)
    assert config.index.transform.type == "pca"


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("export.formats=[jsonl]", ("jsonl",)),
        ("export.columns=[a, b]", ("a", "b")),
        ("export.min_score=-0.5", -0.5),
        ("export.min_score=null", None),
        ("join.rules={same: [x]}", ("x",)),
        ("evaluate.truth=a=b", "a=b"),
        ("evaluate.truth='07'", "07"),
        ("nightly.publish=no", False),
    ],
)
def test_the_value_of_an_override_is_yaml(tmp_path: Path, override: str, wanted: object) -> None:
    config = load(tmp_path, WORKSPACE + "export: {min_score: 1.0}\n", override)
    section, _, key = override.partition("=")[0].partition(".")
    value = getattr(getattr(config, section), key)
    assert (value.same if key == "rules" else value) == wanted


def test_an_override_reaches_one_item_of_a_list(tmp_path: Path) -> None:
    text = WORKSPACE + "images: {sources: [{format: files, paths: a/*}, {format: files, paths: b/*}]}"
    config = load(tmp_path, text, "images.sources.1.files_per_shard=9")
    first, second = config.images.sources
    assert isinstance(first, FilesSource)
    assert isinstance(second, FilesSource)
    assert (first.files_per_shard, second.files_per_shard) == (1024, 9)
    assert load(
        tmp_path, WORKSPACE + "export: {columns: [a, b]}", "export.columns.0=c"
    ).export.columns == (
        "c",
        "b",
    )


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("join.k", "--set got 'join.k', wanted key=value with a dotted key, as in --set join.k=10."),
        ("=3", "--set got '=3', wanted key=value with a dotted key, as in --set join.k=10."),
        (
            "images.sources.1.name=b",
            "--set images.sources.1.name: '1' is no key and no item of the configuration.",
        ),
        (
            "images.sources.first=b",
            "--set images.sources.first: 'first' is no key and no item of the configuration.",
        ),
    ],
)
def test_an_impossible_override_is_refused(tmp_path: Path, override: str, wanted: str) -> None:
    assert refusal(tmp_path, ONE_SOURCE, override) == wanted


def test_an_override_that_is_no_yaml_or_unknown_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, WORKSPACE, "join.k=[1").startswith(
        "--set join.k: '[1' is not valid YAML: "
    )
    assert "join.kk: unknown key. Did you mean 'k'?" in refusal(tmp_path, WORKSPACE, "join.kk=1")
    assert "join.k: got 'x', wanted: " in refusal(tmp_path, WORKSPACE, "join.k=x")


def test_paths_are_relative_to_where_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    text = "workspace: ../w\nimages: {sources: [{format: files, paths: [a/*, ../b/*.png]}]}\n"
    config = load(there, text)
    assert config.workspace == str(tmp_path / "w")
    assert config.images.sources[0].paths == (str(there / "a/*"), str(tmp_path / "b/*.png"))

    typed = load(there, text, "workspace=w2", "images.sources.0.paths=[c/*]")
    assert typed.workspace == str(here / "w2")
    assert typed.images.sources[0].paths == (str(here / "c/*"),)

    # The whole list given on the command line is relative to the working directory, too.
    whole = load(there, text, "images.sources=[{format: files, paths: d/*}]")
    assert whole.images.sources[0].paths == (str(here / "d/*"),)
    # The path of the file itself may be relative.
    assert load_config("../there/kith.yaml").workspace == str(tmp_path / "w")


@pytest.mark.parametrize("path", ["/data/w", "gs://bucket/w"])
def test_absolute_and_remote_paths_stay_as_they_are(tmp_path: Path, path: str) -> None:
    assert load(tmp_path, f"workspace: {path}\n").workspace == path
    assert load(tmp_path, WORKSPACE, f"workspace={path}").workspace == path


def test_a_path_of_weights_follows_the_same_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    weights = tmp_path / "own.weights.h5"
    weights.write_bytes(b"HDF")
    config = load(tmp_path, WORKSPACE + "encoder: {weights: own.weights.h5}")
    assert config.encoder.weights == str(weights)
    message = refusal(tmp_path, WORKSPACE, "encoder.weights=own.weights.h5")
    assert message == (
        "encoder.weights is '/own.weights.h5', but nothing is there. Set it to an existing file, to "
        "imagenet, or to random."
    )


def test_a_missing_file_names_itself_and_an_example(tmp_path: Path) -> None:
    paths: Sequence[str] = (f"{tmp_path}/none.yaml", str(tmp_path))
    for path in paths:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value) == (
            f"The configuration file {path} does not exist. Give one with --config FILE; "
            "configs/local.yaml of the repository is a complete example."
        )


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "list"), ("", "NoneType"), ("a b", "str")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    assert refusal(tmp_path, text) == (
        f"{tmp_path}/kith.yaml holds {kind}, wanted a mapping with sections such as `workspace` and "
        "`images`. See docs/configuration.md."
    )


def test_invalid_yaml_names_line_and_column(tmp_path: Path) -> None:
    message = refusal(tmp_path, "workspace: w\njoin: {k: 3\n")
    assert message.startswith(f"{tmp_path}/kith.yaml is not valid YAML: ")
    assert "line 2, column 7" in message


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kith.yaml").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ConfigError, match="is not a text file: .* Give a YAML file"):
        load_config(str(tmp_path / "kith.yaml"))


def test_resource_hints_are_those_of_beam(tmp_path: Path) -> None:
    hints = "embeddings: {resource_hints: {accelerator: 'type:nvidia-l4;count:1', min_ram: 8GB}}"
    config = load(tmp_path, f"{WORKSPACE}\n{hints}")
    assert config.embeddings.resource_hints["min_ram"] == "8GB"
    with pytest.raises(ConfigError, match=r"embeddings.resource_hints: .*horses.* Name hints of Beam"):
        load(tmp_path, f"{WORKSPACE}\nembeddings: {{resource_hints: {{horses: '2'}}}}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("join:\n  k: 5\n  k: 6\n", "the key 'k' stands twice in one mapping, in lines 3 and 4"),
        ("index: {}\njoin: {}\nindex: {}\n", "'index' stands twice in one mapping, in lines 2 and 4"),
        ("join: {k: 5, k: 6}\n", "the key 'k' stands twice in one mapping, in lines 2 and 2"),
        ("join: {k: 5, 'k': 5}\n", "the key 'k' stands twice"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, told: str) -> None:
    message = refusal(tmp_path, "workspace: w\n" + text)
    assert "kith.yaml is not valid YAML: " in message
    assert told in message
    assert "Correct it there." in message


def test_a_key_that_stands_twice_in_an_override_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, WORKSPACE, "join={k: 5, k: 6}")
    assert message.startswith("--set join: '{k: 5, k: 6}' is not valid YAML: the key 'k' stands twice")


def test_a_key_that_was_merged_may_stand_again(tmp_path: Path) -> None:
    text = """
join:
  rules:
    queries:
      - &sold {column: brand, equals: a}
      - &other {<<: *sold, equals: b}
      - {<<: *other, equals: c}
"""
    queries = load(tmp_path, WORKSPACE + text).join.rules.queries
    assert [(query.column, query.equals) for query in queries] == [
        ("brand", "a"),
        ("brand", "b"),
        ("brand", "c"),
    ]
