"""Finds the lines of text on a page: an ONNX file on the CPU, or the TensorRT plan built from it.

    python examples/text_detection.py                          # ONNX on the CPU, no GPU needed
    python examples/text_detection.py --engine det.engine      # the same on TensorRT

The page is drawn here, so the true place of every line is known. The program fails unless each one is found.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage, spatial

import jetrt
from fetch_model import fetch
from jetrt.report import io_table, latency_table

Floats = npt.NDArray[np.floating[Any]]

# Text, size, left, top, degrees, ink: what a page has, from a headline to small print, one line askew.
PAGE_SIZE = (736, 960)
LINES = [
    ("Never silently wrong", 54, 60, 60, 0, "#101820"),
    ("Never silently copied", 40, 60, 165, 0, "#8a1538"),
    ("Never silently slow", 40, 60, 250, 0, "#14532d"),
    ("Invoice 2026-0173, due 14 December", 28, 60, 370, 0, "#222222"),
    ("3 x text detection, 2 x ten lines of Python", 22, 60, 430, 0, "#222222"),
    ("a page that was scanned slightly askew", 26, 90, 520, 6, "#1f3a93"),
    ("0123456789 + 9876543210", 30, 60, 680, 0, "#5b2c6f"),
    ("small print, which nobody reads but a machine should find", 17, 60, 770, 0, "#333333"),
    ("Total: 42.00", 36, 470, 850, 0, "#101820"),
]


@dataclass
class Box:
    corners: Floats  # 4 × (x, y), in order around the box
    score: float


def draw_page() -> tuple[Image.Image, list[Floats]]:
    """The page and the corners of each line on it."""
    page = Image.new("RGB", PAGE_SIZE, "#f7f3e9")
    truth = []
    for text, size, left, top, degrees, ink in LINES:
        font = ImageFont.load_default(size)
        x0, y0, x1, y1 = font.getbbox(text)
        corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float64)
        angle = math.radians(degrees)
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        layer = Image.new("L", PAGE_SIZE, 0)
        ImageDraw.Draw(layer).text((left, top), text, font=font, fill=255)
        # Both turn about the line's own origin, so that the corners stay true.
        layer = layer.rotate(-degrees, resample=Image.Resampling.BICUBIC, center=(left, top))
        page.paste(Image.new("RGB", PAGE_SIZE, ink), mask=layer)
        truth.append(corners @ turn + (left, top))
    return page, truth


def to_input(page: Image.Image) -> npt.NDArray[np.float32]:
    """The page as the model wants it: sides that 32 divides, blue-green-red, from -1 to 1, channels first."""
    width, height = (max(round(side / 32) * 32, 32) for side in page.size)
    rgb = np.asarray(page.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    scaled = rgb[:, :, ::-1] / 127.5 - 1
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def to_boxes(
    probability: Floats, page_size: tuple[int, int], threshold: float = 0.3, least_score: float = 0.5, grow: float = 1.6
) -> list[Box]:
    """Differentiable binarisation, the other way round: regions above the threshold, the tightest turned rectangle
    about each, grown to undo the shrinking that the model was trained with."""
    height, width = probability.shape
    labels, count = ndimage.label(probability > threshold, structure=np.ones((3, 3)))
    boxes = []
    for index, place in enumerate(ndimage.find_objects(labels, max_label=count), start=1):
        region = labels[place] == index
        score = float(probability[place][region].mean())
        rows, columns = np.nonzero(region)
        if score < least_score or len(rows) < 9:
            continue
        # All corners of the pixels, not their centres: a region has an area even when it is one pixel high.
        pixels = np.stack([columns + place[1].start, rows + place[0].start], axis=1)
        points = (pixels[:, None] + np.array([(0, 0), (1, 0), (1, 1), (0, 1)])).reshape(-1, 2).astype(np.float64)
        center, axes, extent = tightest_rectangle(points)
        margin = extent[0] * extent[1] * grow / (2 * extent.sum())
        half = extent / 2 + margin
        corners = center + (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half) @ axes
        corners *= np.array(page_size) / (width, height)
        corners = np.roll(corners, -int(corners.sum(axis=1).argmin()), axis=0)  # from the upper left
        boxes.append(Box(corners, score))
    return sorted(boxes, key=lambda box: tuple(box.corners.mean(axis=0)[::-1]))


def tightest_rectangle(points: Floats) -> tuple[Floats, Floats, Floats]:
    """Centre, axes and extent of the smallest rectangle about the points; one of its sides lies on the hull."""
    hull = points[spatial.ConvexHull(points).vertices]
    best: tuple[Floats, Floats, Floats] | None = None
    for edge in np.roll(hull, -1, axis=0) - hull:
        along = edge / np.hypot(*edge)
        axes = np.array([along, (-along[1], along[0])])
        turned = hull @ axes.T
        low, high = turned.min(axis=0), turned.max(axis=0)
        if best is None or np.prod(high - low) < np.prod(best[2]):
            best = ((low + high) / 2 @ axes, axes, high - low)
    assert best is not None  # a hull has edges
    return best


def overlap(one: Floats, other: Floats) -> float:
    """Intersection over union of two outlines, counted in pixels of the page."""

    def mask(corners: Floats) -> npt.NDArray[np.bool_]:
        image = Image.new("1", PAGE_SIZE)
        ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in corners], fill=1)
        return np.asarray(image)

    a, b = mask(one), mask(other)
    return float((a & b).sum() / max((a | b).sum(), 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="a TensorRT plan of the same model")
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="where the ONNX file is kept")
    parser.add_argument("--output", type=Path, default=Path("demo.png"))
    parser.add_argument("--repeat", type=int, default=20)
    arguments = parser.parse_args()

    page, truth = draw_page()
    batch = to_input(page)

    path, name = (arguments.engine, "tensorrt") if arguments.engine else (fetch(arguments.cache), "onnx_cpu")
    try:
        model = jetrt.load(path, runtime=name)
    except jetrt.JetrtError as error:
        sys.exit(f"{type(error).__name__}: {error}")

    with model:
        print(f"model    {path}\nruntime  {name}\n\n{io_table(model)}\n")
        (output,) = model.outputs
        seconds = []
        for _ in range(arguments.repeat + 2):
            start = time.perf_counter()
            probability = model(batch, synchronize=True)[output]
            seconds.append(time.perf_counter() - start)
        print(f"page {page.width} x {page.height}, input {list(batch.shape)}")
        print(latency_table(seconds[2:]), end="\n\n")  # the first two warm up

    boxes = to_boxes(probability[0, 0], page.size)
    canvas = ImageDraw.Draw(page)
    for box in boxes:
        outline = [(float(x), float(y)) for x, y in box.corners]
        canvas.line([*outline, *outline[:2]], fill="#e4002b", width=2, joint="curve")
    page.save(arguments.output)

    print(f"{len(boxes)} boxes found, drawn in {arguments.output}")
    lost = 0
    for (text, *_), corners in zip(LINES, truth, strict=True):
        shared, score, corner = max(
            ((overlap(box.corners, corners), box.score, box.corners[0]) for box in boxes),
            key=lambda match: match[0],
            default=(0.0, 0.0, np.zeros(2)),
        )
        lost += shared < 0.5
        place = f"at ({corner[0]:3.0f}, {corner[1]:3.0f})" if shared >= 0.5 else "NOT FOUND"
        print(f"  overlap {shared:.2f}  score {score:.2f}  {place}  {text}")
    if lost:
        print(f"{lost} of {len(LINES)} lines were not found", file=sys.stderr)
        return 1
    print(f"all {len(LINES)} lines that were drawn are found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
