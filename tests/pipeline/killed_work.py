"""Work to be killed: tiny catalogues, the command on them, and what it comes to undisturbed."""

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

from tests.pipeline.killable_runs import KillableRuns, done_again, finished_files
from tests.pipeline.small_catalogue import dataset_bytes, write_catalogue, write_config
from transforms.encoders.keras_runtime import import_keras

# Together with another resize, this makes a night do every stage again.
TONIGHT: dict[str, Any] = {
    "index": {"shards": 2, "transform": {"type": "pca", "dim": 8}},
    "join": {"k": 4},
    "duplicates": {"threshold": 0.99},
    "graph": {"enabled": True},
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A catalogue of few images and a network that loads in no time, on the engine that does, too."""

    data: Path
    model: Path
    engine: str = "tensorflow"

    @staticmethod
    def make(folder: Path, shards: int, images: int, engine: str = "tensorflow") -> "Tiny":
        """Writes both into a folder that is not there yet."""
        keras = import_keras()
        data = write_catalogue(folder / "data", shards, images)
        for name in ("ct_slice.dcm", "photo.tif", "photo.webp"):
            (data / "hard" / name).unlink()
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(40, 8, strides=4)])
        model.save(folder / "model.keras")
        return Tiny(data, folder / "model.keras", engine)

    def write_config(self, path: Path, workspace: Path, **sections: Any) -> Path:
        """Writes the configuration; `resize` of the encoder is set to `pad` for tonight's run."""
        encoder = {
            "name": "custom",
            "weights": str(self.model),
            "engine": self.engine,
            "preprocessing": "tf",
            "input_size": [32, 32],
            "resize": "pad" if sections else "crop",
        }
        return write_config(path, self.data, workspace, encoder=encoder, **sections)


@dataclasses.dataclass
class Kills:
    """What was seen over all rounds of killing.

    `moments` are seconds after the start of the runs that were killed; `kept` counts the files that
    were finished by the last kill of a round, and so were not to be made again.
    """

    moments: list[float] = dataclasses.field(default_factory=list)
    kept: int = 0
    rounds: int = 0


@dataclasses.dataclass(frozen=True)
class Work:
    """A command, the workspace that it begins with, and what it comes to when nothing disturbs it."""

    runs: KillableRuns
    tiny: Tiny
    command: str
    before: Path
    undisturbed: dict[str, str]
    seconds: float

    @staticmethod
    def plan(runs: KillableRuns, tiny: Tiny, command: str, before: Path, folder: Path) -> "Work":
        """Does the work once, undisturbed, in a folder of its own."""
        draft = Work(runs, tiny, command, before, {}, 0.0)
        workspace = draft.prepare(folder)
        ended = runs.run(*draft.arguments(workspace))
        assert not ended.killed
        return dataclasses.replace(draft, undisturbed=dataset_bytes(workspace), seconds=ended.seconds)

    def prepare(self, folder: Path) -> Path:
        """Returns a workspace that looks as before."""
        if self.before.exists():
            shutil.copytree(self.before, folder / "w")
        else:
            folder.mkdir(parents=True)
        self.tiny.write_config(folder / "c.yaml", folder / "w", **TONIGHT)
        return folder / "w"

    def arguments(self, workspace: Path) -> tuple[str, ...]:
        """Returns the command line."""
        return self.command, "--config", str(workspace.parent / "c.yaml"), "--json"

    def check(self, workspace: Path) -> None:
        """Fails unless the workspace is as if nothing had happened."""
        assert dataset_bytes(workspace) == self.undisturbed
        # Neither markers nor unfinished files are left, wherever a run was killed.
        assert [str(path) for path in workspace.rglob("_work")] == []
        hidden = {str(path.relative_to(workspace)) for path in workspace.rglob(".*")}
        assert hidden == {".lock"}
        assert [str(path) for path in self.runs.temporary.rglob("*")] == []

    def kill_at_random(self, folder: Path, wanted: int, seed: int) -> Kills:
        """Kills runs at random moments of their time until so many were killed, and checks each end.

        A round begins with a fresh workspace and ends with a run that was over before its moment came.
        A finished part that a later run of the round made again is an error; rounds go on until at
        least one part was there to be kept.
        """
        chance, kills = random.Random(seed), Kills()
        while len(kills.moments) < wanted or not kills.kept:
            assert kills.rounds < 4 * wanted, f"too few kills, or none with a finished part: {kills}"
            workspace = self.prepare(folder / f"round-{kills.rounds}")
            self.kill_one_round(workspace, chance, kills)
            self.check(workspace)
            shutil.rmtree(workspace.parent)
        return kills

    def kill_one_round(self, workspace: Path, chance: random.Random, kills: Kills) -> None:
        """Runs in one workspace, killed each time, until a run ends by itself."""
        start = finished = finished_files(workspace)
        earlier: list[float] = []
        while True:
            # More time with each kill, so that a round ends on a machine that is busier than before.
            moment = chance.uniform(0, self.seconds * 1.25 ** len(earlier))
            ended = self.runs.run(*self.arguments(workspace), after=moment)
            now = finished_files(workspace)
            again = done_again(finished, now)
            assert again == [], f"done again after kills at {earlier}, then {moment}: {again}"
            if not ended.killed:
                break
            finished = now
            earlier.append(moment)
        kills.moments += earlier
        kills.kept += len(finished.keys() - start.keys())
        kills.rounds += 1
