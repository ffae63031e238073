/* Decodes a box of a JPEG with libjpeg-turbo: the same pixels as decoding all of it, for less work.
 *
 * Above the box only Huffman codes are read, beside it nothing is transformed, and below it nothing is read at all.
 * TurboJPEG has this from version 3 (tj3SetCroppingRegion); Debian and Ubuntu ship 2.1.
 *
 * Called from compiled code, without the GIL (renderer_kernel.py). The module's one attribute is the address.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#ifndef LIBJPEG_TURBO_VERSION
#error "needs libjpeg-turbo's jpeglib.h"
#endif

/* Upsampling blends neighbouring chroma samples, of two pixels each, and a crop's first and last column are blended as
 * if they were the image's own. (Rows: the library reads the neighbours itself.) */
#define MARGIN 2
#define ROWS 16 /* handed over at a time */

struct errors {
    struct jpeg_error_mgr manager;
    jmp_buf escape;
};

static void give_up(j_common_ptr info) { longjmp(((struct errors *)info->err)->escape, 1); }

static void on_message(j_common_ptr info, int level) {
    if (level < 0) /* a warning: the data is damaged */
        give_up(info);
}

static int ends_with_marker(const uint8_t *data, int64_t length) {
    return length >= 2 && data[length - 2] == 0xFF && data[length - 1] == JPEG_EOI;
}

/* Decode a box of the JPEG `data`, of height x width pixels, to RGB.
 *
 * box: top, left, height, width of what is wanted, inside the image. Overwritten with the part that `out` then holds,
 * row by row: at least the box, at most the image.
 *
 * Returns 0, or -1 if the part that was read is damaged, or the image is of another size. A file that does not end as
 * a JPEG does is read to its end, so that a cut one is noticed whatever the box.
 */
static int decode_box(const uint8_t *data, int64_t length, uint8_t *out, int32_t height, int32_t width, int32_t *box) {
    struct jpeg_decompress_struct info;
    struct errors errors;

    memset(&info, 0, sizeof info);
    info.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = give_up;
    errors.manager.emit_message = on_message;
    if (setjmp(errors.escape)) {
        jpeg_destroy_decompress(&info);
        return -1;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, data, (unsigned long)length);
    jpeg_read_header(&info, TRUE);
    if (info.image_height != (JDIMENSION)height || info.image_width != (JDIMENSION)width)
        give_up((j_common_ptr)&info);
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);

    JDIMENSION top = 0, bottom = height, left = 0, columns = width;
    if (!jpeg_has_multiple_scans(&info)) { /* of progressive files everything has been read by now */
        JDIMENSION right = box[1] + box[3] + MARGIN < width ? box[1] + box[3] + MARGIN : width;
        top = box[0] - box[0] % (info.max_v_samp_factor * DCTSIZE); /* whole rows of blocks */
        if (ends_with_marker(data, length))
            bottom = box[0] + box[2];
        left = box[1] > MARGIN ? box[1] - MARGIN : 0;
        columns = right - left;
        if (columns < (JDIMENSION)width)
            jpeg_crop_scanline(&info, &left, &columns); /* moves both outwards, to whole blocks */
        if (top > 0)
            jpeg_skip_scanlines(&info, top);
    }
    while (info.output_scanline < bottom) {
        JSAMPROW rows[ROWS];
        JDIMENSION count = 0;
        for (; count < ROWS && info.output_scanline + count < bottom; count++)
            rows[count] = out + (size_t)(info.output_scanline + count - top) * columns * 3;
        jpeg_read_scanlines(&info, rows, count);
    }
    if (bottom == (JDIMENSION)height)
        jpeg_finish_decompress(&info); /* warns of what is missing */
    jpeg_destroy_decompress(&info);
    box[0] = top, box[1] = left, box[2] = bottom - top, box[3] = columns;
    return 0;
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "jpeg_box", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_jpeg_box(void) {
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddObject(made, "decode_box", PyLong_FromVoidPtr((void *)decode_box)) < 0) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
