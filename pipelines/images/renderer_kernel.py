"""The compiled inner loop of the CPU loaders: decode, crop, resize, mirror, without the GIL.

JPEGs are decoded by libjpeg-turbo with the accurate DCT: pixels equal to Pillow's and torchvision's, at the speed of
FFCV's fast DCT (a difference of 1 of 255 on average). Only the box that is shown is decoded where jpeg_box.c was built,
the whole image by TurboJPEG elsewhere. Resizing repeats resize.py bit by bit. So all loaders give the same bytes from
the same stored pixels. FFCV's own resize is OpenCV's INTER_AREA, which is a box filter when it shrinks
and nearly nearest-neighbour when it enlarges: teachers tell the difference.

Compiled once a machine and cached by numba. Nothing here depends on the data set, the epoch or the
output size, so nothing is ever compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Bits after the binary point of a weight, at most. torch chooses them for each axis so that 16-bit weights do not
# overflow, and rounds to that.
_BITS = 22
_COMPILED: dict[str, Any] = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}


@intrinsic
def _decompress(typing: Any, address: Any, handle: Any, data: Any, out: Any, width: Any, height: Any) -> Any:
    """tjDecompress2(handle, data, len(data), out, width, 0, height, TJPF_RGB, 0), at `address`."""
    signature = types.int32(types.intp, types.intp, data, out, types.intc, types.intc)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, handle, data, out, width, height = args
        source = context.make_array(signature.args[2])(context, builder, data)
        target = context.make_array(signature.args[3])(context, builder, out)
        zero = ir.Constant(ir.IntType(32), 0)
        given = [builder.inttoptr(handle, _POINTER), source.data, source.nitems, target.data]
        return _call(builder, address, [*given, width, zero, height, zero, zero])

    return signature, generate


@intrinsic
def _decode_box(typing: Any, address: Any, data: Any, out: Any, height: Any, width: Any, box: Any) -> Any:
    """decode_box(data, len(data), out, height, width, box) of jpeg_box.c, at `address`."""
    signature = types.int32(types.intp, data, out, types.intc, types.intc, box)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, data, out, height, width, box = args
        source = context.make_array(signature.args[1])(context, builder, data)
        target = context.make_array(signature.args[2])(context, builder, out)
        part = context.make_array(signature.args[5])(context, builder, box)
        return _call(builder, address, [source.data, source.nitems, target.data, height, width, part.data])

    return signature, generate


_POINTER = ir.IntType(8).as_pointer()


def _call(builder: Any, address: Any, args: list[Any]) -> Any:
    """A C function that returns an int.

    By address and not by ctypes object, whose address would be compiled in and forbid caching.
    """
    kind = ir.FunctionType(ir.IntType(32), [each.type for each in args])
    return builder.call(builder.inttoptr(address, kind.as_pointer()), args)


@intrinsic
def _blend_pixel(
    typing: Any,
    source: Any,
    start: Any,
    weights: Any,
    first: Any,
    taps: Any,
    bits: Any,
    target: Any,
    place: Any,
) -> Any:
    """target[place : place + 3] = sum over k of weights[first + k] * source[start + 3k : start + 3k + 3], rounded.

    Two taps at a time, so there must be an even number of them: bytes of both, side by side as 16-bit numbers,
    times both weights, added in pairs, are one instruction (pmaddwd on x86). Reads two bytes beyond the last tap and
    writes one beyond the pixel.
    """
    signature = types.void(source, types.intp, weights, types.intp, types.intp, types.int32, target, types.intp)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, start, weights, first, taps, bits, target, place = args
        pixels = _address(context, builder, signature.args[0], source, start)
        factors = _address(context, builder, signature.args[2], weights, first)
        zero = ir.Constant(_vector(8, 8), [0] * 8)

        def products(tap: Any) -> Any:
            two = _load(builder, pixels, builder.mul(tap, ir.Constant(_I64, 3)), _vector(8, 8))  # R G B R G B . .
            pairs = _shuffle(builder, two, zero, (0, 8, 3, 8, 1, 8, 4, 8, 2, 8, 5, 8, 8, 8, 8, 8))
            both = builder.bitcast(_load(builder, factors, tap, _vector(2, 16)), ir.IntType(32))
            factor = builder.bitcast(_splat(builder, both, 4), _vector(8, 16))
            found = builder.mul(
                builder.sext(builder.bitcast(pairs, _vector(8, 16)), _vector(8, 32)),
                builder.sext(factor, _vector(8, 32)),
            )
            return builder.add(*(_shuffle(builder, found, found, range(part, 8, 2)) for part in (0, 1)))

        out = _address(context, builder, signature.args[6], target, place)
        _store_sum(builder, products, 4, taps, bits, out)
        return context.get_dummy_value()

    return signature, generate


_WIDE = 16  # bytes that _blend_wide makes at once


@intrinsic
def _blend_wide(
    typing: Any, source: Any, start: Any, stride: Any, weights: Any, taps: Any, bits: Any, target: Any, place: Any
) -> Any:
    """target[place : place + 16] = sum over k of weights[k] * source[start + k * stride :][: 16], rounded.

    An even number of taps.
    """
    signature = types.void(source, types.intp, types.intp, weights, types.intp, types.int32, target, types.intp)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, start, stride, weights, taps, bits, target, place = args
        rows = _address(context, builder, signature.args[0], source, start)
        factors = _address(context, builder, signature.args[3], weights, ir.Constant(_I64, 0))

        def product(tap: Any) -> Any:
            row = builder.zext(
                _load(builder, rows, builder.mul(tap, stride), _vector(_WIDE, 8)), _vector(_WIDE, 32)
            )
            weight = builder.sext(_load(builder, factors, tap, ir.IntType(16)), ir.IntType(32))
            return builder.mul(row, _splat(builder, weight, _WIDE))

        def products(tap: Any) -> Any:
            return builder.add(product(tap), product(builder.add(tap, ir.Constant(_I64, 1))))

        out = _address(context, builder, signature.args[6], target, place)
        _store_sum(builder, products, _WIDE, taps, bits, out)
        return context.get_dummy_value()

    return signature, generate


# What the two are made of. numba has no vectors of its own, and its compiler does not find these.
_I64 = ir.IntType(64)


def _vector(count: int, bits: int) -> Any:
    return ir.VectorType(ir.IntType(bits), count)


def _shuffle(builder: Any, first: Any, second: Any, indices: Iterable[int]) -> Any:
    numbers = list(indices)
    return builder.shuffle_vector(first, second, ir.Constant(_vector(len(numbers), 32), numbers))


def _splat(builder: Any, value: Any, count: int) -> Any:
    """`count` times a 32-bit number."""
    nothing = ir.Constant(_vector(count, 32), ir.Undefined)
    return _shuffle(
        builder, builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0)), nothing, [0] * count
    )


def _address(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    """Of array[offset]."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [offset])


def _load(builder: Any, base: Any, offset: Any, kind: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(base, [offset]), kind.as_pointer()), align=1)


def _store_sum(builder: Any, products: Callable[[Any], Any], lanes: int, taps: Any, bits: Any, out: Any) -> None:
    """Store the sum of products(0), products(2), ... as `lanes` bytes, rounded, without its `bits` after the point."""
    half = builder.shl(ir.Constant(ir.IntType(32), 1), builder.sub(bits, ir.Constant(ir.IntType(32), 1)))
    start = _splat(builder, half, lanes)
    before = builder.block
    loop, after = builder.append_basic_block("taps"), builder.append_basic_block("store")
    builder.branch(loop)

    builder.position_at_end(loop)
    tap, total = builder.phi(_I64), builder.phi(_vector(lanes, 32))
    new_total = builder.add(total, products(tap))
    next_tap = builder.add(tap, ir.Constant(_I64, 2))
    tap.add_incoming(ir.Constant(_I64, 0), before)
    tap.add_incoming(next_tap, loop)
    total.add_incoming(start, before)
    total.add_incoming(new_total, loop)
    builder.cbranch(builder.icmp_signed("<", next_tap, taps), loop, after)

    builder.position_at_end(after)
    rounded = builder.trunc(builder.lshr(new_total, _splat(builder, bits, lanes)), _vector(lanes, 8))
    builder.store(rounded, builder.bitcast(out, _vector(lanes, 8).as_pointer()), align=1)


@njit(**_COMPILED)
def _filter(crop, start, extent, size):  # type: ignore[no-untyped-def]
    """The triangle filter that resizes `crop` pixels, of which the first is `start`, to `size`.

    Pixels outside 0 .. extent are black: their weights count when normalising and are then left out. Every
    output pixel gets as many taps, an even number, so that the inner loop's length never changes.

    Returns first [size], where each output pixel's taps start in the image; weights int16 [size, taps]; and their
    bits after the binary point, int32.
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
    taps += taps % 2
    first = np.empty(size, np.int64)
    weights = np.zeros((size, taps), np.int16)
    for row in range(size):
        first[row] = max(min(begin[row] + start, extent - taps), 0)
        for position in range(max(begin[row] + start, 0), min(end[row] + start, extent)):
            rounded = int(0.5 + exact[row, position - start - begin[row]] * (1 << bits))
            weights[row, position - first[row]] = rounded
    return first, weights, np.int32(bits)


@njit(**_COMPILED)
def _blend_rows(out, start, length, tile, first, weights, bits):  # type: ignore[no-untyped-def]
    """out[start : start + length] = sum over k of weights[k] * row number first + k of `tile`, rounded."""
    taps, row = len(weights), first * length
    whole = length - length % _WIDE
    for at in range(0, whole, _WIDE):
        _blend_wide(tile, row + at, length, weights, taps, bits, out, start + at)
    for at in range(whole, length):
        value = 1 << (bits - 1)
        for tap in range(taps):
            value += weights[tap] * tile[row + tap * length + at]
        out[start + at] = value >> bits


@njit(**_COMPILED)
def _render(image, offset, part, box, flip, size, out, place, tile):  # type: ignore[no-untyped-def]
    """Crop, resize and mirror one image into out[place:].

    Of the image, image[offset:] holds `part` (top, left, height, width), which is all that `box` shows.
    """
    top, left, crop_height, crop_width = int(box[0] - part[0]), int(box[1] - part[1]), int(box[2]), int(box[3])
    height, width = int(part[2]), int(part[3])
    length = size * 3
    upper, lower = max(top, 0), min(top + crop_height, height)
    if upper >= lower or left >= width or left + crop_width <= 0:
        out[place : place + size * length] = 0
        return
    first, weights, bits = _filter(crop_width, left, width, size)
    if flip:
        first, weights = first[::-1].copy(), weights[::-1].copy()
    taps = weights.shape[1]
    flat = weights.reshape(weights.size)
    for row in range(upper, lower):
        start = offset + row * width * 3
        for x in range(size):  # ascending: the fourth byte of a pixel is the next one's, written after it
            target = ((row - upper) * size + x) * 3
            _blend_pixel(image, start + first[x] * 3, flat, x * taps, taps, bits, tile, target)
    first, weights, bits = _filter(crop_height, top - upper, lower - upper, size)
    for y in range(size):
        _blend_rows(out, place + y * length, length, tile, first[y], weights[y], bits)


@njit(**_COMPILED)
def _shown_part(boxes, row, height, width, part):  # type: ignore[no-untyped-def]
    """Into `part`: what boxes[:, row] show of an image (top, left, height, width); all of it if they show nothing."""
    top, left, bottom, right = height, width, 0, 0
    for each in range(len(boxes)):
        box = boxes[each, row]
        upper, lower = max(int(box[0]), 0), min(int(box[0]) + int(box[2]), height)
        first, last = max(int(box[1]), 0), min(int(box[1]) + int(box[3]), width)
        if upper < lower and first < last:
            top, left, bottom, right = min(top, upper), min(left, first), max(bottom, lower), max(right, last)
    if top < bottom:
        part[0], part[1], part[2], part[3] = top, left, bottom - top, right - left
    else:
        part[0], part[1], part[2], part[3] = 0, 0, height, width


# Frame headers (ITU T.81, table B.1) that TurboJPEG and every other decoder knows: Huffman, 8 bits; C2 is progressive.
_SOF0, _SOF2, _SOS = 0xC0, 0xC2, 0xDA


@njit(**_COMPILED)
def _is_ordinary(data, height, width):  # type: ignore[no-untyped-def]
    """Whether `data` begins like a JPEG of this size, in gray or three colours: one that TurboJPEG shows as all do."""
    if len(data) < 2 or data[0] != 0xFF or data[1] != 0xD8:
        return False
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] != _SOS:
        if data[at + 1] == 0xFF:  # fill byte
            at += 1
        elif _SOF0 <= data[at + 1] <= _SOF2:
            rows, columns = _two_bytes(data, at + 5), _two_bytes(data, at + 7)
            return data[at + 4] == 8 and rows == height and columns == width and data[at + 9] in (1, 3)
        else:
            at += 2 + _two_bytes(data, at + 2)
    return False


@njit(**_COMPILED)
def _two_bytes(data, at):  # type: ignore[no-untyped-def]
    return (np.int64(data[at]) << 8) + np.int64(data[at + 1])


_BYTES = types.uint8[::1]
_FILE = types.Array(types.uint8, 1, "C", readonly=True)
_INTS = types.int64[::1]
_SIGNATURE = types.void(
    types.intp,
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
)


@njit(_SIGNATURE, **_COMPILED)
def render_samples(  # type: ignore[no-untyped-def]
    decode_box,
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
):
    """Render n samples into `out`; what libjpeg-turbo cannot decode without a warning is black and marked in `failed`.

    Args:
        decode_box: address of jpeg_box.c's function, or 0: then whole images are decoded, by TurboJPEG.
        decompress: address of tjDecompress2.
        handle: TurboJPEG decompressor of this thread.
        file: all encoded images, uint8 [bytes]. Up to five bytes beyond a raw image are read.
        pointers, lengths: int64 [n], each image in the file.
        stored: int32 [n, 2], heights and widths.
        raw: bool [n], raw pixels rather than JPEG.
        boxes, flips: int32 [R, n, 4] and bool [R, n], of R renderings.
        sizes: int64 [R], output pixels.
        out: uint8, gets images [size, size, 3]; rendering r starts at places[r], int64 [R].
        failed: bool [n], written.
        pixels: scratch for a decoded image: eight bytes more than the largest has.
        tile: scratch: one byte more than (1 + rows of the tallest image) * (largest size) * 3.
    """
    part = np.empty(4, np.int32)
    for row in range(len(pointers)):
        height, width = int(stored[row, 0]), int(stored[row, 1])
        data = file[pointers[row] : pointers[row] + lengths[row]]
        part[0], part[1], part[2], part[3] = 0, 0, height, width
        if raw[row]:
            failed[row] = False
        elif not _is_ordinary(data, height, width):
            failed[row] = True
        elif decode_box:
            _shown_part(boxes, row, height, width, part)
            failed[row] = _decode_box(decode_box, data, pixels, height, width, part) != 0
        else:
            failed[row] = _decompress(decompress, handle, data, pixels, width, height) != 0
        for each in range(len(sizes)):
            size = sizes[each]
            place = places[each] + row * size * size * 3
            box, flip = boxes[each, row], flips[each, row]
            if failed[row]:
                out[place : place + size * size * 3] = 0
            elif raw[row]:
                _render(file, pointers[row], part, box, flip, size, out, place, tile)
            else:
                _render(pixels, 0, part, box, flip, size, out, place, tile)
