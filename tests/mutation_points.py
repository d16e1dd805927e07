"""The places where a mutant may stand: cosmic-ray's operators and two of our own, without what no test should see."""

# pyright: reportMissingImports=false
# `make mutants` alone installs cosmic-ray.

from __future__ import annotations

import difflib
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cosmic_ray.plugins
import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator

__all__ = ["Mutant", "changed_lines", "mutants_of"]

# Slips that a person makes. All eleven replacements of an operator would mostly raise TypeErrors, which any test kills,
# and `is` in place of `==` is no other program for small integers.
CHANGES = {
    "ReplaceBinaryOperator": {
        "Add_Sub", "Sub_Add", "Mul_FloorDiv", "FloorDiv_Mul", "FloorDiv_Div", "Div_Mul", "Mod_FloorDiv", "Pow_Mul",
        "BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitOr", "LShift_RShift", "RShift_LShift",
    },
    "ReplaceUnaryOperator": {"Delete_USub", "Delete_Invert", "Delete_Not"},
    "ReplaceComparisonOperator": {
        "Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE",
        "GtE_Gt", "GtE_Lt",
    },
}  # fmt: skip
# They change nothing that could be observed while the program is right, and runs on the CPU.
KEYWORDS_WITHOUT_EFFECT = {"strict", "non_blocking", "stacklevel", "slots", "device"}


class DropKeyword(Operator):
    """Leaves out one keyword argument of a call: what a caller should have passed on."""

    def mutation_positions(self, node: Any) -> list[tuple[Any, Any]]:
        return [(node.children[place].start_pos, node.children[place].end_pos) for place in self._places(node)]

    def mutate(self, node: Any, index: int) -> Any:
        place = self._places(node)[index]
        # With the comma before it; in a trailer it stands alone between the brackets.
        del node.children[place - (node.type == "arglist" and place > 0) : place + 1]
        if node.type == "arglist" and place == 0:
            del node.children[0]
        return node

    @staticmethod
    def _places(node: Any) -> list[int]:
        if node.type not in ("arglist", "trailer") or node.parent.type == "classdef":
            return []
        return [n for n, child in enumerate(node.children) if child.type == "argument" and child.children[1] == "="]

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example("f(x, a=1, b=2)", "f(x, b=2)"),
            Example("f(a=1, b=2)", "f( b=2)"),
            Example("f(a=1)", "f()"),
        )


class DropStatement(Operator):
    """Leaves out a statement that is a call, an augmented assignment or a raise."""

    def mutation_positions(self, node: Any) -> list[tuple[Any, Any]]:
        acts = node.type == "simple_stmt" and self._acts(node.children[0])
        return [(node.start_pos, node.end_pos)] if acts else []

    def mutate(self, node: Any, index: int) -> Any:
        return parso.parse(node.get_first_leaf().prefix + "pass\n")

    @staticmethod
    def _acts(statement: Any) -> bool:
        if statement.type == "expr_stmt":
            return getattr(statement.children[1], "type", "") == "operator" and statement.children[1].value != "="
        return statement.type in ("atom_expr", "raise_stmt")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("f(x)\n", "pass\n"), Example("raise ValueError(x)\n", "pass\n"))


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Fields:
        part: of the package; file: within the repository; operator: its name.
        occurrence: which of the operator's places in the file.
        line: of the file, from 1; text: of that line.
        nth: which of the operator's places on this line.
    """

    part: str
    file: str
    operator: str
    occurrence: int
    line: int
    text: str
    nth: int

    def rank(self, seed: int) -> str:
        """A number that depends on the line's text, not on its place: most of a sample outlives changes elsewhere."""
        return _digest(seed, self.file, self.operator, self.text, self.nth)

    def mutated(self, source: str) -> str:
        code = mutate_code(source, _operators()[self.operator], self.occurrence)
        if code is None:
            raise ValueError(f"{self.file} has no place {self.occurrence} for {self.operator}")
        return code


def changed_lines(source: str, mutated: str) -> tuple[str, str]:
    """What stood where a mutant stands, and what stands there now."""
    lines = list(difflib.unified_diff(source.splitlines(), mutated.splitlines(), n=0, lineterm=""))[2:]
    was, now = ([line[1:].strip() for line in lines if line[0] == sign] for sign in "-+")
    return "\n".join(filter(None, was)), "\n".join(filter(None, now))


def mutants_of(part: str, root: Path, file: Path) -> list[Mutant]:
    """All mutants of a file."""
    source = (root / file).read_text(encoding="utf-8")
    lines, nodes = source.splitlines(), list(ast_nodes(parso.parse(source)))
    found: list[Mutant] = []
    for name, operator in _operators().items():
        places = ((node, place) for node in nodes for place in operator.mutation_positions(node))
        seen: dict[int, int] = {}
        for occurrence, (node, ((line, column), _)) in enumerate(places):
            if not _ignored(_at(node, (line, column)), name):
                text = lines[line - 1].strip()
                found.append(Mutant(part, file.as_posix(), name, occurrence, line, text, seen.setdefault(line, 0)))
                seen[line] += 1
    return found


@functools.cache
def _operators() -> dict[str, Operator]:
    operators: dict[str, Operator] = {}
    for full_name in cosmic_ray.plugins.operator_names():
        name = full_name.rpartition("/")[2]
        kind, _, change = name.partition("_")
        operator = cosmic_ray.plugins.get_operator(full_name)
        if not operator.arguments() and (kind not in CHANGES or change in CHANGES[kind]):
            operators[name] = operator()
    return operators | {"DropKeyword": DropKeyword(), "DropStatement": DropStatement()}


def _at(node: Any, place: tuple[int, int]) -> Any:
    """What is changed: a node, or the one of its children that begins at a place."""
    return next((child for child in getattr(node, "children", ()) if child.start_pos == place), node)


def _ignored(node: Any, operator: str) -> bool:
    """Whether a place is an annotation, a message, an export, a tuned size, or as another mutant."""
    if operator == "AddNot" and (node.type == "not_test" or (node.type == "comparison" and "in" not in _words(node))):
        return True
    child, parent = None, node
    while parent is not None:
        named = parent.children[0].get_code().strip() if hasattr(parent, "children") else ""
        if (
            (parent.type == "raise_stmt" and operator != "DropStatement")
            or parent.type in ("fstring", "import_from", "tfpdef")
            or (parent.type == "parameters" and child is not None and child.type == "operator")
            or (parent.type == "annassign" and child is parent.children[1])
            or (parent.type == "funcdef" and child is parent.annotation)
            or (parent.type == "classdef" and child is not parent.children[-1])
            or (parent.type == "expr_stmt" and (named == "__all__" or named.endswith("_BYTES")))
            or (parent.type == "if_stmt" and parent.children[1].get_code().strip() == "TYPE_CHECKING")
            or (parent.type == "argument" and named in KEYWORDS_WITHOUT_EFFECT)
        ):
            return True
        child, parent = parent, parent.parent
    return False


def _words(node: Any) -> list[str]:
    """The operators of a comparison."""
    return [word for child in node.children[1::2] for word in str(child.get_code()).split()]


def _digest(*what: Any) -> str:
    return hashlib.sha256("\0".join(map(str, what)).encode()).hexdigest()
