"""What `make interop` would run is what can be asked for; and its judgement can fail."""

import numpy as np
import pytest
import torch

from hqq_core import FORMATS
from hqq_core.formats import check_recipe
from tests.interop.environment import REQUIREMENTS, SCRIPTS, Venv
from tests.interop.line import BEGIN, END, between_marks, difference, same_until
from tests.interop.matrix import MATRIX, first_of_each, selected
from tests.interop.rounding import block_size, in_blocks, per_token
from tests.interop.runtime import EXACT, RUNTIMES


def test_every_cell_is_a_recipe_that_its_format_holds():
    for cells in MATRIX:
        for _, recipe in cells:
            check_recipe(recipe)


def test_every_format_runs_somewhere():
    run = {name for name, writer in FORMATS.items() if not writer.capabilities.experimental}
    assert {cells.format for cells in MATRIX} == run
    assert {name for cells in MATRIX for name in cells.runtimes} <= set(RUNTIMES)


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=lambda runtime: runtime.name)
def test_every_runtime_has_its_script_and_its_requirements(runtime):
    assert (SCRIPTS / runtime.script).is_file()
    if isinstance(runtime.environment, Venv):
        lines = [
            line
            for kind in ("txt", "apart.txt")
            for line in (REQUIREMENTS / f"{runtime.environment.name}.{kind}").read_text().splitlines()
            if not line.startswith("#")
        ]
        assert all("==" in line for line in lines)


def test_a_word_selects_a_runtime_or_a_format():
    assert {name for cell in selected(MATRIX, ["vLLM"], ()) for name in cell.runtimes} == {"vLLM"}
    assert {cell.recipe.format for cell in selected(MATRIX, ["mlx"], ())} == {"mlx"}
    assert len(selected(MATRIX, [], ())) == len({(model, recipe) for cells in MATRIX for model, recipe in cells})


def test_what_is_done_is_not_selected_again():
    first, *others = selected(MATRIX, ["mlx"], ())
    done = {(name, first.model, first.recipe) for name in first.runtimes}
    assert selected(MATRIX, ["mlx"], done) == others


def test_the_first_of_each_has_every_pair_once():
    pairs = [(name, cell.recipe.format) for cell in first_of_each(selected(MATRIX, [], ())) for name in cell.runtimes]
    assert sorted(pairs) == sorted({(name, cells.format) for cells in MATRIX for name in cells.runtimes})


def test_one_wrong_logit_is_a_difference():
    wanted = np.random.default_rng(0).normal(size=(2, 8, 32)).astype(np.float32)
    got = wanted.copy()
    got[1, 7, 31] += 1
    assert difference(wanted, wanted) == (0, 0)
    assert difference(got, wanted)[0] > EXACT
    assert RUNTIMES["transformers"].tolerated(0) == EXACT
    assert RUNTIMES["vLLM"].tolerated(0.01) == 0.02
    assert RUNTIMES["mlx-lm"].tolerated(0) == RUNTIMES["mlx-lm"].tolerated(EXACT / 3) == EXACT
    assert RUNTIMES["mlx-lm"].tolerated(EXACT) == 2 * EXACT


def test_continuations_are_compared_token_by_token():
    assert same_until([1, 2, 3], [1, 2, 3]) == "same"
    assert same_until([1, 9, 3], [1, 2, 3]) == "1 of 3"


def test_only_what_lies_between_the_marks_is_replaced():
    assert between_marks(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"


def test_activations_are_rounded_to_their_block():
    x = torch.tensor([[0.0] * 32 + [127.0] + [0.4] * 31])
    assert torch.equal(in_blocks(x, 32), torch.tensor([[0.0] * 32 + [127.0] + [0.0] * 31]))
    assert torch.equal(in_blocks(x, 64), per_token(x))
    y = torch.randn(3, 512)
    step = y.unflatten(-1, (-1, 256)).abs().amax(-1, keepdim=True) / 127
    assert ((in_blocks(y, 256) - y).unflatten(-1, (-1, 256)).abs() <= step * 0.501).all()
    assert [block_size(name) for name in ("Q4_0", "Q8_0", "Q4_K", "TQ2_0")] == [32, 32, 256, 256]
