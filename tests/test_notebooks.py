"""The skeleton that all notebooks share. Running them is the job of nbval: see the Makefile."""

import ast
import re

import nbformat
import pytest

from diclip.settings import ROOT, Settings, load_settings

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST, LONGEST_SOLUTION, MOST_BYTES = 15, 20, 1_000_000

pytestmark = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


@pytest.fixture
def cells(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook.cells


def tagged(cells, tag):
    return [index for index, cell in enumerate(cells) if tag in cell.metadata.get("tags", [])]


def code(cells):
    return [index for index, cell in enumerate(cells) if cell.cell_type == "code"]


def test_parameters_are_typed_commented_settings(cells):
    (index,) = tagged(cells, "parameters")
    assert index == code(cells)[0] and cells[index - 1].cell_type == "markdown"
    lines = cells[index].source.splitlines()
    assert all(re.fullmatch(r"\w+: [\w\[\], |]+ = .+  # \S.*", line) for line in lines)
    values = {line.target.id: ast.literal_eval(line.value) for line in ast.parse("\n".join(lines)).body}
    assert "preset" in values and set(values) <= set(Settings.model_fields)
    load_settings(**values)


def test_setup_follows_the_parameters(cells):
    index = code(cells)[1]
    assert index == tagged(cells, "parameters")[0] + 1
    assert cells[index].source.endswith("settings = runs.setup(globals())")


def test_checks_come_last(cells):
    assert tagged(cells, "checks") == [code(cells)[-1]]
    assert cells[code(cells)[-1]].source.count("assert ") >= 2


def test_exercises_check_themselves(cells):
    exercises, solutions = tagged(cells, "exercise"), tagged(cells, "solution")
    assert len(exercises) >= 3 and solutions == [index + 1 for index in exercises]
    for exercise, solution in zip(exercises, solutions, strict=True):
        names = [line.targets[0].id for line in ast.parse(cells[exercise].source).body if isinstance(line, ast.Assign)]
        check = cells[solution + 1]
        assert names and check.cell_type == "code" and "assert " in check.source
        assert all(re.search(rf"\b{name}\b", cells[solution].source + check.source) for name in names)


def test_it_tells_before_it_computes(cells):
    first = cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "Goal" in first.source and "Predict" in first.source
    assert cells[-1].cell_type == "markdown" and "Read next" in cells[-1].source


def test_cells_are_short(cells):
    for index in code(cells):
        longest = LONGEST_SOLUTION if index in tagged(cells, "solution") else LONGEST
        assert len(cells[index].source.splitlines()) <= longest, cells[index].source


def test_every_cell_has_run_in_order_without_errors(cells):
    assert [cells[index].execution_count for index in code(cells)] == list(range(1, len(code(cells)) + 1))
    kinds = {output.output_type for index in code(cells) for output in cells[index].outputs}
    assert "error" not in kinds
    assert not [o for i in code(cells) for o in cells[i].outputs if o.get("name") == "stderr"]


def test_it_is_small_and_has_no_state(path):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < MOST_BYTES
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
    assert not any({"papermill", "execution"} & set(cell.metadata) for cell in notebook.cells)
