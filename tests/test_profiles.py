"""Hints to optimisation profiles: the syntax of the flags, every rule with its message, and what always holds."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jetrt.builder.hints import Bound, Hints, read_metadata
from jetrt.builder.profiles import InputRange, NetworkInput, Profile, resolve
from jetrt.errors import BuildOptionError

IMAGE = NetworkInput("x", "float32", (-1, 3, -1, -1), dimension_names=("batch", None, "height", "width"))
IDS = NetworkInput("ids", "int64", (-1, -1), dimension_names=("batch", "seq_len"))
PLAIN = NetworkInput("p", "float32", (-1, 4, -1))
STATIC = NetworkInput("s", "float32", (1, 8))
SIZES = NetworkInput("n", "int64", (2,), shape_tensor=True)


def hints(**given):
    parsed = {
        k: tuple(b if isinstance(b, Bound) else Bound.parse(b) for b in given.pop(k, ())) for k in ("min", "opt", "max")
    }
    return Hints(**parsed, **given)


def one(inputs, **given):
    (profile,) = resolve(inputs, hints(**given))
    return profile


def refused(inputs, *texts, **given):
    with pytest.raises(BuildOptionError) as caught:
        resolve(inputs, hints(**given))
    for text in texts:
        assert text in str(caught.value)
    assert caught.value.option.startswith("--")
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------- syntax


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x:1x3x224x224", Bound({"x": (1, 3, 224, 224)})),
        ("x:1x3,y:2", Bound({"x": (1, 3), "y": (2,)})),
        (" x:1 , y:2 ", Bound({"x": (1,), "y": (2,)})),
        ("input:0:1x3", Bound({"input:0": (1, 3)})),
        ("a=b:1", Bound({"a=b": (1,)})),
        ("/model/x.1:5", Bound({"/model/x.1": (5,)})),
        ("x:", Bound({"x": ()})),
        ("n=[1, -2]", Bound(values={"n": (1, -2)})),
        ("n=[]", Bound(values={"n": ()})),
        ("seq_len=128,x:1", Bound({"x": (1,)}, dimensions={"seq_len": 128})),
        ('"a,b":1x2,"c\\"d"=3', Bound({"a,b": (1, 2)}, dimensions={'c"d': 3})),
        ({"x": [1, 3], "seq_len": 7, "n": {"values": [1, 2]}}, Bound({"x": (1, 3)}, {"n": (1, 2)}, {"seq_len": 7})),
    ],
)
def test_syntax(text, expected):
    assert Bound.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read from '' on; write NAME:1x3x224x224"),
        ("x", "cannot be read from 'x' on"),
        ("y:1,x", "cannot be read from 'x' on"),
        ("x:1x?", "'x': replace each ? by a number"),
        ("x=[?]", "'x': replace each ? by a number"),
        ("x:1xx2", "'x' has a part that is no number"),
        ("x=[1;2]", "'x' has a part that is no number"),
        ("x:-1", "'x': a size is at least 0"),
        ("x=99999999999", "a size is at least 0 and at most 2147483647"),
        ("x:1,x:2", "'x' is given twice; a second profile is a second --min"),
        ("x:1,x=2", "'x' is given twice"),
        ({"x": "1x3"}, "'x' is '1x3'; write a list of whole numbers"),
        ({"x": [1.5]}, "write a list of whole numbers"),
        ({"x": True}, "write a list of whole numbers"),
    ],
)
def test_syntax_refused(text, message):
    with pytest.raises(BuildOptionError) as caught:
        Bound.parse(text, "--min")
    assert str(caught.value).startswith("--min")
    assert message in str(caught.value)
    assert caught.value.option == "--min"


NAMES = st.text(min_size=1, max_size=6).filter(lambda name: "\0" not in name)
SIZE = st.integers(0, 2**31 - 1)


@settings(deadline=None)
@given(
    names=st.lists(NAMES, unique=True, max_size=6),
    shape=st.lists(SIZE, max_size=4).map(tuple),
    values=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4).map(tuple),
    size=SIZE,
)
def test_syntax_round_trip(names, shape, values, size):
    bound = Bound(
        dict.fromkeys(names[::3], shape), dict.fromkeys(names[1::3], values), dict.fromkeys(names[2::3], size)
    )
    assume(names)
    assert Bound.parse(str(bound)) == bound


# ------------------------------------------------------------------------------------------------------------ rules


def test_static_network_needs_no_hint():
    assert one([STATIC]) == Profile({"s": InputRange((1, 8), (1, 8), (1, 8))})
    assert resolve([], Hints()) == (Profile({}),)
    assert one([NetworkInput("e", "float32", (0, 3))]).shapes["e"] == InputRange((0, 3), (0, 3), (0, 3))


def test_shapes_by_input_and_by_dimension():
    profile = one(
        [IMAGE, IDS, STATIC],
        min=["x:1x3x32x32,seq_len=1"],
        opt=["x:2x3x224x224,seq_len=64"],
        max=["x:8x3x640x640,seq_len=128"],
    )
    assert profile.shapes == {
        "x": InputRange((1, 3, 32, 32), (2, 3, 224, 224), (8, 3, 640, 640)),
        "ids": InputRange((1, 1), (2, 64), (8, 128)),  # batch from x
        "s": InputRange((1, 8), (1, 8), (1, 8)),
    }


def test_what_is_left_open():
    assert one([PLAIN], opt=["p:2x4x5"]).shapes["p"] == InputRange((2, 4, 5), (2, 4, 5), (2, 4, 5))
    assert one([PLAIN], max=["p:2x4x5"]).shapes["p"] == InputRange((2, 4, 5), (2, 4, 5), (2, 4, 5))
    found = one([PLAIN], min=["p:1x4x1"], max=["p:2x4x5"])
    assert found.shapes["p"] == InputRange((1, 4, 1), (2, 4, 5), (2, 4, 5))
    assert one([PLAIN], min=["p:1x4x1"]).shapes["p"].max == (1, 4, 1)


def test_several_profiles():
    first, second = resolve([IDS], hints(min=["ids:1x1"], opt=["ids:1x8", "ids:4x64"], max=["ids:1x16", "ids:4x128"]))
    assert first.shapes["ids"] == InputRange((1, 1), (1, 8), (1, 16))
    assert second.shapes["ids"] == InputRange((1, 1), (4, 64), (4, 128))


def test_numbers_of_profiles_that_do_not_fit():
    refused(
        [IDS],
        "--opt is given 2 times, another of --min, --opt, --max 3 times",
        "several inputs of one profile are separated by commas",
        opt=["ids:1x1", "ids:2x2"],
        max=["ids:1x1", "ids:2x2", "ids:3x3"],
    )


def test_shape_tensors():
    profile = one([SIZES], min=["n=[1,-1]"], opt=["n=[2,3]"], max=["n=[4,4]"])
    assert profile == Profile({}, {"n": ((1, -1), (2, 3), (4, 4))})
    assert one([SIZES], opt=["n=[2,3]"]).values["n"] == ((2, 3),) * 3
    refused([SIZES], "'n' is a shape tensor, and nothing says which values it takes", "--min 'n=[?,?]'")
    refused([SIZES], "has 1 values; the input has 2", opt=["n=[2]"])
    refused(
        [SIZES],
        "value 1 of the shape tensor 'n': min is 5, opt 3, max 4",
        min=["n=[1,5]"],
        opt=["n=[2,3]"],
        max=["n=[4,4]"],
    )
    refused([IDS], "'ids' is no shape tensor; write its shape as ids:1x3", opt=["ids=[1,2]"])
    any_length = NetworkInput("n", "int64", (-1,), shape_tensor=True)
    refused([any_length], "'n' has [1, 2, 2] values in min, opt and max", min=["n=[1]"], opt=["n=[1,2]"])
    refused([SIZES], "'n' is an input: write n=[…]", opt=["n=3"])


def test_uncovered_dimensions_print_the_flags_to_add():
    message = refused([IMAGE])
    assert message == (
        "the input 'x' is [batch, 3, height, width], and nothing says how large batch, height, width can be. Give "
        "--min 'x:1x3x?x?' --opt 'x:1x3x?x?' --max 'x:1x3x?x?' with a number for each ?."
    )
    refused([PLAIN], "'p' is [-1, 4, -1], and nothing says how large axis 0, axis 2 can be", "--opt 'p:?x4x?'")


def test_uncovered_dimensions_keep_what_is_known():
    message = refused([IMAGE, IDS], opt=["seq_len=7"], max=["seq_len=9"])
    assert (
        "--min 'x:1x3x?x?,ids:1x7' --opt 'seq_len=7,x:1x3x?x?,ids:1x7' --max 'seq_len=9,x:1x3x?x?,ids:1x9'" in message
    )


def test_names_that_are_not_in_the_model():
    refused([IMAGE, IDS], "--opt names 'idz'; the model's inputs are 'x', 'ids'. Did you mean 'ids'?", opt=["idz:1x1"])
    refused(
        [IDS], "no dynamic dimension 'seqlen'; it has 'batch', 'seq_len'. Did you mean 'seq_len'?", opt=["seqlen=1"]
    )
    refused([IDS], "'ids' is an input: write ids:1x3", opt=["ids=3"])
    refused([STATIC], "it has none", opt=["batch=3"])


def test_hints_that_do_not_fit_the_model():
    refused([IMAGE], "--opt x:1x3: 2 dimensions; the input has 4: [batch, 3, height, width]", opt=["x:1x3"])
    refused([IMAGE], "--min x:1x4x8x8: axis 1 is 4; the model fixes it to 3", min=["x:1x4x8x8"])


def test_min_above_opt_names_both():
    refused(
        [IDS],
        "input 'ids', axis 1 (seq_len): min is 9 (--min seq_len=9), above opt 7 (--opt ids:1x7)",
        min=["seq_len=9"],
        opt=["ids:1x7"],
    )
    refused([PLAIN], "input 'p', axis 2: opt is 5", "above max 4", opt=["p:1x4x5"], max=["p:1x4x4"])


def test_a_dimension_has_one_size():
    refused(
        [IMAGE, IDS],
        "--opt x:1x3x8x8 and --opt ids:2x7 give the dimension 'batch' the sizes 1 and 2",
        opt=["x:1x3x8x8,ids:2x7"],
    )
    square = NetworkInput("q", "float32", (-1, -1), dimension_names=("m", "m"))
    refused([square], "the dimension 'm' the sizes 2 and 3", opt=["q:2x3"])


# ------------------------------------------------------------------------------------------------------------ GR00T


DIT = [
    NetworkInput("sa_embs", "bfloat16", (-1, -1, 1536), dimension_names=("batch_size", "sa_seq_len", None)),
    NetworkInput("vl_embs", "bfloat16", (-1, -1, 2048), dimension_names=("batch_size", "vl_seq_len", None)),
    NetworkInput("timestep", "int64", (-1,), dimension_names=("batch_size",)),
    NetworkInput("image_mask", "bool", (-1, -1), dimension_names=("batch_size", "vl_seq_len")),
]
METADATA = {
    "schema_version": 1,
    "sa_seq_len": 51,
    "vl_seq_len": 122,
    "llm_seq_len": 280,
    "num_patches": 256,
    "num_merged_patches": 64,
    "num_vis_tokens": 64,
    "precision": "bf16",
}


def metadata(tmp_path, **changes):
    path = tmp_path / "export_metadata.json"
    path.write_text(json.dumps({k: v for k, v in {**METADATA, **changes}.items() if v is not None}))
    return read_metadata(path)


def test_metadata_of_the_exporter(tmp_path):
    sizes = metadata(tmp_path)
    assert sizes == read_metadata(tmp_path)
    profile = one(DIT, metadata=sizes)
    assert profile.shapes["sa_embs"] == InputRange((1, 1, 1536), (1, 51, 1536), (8, 115, 1536))
    assert profile.shapes["vl_embs"] == InputRange((1, 1, 2048), (1, 122, 2048), (8, 244, 2048))
    assert profile.shapes["image_mask"] == InputRange((1, 1), (1, 122), (8, 244))
    assert profile.shapes["timestep"] == InputRange((1,), (1,), (8,))
    batches = one(DIT, metadata=metadata(tmp_path, batch_size=16))
    assert batches.shapes["timestep"] == InputRange((1,), (16,), (16,))


def test_metadata_reaches_dimensions_that_the_exporter_named_itself(tmp_path):
    made_up = NetworkInput("inputs_embeds", "bfloat16", (1, -1, 2048), dimension_names=(None, "s77", None))
    unnamed = NetworkInput("deepstack_0", "bfloat16", (-1, 2048))
    profile = one([made_up, unnamed], metadata=metadata(tmp_path))
    assert profile.shapes["inputs_embeds"] == InputRange((1, 1, 2048), (1, 280, 2048), (1, 560, 2048))
    assert profile.shapes["deepstack_0"] == InputRange((1, 2048), (64, 2048), (128, 2048))


def test_flags_win_over_metadata(tmp_path):
    sizes = metadata(tmp_path)
    profile = one(DIT, metadata=sizes, max=["vl_seq_len=100,batch_size=1"])
    assert profile.shapes["vl_embs"] == InputRange((1, 1, 2048), (1, 100, 2048), (1, 100, 2048))
    assert one(DIT, metadata=sizes, min=["vl_seq_len=300"]).shapes["image_mask"] == InputRange(
        (1, 300), (1, 300), (8, 300)
    )
    assert one(DIT, metadata=sizes, max_seq_len=64).shapes["sa_embs"] == InputRange(
        (1, 1, 1536), (1, 51, 1536), (8, 64, 1536)
    )


def test_metadata_covers_only_what_it_says(tmp_path):
    sizes = metadata(tmp_path, vl_seq_len=None)
    message = refused(
        DIT, "'vl_embs' is [batch_size, vl_seq_len, 2048], and nothing says how large vl_seq_len", metadata=sizes
    )
    assert "'timestep'" not in message
    assert "--opt 'vl_embs:1x?x2048,image_mask:1x?'" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has none of the sizes that a GR00T export writes"),
        ('{"a": 1}', "has none of the sizes"),
        ('{"vl_seq_len": 0}', "says vl_seq_len is 0; it must be a whole number above 0"),
        ('{"vl_seq_len": "12"}', "says vl_seq_len is '12'"),
        ('{"vl_seq_len": true}', "says vl_seq_len is True"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_metadata_refused(tmp_path, content, message):
    path = tmp_path / "export_metadata.json"
    path.write_text(content)
    with pytest.raises(BuildOptionError, match=r"^--metadata: ") as caught:
        read_metadata(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_metadata_missing(tmp_path):
    with pytest.raises(BuildOptionError, match=r"export_metadata\.json cannot be read: No such file"):
        read_metadata(tmp_path)


def test_max_seq_len():
    profile = one([IDS], max_seq_len=128, opt=["batch=2"])
    assert profile.shapes["ids"] == InputRange((2, 1), (2, 128), (2, 128))
    assert one([IDS], max_seq_len=128, opt=["ids:1x64"]).shapes["ids"] == InputRange((1, 1), (1, 64), (1, 128))
    refused([IDS], "--max-seq-len 128: --max ids:1x256 asks for more: 256", max_seq_len=128, max=["ids:1x256"])
    refused(
        [IDS], "opt is 200 (--opt ids:1x200), above max 128 (--max-seq-len 128)", max_seq_len=128, opt=["ids:1x200"]
    )
    refused(
        [IMAGE],
        "the model has no dynamic sequence dimension (dynamic are: input 'x', axis 0 (batch)",
        max_seq_len=128,
        opt=["x:1x3x8x8"],
    )


def test_opt_sa_seq():
    profile = one(DIT, opt_sa_seq=17, max_seq_len=512, opt=["vl_seq_len=122,batch_size=1"])
    assert profile.shapes["sa_embs"] == InputRange((1, 1, 1536), (1, 17, 1536), (1, 512, 1536))
    refused(DIT, "--opt sa_seq_len=51 says 51", opt_sa_seq=17, opt=["sa_seq_len=51,vl_seq_len=1,batch_size=1"])
    refused(DIT, "opt is 17", "above max 16", opt_sa_seq=17, max_seq_len=16, opt=["vl_seq_len=1,batch_size=1"])
    baked = NetworkInput("sa_embs", "bfloat16", (1, 41, 1536))
    assert one([baked], opt_sa_seq=41).shapes["sa_embs"].opt == (1, 41, 1536)
    refused([baked], "--opt-sa-seq 17: the model fixes sa_embs to 41", opt_sa_seq=17)
    refused([STATIC], "the model has no input sa_embs", opt_sa_seq=17)


def test_shapes_of_the_scripts():
    fork = one(DIT, model_type="dit")
    assert fork.shapes["sa_embs"] == InputRange((1, 1, 1536), (1, 51, 1536), (1, 256, 1536))
    assert fork.shapes["vl_embs"] == InputRange((1, 1, 2048), (1, 483, 2048), (1, 1024, 2048))
    assert one([IDS], model_type="backbone").shapes["ids"] == InputRange((1, 1), (1, 483), (1, 1024))
    default = one(DIT, allow_default_hints=True)
    assert default.shapes["vl_embs"] == InputRange((1, 1, 2048), (1, 280, 2048), (8, 560, 2048))
    assert default.shapes["sa_embs"] == InputRange((1, 1, 1536), (1, 51, 1536), (8, 115, 1536))
    assert default.shapes["timestep"] == InputRange((1,), (1,), (8,))
    for name in ("seq_len", "sequence_length"):
        llm = NetworkInput("a", "int64", (-1,), dimension_names=(name,))
        assert one([llm], allow_default_hints=True).shapes["a"] == InputRange((1,), (280,), (560,))
        assert one([llm], model_type="backbone").shapes["a"] == InputRange((1,), (483,), (1024,))


# ------------------------------------------------------------------------------------------------------- properties


@st.composite
def networks(draw):
    """Inputs over a few named and unnamed dimensions, with a size triple for each unknown."""
    triples = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)).map(lambda t: tuple(sorted(t)))
    sizes = {name: draw(triples) for name in ("a", "b", "c")}
    inputs, ranges = [], {}
    for index in range(draw(st.integers(1, 4))):
        axes = draw(st.lists(st.sampled_from(["a", "b", "c", None, 3]), max_size=3))
        name = f"i{index}"
        shape = tuple(3 if axis == 3 else -1 for axis in axes)
        names = tuple(axis if isinstance(axis, str) else None for axis in axes)
        inputs.append(NetworkInput(name, "float32", shape, dimension_names=names))
        columns = [(3, 3, 3) if a == 3 else sizes[a] if a else draw(triples) for a in axes]
        ranges[name] = [tuple(c[k] for c in columns) for k in range(3)]
    return inputs, ranges


def unknowns(inputs, name):
    (info,) = (info for info in inputs if info.name == name)
    return {info.key(axis) for axis, size in enumerate(info.shape) if size < 0}


@settings(deadline=None, max_examples=300)
@given(data=st.data(), network=networks())
def test_min_opt_max_and_every_hint_honoured(data, network):
    inputs, ranges = network
    given_ = {}
    for index, bound in enumerate(("min", "opt", "max")):
        named = data.draw(st.sets(st.sampled_from([info.name for info in inputs])))
        given_[bound] = (Bound({name: ranges[name][index] for name in sorted(named)}),)
    soft = data.draw(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 20)))
    known = {axis for bound in given_.values() for name in bound[0].shapes for axis in unknowns(inputs, name)} | {*soft}
    if not {axis for info in inputs for axis in unknowns(inputs, info.name)} <= known:
        refused(inputs, "nothing says how large", **given_, metadata=soft)
        return
    (profile,) = resolve(inputs, Hints(**given_, metadata=soft))  # these hints never contradict each other
    assert set(profile.shapes) == {info.name for info in inputs}
    sizes: dict[str, set] = {}
    for info in inputs:
        found = profile.shapes[info.name]
        for axis, fixed in enumerate(info.shape):
            triple = (found.min[axis], found.opt[axis], found.max[axis])
            assert triple[0] <= triple[1] <= triple[2]
            if fixed >= 0:
                assert triple == (fixed,) * 3
            elif info.dimension_names[axis]:
                sizes.setdefault(info.dimension_names[axis], set()).add(triple)
        for bound, (hint,) in given_.items():
            if info.name in hint.shapes:
                assert getattr(found, bound) == hint.shapes[info.name]
    assert all(len(triples) == 1 for triples in sizes.values())  # one size for one name
    assert Profile.from_mapping(json.loads(json.dumps(profile.to_mapping()))) == profile


@settings(deadline=None, max_examples=200)
@given(data=st.data(), network=networks())
def test_the_flags_that_an_error_prints_are_enough(data, network):
    inputs, ranges = network
    known = data.draw(st.sets(st.sampled_from([info.name for info in inputs])))
    opt = Bound({name: ranges[name][1] for name in sorted(known)})
    try:
        resolve(inputs, Hints(opt=(opt,)))
        return
    except BuildOptionError as error:
        flags = re.search(r"Give (.*?)(?: with a number for each \?)?\.$", str(error))[1]
    words = shlex.split(flags.replace("?", "5"))
    again = {flag[2:]: (Bound.parse(text),) for flag, text in zip(words[::2], words[1::2], strict=True)}
    (profile,) = resolve(inputs, Hints(**again))
    for name in known:
        assert profile.shapes[name].opt == ranges[name][1]
