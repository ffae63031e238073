"""The DALI loader: one pipeline for CPU and GPU, driven by the plan.

Reads the shards of `tools/convert.py shards`, or an ImageFolder as it is. DALI decodes the part of an image that
its boxes need, crops, and resizes; a mirrored image is resized from right to left, which costs nothing.

On a GPU whole images are decoded and cut afterwards: decoding regions crashes in nvImageCodec 0.9 on some GPUs, and
`decoders.image_slice` hands a share of the images to the JPEG engine whatever one wants (its hw_decoder_load is 0.65
unless given). nvImageCodec sorts each batch by chroma subsampling and area and gives the first part to the engine, the
rest to CUDA kernels; the two differ in some pixels. So a loader that must be repeatable uses the kernels alone. That
costs CPU cores: kernels leave Huffman decoding to the CPU.

What the JPEG decoders of CPU and GPU could see differently (CMYK, grayscale, PNG named .JPEG ...) is
decoded here the way the torch loader does it and handed to DALI as plain pixels: all backends agree on
odd files. DALI's fused random-crop decoder is not used: the plan says where the box is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.base import Batch, DecodeError, Loader, LoaderOptions
from pipelines.formats.originals import open_originals
from pipelines.formats.stored import PackedSamples, StoredSamples
from pipelines.images import versions
from pipelines.images.decode import Encoded, Pixels, is_plain_jpeg, read_pixels
from pipelines.index import DatasetIndex
from pipelines.plan import RankPlan
from pipelines.prefetch import copy_stream

Fetched = tuple[list[Encoded], list[DecodeError]]  # files for DALI, and what is wrong with those shown black

# Values of a teacher cache's fingerprint: another wording would refuse every cache ever filled. ("0 by the engine" was
# said of an earlier pipeline, whose engine took part all the same.)
FINGERPRINT = {"backend": "dali", "resize": "triangular, antialiased, float32"}
DECODE_CPU, DECODE_GPU, DECODE_KERNELS = "cpu", "gpu, {:g} by the engine", "gpu, by kernels"

ENGINE_SHARE = 0.65  # of a batch's JPEGs where nothing is cached; DALI's own default
AHEAD = 2  # batches in the pipeline besides the one in use


def _import_dali() -> ModuleType:
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise ValueError(f"DALI is not installed ({error}): pip install 'fastdcd[dali]'") from error
    module: ModuleType = nvidia.dali
    return module


class DALILoader(Loader):
    """Executes plans over shards or an ImageFolder with a DALI pipeline."""

    backend = "dali"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        hw_decoder_load: float | None = None
        """Share of each batch's JPEGs for the GPU's JPEG engine, 0 to 1; CUDA kernels, fed by CPU cores, decode the
        others, and the two do not agree in every pixel. Which of them an image meets depends on its batch, so only 0
        (kernels alone) is repeatable: it is the default with teacher.mode cached or fill. Elsewhere it is DALI's own,
        0.65."""

        def __post_init__(self) -> None:
            if self.hw_decoder_load is not None and not 0 <= self.hw_decoder_load <= 1:
                raise ValueError(f"hw_decoder_load: got {self.hw_decoder_load}, expected a share from 0 to 1")

    def __init__(self, index: DatasetIndex, stored: StoredSamples, options: LoaderOptions) -> None:
        self.index, self._stored, self._options = index, stored, options
        # opening a file waits for the storage; of mapped files the kernel reads ahead, and a thread would cost more
        self._threads = None
        if not isinstance(stored, PackedSamples):
            self._threads = ThreadPoolExecutor(max(options.workers, 1), "dali-read")
        self._dali = _import_dali()
        self._labels = torch.from_numpy(index.labels)
        self._pipeline: _Pipeline | None = None
        # memory for the JPEG engine is taken at once for a whole batch of these: a few huge originals must not decide
        height, width = np.quantile(index.sizes, 0.95, axis=0).tolist() if len(index) else (0, 0)
        self._usual_size = (round(height), round(width))
        share = self.own_options(options).hw_decoder_load
        self._engine_share = (0.0 if options.repeatable else ENGINE_SHARE) if share is None else share
        if options.repeatable and self._engine_share and options.device.type == "cuda":
            raise ValueError(
                f"data.hw_decoder_load: got {share:g}, but cached features need a sample's pixels to be the same in every "
                "batch, and the batch decides which images the JPEG engine decodes; set 0 (or leave it out)"
            )
        self._looked_at, self._plain = np.zeros((2, len(index)), np.bool_)
        # Samples that DALI must not see: pixels from here instead (None), or black because of an error.
        self._replaced: dict[int, DecodeError | None] = {}

    @classmethod
    def open(cls, path: Path, options: LoaderOptions) -> Self:
        _import_dali()
        index, samples = open_originals(path, options)
        return cls(index, samples, options)

    @property
    def fingerprint(self) -> Mapping[str, str]:
        decode = DECODE_CPU
        if self._options.device.type == "cuda":
            decode = DECODE_GPU.format(self._engine_share) if self._engine_share else DECODE_KERNELS
        return {**FINGERPRINT, "decode": decode}

    @property
    def environment(self) -> Mapping[str, str]:
        # DALI changed its default decoder between minor versions; odd files, decoded by torchvision, are too few to count
        decoders = (
            ("nvidia-nvimgcodec", "nvidia-nvjpeg")
            if self._options.device.type == "cuda"
            else ("nvidia-nvimgcodec",)
        )
        return {"dali": str(self._dali.__version__), **versions.installed(*decoders)}

    def _execute(self, rank_plan: RankPlan) -> Generator[Batch, None, None]:
        numbers = [number for number in range(rank_plan.batches) if len(rank_plan.ids[rank_plan.rows(number)])]
        at = 0
        while at < len(numbers):  # again from where an undecodable image has ended the pipeline
            for batch in self._run(rank_plan, numbers[at:]):
                at += 1
                yield batch

    def _run(self, rank_plan: RankPlan, numbers: list[int]) -> Generator[Batch, None, None]:
        """Yield batches `numbers` until they end or DALI meets an image that it cannot decode."""
        pipeline = self._pipeline_for(rank_plan)
        reading: deque[_Pending] = deque()
        left = iter(numbers)

        def read_ahead() -> Iterator[_Inputs]:
            while True:
                while len(reading) <= AHEAD and (number := next(left, None)) is not None:
                    reading.append(self._read(rank_plan, number))
                if not reading:
                    return
                yield reading.popleft().result()

        pipeline.begin(read_ahead())
        try:
            for _ in numbers:
                try:
                    images = pipeline.take()
                except RuntimeError as error:
                    self._find_undecodable(pipeline.inside, error)
                    return
                inputs = pipeline.inside.popleft()
                for bad in inputs.errors:
                    self._handle(bad, self._options)
                ids = torch.from_numpy(inputs.ids)
                yield Batch(images=images, labels=self._labels[ids], ids=ids)
        finally:
            if not pipeline.empty():  # an error has ended it
                self._drop_pipeline()

    def _pipeline_for(self, rank_plan: RankPlan) -> _Pipeline:
        shape = _Shape(
            batch_size=rank_plan.batch_size,
            sizes=tuple(each.size for each in rank_plan.crops),
            workers=max(self._options.workers, 1),
            device=self._options.device,
            hw_decoder_load=self._engine_share,
            usual_size=self._usual_size,
            exact=_exact(rank_plan, self.index.sizes),
        )
        if self._pipeline is not None and self._pipeline.shape != shape:
            self._drop_pipeline()
        if self._pipeline is None:
            self._pipeline = _Pipeline(self._dali, shape)
        return self._pipeline

    def _drop_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def _read(self, rank_plan: RankPlan, number: int) -> _Pending:
        rows = rank_plan.rows(number)
        ids = rank_plan.ids[rows]
        files = self._begin(ids)
        boxes = np.stack([each.boxes[rows] for each in rank_plan.crops])  # [R, n, 4]
        flips = np.stack([each.flips[rows] for each in rank_plan.crops])  # [R, n]
        return _Pending(ids, files, _place(boxes, self.index.sizes[ids]), flips)

    def _begin(self, ids: NDArray[np.int64]) -> list[Callable[[], Fetched]]:
        """Get the files of a batch on their way; each result is `_fetch` of a part of `ids`."""
        if isinstance(self._stored, PackedSamples):
            self._stored.will_need(ids)
        if self._threads is None:
            return [partial(self._fetch, ids)]
        parts = np.array_split(ids, max(self._options.workers, 1))
        return [self._threads.submit(self._fetch, part).result for part in parts]

    def _fetch(self, ids: NDArray[np.int64]) -> Fetched:
        """Files for DALI. Those of a part are read at once; each is looked into once, in its first epoch."""
        try:
            files = self._stored.read_all(ids)
            for place in np.flatnonzero(~self._looked_at[ids]).tolist():
                self._look_at(int(ids[place]), files[place])
            odd = np.flatnonzero(~self._plain[ids])
        except (OSError, ValueError):  # of one of them; which one is found out below
            files, odd = [np.empty(0, np.uint8)] * len(ids), np.arange(len(ids))
        errors = []
        for place, sample_id in zip(odd.tolist(), ids[odd].tolist(), strict=True):
            error = self._replaced.get(sample_id)
            try:
                if error is None:
                    data = self._stored.read(sample_id)
                    if not self._looked_at[sample_id]:
                        self._look_at(sample_id, data)
                    files[place] = data if self._plain[sample_id] else _as_ppm(self._decode(sample_id, data))
            except DecodeError as found:
                error = found
            except (OSError, ValueError) as found:
                error = DecodeError(sample_id, self.index.names[sample_id], str(found))
            if error is not None:
                errors.append(error)
                files[place] = _as_ppm(np.zeros((*self.index.sizes[sample_id].tolist(), 3), np.uint8))
        return files, errors

    def _look_at(self, sample_id: int, data: Encoded) -> None:
        """Note whether DALI may decode a file itself."""
        self._plain[sample_id] = is_plain_jpeg(data, self.index.sizes[sample_id].tolist())
        self._looked_at[sample_id] = True

    def _replace(self, sample_id: int, error: DecodeError | None) -> None:
        """Never show a sample's file to DALI again."""
        self._replaced[sample_id] = error
        self._plain[sample_id], self._looked_at[sample_id] = False, True

    def _decode(self, sample_id: int, data: Encoded) -> Pixels:
        """As the torch loader does. Raises DecodeError."""
        name, stored = self.index.names[sample_id], tuple(self.index.sizes[sample_id].tolist())
        try:
            pixels = read_pixels(data.tobytes())
        except ValueError as error:
            raise DecodeError(sample_id, name, str(error)) from None
        if pixels.shape[:2] != stored:
            found = f"it is {pixels.shape[0]}x{pixels.shape[1]} pixels now and was {stored[0]}x{stored[1]}"
            raise DecodeError(
                sample_id,
                name,
                f"{found} when the index was made: it has been replaced; start again to rebuild it",
            )
        return pixels

    def _find_undecodable(self, outstanding: Sequence[_Inputs], error: RuntimeError) -> None:
        """DALI does not say which image it was: look at all that were in the pipeline.

        If torchvision decodes them all, DALI cannot decode one that others can: it gets pixels from here on.
        """
        found = False
        suspects = [sample_id for inputs in outstanding for sample_id in inputs.ids.tolist()]
        for sample_id in suspects:
            if sample_id not in self._replaced:
                try:
                    self._decode(sample_id, self._stored.read(sample_id))
                except DecodeError as bad:
                    self._replace(sample_id, bad)
                    found = True
                except (OSError, ValueError) as bad:
                    self._replace(sample_id, DecodeError(sample_id, self.index.names[sample_id], str(bad)))
                    found = True
        if not found:
            if all(sample_id in self._replaced for sample_id in suspects):
                raise error  # not about images
            for sample_id in suspects:
                if sample_id not in self._replaced:
                    self._replace(sample_id, None)

    def close(self) -> None:
        super().close()
        self._drop_pipeline()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        self._stored.close()
        if self._options.device.type == "cuda":
            self._dali.backend.ReleaseUnusedMemory()  # DALI's pools, which other loaders would not get


@dataclass(frozen=True)
class _Inputs:
    """A batch on its way through the pipeline. Keeps alive what DALI reads without copying."""

    ids: NDArray[np.int64]
    files: list[Encoded]
    errors: list[DecodeError]
    places: _Places
    flips: NDArray[np.bool_]  # [R, n]

    def arrays(self, exact: bool) -> list[Any]:
        """In the order of the pipeline's inputs."""
        # [R, n, 2] where in a box resizing begins, as shares of its height and width: if mirrored, at its right
        corners = np.stack([np.zeros_like(self.flips), self.flips], -1).astype(np.float32)
        boxes = [] if exact else [*self.places.box_start, *self.places.box_shape]
        return [self.files, self.places.start, self.places.shape, *corners, *(1 - corners), *boxes]


@dataclass(frozen=True)
class _Places:
    """Boxes as DALI wants them.

    Attributes:
        start, shape: int32 [n, 2], the part of each image to decode.
        box_start, box_shape: int32 [R, n, 2], the boxes within that part; they may reach outside.
    """

    start: NDArray[np.int32]
    shape: NDArray[np.int32]
    box_start: NDArray[np.int32]
    box_shape: NDArray[np.int32]


def _place(boxes: NDArray[np.int32], sizes: NDArray[np.int32]) -> _Places:
    """The part to decode that holds all boxes [R, n, 4] of each image."""
    top_left, shape = boxes[:, :, :2], boxes[:, :, 2:]
    start = top_left.min(0).clip(0, sizes - 1)
    end = (top_left + shape).max(0).clip(start + 1, sizes)
    return _Places(
        start=start, shape=end - start, box_start=top_left - start, box_shape=np.ascontiguousarray(shape)
    )


def _exact(rank_plan: RankPlan, sizes: NDArray[np.int32]) -> bool:
    """Whether all renderings show the same boxes, and none reaches outside its image."""
    boxes = rank_plan.crops[0].boxes
    same = all(np.array_equal(each.boxes, boxes) for each in rank_plan.crops[1:])
    inside = (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes[rank_plan.ids]).all()
    return bool(same and inside)


class _Pending:
    """Inputs whose files are being read."""

    def __init__(
        self,
        ids: NDArray[np.int64],
        files: list[Callable[[], Fetched]],
        places: _Places,
        flips: NDArray[np.bool_],
    ) -> None:
        self._ids, self._files, self._places, self._flips = ids, files, places, flips

    def result(self) -> _Inputs:
        parts = [wait() for wait in self._files]
        files = [file for part, _ in parts for file in part]
        errors = [error for _, part in parts for error in part]
        return _Inputs(self._ids, files, errors, self._places, self._flips)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What a pipeline is built for; another needs another pipeline.

    Attributes:
        batch_size, sizes: of the Work.
        workers, device: see LoaderOptions. hw_decoder_load: see DALILoader.Options.
        usual_size: height and width that hardly any image exceeds: the GPU's decoder prepares for them.
        exact: every image is decoded to exactly the box of all its renderings; otherwise boxes are cut out of
            what was decoded, and filled up with black.
    """

    batch_size: int
    sizes: tuple[int, ...]
    workers: int
    device: torch.device
    hw_decoder_load: float
    usual_size: tuple[int, int]
    exact: bool


class _Pipeline:
    """A DALI pipeline: batches in, batches out, in order."""

    def __init__(self, dali: ModuleType, shape: _Shape) -> None:
        self.shape = shape
        self.inside: deque[_Inputs] = deque()  # asked for by DALI and not yet taken
        self._batches: Iterator[_Inputs] = iter(())
        self._gpu = shape.device.type == "cuda"
        self._dali = dali
        device_id = (shape.device.index or 0) if self._gpu else None
        self._pipe = dali.Pipeline(
            batch_size=shape.batch_size,
            num_threads=shape.workers,
            device_id=device_id,
            prefetch_queue_depth=AHEAD,
            exec_dynamic=True,  # every batch has memory of its own
            set_affinity=self._gpu,  # its threads run on cores near the GPU, of those that the process may use
        )
        with self._pipe:
            self._pipe.set_outputs(*self._graph())
        self._pipe.build()
        self._stream = copy_stream(shape.device) if self._gpu else None

    def _graph(self) -> Iterator[Any]:
        fn, types = self._dali.fn, self._dali.types

        crops = len(self.shape.sizes)
        boxes = [] if self.shape.exact else [types.INT32] * (2 * crops)
        dtypes = [types.UINT8, types.INT32, types.INT32, *[types.FLOAT] * (2 * crops), *boxes]
        files, start, shape, *views = fn.external_source(
            source=self._next, num_outputs=len(dtypes), batch=True, no_copy=True, dtype=dtypes
        )
        begins, ends, box_starts, box_shapes = (views[crops * k : crops * (k + 1)] for k in range(4))
        # jpeg_fancy_upsampling: chroma as the CPU decoders interpolate it
        decode = {"output_type": types.RGB, "adjust_orientation": False}
        if self._gpu:
            height, width = self.shape.usual_size
            decode |= {"device": "mixed", "jpeg_fancy_upsampling": True}
            decode |= {"hw_decoder_load": self.shape.hw_decoder_load}
            if self.shape.hw_decoder_load:
                decode |= {"preallocate_height_hint": height, "preallocate_width_hint": width}
            image = fn.decoders.image(files, **decode)
            image = fn.slice(image, start=start, shape=shape, axis_names="HW")
        else:
            image = fn.decoders.image_slice(files, start=start, shape=shape, axis_names="HW", **decode)
        for number, size in enumerate(self.shape.sizes):
            box = image
            if not self.shape.exact:
                box = fn.slice(
                    image,
                    start=box_starts[number],
                    shape=box_shapes[number],
                    axis_names="HW",
                    out_of_bounds_policy="pad",
                )
            yield fn.resize(
                box,
                size=[size, size],
                roi_start=begins[number],
                roi_end=ends[number],  # before its start: mirrored, without a pass of its own
                roi_relative=True,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )

    def begin(self, batches: Iterator[_Inputs]) -> None:
        """Start an epoch."""
        self._batches = batches
        self._pipe.reset()

    def _next(self) -> list[Any]:
        """The next batch, for DALI, which asks ahead."""
        inputs = next(self._batches)  # its StopIteration ends DALI's epoch too
        self.inside.append(inputs)
        return inputs.arrays(self.shape.exact)

    def take(self) -> tuple[Tensor, ...]:
        """The oldest batch, [n, 3, size, size] a rendering, in memory of its own. Raises RuntimeError."""
        outputs = self._pipe.run()
        if self._stream is None:  # no copy: DALI lets go of the memory when torch does, as in its own iterators
            copies = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        else:
            from nvidia.dali.plugin.pytorch import feed_ndarray

            with torch.cuda.stream(self._stream):
                copies = []
                for output in outputs:
                    tensor = output.as_tensor()
                    copies.append(torch.empty(tensor.shape(), dtype=torch.uint8, device=self.shape.device))
                    feed_ndarray(tensor, copies[-1], cuda_stream=self._stream)
            self._stream.synchronize()  # so that whoever uses them need not know the stream
        return tuple(copy.permute(0, 3, 1, 2) for copy in copies)

    def empty(self) -> bool:
        """Finish what is inside, for an epoch that is left early; whether the pipeline can be used again."""
        self._batches = iter(())
        try:
            while True:  # DALI must see the end of its epoch before it begins another
                self._pipe.run()
                self.inside.popleft()
        except StopIteration:
            return not self.inside
        except RuntimeError:
            return False

    def close(self) -> None:
        """Release threads and memory."""
        self._pipe._shutdown()
        del self._pipe


def _as_ppm(pixels: Pixels) -> Encoded:
    """Pixels as a file that every decoder reads without loss: portable pixmap."""
    height, width = pixels.shape[:2]
    header = np.frombuffer(f"P6 {width} {height} 255\n".encode(), np.uint8)
    return np.concatenate([header, pixels.reshape(-1)])
