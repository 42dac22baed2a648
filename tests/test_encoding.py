"""Encodings: what cannot be built, what JSON gives back, and how big things are."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monoquant_core.encoding import (
    FLOAT4_E2M1FN,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT8_E8M0FNU,
    FLOAT_BITS,
    FULL,
    INT4,
    INT8,
    MAX_DEPTH,
    UINT4,
    UINT8,
    ActivationQuant,
    ElementType,
    Encoding,
    codebook,
    integer,
    minifloat,
    param_shape,
    per_channel,
    per_group,
    per_row,
    per_tensor,
)
from monoquant_core.errors import EncodingError
from monoquant_core.model import TensorSpec

GOOD = Encoding(UINT4, (1, 32), "float16", zero_point=UINT4)


def nested(depth: int) -> Encoding:
    encoding = Encoding(INT8, (1, 2), "float32")
    for _ in range(depth - 1):
        encoding = Encoding(INT8, (1, 2), encoding)
    return encoding


REFUSALS = {
    "no name": (lambda: ElementType("", 4, "int"), "has a name"),
    "name is no text": (lambda: ElementType(4, 4, "int"), "has a name"),
    "no bits": (lambda: ElementType("t_none", 0, "int"), "t_none: bits must be in 1..16, got 0"),
    "too many bits": (lambda: integer(17), "int17: bits must be in 1..16, got 17"),
    "bits no integer": (lambda: ElementType("t_bits", 4.0, "int"), "t_bits: bits must be in 1..16, got 4.0"),
    "bits a bool": (lambda: ElementType("t_bool", True, "int"), "t_bool: bits must be"),
    "unknown kind": (lambda: ElementType("t_kind", 4, "complex"), "t_kind: kind must be int, float or codebook"),
    "signed no bool": (lambda: ElementType("t_sign", 4, "int", 1), "t_sign: signed must be True or False"),
    "integer with table": (lambda: ElementType("t_int", 1, "int", table=(0.0, 1.0)), "exactly the non-integer kinds"),
    "float without table": (lambda: ElementType("t_float", 4, "float"), "exactly the non-integer kinds have a table"),
    "table too long": (lambda: ElementType("t_long", 1, "codebook", table=(0.0, 1.0, 2.0)), "3 values do not fit 1"),
    "table empty": (lambda: ElementType("t_empty", 1, "codebook", table=()), "0 values do not fit 1 bits"),
    "table a list": (lambda: ElementType("t_list", 1, "codebook", table=[0.0, 1.0]), "a tuple of numbers"),
    "table of text": (lambda: ElementType("t_text", 1, "codebook", table=("0", "1")), "a tuple of numbers"),
    "table of bools": (lambda: ElementType("t_bools", 1, "codebook", table=(False, True)), "a tuple of numbers"),
    "table too large": (lambda: ElementType("t_large", 1, "codebook", table=(10**400,)), "does not fit a float"),
    "wrong width for its name": (lambda: ElementType("int3", 4, "int"), "int3: the name of an integer of 3 bits"),
    "unsigned under a signed name": (lambda: ElementType("int5", 5, "int", False), "int5: the name of an integer"),
    "codebook under an integer's name": (lambda: codebook("uint7", (0.0, 1.0)), "uint7: the name of an integer"),
    "element is a name": (lambda: Encoding("int8", (1, FULL), "float32"), "element must be an ElementType, got 'int8'"),
    "block a list": (lambda: Encoding(INT8, [1, FULL], "float32"), "block must be a non-empty tuple"),
    "block empty": (lambda: Encoding(INT8, (), "float32"), "block must be a non-empty tuple, got ()"),
    "block zero": (lambda: Encoding(INT8, (1, 0), "float32"), "block extents must be positive or FULL, got (1, 0)"),
    "block negative": (lambda: Encoding(INT8, (1, -2), "float32"), "block extents must be positive or FULL"),
    "block fractional": (lambda: Encoding(INT8, (1, 32.0), "float32"), "block extents must be positive or FULL"),
    "scale dtype": (lambda: Encoding(INT8, (1,), "int8"), "scale: 'int8' is not a float dtype name (float16, bfloat16"),
    "no scale": (lambda: Encoding(INT8, (1,), None), "scale: a float dtype name, an ElementType or an Encoding"),
    "zero point dtype": (lambda: Encoding(UINT8, (1,), "float32", "f32"), "zero_point: 'f32' is not a float dtype"),
    "offset a number": (lambda: Encoding(UINT8, (1,), "float32", offset=1.0), "offset: a float dtype name, an Element"),
    "zero point of a float": (
        lambda: Encoding(FLOAT8_E4M3FN, (1, FULL), "float32", zero_point="float32"),
        "float8_e4m3fn: only integer elements take a zero_point",
    ),
    "nested rank": (
        lambda: Encoding(INT8, (1, 2, 2), Encoding(INT8, (1, 2), "float32")),
        "scale: a nested block has the parent's rank, or rank 1 (flattened)",
    ),
    "nested too deep": (lambda: nested(MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} deep"),
    "clip too wide": (lambda: Encoding(INT4, (1,), "float32", clip=(-9, 7)), "clip (-9, 7) is not inside (-8, 7)"),
    "clip backwards": (lambda: Encoding(INT4, (1,), "float32", clip=(7, -7)), "clip (7, -7) is not inside (-8, 7)"),
    "clip of one": (lambda: Encoding(INT4, (1,), "float32", clip=(7,)), "clip: two integers expected, got (7,)"),
    "clip fractional": (lambda: Encoding(INT4, (1,), "float32", clip=(-7.0, 7.0)), "clip: two integers expected"),
    "activation granularity": (lambda: ActivationQuant(INT8, "channel", True), "tensor, token or group, got 'channel'"),
    "activation group without size": (lambda: ActivationQuant(INT8, "group", True), "group_size exactly when"),
    "activation size without group": (lambda: ActivationQuant(INT8, "token", True, group_size=8), "group_size exactly"),
    "activation group of none": (
        lambda: ActivationQuant(INT8, "group", True, group_size=0),
        "group_size must be a positive integer, got 0",
    ),
    "activation group fractional": (
        lambda: ActivationQuant(INT8, "group", True, group_size=1.5),
        "group_size must be a positive integer, got 1.5",
    ),
    "activation of a name": (lambda: ActivationQuant("int8", "token", True), "element must be an ElementType"),
    "activation dynamic a text": (lambda: ActivationQuant(INT8, "token", "false"), "dynamic must be True or False"),
    "activation symmetric a number": (lambda: ActivationQuant(INT8, "token", True, 1), "symmetric must be True or Fal"),
    "static range a text": (lambda: ActivationQuant(INT8, "tensor", False, low="-1", high=1.0), "finite expected"),
    "static range a bool": (lambda: ActivationQuant(INT8, "tensor", False, low=False, high=True), "finite expected"),
    "static range no float holds": (
        lambda: ActivationQuant(INT8, "tensor", False, low=-(10**400), high=1.0),
        "low <= 0 <= high and finite expected",
    ),
    "shape a list": (lambda: TensorSpec("w", [2, 3], "float32", GOOD), "w: impossible shape [2, 3]"),
    "quantized integers": (lambda: TensorSpec("w", (2, 32), "int64", GOOD), "stands for floats, not for int64"),
    "dynamic with a range": (lambda: ActivationQuant(INT8, "token", True, high=1.0), "dynamic activation has no range"),
    "static without a range": (lambda: ActivationQuant(INT8, "tensor", False, low=0.0), "needs low and high"),
    "static above zero": (lambda: ActivationQuant(INT8, "tensor", False, low=1.0, high=2.0), "low <= 0 <= high"),
    "static with NaN": (lambda: ActivationQuant(INT8, "tensor", False, low=math.nan, high=2.0), "finite expected"),
    "static with inf": (lambda: ActivationQuant(INT8, "tensor", False, low=0.0, high=math.inf), "finite expected"),
    "signed weight with a zero point": (
        lambda: Encoding(INT4, (1, 32), "float16", zero_point=INT4).check_weight(),
        "a weight's integer codes are unsigned with a zero point or an offset",
    ),
    "unsigned weight without": (
        lambda: Encoding(UINT4, (1, 32), "float16").check_weight(),
        "a weight's integer codes are signed without one",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(case: str) -> None:
    build, message = REFUSALS[case]
    with pytest.raises(EncodingError) as caught:
        build()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


JSON_REFUSALS = {
    "not an object": ([], "expected an object"),
    "unknown key": ({**GOOD.to_dict(), "extras": {}}, "unknown keys 'extras'"),
    "no element": ({"block": [1], "scale": "float32"}, "element, block and scale expected"),
    "no scale": ({k: v for k, v in GOOD.to_dict().items() if k != "scale"}, "element, block and scale expected"),
    "block no list": ({**GOOD.to_dict(), "block": 32}, "element, block and scale expected"),
    "block of text": ({**GOOD.to_dict(), "block": ["1", "32"]}, "block extents must be positive or FULL"),
    "clip of three": ({**GOOD.to_dict(), "clip": [0, 1, 2]}, "clip is two integers, got [0, 1, 2]"),
    "clip empty": ({**GOOD.to_dict(), "clip": []}, "clip is two integers, got []"),
    "scale a number": ({**GOOD.to_dict(), "scale": 1.5}, "parameter: a dtype name, {'codes': ...} or"),
    "scale null": ({**GOOD.to_dict(), "scale": None}, "parameter: a dtype name"),
    "scale of both kinds": ({**GOOD.to_dict(), "scale": {"codes": {}, "encoding": {}}}, "parameter: a dtype name"),
    "codes no object": ({**GOOD.to_dict(), "scale": {"codes": []}}, "parameter: a dtype name"),
    "element unknown key": ({**GOOD.to_dict(), "element": {**UINT4.to_dict(), "width": 8}}, "unknown keys 'width'"),
    "element without bits": ({**GOOD.to_dict(), "element": {"name": "uint4"}}, "name, bits and signed expected"),
    "element bits true": (
        {**GOOD.to_dict(), "element": {"name": "b", "bits": True}},
        "element type: name, bits and signed expected",
    ),
    "table no list": (
        {**GOOD.to_dict(), "element": {"name": "t_a", "bits": 1, "kind": "codebook", "table": "12"}},
        "element type 't_a': the table must be a list of numbers",
    ),
    "table of words": (
        {**GOOD.to_dict(), "element": {"name": "t_b", "bits": 1, "kind": "codebook", "table": [1.0, "2"]}},
        "t_b: the table must be a tuple of numbers",
    ),
    "table too large": (
        {**GOOD.to_dict(), "element": {"name": "t_c", "bits": 1, "kind": "codebook", "table": [0] * 70000}},
        "element type 't_c': the table must be a list of numbers",
    ),
    "table number too large": (
        {**GOOD.to_dict(), "element": {"name": "t_d", "bits": 1, "kind": "codebook", "table": [10**400]}},
        "t_d: a value of the table does not fit a float",
    ),
    "kind a list": (
        {**GOOD.to_dict(), "element": {"name": "t_e", "bits": 1, "kind": ["int"]}},
        "t_e: kind must be int, float or codebook",
    ),
    "another table under a taken name": (
        {**GOOD.to_dict(), "element": {**FLOAT8_E4M3FN.to_dict(), "table": [0.0, 1.0]}},
        "element type 'float8_e4m3fn' already means something else in this process",
    ),
}


@pytest.mark.parametrize("case", JSON_REFUSALS)
def test_from_dict_refuses(case: str) -> None:
    data, message = JSON_REFUSALS[case]
    with pytest.raises(EncodingError) as caught:
        Encoding.from_dict(data)
    assert message in str(caught.value)


def test_a_file_cannot_nest_until_the_stack_ends() -> None:
    data = GOOD.to_dict()
    for _ in range(500):
        data = {**GOOD.to_dict(), "scale": {"encoding": data}}
    with pytest.raises(EncodingError, match="nested more than 8 deep"):
        Encoding.from_dict(data)


def test_deepest_nesting_survives_json() -> None:
    assert Encoding.from_dict(nested(MAX_DEPTH).to_dict()) == nested(MAX_DEPTH)


@pytest.mark.parametrize("key", ["element", "granularity", "dynamic"])
def test_activation_from_dict_refuses_without(key: str) -> None:
    data = ActivationQuant(INT8, "token", True).to_dict()
    del data[key]
    with pytest.raises(EncodingError, match="activation: "):
        ActivationQuant.from_dict(data)
    with pytest.raises(EncodingError, match="unknown keys 'extra'"):
        ActivationQuant.from_dict({**ActivationQuant(INT8, "token", True).to_dict(), "extra": 1})


@pytest.mark.parametrize(
    "activation",
    [
        ActivationQuant(INT8, "token", True),
        ActivationQuant(FLOAT8_E4M3FN, "tensor", False, low=-1.5, high=0.0),
        ActivationQuant(FLOAT4_E2M1FN, "group", True, symmetric=True, group_size=16),
        ActivationQuant(UINT8, "tensor", False, symmetric=False, low=-0.1, high=1e30),
    ],
    ids=str,
)
def test_activation_survives_json(activation: ActivationQuant) -> None:
    assert ActivationQuant.from_dict(json.loads(json.dumps(activation.to_dict(), allow_nan=False))) == activation


def test_a_name_means_one_table() -> None:
    codebook("t_taken", (0.0, 1.0, 2.0))
    assert codebook("t_taken", (0.0, 1.0, 2.0)).table == (0.0, 1.0, 2.0)
    for other in [(0.0, 1.0, 3.0), (-0.0, 1.0, 2.0), (0.0, 1.0, math.nan), (0.0, 1.0, 2.0, 2.0)]:
        with pytest.raises(EncodingError, match="'t_taken' already means something else"):
            codebook("t_taken", other)


def test_a_refused_type_does_not_take_its_name() -> None:
    with pytest.raises(EncodingError):
        ElementType("t_retry", 99, "int")
    assert ElementType("t_retry", 3, "int").bits == 3


def test_every_nan_is_the_same_one() -> None:
    codebook("t_nan", (0.0, math.nan))
    assert codebook("t_nan", (0.0, -math.nan)).name == "t_nan"


@pytest.mark.parametrize(
    "element", [FLOAT8_E4M3FN, FLOAT8_E5M2, FLOAT8_E8M0FNU, FLOAT4_E2M1FN, INT8, integer(16, signed=False)], ids=str
)
def test_element_survives_json_in_another_process(element: ElementType) -> None:
    """Where nothing has used the name before, the table of the file is the one that counts."""
    code = (
        "import json, sys; from monoquant_core.encoding import ElementType\n"
        "data = json.loads(sys.stdin.read())\n"
        "print(json.dumps(ElementType.from_dict(data).to_dict(), allow_nan=False))"
    )
    text = json.dumps(element.to_dict(), allow_nan=False)
    done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(text)


floats = st.floats(width=64) | st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324])


@st.composite
def elements(draw: st.DrawFn, kinds: tuple[str, ...] = ("int", "codebook")) -> ElementType:
    if draw(st.sampled_from(kinds)) == "int":
        return integer(draw(st.integers(1, 16)), signed=draw(st.booleans()))
    table = tuple(draw(st.lists(floats, min_size=1, max_size=20)))
    # A name for each table: equal names must mean equal tables, whatever order the examples come in.
    return codebook("drawn_" + "_".join(map(float.hex, table)), table)


@st.composite
def encodings(draw: st.DrawFn, rank: int, depth: int = 0) -> Encoding:
    def parameter() -> str | ElementType | Encoding:
        choices: list[st.SearchStrategy[str | ElementType | Encoding]] = [
            st.sampled_from(sorted(FLOAT_BITS)),
            elements(),
        ]
        if depth < 3:
            choices.append(st.sampled_from([1, rank]).flatmap(lambda r: encodings(r, depth + 1)))
        return draw(st.one_of(choices))

    element = draw(elements())
    block = tuple(draw(st.lists(st.integers(1, 64) | st.just(FULL), min_size=rank, max_size=rank)))
    scale = parameter()
    zero_point = parameter() if element.kind == "int" and draw(st.booleans()) else None
    offset = parameter() if draw(st.booleans()) else None
    low, high = element.code_range
    clip = (low, low + 1) if high > low and draw(st.booleans()) else None
    return Encoding(element, block, scale, zero_point, offset, clip)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 4).flatmap(encodings))
def test_encoding_survives_json(encoding: Encoding) -> None:
    back = Encoding.from_dict(json.loads(json.dumps(encoding.to_dict(), allow_nan=False)))
    assert back == encoding
    assert back.clip == encoding.clip
    assert hash(back) == hash(encoding)
    assert str(back) == str(encoding)
    assert back.element.to_dict() == encoding.element.to_dict()


@settings(deadline=None, max_examples=80)
@given(st.data(), st.integers(1, 3))
def test_nbits_adds_up(data: st.DataObject, rank: int) -> None:
    """The size of codes and of every parameter, computed here from the shape alone."""
    encoding = data.draw(encodings(rank))
    shape = tuple(data.draw(st.lists(st.integers(0, 40), min_size=rank, max_size=rank)))

    def bits(param: str | ElementType | Encoding, count: int, grid: tuple[int, ...]) -> int:
        if isinstance(param, str):
            return count * FLOAT_BITS[param]
        if isinstance(param, ElementType):
            return count * param.bits
        return total(param, (count,) if len(param.block) == 1 else grid)

    def total(enc: Encoding, extents: tuple[int, ...]) -> int:
        grid = tuple(
            math.ceil(n / (n if b == FULL else b)) if n else 0 for n, b in zip(extents, enc.block, strict=True)
        )
        own = math.prod(extents) * enc.element.bits
        return own + sum(bits(p, math.prod(grid), grid) for _, p in enc.params())

    assert encoding.nbits(shape) == total(encoding, shape)


def test_clip_is_left_out_of_comparison() -> None:
    """No format stores it."""
    narrow = Encoding(INT8, (1, FULL), "float32", clip=(-127, 127))
    assert narrow == Encoding(INT8, (1, FULL), "float32")
    assert narrow.codes_range == (-127, 127)
    assert Encoding(INT8, (1, FULL), "float32").codes_range == (-128, 127)


@pytest.mark.parametrize(
    ("shape", "block", "expected"),
    [
        ((64, 256), per_tensor(2), (1, 1)),
        ((64, 256), per_channel(2), (64, 1)),
        ((64, 256), per_channel(2, 1), (1, 256)),
        ((64, 256), per_channel(2, -1), (1, 256)),
        ((64, 256), per_group(2, 32), (64, 8)),
        ((64, 250), per_group(2, 32), (64, 8)),
        ((64, 31), per_group(2, 32), (64, 1)),
        ((3, 64, 256), per_row(3), (3, 64, 1)),
        ((300, 130), (128, 128), (3, 2)),
        ((8, 4, 3, 3), per_channel(4), (8, 1, 1, 1)),
        ((8, 4, 3, 3), (1, 32), (8, 2)),
        ((8, 4, 3, 3), (256,), (2,)),
        ((), (FULL,), (1,)),
        ((7,), (FULL,), (1,)),
        ((0, 64), per_channel(2), (0, 1)),
        ((4, 0), per_channel(2), (4, 0)),
        ((0, 64), per_tensor(2), (0, 1)),
        ((0,), (32,), (0,)),
    ],
)
def test_param_shape(shape: tuple[int, ...], block: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert param_shape(shape, block) == expected


@pytest.mark.parametrize(
    ("shape", "block"), [((4,), (1, 4)), ((4, 4), (1, 1, 4)), ((2, 2, 2, 2), (1, 1, 2)), ((), (1, 1))]
)
def test_param_shape_refuses(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    with pytest.raises(EncodingError, match="has another rank than shape"):
        param_shape(shape, block)


def test_text_says_the_structure() -> None:
    inner = Encoding(integer(6, signed=False), (1, 8), "float16")
    assert str(Encoding(INT8, (1, FULL), "float32")) == "int8[1x*]*float32"
    assert str(GOOD) == "(uint4-uint4)[1x32]*float16"
    assert str(Encoding(UINT4, (1, 32), inner, offset=inner)) == "uint4[1x32]*(uint6[1x8]*float16)+(uint6[1x8]*float16)"
    assert str(ActivationQuant(INT8, "token", True)) == "dynamic int8 per token"
    assert str(ActivationQuant(INT8, "group", True, group_size=32)) == "dynamic int8 per group[32]"


def test_code_ranges() -> None:
    assert integer(3).code_range == (-4, 3)
    assert integer(3, signed=False).code_range == (0, 7)
    assert codebook("t_three", (-1.0, 0.0, 1.0)).code_range == (0, 2)
    assert codebook("t_three", (-1.0, 0.0, 1.0)).bits == 2
    assert FLOAT8_E8M0FNU.code_range == (0, 255)


def test_minifloat_without_specials_uses_every_code() -> None:
    """float6_e3m2fn and float6_e2m3fn: the largest values of OCP MX v1.0, table 1."""
    assert max(minifloat("float6_e3m2fn", 3, 2, nan="none").table) == 28.0
    assert max(minifloat("float6_e2m3fn", 2, 3, nan="none").table) == 7.5
