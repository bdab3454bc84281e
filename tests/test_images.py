"""Odd metadata, all sorts of archives and folders, trouble of the machine, other systems.

Files are put together by hand with struct and zlib; what they show is worked out by hand, too.
"""
import errno
import io
import os
import pickle
import struct
import tempfile
import unittest.mock
import warnings
import zipfile
import zlib

from tests.helpers import peak, picture, picture_folder, raises, run, windows_like

import numpy as np
import torch
from PIL import Image

import data
from tools.script import machines_trouble

LOOKS_AT = {  # EXIF's orientation -> which stored (row, column) of H x W pixels is shown at (r, c)
    1: lambda r, c, H, W: (r, c), 2: lambda r, c, H, W: (r, W - 1 - c),
    3: lambda r, c, H, W: (H - 1 - r, W - 1 - c), 4: lambda r, c, H, W: (H - 1 - r, c),
    5: lambda r, c, H, W: (c, r), 6: lambda r, c, H, W: (H - 1 - c, r),
    7: lambda r, c, H, W: (H - 1 - c, W - 1 - r), 8: lambda r, c, H, W: (c, W - 1 - r)}


def turned(x, orientation):
    """Pixels (H, W, 3) as a viewer shows them."""
    H, W = x.shape[:2]
    h, w = (W, H) if orientation > 4 else (H, W)
    return np.array([[x[LOOKS_AT[orientation](r, c, H, W)] for c in range(w)] for r in range(h)])


def shown(blob, short=None):
    return np.array(data.load_image(io.BytesIO(blob), short))


def tiff(order, *entries, after=b""):
    """A TIFF file, or EXIF data: entries (tag, type, count, value or offset), and bytes behind the directory."""
    blob = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, 8, len(entries))
    for tag, kind, count, value in entries:
        packed = {1: "BBH", 3: "HH"}.get(kind, "I") if count == 1 else "I"  # small values stand at the left
        value = struct.pack(order + packed, value, *(len(packed) - 1) * [0])
        blob += struct.pack(order + "HHI", tag, kind, count) + value
    return blob + bytes(4) + after


def odd_exif(orientation):
    """EXIF data that hold the tag 274 among what a reader may choke on."""
    for order in "<>":
        turn = (274, 3, 1, orientation)
        at = 8 + 2 + 2 * 12 + 4  # behind a directory of two entries
        yield tiff(order, turn, (282, 10, 1, at), after=struct.pack(order + "ii", -72, 1))  # a negative resolution
        yield tiff(order, turn, (282, 5, 1, at), after=struct.pack(order + "II", 72, 0))  # divided by zero
        yield tiff(order, turn, (282, 5, 2 ** 32 - 1, at))
        yield tiff(order, turn, (282, 2, 1, 0), (296, 3, 1, 2))  # a resolution that is an empty text
        yield tiff(order, (270, 2, 100, 2 ** 32 - 1), turn)  # a description beyond the end
        yield tiff(order, (270, 2, 2 ** 31, 0), (271, 99, 1, 0), turn, (34665, 4, 1, 8), (34853, 13, 9, 2 ** 31))
        yield tiff(order, turn, (34665, 2, 4, 0), (34853, 12, 1, 1))  # addresses that are text and a number
        yield tiff(order, (256, 12, 3, 2 ** 32 - 1), turn)[:-6]  # cut off soon after
        yield tiff(order, (274, 4, 1, orientation))  # a long integer
        yield tiff(order, (274, 1, 1, orientation))  # a byte
        yield b"Exif\0\0" + tiff(order, turn)  # marked twice


def jpeg_with(blob, *segments):
    """A JPEG with (marker, content) segments before all others."""
    return blob[:2] + b"".join(b"\xff" + bytes([m]) + struct.pack(">H", len(x) + 2) + x for m, x in segments) + blob[2:]


def png_with(depth, colour, width, height, rows, *chunks, after=()):
    """A PNG of rows of bytes, with (kind, content) chunks before and after the pixels."""
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    blob = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), *chunks, (b"IDAT", pixels), *after, (b"IEND", b"")):
        blob += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return blob


def test_odd_metadata_cost_no_picture():
    f, rgb = io.BytesIO(), picture(1, 16, 24)
    rgb.save(f, "JPEG", quality=95)
    plain, raw = f.getvalue(), np.array(rgb)
    stored = np.array(Image.open(f))
    rows = [row.tobytes() for row in raw]
    for orientation in LOOKS_AT:
        for exif in odd_exif(orientation):
            got = shown(jpeg_with(plain, (0xE1, b"Exif\0\0" + exif)))
            assert np.array_equal(got, turned(stored, orientation)), f"JPEG, orientation {orientation}: {exif}"
            got = shown(png_with(8, 2, 16, 24, rows, (b"eXIf", exif)))
            assert np.array_equal(got, turned(raw, orientation)), f"PNG, orientation {orientation}: {exif}"
        for file, how in ("WEBP", {"lossless": True}), ("TIFF", {}):
            exif = Image.Exif()
            exif[274] = orientation
            rgb.save(f := io.BytesIO(), file, exif=exif, **how)
            assert np.array_equal(shown(f.getvalue()), turned(raw, orientation)), f"{file}, orientation {orientation}"
    for exif in (b"", b"no EXIF", b"II*\0", bytes(100), tiff("<", (274, 3, 1, 9)), tiff("<", (274, 2, 40, 6)),
                 tiff("<", (274, 3, 1, 6))[:15]):
        assert np.array_equal(shown(jpeg_with(plain, (0xE1, b"Exif\0\0" + exif))), stored), f"no orientation: {exif}"
    # other segments of a JPEG: an index of several pictures, Photoshop's, a colour profile, text, in pieces or torn
    index = tiff("<", (0xB000, 7, 4, 0), (0xB001, 4, 1, 3), (0xB002, 7, 16, 0))
    segments = [(0xE2, b"MPF\0" + index), (0xE2, b"MPF\0II*\0"),
                (0xED, b"Photoshop 3.0\0008BIM\x03\xed\0\0\xff\xff\xff\xff"), (0xFE, b"\xff\0"),
                (0xE2, b"ICC_PROFILE\0\x01\x09abc"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x")]
    for some in (*([s] for s in segments), segments):
        assert np.array_equal(shown(jpeg_with(plain, *some)), stored), some
        exif = 0xE1, b"Exif\0\0" + tiff("<", (274, 3, 1, 6))  # behind them it still turns the picture
        assert np.array_equal(shown(jpeg_with(plain, *some, exif)), turned(stored, 6)), some
    large = picture(2, 640, 480)
    for kind in "RGB", "CMYK":  # Adobe's segment stays: without it the colours would be others
        large.convert(kind).save(f := io.BytesIO(), "JPEG")
        odd = jpeg_with(f.getvalue(), *segments)
        assert np.array_equal(shown(odd), np.array(Image.open(f).convert("RGB")))
        assert shown(odd, 70).shape == (240, 320, 3)
    # three channels numbered 1, 2, 3 are taken for YCbCr, unless Adobe's segment says that they are red, green, blue
    Image.new("RGB", (16, 16), (200, 30, 40)).save(f := io.BytesIO(), "JPEG", quality=100, keep_rgb=True)
    blob = f.getvalue()
    frame, scan = blob.index(b"\xff\xc0") + 10, blob.index(b"\xff\xda") + 5
    blob = bytearray(blob)
    for k in range(3):
        assert blob[frame + 3 * k] == blob[scan + 2 * k] == b"RGB"[k]
        blob[frame + 3 * k] = blob[scan + 2 * k] = k + 1
    assert abs(shown(bytes(blob)).astype(int) - (200, 30, 40)).max() <= 1
    # of two EXIF segments the first counts, as for PIL, which appends the second to it
    first, second = (tiff("<", (274, 3, 1, n)) for n in (6, 3))
    twice = jpeg_with(plain, (0xE1, b"Exif\0\0" + first), (0xE1, b"Exif\0\0" + second))
    assert np.array_equal(shown(twice), turned(stored, 6)) and Image.open(io.BytesIO(twice)).getexif()[274] == 6
    for compression in "tiff_lzw", "tiff_adobe_deflate":  # whose rows may be kept as differences
        rgb.save(g := io.BytesIO(), "TIFF", compression=compression, tiffinfo={317: 2})
        assert Image.open(g).tag_v2[317] == 2 and np.array_equal(shown(g.getvalue()), raw), compression
    large.save(f := io.BytesIO(), "MPO", save_all=True, append_images=[rgb])  # of a phone: the first picture
    large.save(g := io.BytesIO(), "JPEG")
    assert np.array_equal(shown(f.getvalue()), np.array(Image.open(g)))
    # chunks of a PNG that are large, inflate to much or are wrong
    bomb, profile, mega = (zlib.compress(bytes(n), 9) for n in (2 ** 26, 3_000_000, 2 ** 20 - 1))
    before = peak()
    for name, chunks in {"text": [(b"zTXt", b"a\0\0" + bomb)], "profile": [(b"iCCP", b"a\0\0" + bomb)],
                         "a usual profile": [(b"iCCP", b"a\0\0" + profile)], "method": [(b"iCCP", b"a\0\7" + profile)],
                         "in all": [(b"zTXt", b"a\0\0" + mega)] * 70,
                         "plain": [(b"tEXt", b"a\0" + bytes(9_000_000))] * 8,
                         "international": [(b"iTXt", b"a\0\1\0\0\0" + bomb)],
                         "torn": [(b"gAMA", b"1"), (b"pHYs", b""), (b"eXIf", b"no"), (b"cHRM", b"1"), (b"sRGB", b"")],
                         }.items():
        assert np.array_equal(shown(png_with(8, 2, 16, 24, rows, *chunks)), raw), name
        assert np.array_equal(shown(png_with(8, 2, 16, 24, rows, after=chunks)), raw), f"{name}, after the pixels"
    assert peak() < before + 300, "no bomb may go off"
    for entry in ((34665, 4, 1, 2 ** 32 - 1), (34853, 12, 1, 6), (282, 10, 1, 2 ** 31), (700, 99, 2 ** 31, 8),
                  (305, 2, 2 ** 32 - 1, 0)):
        blob = tiff("<", (256, 3, 1, 16), (257, 3, 1, 24), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2),
                    (273, 4, 1, 140), (274, 3, 1, 8), (277, 3, 1, 3), (279, 4, 1, raw.size), entry,
                    after=struct.pack("<HHH", 8, 8, 8) + raw.tobytes())
        assert blob.index(struct.pack("<HHH", 8, 8, 8)) == 134
        assert np.array_equal(shown(blob), turned(raw, 8)), f"a TIFF with {entry}"
    raises(data.UserError, data.load_image, io.BytesIO(plain[:200]), words="cannot be read as an image")


def test_deep_and_transparent_pictures_by_hand():
    def grey(order, bits, pixels, white_is_zero=0, kind=1, packed=0):
        """A grey TIFF of one row, its bytes given; kind: 1 unsigned, 2 signed, 3 with a point."""
        pixels = zlib.compress(pixels) if packed else pixels
        return tiff(order, (256, 3, 1, 4), (257, 3, 1, 1), (258, 3, 1, bits), (259, 3, 1, 8 if packed else 1),
                    (262, 3, 1, 1 - white_is_zero), (273, 4, 1, 134), (277, 3, 1, 1), (278, 3, 1, 1),
                    (279, 4, 1, len(pixels)), (339, 3, 1, kind), after=pixels)

    def levels(*what):
        return shown(grey(*what))[0, :, 0].tolist()
    for order in "<>":
        for packed in 0, 1:
            about = f"{order}, {'deflated' if packed else 'raw'}"
            deep = struct.pack(order + "4H", 0, 1000, 32768, 65535)
            signed = struct.pack(order + "4h", -32768, -1, 0, 32767)
            assert levels(order, 16, deep, 0, 1, packed) == [0, 3, 128, 255], about
            assert levels(order, 16, deep, 1, 1, packed) == [255, 252, 127, 0], f"white at 0, {about}"
            assert levels(order, 16, signed, 0, 2, packed) == [0, 127, 128, 255], f"signed, {about}"
            assert levels(order, 16, signed, 1, 2, packed) == [255, 128, 127, 0], f"signed, white at 0, {about}"
            assert levels(order, 8, b"\0\x01\xf0\xff", 1, 1, packed) == [255, 254, 15, 0], f"8 bits, {about}"
            assert levels(order, 8, b"\x80\xff\0\x7f", 0, 2, packed) == [0, 127, 128, 255], f"8 bits, signed, {about}"
            assert levels(order, 1, b"\x50", 1, 1, packed) == [255, 0, 255, 0], f"1 bit, {about}"
    twelve = b"\x00\x08\x00\xff\xf1\x00"  # 0x000, 0x800, 0xfff, 0x100
    assert levels("<", 12, twelve) == [0, 128, 255, 16] and levels("<", 12, twelve, 1) == [255, 127, 0, 239], "12 bits"
    plain = tiff("<", (256, 3, 1, 4), (257, 3, 1, 1), (262, 3, 1, 0), (273, 4, 1, 74), (274, 3, 1, 3), after=b"\x30")
    assert shown(plain)[0, :, 0].tolist() == [0, 0, 255, 255], "1 bit by default; pixels 0011, white at 0, upside down"
    raises(data.UserError, levels, "<", 16, struct.pack("<4e", 0, 0.5, 1, 2), 0, 3, words="cannot be read")
    for kind in 1, 2, 3:
        raises(data.UserError, levels, "<", 32, bytes(16), 0, kind, words="32 bits a channel")
    # PNG: white where a pixel has the colour that is said to be transparent, compared at the depth of the file
    def row(depth, colour, pixels, clear):
        clear = struct.pack(f">{len(clear)}H", *clear)
        return shown(png_with(depth, colour, 4, 1, [pixels], (b"tRNS", clear)))[0].tolist()
    g = lambda *values: [[v] * 3 for v in values]
    assert row(1, 0, b"\x50", [0]) == g(255, 255, 255, 255) and row(1, 0, b"\x50", [1]) == g(0, 255, 0, 255)
    assert row(2, 0, b"\x1b", [2]) == g(0, 85, 255, 255) and row(2, 0, b"\x1b", [0]) == g(255, 85, 170, 255)
    assert row(4, 0, b"\x0f\x5a", [5]) == g(0, 255, 255, 170)
    assert row(8, 0, b"\0\x09\x55\xff", [9]) == g(0, 255, 85, 255)
    assert row(16, 0, struct.pack(">4H", 0, 0x1234, 0x12FF, 65535), [0x1234]) == g(0, 255, 0x12, 255)
    assert row(8, 2, bytes(range(12)), [3, 4, 5]) == [[0, 1, 2], [255] * 3, [6, 7, 8], [9, 10, 11]]
    deep = struct.pack(">12H", *(256 * v + 7 for v in range(12)))
    assert row(16, 2, deep, [256 * v + 7 for v in (3, 4, 5)]) == [[0, 1, 2], [255] * 3, [6, 7, 8], [9, 10, 11]]


def test_tiffs_whose_tags_lie_elsewhere_are_missing_or_long():
    rgb = bytes(range(12))
    for order in "<>":  # three depths, and three times "plain numbers", at an address that reads 2 in either half
        at = 0x20002
        blob = tiff(order, (256, 3, 1, 4), (257, 3, 1, 1), (258, 3, 3, at - 6), (259, 3, 1, 1), (262, 3, 1, 2),
                    (273, 4, 1, 134), (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 12), (339, 3, 3, at),
                    after=(rgb + bytes(at))[:at - 6 - 134] + struct.pack(order + "6H", 8, 8, 8, 1, 1, 1))
        assert shown(blob).tobytes() == rgb, f"{order}: the address 0x20002 is no 2, signed numbers"
    deep = (0, 1000, 32768, 65535)
    blob = tiff("<", (256, 3, 1, 4), (257, 3, 1, 1), (258, 3, 1, 16), (259, 3, 1, 1), (273, 4, 1, 110), (277, 3, 1, 1),
                (278, 3, 1, 1), (279, 4, 1, 8), after=struct.pack("<4H", *deep))
    assert shown(blob)[0, :, 0].tolist() == [0, 3, 128, 255], "no tag 262: the pixels behind the directory stay"
    entries = ((256, 3, 4), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 232), (277, 3, 1),
               (278, 3, 1), (279, 4, 8), (339, 3, 2))  # a BigTIFF
    blob = struct.pack("<2s3H2Q", b"II", 43, 8, 0, 16, 10)
    blob += b"".join(struct.pack("<HHQQ", tag, kind, 1, value) for tag, kind, value in entries)
    blob += bytes(8) + struct.pack("<4h", *(x - 32768 for x in deep))
    assert shown(blob)[0, :, 0].tolist() == [0, 3, 128, 255], "a BigTIFF of signed numbers"


def test_avif():
    if "AVIF" not in data.FORMATS:
        return
    rgb, exif = picture(3, 40, 24), Image.Exif()
    for orientation in LOOKS_AT:
        exif[274], exif[270] = orientation, "a description"
        rgb.save(f := io.BytesIO(), "AVIF", quality=100, subsampling="4:4:4", exif=exif)
        blob = f.getvalue()
        at = blob.index(b"MM\0*")
        for odd in (blob, blob[:at] + b"XX" + blob[at + 2:]):  # the second's EXIF is none
            error = np.abs(shown(odd).astype(int) - turned(np.array(rgb), orientation)).mean()
            assert error < 3, f"orientation {orientation}: {error}"


def test_archives_by_other_tools():
    png = lambda level: png_with(8, 0, 1, 1, [bytes([level])])
    with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings():
        path = os.path.join(tmp, "a.zip")

        def archive(*entries, system=0):
            with zipfile.ZipFile(path, "w") as z:
                for name, blob in entries:
                    info = zipfile.ZipInfo("x")
                    info.filename, info.create_system = name, system
                    z.writestr(info, blob)
            return data.ImageDataset(path, None, train=False)
        names = lambda a: [os.path.relpath(a.path(i), path) for i in range(len(a))]
        warnings.simplefilter("ignore")  # zipfile's, of a name that comes twice
        for system in 0, 3:  # Windows, and a script on Unix; names that are not ASCII carry the flag of UTF-8
            a = archive(("set\\dog\\b.png", png(1)), ("set\\cat\\a.png", png(2)), ("set/ünï/c.png", png(3)),
                        ("\\ünï\\d.png", png(4)), ("../cat/e.png", png(5)), ("cat\\f.png\\", b""), system=system)
            assert a.classes == ["cat", "dog", "ünï"] and names(a) == [
                "cat/e.png", "set/cat/a.png", "set/dog/b.png", "set/ünï/c.png", "ünï/d.png"], names(a)
            assert a.labels.tolist() == [0, 0, 1, 2, 2] and [int(img[0]) for img, _ in a] == [5, 2, 1, 3, 4]
        a = archive(("c/a.png", png(1)), ("c/b.png", png(2)), ("c/a.png", b"meanwhile"), ("c\\a.png", png(3)))
        assert names(a) == ["c/a.png", "c/b.png"] and [int(img[0]) for img, _ in a] == [3, 2], "the last counts"
        good = [("cat/a.png", png(1))]
        hidden = [".thumbnails/a.png", "cat/.ipynb_checkpoints/a.png", "__MACOSX/cat/a.png", "__MACOSX/cat/._a.png",
                  "cat/@eaDir/a.png/S.png", ".cache\\x\\a.png", "cat/.b.png", "cat/._a.png"]
        a = archive(*good, *((name, b"") for name in hidden))
        assert names(a) == ["cat/a.png"] and a.classes == ["cat"]
        raises(data.UserError, archive, *((name, b"") for name in hidden), words="holds no images")

        # a locale that knows ASCII alone: the same names, order and classes as here
        folder = os.path.join(tmp, "pictures")
        raw = {b"caf\xc3\xa9/a.png": png(1), b"\xe4\xb8\xad/b.png": png(2), b"no \xff text/c.png": png(3)}
        for name, blob in raw.items():
            name = os.path.join(os.fsencode(folder), name)
            os.makedirs(os.path.dirname(name))
            open(name, "wb").write(blob)
        archive(*((name.decode(), blob) for name, blob in raw.items() if b"\xff" not in name))
        script = os.path.join(tmp, "names.py")
        open(script, "w").write(f"""
import sys, data
for root in {[folder, path]!r}:
    a = data.ImageDataset(root, None, False)
    print(a.names, ascii(a.classes), [(int(x[0, 0, 0]), label) for x, label in a])
print(sys.getfilesystemencoding())
""")
        done = run("python", "-c", f"import runpy; runpy.run_path({script!r})",
                   LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        all_names, two_names = b"".join(sorted(raw)), b"".join(sorted(n for n in raw if b"\xff" not in n))
        assert done.stdout.splitlines() == [
            f"{all_names} {ascii(['café', 'no {}xff text'.format(chr(92)), '中'])} [(1, 0), (3, 1), (2, 2)]",
            f"{two_names} {ascii(['café', '中'])} [(1, 0), (2, 1)]", "ascii"], done.stdout + done.stderr


def test_archives_that_are_encrypted_or_inflate_to_too_much():
    with tempfile.TemporaryDirectory() as tmp:
        for method in zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2:
            path = os.path.join(tmp, f"{method}.zip")
            with zipfile.ZipFile(path, "w", method) as z:
                z.writestr("large.png", png_with(8, 0, 4, 4, [bytes(4)] * 4) + bytes(20_000))
            if method == zipfile.ZIP_BZIP2:
                raises(data.UserError, data.ImageDataset, path, None, False, words=["large.png", "unknown method"])
                continue
            assert data.ImageDataset(path, None, train=False)[0][0].shape == (3, 4, 4), "what follows IEND is nothing"
            with unittest.mock.patch.object(data, "MAX_BYTES", 10_000):  # 20,000 bytes, packed or not
                words = ["large.png", "10,001 bytes long" if method else "bytes long", "at most 10,000"]
                raises(data.UserError, data.ImageDataset(path, None, train=False).__getitem__, 0, words=words)
            blob = bytearray(open(path, "rb").read())
            at = blob.rindex(b"PK\x01\x02") + 42  # where the directory says that the entry begins, APPNOTE 4.3.12
            open(path, "wb").write(blob[:at] + struct.pack("<I", 2 ** 31) + blob[at + 4:])
            raises(data.UserError, data.ImageDataset, path, None, False,
                   words=f"{path} is a damaged .zip archive: its entry large.png lies outside of the file")
            blob[blob.rindex(b"PK\x01\x02") + 8] |= 1  # the general purpose flag's first bit, APPNOTE 4.4.4
            open(path, "wb").write(blob)
            raises(data.UserError, data.ImageDataset, path, None, False, words=["large.png", "encrypted"])


def test_folders_that_are_no_classes():
    with tempfile.TemporaryDirectory() as tmp:
        root = os.path.join(tmp, ".hidden", "set")  # that the root is hidden is the user's choice
        for name in ("cat/a.png", "cat/b.png", "cat/._a.png", "cat/.c.png", "cat/.ipynb_checkpoints/a.png",
                     "cat/@eaDir/a.png", ".thumbnails/a.png", "@eaDir/a.png/x.png", "__MACOSX/a.png",
                     "lost+found/a.png", "more/zebra/d.png"):
            os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
            picture(0).save(os.path.join(root, name))
        outside = os.path.join(tmp, "outside")
        os.makedirs(outside)
        picture(1).save(os.path.join(outside, "e.png"))
        for link in "second", "first", "third":
            os.symlink(outside, os.path.join(root, link))
        os.symlink(root, os.path.join(root, "more", "cycle"))
        os.symlink("self", os.path.join(root, "self"))
        expected = ["cat/a.png", "cat/b.png", "first/e.png", "more/zebra/d.png"]
        scandir = os.scandir

        class Listing(list):  # in another order than a disk's
            __enter__, __exit__ = lambda self: self, lambda self, *_: None
            __next__ = lambda self: self.pop() if self else next(iter(()))
        for key in (lambda e: e.name), (lambda e: e.name[::-1]), (lambda e: [-ord(c) for c in e.name]):
            with unittest.mock.patch("os.scandir", lambda path: Listing(sorted(scandir(path), key=key))):
                a = data.ImageDataset(root, 16, train=False)
                assert [name for name, *_ in data.list_folder(root)] == expected, "in the same order on all nodes"
            assert [os.path.relpath(a.path(i), root) for i in range(len(a))] == expected
            assert a.classes == ["cat", "first", "zebra"] and a.labels.tolist() == [0, 0, 1, 2]


class Flaky:
    """Stands for a function that fails `times` times with the error number, from the worker's first call on."""

    def __init__(self, function, code, times):
        self.function, self.code, self.times = function, code, times

    def __call__(self, *args):
        if self.times > 0:
            self.times -= 1
            raise MemoryError if self.code is None else OSError(self.code, os.strerror(self.code))
        return self.function(*args)


def test_only_its_own_damage_replaces_a_picture():
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(data, "WAITS", (0.001, 0.001, 0.001)):
        folder, archive = picture_folder(tmp)
        right = data.ImageDataset(folder, 16, train=True)
        right = [right[n] for n in range(10)]
        machines = [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOTCONN,
                    errno.EAGAIN, None]
        for root, place, name in ((folder, data.os, "stat"), (folder, data, "read_file"), (archive, data, "open"),
                                  (archive, data, "open_image")):
            function = getattr(place, name, open)
            for code in machines:
                if code is not None and name == "open_image" or code is None and name == "stat":
                    continue
                train_set = data.ImageDataset(root, 16, train=True)
                with unittest.mock.patch.object(place, name, Flaky(function, code, 3), create=True):
                    img, label = train_set[4]
                    assert label == right[4][1] and torch.equal(img, right[4][0]), f"{name}, {code}: 3 attempts fail"
                with unittest.mock.patch.object(place, name, Flaky(function, code, 10 ** 6), create=True):
                    for workers in (0, 1) if code in (errno.EIO, None) else (0,):
                        try:
                            next(iter(torch.utils.data.DataLoader(train_set, 2, num_workers=workers)))
                            raise AssertionError("a picture stood in for what the machine could not read")
                        except OSError as e:
                            expected, path = code or errno.ENOMEM, train_set.path(train_set.index(0))
                            assert machines_trouble(e) and not isinstance(e, ValueError), f"{workers}: {e!r}"
                            last = f"[Errno {expected}] {os.strerror(expected)} in each of 4 attempts: {path!r}"
                            assert str(e).strip().endswith(last), e
                            e.__traceback__ = None  # it keeps the loader, which the next worker would inherit
        short = RuntimeError("Pixel allocation failed: Out of memory")  # libavif's words
        with unittest.mock.patch.object(data, "open_image", side_effect=short):
            raises(OSError, train_set.__getitem__, 0, words=[os.strerror(errno.ENOMEM), "4 attempts"])
        # the picture's own: gone, not allowed, a folder now, or a link to itself
        for code in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG):
            train_set, plain = (data.ImageDataset(folder, 16, train=t) for t in (True, False))
            n = next(n for n in range(10) if train_set.index(n) == 2)
            with unittest.mock.patch.object(data.os, "stat", Flaky(os.stat, code, 1)):
                img, label = train_set[n]
            stands_in = data.random_crop(data.load_image(train_set.path(3)), 16, np.random.default_rng([0, n, 1]))
            assert label == -1 - 2 and torch.equal(img, data.to_tensor(stands_in))
            with unittest.mock.patch.object(data.os, "stat", Flaky(os.stat, code, 1)):
                words = [plain.path(2), "cannot be opened", os.strerror(code)]
                raises(data.UserError, plain.__getitem__, 2, words=words)
        plain = data.ImageDataset(archive, 16, train=True)
        os.remove(archive)
        elsewhere = pickle.loads(pickle.dumps(plain))  # as a worker gets it that is started by spawn
        raises(data.MissingFile, elsewhere.__getitem__, 0, words=[archive, "is gone"])
        raises(data.MissingFile, data.ImageDataset, archive, 16, True, words=f"{archive}: no such folder")
        for kind in data.UserError, data.MissingFile:
            assert issubclass(kind, ValueError), "callers that know of ValueError alone"
        for code, kind in (errno.EMFILE, OSError), (errno.EACCES, data.UserError):
            open(archive, "wb").close()
            with unittest.mock.patch.object(data.zipfile, "ZipFile", Flaky(None, code, 1)):
                raises(kind, data.ImageDataset, archive, 16, True, words=[archive, os.strerror(code)])
            with unittest.mock.patch("os.scandir", Flaky(None, code, 1)):
                whose = "" if kind is OSError else "the folder cannot be read: "
                raises(kind, data.ImageDataset, folder, 16, True, words=[whose, os.strerror(code)])


def test_archives_take_no_descriptors():
    with tempfile.TemporaryDirectory() as tmp:
        _, archive = picture_folder(tmp)
        script = os.path.join(tmp, "few.py")  # the limit itself: descriptors run out while pictures are read
        open(script, "w").write(f"""
import os, resource, torch, data
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
a = data.ImageDataset([{archive!r}] * 160, 16, train=True)
assert sorted(a[n][1] for n in range(1600)) == [0] * 800 + [1] * 800, "a picture was replaced"
data.WAITS = (0.01,)
held = []
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
try:
    print("no error", a[0][1])
except OSError as e:
    print(e.errno, e)
""")
        done = run("python", script, PYTHONPATH=os.getcwd())
        assert done.stdout.startswith(f"{errno.EMFILE} ") and "Too many open" in done.stdout, done.stdout + done.stderr


def test_data_without_what_windows_lacks():
    with tempfile.TemporaryDirectory() as tmp:
        folder, archive = picture_folder(tmp)
        plain = data.ImageDataset([folder, archive], 16, train=True)
        right = [(img.sum().item(), label) for img, label in (plain[n] for n in range(20))]
        script = os.path.join(tmp, "other.py")
        open(script, "w").write(windows_like() + f"""
import data

def hidden(worker=None):
    assert not hasattr(os, "pread") and not hasattr(signal, "SIGHUP")
    try:
        import fcntl
    except ImportError:
        return
    raise AssertionError("fcntl is there")

if __name__ == "__main__":
    hidden()
    a = data.ImageDataset({[folder, archive]}, 16, train=True)
    for start in sys.argv[1:]:
        loader = torch.utils.data.DataLoader(a, None, sampler=range(20), num_workers=2 if start == "fork" else 1,
                                             multiprocessing_context=start, worker_init_fn=hidden)
        print([(img.sum().item(), label) for img, label in loader])
    assert data.cores() == os.cpu_count()
""")
        done = run("python", script, "fork", "spawn", "forkserver", PYTHONPATH=os.getcwd())
        assert done.stdout.splitlines() == [str(right)] * 3, done.stdout + done.stderr
    with unittest.mock.patch("os.sched_getaffinity", lambda pid: {1, 5, 7}, create=True):
        assert data.cores() == 3, "the affinity, not the machine"


def test_a_damaged_tiff_costs_one_line():
    """PIL logs what it finds in a TIFF of 50 samples a pixel; the script says it once, in its own words."""
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "a.tif")
        Image.new("RGB", (8, 8)).save(path)
        with open(path, "rb") as f:
            tiff = f.read()
        entry = struct.pack("<HHIH", 277, 3, 1, 3)  # SamplesPerPixel, one short: 3
        assert tiff.count(entry) == 1
        with open(path, "wb") as f:
            f.write(tiff.replace(entry, struct.pack("<HHIH", 277, 3, 1, 50)))
        done = run("python", "sample.py", path, "--out", tmp)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and path in done.stderr, done.stderr


def test_data_py_ends_as_it_should():
    with tempfile.TemporaryDirectory() as tmp:
        folder, archive = picture_folder(tmp)
        for fault, status in (("torch.from_numpy", 1), ("zipfile.ZipFile", 2), ("nothing", 0)):
            script = os.path.join(tmp, "ends.py")
            open(script, "w").write(f"""
import runpy, sys, torch, zipfile, errno
def fault(*args):
    raise OSError(errno.EIO, "Input/output error") if {status} == 2 else ValueError("not enough values to unpack")
{fault} = fault
sys.argv[1:] = [{archive!r}]
runpy.run_path("data.py", run_name="__main__")
""")
            done = run("python", script)
            lines = done.stderr.splitlines()
            assert done.returncode == status, f"{fault}: {done.stderr}"
            assert ("Traceback" in done.stderr) == (status == 1), f"{fault}: {done.stderr}"
            assert status != 2 or len(lines) == 1 and "a.zip" not in lines[0] and archive in lines[0], lines
        for given in (os.path.join(tmp, "missing"), script):
            done = run("python", "data.py", given)
            assert done.returncode == 2 and given in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
