"""What a card says to copy, copied: each Python snippet runs against the Hub, and each command has the options it is given."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hqq_core import Recipe, output_folders, quantize_checkpoint
from hqq_core.card._runtimes import PROMPT, SNIPPETS
from hqq_core.formats import FORMATS
from tests.fakehub.server import FakeHub
from tests.families import build
from tests.solved import dequantized, stored_as
from tests.vocabularies import save_tokenizer

REPO = "team-a/quantized"
HERE = ("transformers 5", "hqq 0", "mlx-lm")  # runtimes of the test environment; others: tests/interop
RECIPES = {
    "compressed-tensors": {}, "hqq": {}, "mlx": {}, "metal": {}, "gguf": {"type": "Q4_1"}, "awq": {"group_size": 64},
}  # fmt: skip
MODULE = "model.layers.1.mlp.down_proj"
LOOK = f"""
layer = model.get_submodule("{MODULE}")
W = layer.dequantize() if hasattr(layer, "dequantize") else layer.weight
__import__("torch").save(W.detach().float(), "W.pt")
"""
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def sections(card: str) -> dict[str, list[tuple[str, str]]]:
    """By runtime, the language and text of each block."""
    parts = re.split(r"^### (.*)$", card.split("## Load it")[1].split("\n## ")[0], flags=re.MULTILINE)[1:]
    blocks = [re.findall(r"^```(\w+)\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL) for text in parts[1::2]]
    return dict(zip(parts[::2], blocks, strict=True))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Llama that writes; of a size that every format here takes."""
    folder = tmp_path_factory.mktemp("source")
    build("llama", hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(folder)
    return save_tokenizer(folder, "llama-bpe")


def recipe_of(name: str) -> Recipe:
    return Recipe(format=name, energy="none", preset="fast", **{"group_size": 32} | RECIPES[name])


def solved_weight(source: Path, name: str) -> torch.Tensor:
    """What was solved for MODULE, as its reader has it."""
    if name == "gguf":
        return stored_as(source, recipe_of(name))[f"{MODULE}.weight"]
    return dequantized(source, recipe_of(name))[MODULE].float()


def run(code: str, environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "repo_id"), [*((name, REPO) for name in RECIPES), ("hqq", None), ("gguf", None)])
def test_each_python_snippet_loads_the_model_and_it_writes(source, tmp_path, fakehub: FakeHub, name, repo_id):
    result = tmp_path / "result"
    quantize_checkpoint(source, result, recipe_of(name), repo_id=repo_id)
    environment = fakehub.environment(tmp_path / "home") | QUIET
    if repo_id:
        fakehub.add_repo(repo_id, result)
    found = sections((result / "README.md").read_text())
    here = {runtime: blocks for runtime, blocks in found.items() if runtime.startswith(HERE)}
    codes = [text for blocks in here.values() for language, text in blocks if language == "python"]
    codes = [code for code in codes if name != "awq" or "mlx_lm" in code]  # transformers wants gptqmodel for it
    assert codes
    for code in codes:
        folder = tmp_path if repo_id else result
        if "mlx_lm" in code:  # whose weights tests/hqq_core/formats/test_mlx.py looks at
            assert run(code, environment, folder).strip(), "something is written"
            continue
        assert PROMPT in run(code + LOOK, environment, folder)
        assert torch.equal(torch.load(folder / "W.pt"), solved_weight(source, name))


def test_a_folder_of_a_repository_is_downloaded_and_loads(source, tmp_path, fakehub: FakeHub):
    recipes = [recipe_of("compressed-tensors"), recipe_of("mlx")]
    quantize_checkpoint(source, tmp_path / "out", *recipes, repo_id=REPO)
    fakehub.add_repo(REPO, tmp_path / "out")
    environment = fakehub.environment(tmp_path / "home") | QUIET
    card = (tmp_path / "out" / output_folders(recipes)[0] / "README.md").read_text()
    command = re.search(r"^hf download .*$", card, re.MULTILINE).group()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(
        [tool("hf"), *shlex.split(command)[1:]], check=True, capture_output=True, env=environment, cwd=elsewhere
    )
    assert [path.name for path in elsewhere.iterdir() if path.name != ".cache"] == [output_folders(recipes)[0]]
    (code,) = (text for blocks in sections(card).values() for language, text in blocks if language == "python")
    assert PROMPT in run(code, environment, elsewhere)


def test_other_models_are_loaded_by_their_own_class(tmp_path, fakehub: FakeHub):
    build("bert").save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", recipe_of("compressed-tensors"))
    found = sections((tmp_path / "out" / "README.md").read_text())
    assert not [runtime for runtime in found if not runtime.startswith("transformers")], "others write text alone"
    ((_, code),) = (block for blocks in found.values() for block in blocks if block[0] == "python")
    assert "from transformers import BertModel\n" in code
    loaded = run(
        code + "\nprint(type(model).__name__)", fakehub.environment(tmp_path / "home") | QUIET, tmp_path / "out"
    )
    assert loaded.strip() == "BertModel"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("local", [True, False])
def test_every_runtime_of_a_format_has_a_snippet(name, local):
    for runtime in FORMATS[name].capabilities.runtimes:
        assert any(
            name in snippet.formats
            and snippet.runtime == runtime.name
            and snippet.local in (None, local)
            and not snippet.title
            for snippet in SNIPPETS
        ), runtime


def test_no_snippet_is_for_what_no_format_names():
    for snippet in SNIPPETS:
        for name in snippet.formats:
            assert snippet.runtime in {runtime.name for runtime in FORMATS[name].capabilities.runtimes}


@pytest.mark.parametrize(
    ("nbits", "zero", "served"), [(4, "int", True), (8, "none", True), (8, "int", False), (3, "int", False)]
)
def test_servers_are_named_for_what_they_have_kernels_for(source, tmp_path, nbits, zero, served):
    recipe = Recipe(nbits=nbits, zero=zero, energy="none", preset="fast", group_size=32)
    quantize_checkpoint(source, tmp_path / "out", recipe)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("vllm serve" in card, "sglang" in card) == (served, served)


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is installed with the tests"
    return found


@pytest.mark.parametrize("command", ["hf download", "mlx_lm.generate", "halfquad verify"])
def test_commands_have_the_options_that_snippets_give_them(source, tmp_path, command):
    quantize_checkpoint(source, tmp_path / "out", recipe_of("mlx"), recipe_of("metal"), repo_id=REPO)
    cards = [path.read_text() for path in (tmp_path / "out").glob("*/README.md")]
    used = {line for card in cards for line in card.splitlines() if line.startswith(command)}
    program, *subcommand = command.split()
    told = subprocess.run([tool(program), *subcommand, "--help"], capture_output=True, text=True, check=True).stdout
    assert used
    for line in used:
        options = [word for word in shlex.split(line) if word.startswith("-")]
        assert all(option in told for option in options), line


def test_snippets_are_the_pages_own_words():
    """docs/finetuning.md shows the same way into the hqq library, which tests/test_finetuning.py runs."""
    page = (Path(__file__).parents[3] / "docs" / "finetuning.md").read_text()
    (snippet,) = (one.text for one in SNIPPETS if one.runtime == "hqq" and one.language == "python")
    loop = snippet.split("# what was not quantized\n")[1].split("$write")[0]
    assert loop.replace("model.set_submodule", "base.set_submodule") in page
