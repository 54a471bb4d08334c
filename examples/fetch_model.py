"""Fetches the demo's model: PP-OCRv6_det_small.onnx (Apache-2.0, PaddleOCR) out of the `rapidocr` wheel.

The wheel comes from the package index by pip, is not installed, and is unpacked for the model only. Both hashes are
checked, so the model is this one or none.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "rapidocr==3.10.0"
WHEEL_SHA256 = "2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050"
MEMBER = "rapidocr/models/PP-OCRv6_det_small.onnx"
MODEL_SHA256 = "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f"


def check(what: str, data: bytes, expected: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        sys.exit(f"{what}: sha256 is {found}, expected {expected}; not used")


def fetch(folder: Path) -> Path:
    """The path of the model in `folder`, fetched if it is not there or not intact."""
    model = folder / Path(MEMBER).name
    if model.exists() and hashlib.sha256(model.read_bytes()).hexdigest() == MODEL_SHA256:
        return model
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        if subprocess.run([*pip, "--dest", scratch, PACKAGE], check=False).returncode:
            sys.exit(f"pip could not download {PACKAGE}; see its message above")
        (wheel,) = Path(scratch).glob("*.whl")
        check(wheel.name, wheel.read_bytes(), WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(MEMBER)
        check(MEMBER, data, MODEL_SHA256)
        unpacked = Path(scratch) / model.name
        unpacked.write_bytes(data)
        unpacked.replace(model)
    return model


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/demo")))
