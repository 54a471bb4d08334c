"""The manifest of a plan: what is written is read back, follows the published schema, and hostile files are refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import JSON, MANIFEST, MANIFESTS, ORIN

import jetrt
from jetrt.errors import ManifestError
from jetrt.provenance import Manifest, key_of
from jetrt.provenance import manifest as manifest_module

SCHEMA = json.loads((Path(jetrt.__file__).parent / "schemas" / "manifest.json").read_text())


def follows(schema: dict[str, Any], value: Any) -> bool:
    """The part of JSON Schema that the published schema uses; an unknown word fails the test."""
    known = {"$schema", "$id", "$defs", "title", "description", "$ref", "type", "enum", "const", "pattern", "minimum"}
    known |= {"anyOf", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems"}
    assert set(schema) <= known, set(schema) - known
    if "$ref" in schema:
        return follows(SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], value)
    if "anyOf" in schema:
        return any(follows(part, value) for part in schema["anyOf"])
    if "const" in schema:
        return bool(value == schema["const"])
    if "enum" in schema:
        return value in schema["enum"]
    number = not isinstance(value, bool)
    types: dict[str, bool] = {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "integer": isinstance(value, int) and number,
        "number": isinstance(value, (int, float)) and number,
        "null": value is None,
    }
    wanted = schema.get("type", list(types))
    if not any(types[name] for name in ([wanted] if isinstance(wanted, str) else wanted)):
        return False
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    if types["number"]:
        return bool(value >= schema.get("minimum", value))
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        rest = value[len(first) :]
        return (
            len(value) >= schema.get("minItems", 0)
            and all(follows(part, item) for part, item in zip(first, value, strict=False))
            and all(follows(schema.get("items", {}), item) for item in rest)
        )
    if isinstance(value, dict):
        known_keys = schema.get("properties", {})
        return (
            set(schema.get("required", [])) <= set(value)
            and (schema.get("additionalProperties", True) or set(value) <= set(known_keys))
            and all(follows(known_keys.get(key, {}), item) for key, item in value.items())
        )
    return True


@given(MANIFESTS)
@settings(deadline=None)
def test_what_is_written_is_read_back_and_follows_the_schema(manifest: Manifest) -> None:
    text = manifest.to_json()
    again = Manifest.from_json(text)
    assert again == manifest
    assert again.to_json() == text
    assert Manifest.from_json(text.encode()) == manifest
    mapping = json.loads(text)
    assert follows(SCHEMA, mapping)
    assert text.endswith("}\n")
    assert list(mapping) == sorted(mapping)


def test_the_schema_is_valid_where_jsonschema_can_say_so() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(MANIFEST.to_json()))


def test_schema_and_dataclasses_have_the_same_keys_and_patterns() -> None:
    classes = {kind.__name__: kind for kind in vars(manifest_module).values() if is_dataclass(kind)} | {
        "Manifest": Manifest
    }
    schemas = {name: part for name, part in SCHEMA["$defs"].items() if part["type"] == "object"} | {"Manifest": SCHEMA}
    del classes["Rule"]
    assert set(classes) == set(schemas)
    for name, kind in classes.items():
        keys = [f.name for f in fields(kind)]
        assert list(schemas[name]["properties"]) == keys, name
        assert schemas[name]["required"] == keys, name
        assert schemas[name]["additionalProperties"] is False, name
    rules = {name: get_args(kind)[1] for name, kind in vars(manifest_module).items() if get_origin(kind) is Annotated}
    assert set(rules) == set(SCHEMA["$defs"]) - set(schemas)
    for name, rule in rules.items():
        part = SCHEMA["$defs"][name]
        pattern = None if rule.pattern is None else f"^(?:{rule.pattern})$"
        assert (part.get("pattern"), part.get("minimum")) == (pattern, rule.least), name


def mutated(mapping: dict[str, Any], random: Random, other: Any) -> None:
    """Changes one place of a manifest."""
    spot: Any = mapping
    while True:
        keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
        if not keys:
            break
        key = random.choice(keys)
        if isinstance(spot[key], (dict, list)) and random.random() < 0.7:
            spot = spot[key]
            continue
        what = random.randrange(3)
        if what == 0 or isinstance(spot, list):
            spot[key] = other
        elif what == 1:
            del spot[key]
        else:
            spot[f"{key}2"] = other
        break


@given(
    st.randoms(use_true_random=False),
    JSON | st.sampled_from(["..", "a/b", "/a", "1" * 64, "1.2", "x\ny", -1, 0, {}, []]),
)
def test_reader_and_schema_agree_on_what_is_wrong(random: Random, other: Any) -> None:
    mapping = json.loads(MANIFEST.to_json())
    mutated(mapping, random, other)
    refused = None
    try:
        Manifest.from_json(json.dumps(mapping))
    except ManifestError as error:
        refused = error
    assert (refused is None) == follows(SCHEMA, mapping), refused


# Manifest: hostile files ----------------------------------------------------------------------------------------------


def edited(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(mapping: dict[str, Any]) -> None:
        for place, value in changes.items():
            *path, last = place.split("__")
            spot = mapping
            for key in path:
                spot = spot[int(key) if key.isdigit() else key]
            spot[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (edited(engine__file="../x"), '/engine/file: "../x" is not a file name without a folder'),
        (edited(engine__file="a\\b"), "is not a file name without a folder"),
        (edited(engine__file=".."), "is not a file name without a folder"),
        (edited(engine__file="a\n"), "is not a file name without a folder"),
        (
            edited(model__files=[{"file": "w/../../x", "sha256": "0" * 64, "bytes": 1}]),
            "/model/files/0/file: \"w/../../x\" is not a relative path without '..'",
        ),
        (edited(engine__bytes=-1), "/engine/bytes: -1 is not 0 or more"),
        (edited(engine__bytes=True), "/engine/bytes: true is not a whole number"),
        (edited(engine__bytes=1.0), "/engine/bytes: 1.0 is not a whole number"),
        (edited(engine__bytes="1"), '/engine/bytes: "1" is not a whole number'),
        (edited(engine__sha256="A" * 64), "/engine/sha256: "),
        (edited(stripped=0), "/stripped: 0 is not true or false"),
        (edited(machine__gpu="Orin\x1b[2J"), '/machine/gpu: "Orin\\u001b[2J" is not text without control characters'),
        (edited(machine__sm=0), "/machine/sm: 0 is not 1 or more"),
        (edited(machine__tensorrt="9" * 5000), "/machine/tensorrt: "),
        (edited(machine=None), "/machine: null is not an object"),
        (edited(inputs={}), "/inputs: {} is not a list"),
        (edited(inputs__0__location="moon"), '/inputs/0/location: "moon" is not one of "device", "host"'),
        (edited(inputs__0__shape=[1, "n"]), '/inputs/0/shape/1: "n" is not a whole number'),
        (edited(parity__state="maybe"), '/parity/state: "maybe" is not one of "passed", "failed", "not run"'),
        (edited(command=["rm", "-rf", "/"]), '/command: does not begin with "jetrt"'),
        (edited(command=[]), '/command: does not begin with "jetrt"'),
        (edited(command=["jetrt", "\x1b]0;"]), "/command/1: "),
        (edited(extra=1), "/extra: unknown key; known: schema, jetrt,"),
        (edited(options={"a/b~c": {"d": "\ud800"}}), "/options/a~1b~0c/d: \"\\ud800\" holds half a character"),
        (edited(options={"\udfff": 1}), "/options: \"\\udfff\" holds half a character"),
        (edited(options=[1]), "/options: [1] is not an object"),
        (lambda mapping: mapping.pop("key"), "/key: the key is missing"),
        (lambda mapping: mapping["parity"].pop("state"), "/parity/state: the key is missing"),
    ],
)  # fmt: skip
def test_a_manifest_with_one_wrong_value(edit: Callable[[dict[str, Any]], Any], problem: str) -> None:
    mapping = json.loads(MANIFEST.to_json())
    edit(mapping)
    with pytest.raises(ManifestError) as caught:
        Manifest.from_json(json.dumps(mapping), path="/plans/det.engine.json")
    message = str(caught.value)
    assert message.startswith("/plans/det.engine.json: /")
    assert problem in message
    assert "The manifest is damaged or was not written by jetrt." in message
    assert len(message) < 800
    assert message.encode()
    assert message.isprintable()


def nested(depth: int) -> str:
    return MANIFEST.to_json().replace('"opt_level": 3', '"opt_level": ' + "[" * depth + "]" * depth)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no JSON: Expecting value in line 1, column 1"),
        ('{"schema": "jetrt-manifest-1"', "no JSON: Expecting ',' delimiter in line 1"),
        ("[]", "[] is not an object"),
        ("null", "null is not an object"),
        (b"\xff{}", "byte 0 is not UTF-8"),
        ("\ufeff{}", "no JSON: "),
        (b" " * ((16 << 20) + 1), "more than 16777216 bytes"),
        ("[" * 200_000, "nested more than 64 deep"),
        (nested(63), None),
        (nested(64), "nested more than 64 deep"),
        (nested(20_000), "nested more than 64 deep"),
        (MANIFEST.to_json().replace("0.999\n", "NaN\n"), "/parity/thresholds/cosine: NaN is no JSON"),
        (MANIFEST.to_json().replace("0.999\n", "-Infinity\n"), "/parity/thresholds/cosine: -Infinity is no JSON"),
        (MANIFEST.to_json().replace("0.999\n", "1e999\n"), "/parity/thresholds/cosine: a number beyond the range"),
        (
            MANIFEST.to_json().replace('level": 3', f'level": {"9" * 5000}'),
            "/options/opt_level: a number of 5000 digits",
        ),
        (MANIFEST.to_json().replace('"sm": 87', '"sm": 87, "sm": 90'), "/machine/sm: the key is given twice"),
        (MANIFEST.to_json().replace('"opt_', '"a": 1, "a": 1, "opt_'), "/options/a: the key is given twice"),
        ('{"schema": 1}', "/schema: "),
        ("{}", "/schema: the key is missing"),
    ],
    ids=lambda value: None if value is None or len(value) > 60 else value,
)
def test_a_hostile_file(tmp_path: Path, text: str | bytes, problem: str | None) -> None:
    path = Manifest.path_for(tmp_path / "det.engine")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if problem is None:
        Manifest.read(tmp_path / "det.engine")
        return
    with pytest.raises(ManifestError) as caught:
        Manifest.read(tmp_path / "det.engine")
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)
    assert caught.value.path == str(path)


@given(st.binary(max_size=200) | st.text().map(str.encode) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused_with_a_manifest_error(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(data)


def test_a_newer_schema_is_named_whatever_else_is_in_it() -> None:
    with pytest.raises(
        ManifestError, match="its schema is \"jetrt-manifest-2\", and this jetrt reads 'jetrt-manifest-1'"
    ):
        Manifest.from_json('{"schema": "jetrt-manifest-2", "unheard of": [1]}', path="det.engine.json")


def test_a_manifest_that_is_no_file(tmp_path: Path) -> None:
    path = Manifest.path_for(tmp_path / "det.engine")
    assert Manifest.read(tmp_path / "det.engine") is None
    os.mkfifo(path)
    with pytest.raises(ManifestError, match=r"det\.engine\.json: cannot be read: not a regular file"):
        Manifest.read(tmp_path / "det.engine")
    path.unlink()
    path.mkdir()
    with pytest.raises(ManifestError, match=r"det\.engine\.json: cannot be read: (not a regular file|Is a directory)"):
        Manifest.read(tmp_path / "det.engine")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"options": {"path": Path("x")}}, "/options/path: a PosixPath is not a JSON value"),
        ({"options": {"x": float("nan")}}, "/options/x: NaN is not a finite number"),
        ({"options": {1: 2}}, "/options: 1 is not a string, as every key must be"),
        ({"key": "short"}, '/key: "short" is not 64 lower-case hex digits'),
        ({"audit": {"log": "x" * (16 << 20)}}, "would have 16"),
    ],
)
def test_nothing_is_written_that_could_not_be_read(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ManifestError, match=r"[Tt]he manifest of det\.engine") as caught:
        replace(MANIFEST, **change).to_json()
    assert problem in str(caught.value)


# Key ------------------------------------------------------------------------------------------------------------------


def test_the_key_is_of_what_decides_the_plan() -> None:
    def key(**changes: Any) -> str:
        base: dict[str, Any] = {
            "model_sha256": "1" * 64,
            "options": {"precision": "fp16", "shapes": {"x": (1, 2)}},
            "calibration_sha256": None,
            "machine": ORIN,
        }
        return key_of(**{**base, **changes})

    assert re.fullmatch("[0-9a-f]{64}", key())
    # Order of keys, tuples or lists, and what does not shape the plan make no difference.
    assert key(options={"shapes": {"x": [1, 2]}, "precision": "fp16"}) == key()
    assert key(machine=replace(ORIN, power_mode="15W", driver="1", gpu="other")) == key()
    others = [
        key(model_sha256="2" * 64),
        key(options={"precision": "fp32", "shapes": {"x": (1, 2)}}),
        key(calibration_sha256="1" * 64),
        key(machine=replace(ORIN, sm=86)),
        key(machine=replace(ORIN, sm_count=8)),
        key(machine=replace(ORIN, tensorrt="10.3.0.31")),
    ]
    assert len({key(), *others}) == 7
