"""Whether a calibration table was made for this model, by this TensorRT, and is still what it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NoReturn

from ..builder.calibration_cache import SCHEMA, parse_cache, sidecar_of
from ..builder.onnx_file import OnnxFile
from ..errors import CalibrationCacheError


def check_table(table: Path, model: Path, tensorrt: str | None) -> None:
    """Raises `CalibrationCacheError` for a table of another model or TensorRT, for one whose bytes changed, and for one
    that does not say what it was made from: TensorRT itself compares none of that."""

    def distrust(why: str, found: str, expected: str) -> NoReturn:
        raise CalibrationCacheError(
            f"{table}: this calibration table cannot be trusted: {why}. Make it again with "
            f"`jetrt build --onnx {model} --precision int8 --calib-data … --recalibrate`.",
            path=str(table),
            found=found,
            expected=expected,
        )

    sidecar = sidecar_of(table)
    try:
        content = table.read_bytes()
    except OSError as error:
        distrust(f"it cannot be read ({error.strerror or error})", "nothing", "a calibration table")
    try:
        record = json.loads(sidecar.read_bytes())
        schema, digest = record["schema"], record["cache"]["sha256"]
        made_from = {key: str(record["identity"][key]) for key in ("model", "TensorRT")}
    except FileNotFoundError:
        distrust(f"there is no {sidecar.name}, which says what it was made from", "no sidecar", sidecar.name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        distrust(f"{sidecar.name} is damaged ({error!r})", "a damaged sidecar", "a whole one")
    pairs = [
        ("schema", schema, SCHEMA),
        ("its SHA-256", hashlib.sha256(content).hexdigest(), digest),
        ("the model's SHA-256", made_from["model"], OnnxFile.open(model).sha256().sha256),
    ]
    if tensorrt is not None:
        pairs.append(("TensorRT", made_from["TensorRT"], ".".join(tensorrt.split(".")[:3])))
    for what, found, expected in pairs:
        if found != expected:
            distrust(f"{what} is {found}, expected {expected}", str(found), str(expected))
    parse_cache(content, table)
