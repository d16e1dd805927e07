"""Methods and tasks on a command line: values by the types of their fields, and what is wrong with them."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import pytest

from gossamer import Policy, Profile
from gossamer.cli.specs import (
    field_values,
    make_policy,
    parse_method,
    parse_policies,
    parse_policy,
    parse_task,
    split_specs,
)
from gossamer.methods import AShape, Dense, DuoAttention, MaxRelative, Method, MInference, PerHead, Quest
from gossamer.profiles import write_duo


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Fields:
    name: ClassVar[str] = "fields"
    count: int = 1
    share: float = 0.5
    wide: bool = False
    word: str = ""
    budget: float | None = None
    either: int | str = 1
    sizes: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    layers: tuple[tuple[int, ...], ...] = ()
    weights: Sequence[float] = ()
    names: list[str] = dataclasses.field(default_factory=list)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mode: Literal["mean", "max", 3] = "mean"
    colour: Colour = Colour.RED
    base: Method = Dense()  # noqa: RUF009  # frozen


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("count=3", 3),
        ("count = 3", 3),
        ("share=2", 2.0),
        ("share=1e-3", 0.001),
        ("wide=True", True),
        ("word=none", "none"),
        ("budget=none", None),
        ("budget=0.25", 0.25),
        ("either=7", 7),
        ("either=auto", "auto"),
        ("sizes=[1, 2]", (1, 2)),
        ("sizes=[]", ()),
        ("pair=[1,2]", (1, 2.0)),
        ("layers=[[1],[2,3]]", ((1,), (2, 3))),
        ("weights=[1,2.5]", [1.0, 2.5]),
        ('names=["a"]', ["a"]),
        ('options={"a":1}', {"a": 1}),
        ("mode=max", "max"),
        ("mode=3", 3),
        ("colour=red", Colour.RED),
        ("colour=BLUE", Colour.BLUE),
        ("colour=2", Colour.BLUE),
        ("base=a_shape(sink=3,window=9)", AShape(3, 9)),
        ("unknown=3", "3"),
    ],
)
def test_values_are_of_their_fields_types(pair: str, value: Any) -> None:
    (got,) = field_values(Fields, [pair]).values()
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("count=x", "fields.count takes int, got 'x'"),
        ("count=1.5", "fields.count takes int, got '1.5'"),
        ("wide=1", "fields.wide takes bool, got '1'"),
        ("budget=much", "fields.budget takes float | None, got 'much'"),
        ("sizes=3", "fields.sizes takes tuple[int, ...], got '3'"),
        ("sizes=1;2", "got '1;2' (write it as JSON, such as [1,2])"),
        (f"sizes={'[' * 3000}{']' * 3000}", "(write it as JSON, such as [1,2])"),
        ('sizes=[1,"a"]', "fields.sizes takes tuple[int, ...]"),
        ("sizes=[true]", "fields.sizes takes tuple[int, ...]"),
        ("pair=[1]", "fields.pair takes tuple[int, float], got '[1]'"),
        ("weights=[true]", "got '[true]'"),
        ("options=[1]", "got '[1]'"),
        ("mode=min", "fields.mode takes 'mean' or 'max' or 3, got 'min'"),
        ("colour=green", "fields.colour takes Colour, got 'green'"),
        ("base=magic", "fields.base takes Method, got 'magic' (unknown method 'magic'; known: dense"),
        ("base=a_shape(sink=-1)", "a_shape.sink must be at least 0, got -1"),
        ("count", "fields are given as FIELD=VALUE, got 'count'"),
    ],
)
def test_values_of_other_types_are_named(pair: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the whole message is compared
        field_values(Fields, [pair])
    assert message in str(raised.value)


def test_lists_are_split_outside_brackets() -> None:
    assert split_specs("dense, a(x=1,y=[2,3]) ,b:z=3") == ["dense", "a(x=1,y=[2,3])", "b:z=3"]
    for text in ("a(x=[1,2)", "a)", "a(", "a(x=1]]"):
        with pytest.raises(ValueError, match="parentheses do not match"):
            split_specs(text)


def test_both_forms_of_fields_are_the_same() -> None:
    assert parse_method("a_shape(sink=4, window=64)") == parse_method("a_shape:sink=4:window=64") == AShape(4, 64)
    assert parse_method("dense") == Dense()
    assert parse_task("needle_multikey(turns=2,keys=8)") == parse_task("needle_multikey:keys=8", turns=2)
    for spec in ("a-shape", "a_shape(4"):
        with pytest.raises(ValueError, match="neither name nor name"):
            parse_method(spec)
    with pytest.raises(ValueError, match="FIELD=VALUE"):
        parse_method("a_shape(4)")


def test_a_profile_stands_for_methods_per_head_and_is_what_it_holds() -> None:
    theirs, ours = Profile.uniform(2, 3, AShape(1, 5)), Profile.uniform(2, 3, MaxRelative())
    for name in ("minference", "per_head"):
        assert parse_policy(name, theirs, 7) == Policy(MInference(theirs.layers), 7)
        assert parse_policy(name, ours, None) == Policy(PerHead(ours.layers))
    assert parse_policy("dense", theirs, 7) == Policy(Dense(), 7)
    assert parse_policy("a_shape(sink=4)", None, 3) == Policy(AShape(4), 3)
    with pytest.raises(ValueError, match="leave slash_size of minference out"):
        make_policy("minference", ["slash_size=9"], theirs, None)
    with pytest.raises(ValueError, match="use --profile FILE"):
        parse_method("minference(layers=[])")


def test_each_method_for_prompts_is_tried_with_each_for_steps() -> None:
    policies = parse_policies("dense,a_shape(sink=4)", "none,quest(budget=64)", None, 3)
    assert policies == [
        Policy(Dense(), 3), Policy(Dense(), 3, decode=Quest(64)), Policy(AShape(4), 3),
        Policy(AShape(4), 3, decode=Quest(64)),
    ]  # fmt: skip
    assert parse_policies("dense", None, None, 3) == policies[:1]
    with pytest.raises(ValueError, match="must be a method that chooses"):
        parse_policies("dense", "a_shape", None, 3)


def test_numbers_by_layer_and_head_come_from_a_file(tmp_path) -> None:
    write_duo(tmp_path, [[0.5, 1.0]], sink=1, recent=2)
    made = parse_method(f"duo_attention(gates=@{tmp_path},sparsity=0.25)")
    assert made == DuoAttention(((0.5, 1.0),), sparsity=0.25)
    assert parse_method("lserve(gates=[[0.5,1]])").to_dict()["gates"] == ((0.5, 1.0),)
    with pytest.raises(ValueError, match=r"cannot read .*nowhere: No such file"):
        parse_method(f"duo_attention(gates=@{tmp_path}/nowhere)")
    with pytest.raises(ValueError, match=r"a_shape\.sink takes int, got '@3'"):
        parse_method("a_shape(sink=@3)")
