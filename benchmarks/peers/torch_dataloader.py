"""PyTorch: a `DataLoader` with a worker for each core, and the network in one loop.

`--mode plain` is what a tutorial has; `channels_last` adds the memory format that PyTorch
recommends for convolutions on CPUs, `traced` also a frozen trace, `compiled` also `torch.compile`
with frozen weights. What happens before the first batch (tracing, compiling) is not timed.
"""

import argparse
import io
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch._inductor.config
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers import torch_lite0
from benchmarks.peers.records import Place, find_records, read_record, report

MODES = ("plain", "channels_last", "traced", "compiled")


class Photographs(Dataset[tuple[str, Tensor]]):
    """The images of the shards, decoded in full, the centre resized to the network's input."""

    def __init__(self, places: list[Place]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> tuple[str, Tensor]:
        image_id, data = read_record(self._places[number])
        image = Image.open(io.BytesIO(data)).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        size = (torch_lite0.INPUT_SIZE, torch_lite0.INPUT_SIZE)
        box = (left, top, left + side, top + side)
        resized = image.resize(size, Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        return image_id, (pixels.float() - 127.0) / 128.0


def main() -> None:
    """Embeds the images of the shards and writes one Parquet file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--mode", choices=MODES, default="plain")
    options = parser.parse_args()

    half = options.precision == "bfloat16"
    torch.set_num_threads(options.threads)
    model = torch_lite0.build()
    if options.mode != "plain":
        model = model.to(memory_format=torch.channels_last)
    run: Callable[[Tensor], Tensor] = model
    if options.mode == "compiled":
        torch._inductor.config.freezing = True
        run = torch.compile(model)

    def encode(images: Tensor) -> Tensor:
        if options.mode != "plain":
            images = images.contiguous(memory_format=torch.channels_last)
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            found: Tensor = run(images)
        return found.float()

    if options.mode == "traced":
        shape = (options.batch, 3, torch_lite0.INPUT_SIZE, torch_lite0.INPUT_SIZE)
        example = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
        # Autocast's cache of weights and a trace exclude each other.
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, half, cache_enabled=False):
            run = torch.jit.freeze(torch.jit.trace(model, example))

    dataset = Photographs(find_records(options.shards, options.limit))
    sizes = {min(options.batch, len(dataset)), len(dataset) % options.batch} - {0}
    for size in [*sizes, *sizes]:  # The first calls of a size trace, compile and choose.
        encode(torch.zeros(size, 3, torch_lite0.INPUT_SIZE, torch_lite0.INPUT_SIZE))

    start = time.perf_counter()
    loader = DataLoader(dataset, batch_size=options.batch, num_workers=options.threads)
    ids: list[str] = []
    vectors = []
    for names, images in loader:
        ids += names
        vectors.append(encode(images).numpy())
    values = np.concatenate(vectors).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    options.out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image_id": ids, "embedding": column}), options.out / "vectors.parquet")
    seconds = time.perf_counter() - start
    packages = ("torch", "pillow", "pyarrow")
    note = f"{options.threads} workers, {options.mode.replace('_', ' ')}"
    report(len(ids), seconds, note, {name: version(name) for name in packages})


if __name__ == "__main__":
    main()
