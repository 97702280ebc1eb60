#!/usr/bin/env bash
# Pillow 13.0.0: 16-bit grey becomes white when it is converted, and a TIFF whose zero is white stays a negative.
#
# convert("L") and convert("RGB") of mode I;16 clip at 255 instead of scaling, so all but the darkest 256 levels are
# white. Of a TIFF with PhotometricInterpretation 0 (zero is white) 8 bits are inverted when it is written and when it is
# read, 16 bits are neither: such a file of another program's reads as its negative.
#
# Seen: a ramp over 16 bits is 99 % white; written and read black to white, the strip holds 255, 0 in 8 bits and
# 0, 65535 in 16. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.6
(cd "$work" && "$work/venv/bin/python" - <<'PY'
import sys
import numpy as np
import PIL
from PIL import Image, TiffImagePlugin

ramp = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
white = [float((np.asarray(ramp.convert(mode)) == 255).mean()) for mode in ("L", "RGB")]
tags = TiffImagePlugin.ImageFileDirectory_v2()
tags[262] = 0
strips = {}
for dtype in (np.uint8, np.uint16):
    black_to_white = np.array([[0, np.iinfo(dtype).max]], dtype=dtype)
    Image.fromarray(black_to_white).save("zero.tif", tiffinfo=tags)
    with Image.open("zero.tif") as image:
        assert np.asarray(image).tolist() == black_to_white.tolist()
        strips[dtype.__name__] = np.fromfile("zero.tif", dtype, 2, offset=image.tag_v2[273][0]).tolist()
print(f"Pillow {PIL.__version__}: {white} white; {strips}")
sys.exit(not (min(white) > 0.99 and strips == {"uint8": [255, 0], "uint16": [0, 65535]}))
PY
)
