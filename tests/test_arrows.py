"""Rooms import only rooms below them, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "effnet_quant"
# from the top to the bottom; a room imports rooms of the floors below its own, and none beside it
FLOORS = (
    ("cli",),
    ("jobs",),
    ("report", "serving", "checks"),
    ("engines", "export", "training"),
    ("saved_model",),
    ("api",),
    ("quantization",),
    ("tasks",),
    ("data",),
    ("models",),
    ("card", "recipes", "integer"),
)
# every room may import these, and they import errors and terminal alone
FOUNDATIONS = ("errors", "files", "memory", "structure", "terminal")
# the package's own front: __main__ starts the command line, __init__ names what is public
FRONT: dict[str, set[str]] = {"__main__": {"cli"}, "__init__": set()}
# files that break the rule, and the room they should not know; the list only ever gets shorter
EXCEPTIONS: set[tuple[str, str]] = set()


def imported_rooms(path: Path) -> Iterator[str]:
    """The rooms whose modules a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for package, *parts in (module.split(".") for module in modules):
            if package == "effnet_quant" and parts and parts[0] != "__version__":
                yield parts[0]


def allowed(room: str) -> set[str]:
    """The rooms that modules of a room may import."""
    if room in FRONT:
        return FRONT[room]
    if room in FOUNDATIONS:
        return {"errors", "terminal"}
    (floor,) = (number for number, rooms in enumerate(FLOORS) if room in rooms)
    return {room, *FOUNDATIONS, *(below for rooms in FLOORS[floor + 1 :] for below in rooms)}


def room_of(path: Path) -> str:
    """The folder of the package that a file is in, or the file itself."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_its_floor() -> None:
    known = {room for rooms in FLOORS for room in rooms} | {*FOUNDATIONS, *FRONT}
    assert {room_of(path) for path in FILES} <= known


def test_imports_follow_the_arrows() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), room)
        for path in FILES
        for room in imported_rooms(path)
        if room not in allowed(room_of(path))
    }
    assert found - EXCEPTIONS == set(), "a room imports one that is not below it"
    assert EXCEPTIONS - found == set(), "these keep to the rule now: take them out of EXCEPTIONS"


def test_no_room_imports_cli() -> None:
    assert {room_of(path) for path in FILES if "cli" in imported_rooms(path)} == {"__main__", "cli"}


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import effnet_quant.data.folders\nfrom effnet_quant import __version__, cli\nfrom torch import nn\n"
        "def late():\n    from effnet_quant.models.layers import ConvBNAct\n"
    )
    assert list(imported_rooms(path)) == ["data", "cli", "models"]


@pytest.mark.parametrize(
    ("room", "others", "not_others"),
    [
        ("cli", {"api", "card", "errors"}, {"__main__"}),
        ("checks", {"engines", "data", "models"}, {"cli", "report"}),
        ("training", {"tasks", "models"}, {"engines", "checks"}),
        ("models", {"card", "files"}, {"data", "quantization"}),
        ("files", {"errors"}, {"models", "memory"}),
    ],
)
def test_arrows_point_down(room: str, others: set[str], not_others: set[str]) -> None:
    assert others <= allowed(room)
    assert not not_others & allowed(room)


def test_the_architecture_names_every_file_and_no_other() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page[page.index("effnet_quant/\n") : page.index("tests/                   mirrors")]
    named = set(re.findall(r"\w+\.py", tree)) - {"__init__.py"}
    assert named == {path.name for path in FILES if path.name != "__init__.py" and path.parent.name != "passes"}
