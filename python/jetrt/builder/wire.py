"""Protobuf's wire format over a mapped file: fields are found by their lengths, and nothing is copied.

Our own because protobuf's library stops at 2 GiB and would bring a version of its own onto a JetPack that has another.
Safe for hostile files: every length is checked against the message around it, a varint has at most ten bytes, and the
number of fields that are kept is limited.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Damaged", "Truncated", "Wire"]

MAX_ENTRIES = 8_000_000  # nodes, names, shapes, …; the largest models that TensorRT builds have a tenth of it


class Damaged(Exception):  # noqa: N818  its catcher turns it into an error that names the file
    """The bytes are not a message of the kind that was expected."""


class Truncated(Damaged):
    """A length points beyond the end of the file."""


#: What a field holds: a number (varint, fixed32, fixed64), or where its bytes begin and end.
_Field = tuple[int, int, int, int]  # number, wire type, value or begin, end


class Wire:
    """Fields of protobuf messages in a mapped file."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.entries = data, size, 0

    def varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end:
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
            shift += 7
            if shift > 63:
                raise Damaged("a number has more than ten bytes")
        raise Truncated("it ends within a number") if end == self.size else Damaged("a number crosses its message")

    def fields(self, begin: int, end: int) -> Iterator[_Field]:
        at = begin
        while at < end:
            tag, at = self.varint(at, end)
            number, wire = tag >> 3, tag & 7
            if number == 0:
                raise Damaged("a field has the number 0")
            if wire == 0:
                value, at = self.varint(at, end)
                yield number, wire, value, at
                continue
            if wire == 2:
                length, at = self.varint(at, end)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise Damaged(f"field {number} has the unknown wire type {wire}")
            if length > end - at:
                if at + length > self.size:
                    raise Truncated(f"field {number} needs {at + length:,} bytes and the file has {self.size:,}")
                raise Damaged(f"field {number} is longer than the message around it")
            yield number, wire, at, at + length
            at += length

    def message(self, begin: int, end: int) -> dict[int, list[Any]]:
        """A small message: numbers as int, the rest as (begin, end)."""
        found: dict[int, list[Any]] = {}
        for number, wire, value, stop in self.fields(begin, end):
            self.count()
            found.setdefault(number, []).append(value if wire == 0 else (value, stop))
        return found

    def count(self) -> None:
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            raise Damaged(f"it has more than {MAX_ENTRIES:,} entries")

    def text(self, span: Any) -> str:
        if isinstance(span, int):
            raise Damaged("a number stands where a text belongs")
        # A name that is no UTF-8 is still a name; TensorRT takes it as bytes.
        return self.data[span[0] : span[1]].decode("utf-8", "backslashreplace")

    def last_text(self, message: Mapping[int, Sequence[Any]], number: int) -> str:
        return self.text(message[number][-1]) if number in message else ""

    def last_number(self, message: Mapping[int, Sequence[Any]], number: int, default: int = 0) -> int:
        value = message[number][-1] if number in message else default
        if not isinstance(value, int):
            raise Damaged(f"field {number} is no number")
        return value - (1 << 64) if value >> 63 else value

    def spans(self, message: Mapping[int, Sequence[Any]], number: int) -> Iterator[tuple[int, int]]:
        for value in message.get(number, ()):
            if isinstance(value, int):
                raise Damaged(f"a number stands where message {number} belongs")
            yield value

    def numbers(self, message: Mapping[int, Sequence[Any]], number: int) -> Iterator[int]:
        """Repeated integers, packed or not."""
        for value in message.get(number, ()):
            if isinstance(value, int):
                yield value
                continue
            at, end = value
            while at < end:
                item, at = self.varint(at, end)
                yield item
