"""The compiled inner loop of the FFCV executor: decode, crop, resize, mirror, without the GIL.

JPEGs are decoded by the TurboJPEG library that FFCV is linked against, with the accurate DCT: pixels equal
to Pillow's and torchvision's, at the speed of FFCV's fast DCT (a difference of 1 of 255 on average). Resizing
repeats torch's antialiased bilinear resize of uint8 images bit by bit (ATen's UpSampleKernel: 16-bit
weights, along the width first, rounded in between). So the torch executor gives the same bytes from the
same stored pixels. FFCV's own resize is OpenCV's INTER_AREA, which is a box filter when it shrinks and
nearly nearest-neighbour when it enlarges: teachers tell the difference.

Compiled once a machine and cached by numba. Nothing here depends on the data set, the epoch or the
output size, so nothing is ever compiled again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Bits after the binary point of a weight. torch chooses them for each axis so that 16-bit weights do not
# overflow, and rounds to that; shifting the rounded weights to a common precision changes no result.
_BITS = 22
_COMPILED: dict[str, Any] = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}


@intrinsic
def _decompress(typing: Any, address: Any, handle: Any, data: Any, out: Any, width: Any, height: Any) -> Any:
    """tjDecompress2(handle, data, len(data), out, width, 0, height, TJPF_RGB, 0), at `address`.

    Called by address and not by ctypes object, whose address would be compiled in and forbid caching.
    """
    signature = types.int32(types.intp, types.intp, data, out, types.intc, types.intc)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, handle, data, out, width, height = args
        i8p, i32, i64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
        source = context.make_array(signature.args[2])(context, builder, data)
        target = context.make_array(signature.args[3])(context, builder, out)
        kind = ir.FunctionType(i32, [i8p, i8p, i64, i8p, i32, i32, i32, i32, i32])
        zero = ir.Constant(i32, 0)
        return builder.call(
            builder.inttoptr(address, kind.as_pointer()),
            [
                builder.inttoptr(handle, i8p),
                source.data,
                source.nitems,
                target.data,
                width,
                zero,
                height,
                zero,
                zero,
            ],
        )

    return signature, generate


@intrinsic
def _blend_pixel(
    typing: Any,
    source: Any,
    start: Any,
    weights: Any,
    first: Any,
    taps: Any,
    target: Any,
    place: Any,
) -> Any:
    """target[place : place + 4] = sum over k of weights[first + k] * source[start + 3k : start + 3k + 4].

    One RGB pixel and a fourth byte that belongs to the next: four lanes are one vector register. numba
    has no vectors of its own, and its compiler does not find this one.
    """
    signature = types.void(source, types.intp, weights, types.intp, types.intp, target, types.intp)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, start, weights, first, taps, target, place = args
        i32, i64 = ir.IntType(32), ir.IntType(64)
        bytes4, ints4 = ir.VectorType(ir.IntType(8), 4), ir.VectorType(i32, 4)

        def pointer(number: int, array: Any, offset: Any) -> Any:
            data = context.make_array(signature.args[number])(context, builder, array).data
            return builder.gep(data, [offset])

        def splat(value: Any) -> Any:
            nothing = ir.Constant(ints4, ir.Undefined)
            single = builder.insert_element(nothing, value, ir.Constant(i32, 0))
            return builder.shuffle_vector(single, nothing, ir.Constant(ints4, [0] * 4))

        pixels, factors = pointer(0, source, start), pointer(2, weights, first)
        out = builder.bitcast(pointer(5, target, place), bytes4.as_pointer())
        before = builder.block
        loop, after = builder.append_basic_block("taps"), builder.append_basic_block("store")
        builder.branch(loop)

        builder.position_at_end(loop)
        tap, total = builder.phi(i64), builder.phi(ints4)
        address = builder.gep(pixels, [builder.mul(tap, ir.Constant(i64, 3))])
        pixel = builder.zext(builder.load(builder.bitcast(address, bytes4.as_pointer()), align=1), ints4)
        factor = splat(builder.load(builder.gep(factors, [tap])))
        new_total = builder.add(total, builder.mul(pixel, factor))
        next_tap = builder.add(tap, ir.Constant(i64, 1))
        tap.add_incoming(ir.Constant(i64, 0), before)
        tap.add_incoming(next_tap, loop)
        total.add_incoming(ir.Constant(ints4, [1 << (_BITS - 1)] * 4), before)
        total.add_incoming(new_total, loop)
        builder.cbranch(builder.icmp_signed("<", next_tap, taps), loop, after)

        builder.position_at_end(after)
        rounded = builder.lshr(new_total, ir.Constant(ints4, [_BITS] * 4))
        builder.store(builder.trunc(rounded, bytes4), out, align=1)
        return context.get_dummy_value()

    return signature, generate


@njit(**_COMPILED)
def _filter(crop, start, extent, size):  # type: ignore[no-untyped-def]
    """The triangle filter that resizes `crop` pixels, of which the first is `start`, to `size`.

    Pixels outside 0 .. extent are black: their weights count when normalising and are then left out. Every
    output pixel gets as many taps, so that the inner loop's length never changes.

    Returns first [size], where each output pixel's taps start in the image, and weights int32 [size, taps].
    """
    scale = crop / size
    support = max(scale, 1.0)
    exact = np.zeros((size, 2 * int(np.ceil(support)) + 1))
    begin, end = np.empty(size, np.int64), np.empty(size, np.int64)  # in the crop
    largest = 0.0
    for row in range(size):
        centre = scale * (row + 0.5)
        begin[row] = max(int(centre - support + 0.5), 0)
        end[row] = min(int(centre + support + 0.5), crop)
        total = 0.0
        for tap in range(end[row] - begin[row]):
            weight = max(1.0 - abs((tap + begin[row] - centre + 0.5) / support), 0.0)
            exact[row, tap] = weight
            total += weight
        for tap in range(end[row] - begin[row]):
            exact[row, tap] /= total
            largest = max(largest, exact[row, tap])
    bits = 0
    while bits < _BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    taps = 1
    for row in range(size):
        while end[row] > begin[row] and int(0.5 + exact[row, end[row] - begin[row] - 1] * (1 << bits)) == 0:
            end[row] -= 1
        taps = max(taps, min(end[row] + start, extent) - max(begin[row] + start, 0))
    first = np.empty(size, np.int64)
    weights = np.zeros((size, taps), np.int32)
    for row in range(size):
        first[row] = max(min(begin[row] + start, extent - taps), 0)
        for position in range(max(begin[row] + start, 0), min(end[row] + start, extent)):
            rounded = int(0.5 + exact[row, position - start - begin[row]] * (1 << bits))
            weights[row, position - first[row]] = rounded << (_BITS - bits)
    return first, weights


@njit(**_COMPILED)
def _blend_rows(out, start, length, tile, first, weights, total):  # type: ignore[no-untyped-def]
    """out[start : start + length] = sum over k of weights[k] * row number first + k of `tile`, rounded.

    32-bit arithmetic throughout, so that the compiler makes vectors of it; numba would widen it to 64.
    `total` is scratch, uint32 [length].
    """
    taps = len(weights)
    target = out[start : start + length]
    row0 = tile[first * length : (first + 1) * length]
    weight0 = np.uint32(weights[0])
    half = np.uint32(1 << (_BITS - 1))
    if taps == 2:
        row1, weight1 = tile[(first + 1) * length : (first + 2) * length], np.uint32(weights[1])
        for j in range(length):
            value = np.uint32(half + weight0 * np.uint32(row0[j]) + weight1 * np.uint32(row1[j]))
            target[j] = np.uint8(np.uint32(value >> _BITS))
        return
    for j in range(length):
        total[j] = np.uint32(half + weight0 * np.uint32(row0[j]))
    for tap in range(1, taps - 1, 2):
        row1 = tile[(first + tap) * length : (first + tap + 1) * length]
        row2 = tile[(first + tap + 1) * length : (first + tap + 2) * length]
        weight1, weight2 = np.uint32(weights[tap]), np.uint32(weights[tap + 1])
        for j in range(length):
            total[j] = np.uint32(total[j] + weight1 * np.uint32(row1[j]) + weight2 * np.uint32(row2[j]))
    if taps % 2 == 0:
        row1, weight1 = tile[(first + taps - 1) * length : (first + taps) * length], np.uint32(weights[taps - 1])
        for j in range(length):
            total[j] = np.uint32(total[j] + weight1 * np.uint32(row1[j]))
    for j in range(length):
        target[j] = np.uint8(np.uint32(total[j] >> _BITS))


@njit(**_COMPILED)
def _render(image, offset, height, width, box, flip, size, out, place, tile, total):  # type: ignore[no-untyped-def]
    """Crop, resize and mirror one image [height, width, 3] at image[offset:] into out[place:]."""
    top, left, crop_height, crop_width = int(box[0]), int(box[1]), int(box[2]), int(box[3])
    length = size * 3
    upper, lower = max(top, 0), min(top + crop_height, height)
    if upper >= lower or left >= width or left + crop_width <= 0:
        out[place : place + size * length] = 0
        return
    first, weights = _filter(crop_width, left, width, size)
    taps = weights.shape[1]
    flat = weights.reshape(weights.size)
    for row in range(upper, lower):
        start = offset + row * width * 3
        for x in range(size):  # ascending: the fourth byte of a pixel is the next one's, written after it
            column = size - 1 - x if flip else x
            target = ((row - upper) * size + x) * 3
            _blend_pixel(image, start + first[column] * 3, flat, column * taps, taps, tile, target)
    first, weights = _filter(crop_height, top - upper, lower - upper, size)
    for y in range(size):
        _blend_rows(out, place + y * length, length, tile, first[y], weights[y], total)


_BYTES = types.uint8[::1]
_FILE = types.Array(types.uint8, 1, "C", readonly=True)
_INTS = types.int64[::1]
_SIGNATURE = types.void(
    types.intp,
    types.intp,
    _FILE,
    _INTS,
    _INTS,
    types.int32[:, ::1],
    types.boolean[::1],
    types.int32[:, :, ::1],
    types.boolean[:, ::1],
    _INTS,
    _BYTES,
    _INTS,
    types.boolean[::1],
    _BYTES,
    _BYTES,
    types.uint32[::1],
)


@njit(_SIGNATURE, **_COMPILED)
def render_samples(  # type: ignore[no-untyped-def]
    decompress,
    handle,
    file,
    pointers,
    lengths,
    stored,
    raw,
    boxes,
    flips,
    sizes,
    out,
    places,
    failed,
    pixels,
    tile,
    total,
):
    """Render n samples into `out`; what cannot be decoded is black and marked in `failed`.

    Args:
        decompress: address of tjDecompress2.
        handle: TurboJPEG decompressor of this thread.
        file: the .beton, uint8 [bytes].
        pointers, lengths: int64 [n], each image in the file.
        stored: int32 [n, 2], heights and widths.
        raw: bool [n], raw pixels rather than JPEG.
        boxes, flips: int32 [R, n, 4] and bool [R, n], of R renderings.
        sizes: int64 [R], output pixels.
        out: uint8, gets images [size, size, 3]; rendering r starts at places[r], int64 [R].
        failed: bool [n], written.
        pixels: scratch for a decoded image: one byte more than the largest has.
        tile: scratch: one byte more than (rows of the largest image) * (largest size) * 3.
        total: scratch uint32, largest size * 3.
    """
    for row in range(len(pointers)):
        height, width = int(stored[row, 0]), int(stored[row, 1])
        data = file[pointers[row] : pointers[row] + lengths[row]]
        failed[row] = not raw[row] and _decompress(decompress, handle, data, pixels, width, height) != 0
        for rendering in range(len(sizes)):
            size = sizes[rendering]
            place = places[rendering] + row * size * size * 3
            box, flip = boxes[rendering, row], flips[rendering, row]
            if failed[row]:
                out[place : place + size * size * 3] = 0
            elif raw[row]:
                _render(file, pointers[row], height, width, box, flip, size, out, place, tile, total)
            else:
                _render(pixels, 0, height, width, box, flip, size, out, place, tile, total)
