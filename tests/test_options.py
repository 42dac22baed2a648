"""Options: what a plugin may declare, and what a user may give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monoquant_core.declarations import NoOptions
from monoquant_core.errors import OptionError
from monoquant_core.options import build, option, option_infos, parse


@dataclass(frozen=True)
class Sample:
    """One option of every type."""

    group_size: int = option(128, "Elements that share a scale.", minimum=1)
    granularity: str = option("channel", "What shares a scale.", choices=("tensor", "channel"))
    symmetric: bool = option(True, "No zero point.")
    fast: bool = option(False, "Skip the search.")
    percentile: float = option(99.9, "Where to cut.", minimum=50.0)
    levels: int = option(4, "How many levels.", choices=(2, 4, 8))


INFOS = {info.name: info for info in option_infos(Sample)}


def test_infos_repeat_the_declaration_in_order() -> None:
    assert list(INFOS) == ["group_size", "granularity", "symmetric", "fast", "percentile", "levels"]
    size = INFOS["group_size"]
    assert (size.type, size.default, size.help) == (int, 128, "Elements that share a scale.")
    assert (size.choices, size.minimum) == (None, 1)
    assert INFOS["granularity"].choices == ("tensor", "channel")
    assert option_infos(NoOptions) == []


def test_flags_show_the_form_that_changes_something() -> None:
    assert INFOS["group_size"].flag == "--group-size"
    assert INFOS["symmetric"].flag == "--no-symmetric"
    assert INFOS["fast"].flag == "--fast"


@dataclass(frozen=True)
class Undeclared:
    """A plain field."""

    size: int = 3


@dataclass(frozen=True)
class Structured:
    """No flag can hold it."""

    sizes: list[int] = option((), "Sizes.")  # noqa: RUF009


@dataclass(frozen=True)
class Optional_:
    """Neither can it hold this."""

    size: int | None = option(None, "Size.")


@dataclass(frozen=True)
class Metadata:
    """A field with metadata of another library."""

    size: int = field(default=3, metadata={"doc": "Size."})


@dataclass(frozen=True)
class Forward:
    """A type that does not exist."""

    size: Missing = option(3, "Size.")  # type: ignore[name-defined]  # noqa: F821, RUF009


@dataclass
class Thawed:
    """Could be changed after it was checked."""

    size: int = option(3, "Size.")


@dataclass(frozen=True)
class Required:
    """No flag could be left out."""

    size: int = field(metadata={"help": "Size.", "choices": None, "minimum": None})


@dataclass(frozen=True)
class Mistyped:
    """A default of another type."""

    size: int = option("3", "Size.")


@dataclass(frozen=True)
class TooSmall:
    """A default that users may not give."""

    size: int = option(0, "Size.", minimum=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Thawed, "options are declared in a frozen dataclass"),
        (Required, "Required.size: declare it with option(default, help)"),
        (Mistyped, "default of Mistyped: size wants int, got '3'"),
        (TooSmall, "default of TooSmall: size is at least 1, got 0"),
        (Undeclared, "Undeclared.size: declare it with option(default, help)"),
        (Metadata, "Metadata.size: declare it with option(default, help)"),
        (Structured, "Structured.sizes: bool, int, float or str expected, got list[int]"),
        (Optional_, "Optional_.size: bool, int, float or str expected, got int | None"),
        (Forward, "Forward: name 'Missing' is not defined"),
        (dict, "options are declared in a frozen dataclass"),
        (Sample(), "options are declared in a frozen dataclass"),
    ],
)
def test_declaration_refused(options: type, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        option_infos(options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"group_sise": 64}, "scheme sample has no option 'group_sise'", "did you mean 'group_size'?"),
        ({"xyz": 1}, "scheme sample has no option 'xyz'", "it takes: group_size, granularity, symmetric"),
        ({"group_size": "64"}, "scheme sample: group_size wants int, got '64'", ""),
        ({"group_size": 64.0}, "group_size wants int, got 64.0", ""),
        ({"group_size": True}, "group_size wants int, got True", ""),
        ({"group_size": None}, "group_size wants int, got None", ""),
        ({"group_size": 0}, "group_size is at least 1, got 0", ""),
        ({"symmetric": 1}, "symmetric wants bool, got 1", ""),
        ({"symmetric": "yes"}, "symmetric wants bool, got 'yes'", ""),
        ({"granularity": "row"}, "granularity is one of tensor, channel, got 'row'", ""),
        ({"granularity": "Channel"}, "granularity is one of tensor, channel, got 'Channel'", ""),
        ({"percentile": True}, "percentile wants float, got True", ""),
        ({"percentile": 49.9}, "percentile is at least 50.0, got 49.9", ""),
        ({"percentile": math.nan}, "percentile is at least 50.0, got nan", ""),
        ({"levels": 3}, "levels is one of 2, 4, 8, got 3", ""),
    ],
)
def test_value_refused(values: dict[str, object], message: str, hint: str) -> None:
    with pytest.raises(OptionError) as caught:
        build(Sample, values, owner="scheme sample")
    assert message in str(caught.value)
    assert caught.value.hint.startswith(hint)


def test_a_plugin_without_options_says_so() -> None:
    with pytest.raises(OptionError) as caught:
        build(NoOptions, {"size": 1}, owner="scheme plain")
    assert caught.value.hint == "it takes: no options"


def test_build() -> None:
    assert build(Sample, {}, owner="x") == Sample()
    assert build(Sample, {"percentile": 100, "group_size": 1}, owner="x") == Sample(percentile=100, group_size=1)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("group_size", "64", 64),
        ("group_size", "-1", -1),
        ("granularity", "tensor", "tensor"),
        ("granularity", "", ""),
        ("symmetric", "false", False),
        ("symmetric", "True", True),
        ("symmetric", "no", False),
        ("symmetric", "1", True),
        ("percentile", "99", 99.0),
        ("percentile", "1e2", 100.0),
    ],
)
def test_parse(name: str, text: str, value: object) -> None:
    parsed = parse(INFOS[name], text, owner="--set")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("group_size", "64.0"), ("group_size", "big"), ("group_size", ""), ("symmetric", "maybe"), ("percentile", "high")],
)
def test_parse_refuses(name: str, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(INFOS[name], text, owner="--set '*=sample'")
    assert str(caught.value) == f"--set '*=sample': {name} wants {INFOS[name].type.__name__}, got {text!r}"


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "group_size": st.integers(1),
            "granularity": st.sampled_from(["tensor", "channel"]),
            "symmetric": st.booleans(),
            "percentile": st.floats(50, allow_nan=False),
            "levels": st.sampled_from([2, 4, 8]),
        },
    )
)
def test_what_is_written_is_read_back(values: dict[str, object]) -> None:
    """The text of a value parses to it: recipes, ``--set`` and flags agree."""
    texts = {name: str(value) for name, value in values.items()}
    parsed = {name: parse(INFOS[name], text, owner="x") for name, text in texts.items()}
    assert build(Sample, parsed, owner="x") == build(Sample, values, owner="x") == Sample(**values)  # type: ignore[arg-type]
