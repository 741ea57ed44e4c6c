"""docs/finetuning.md, run: every method it lists trains over every base it lists, which stays as it was."""

import re
from pathlib import Path

import pytest
import torch

from hqq_core import Recipe, quantize_checkpoint
from tests.families import build
from tests.models import english
from tests.oracles import hqq
from tests.solved import dequantized

PAGE = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text()
BASES = ("compressed-tensors", "hqq")
CELLS = {
    (method, base): cell
    for method, *cells in re.findall(r"^\| ([A-Z]\w.*?) \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
    for base, cell in zip(BASES, cells, strict=True)
}
TRAINED = [pair for pair, cell in CELLS.items() if cell.startswith("yes")]
REFUSED = [pair for pair, cell in CELLS.items() if cell.startswith("no")]
SETTINGS = {"nbits": 4, "group_size": 32, "energy": "none"}
FALLS_TO = (
    0.98  # of the first loss, in the page's thirty steps; prompt tuning, with the fewest parameters, comes to 0.97
)

pytestmark = [  # PEFT advises, and calls transformers by an older name
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Llama of 200,000 parameters that has read some English, byte by byte."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    model = build("llama", intermediate_size=128).train()
    ids = torch.tensor(tokenizer(english()[:40_000]).input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in ids[: len(ids) // 512 * 512].view(-1, 8, 64):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(source, tmp_path_factory) -> Path:
    """The source in every format of the page, 4 bit."""
    folder = tmp_path_factory.mktemp("results")
    for name in BASES:
        quantize_checkpoint(source, folder / name, Recipe(format=name, **SETTINGS))
    return folder


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=words | {"<pad>": len(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def run(heading: str, results: Path, base: str, scope: dict | None = None, part: int = 0) -> dict:
    """The names that a snippet of the page leaves behind."""
    section = re.split(rf"^#+ {heading}$", PAGE, flags=re.MULTILINE)[1]
    snippet = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[part]
    code = snippet.replace("path/to/result", str(results / base)).replace("path/to/adapter", str(results / "adapter"))
    scope = {} if scope is None else scope
    torch.manual_seed(0)
    exec(compile(code, f"docs/finetuning.md, {heading}", "exec"), scope)
    return scope


def attach(method: str, base: str, results: Path) -> dict:
    """A fresh base under a fresh adapter, and the page's batch."""
    hqq("core.quantize")  # its first import warns
    scope = run(base, results, base)
    run("Methods", results, base, scope)
    run(method, results, base, scope)
    return run("Train", results, base, scope)


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model.eval()(**batch).logits


@pytest.mark.parametrize(("method", "base"), TRAINED)
def test_training_lowers_the_loss_and_leaves_the_base(results, method, base):
    scope = attach(method, base, results)
    model, batch = scope["model"], scope["batch"]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with model.disable_adapter():
        untouched = logits(model, batch)
    model.train()
    losses = run("Train", results, base, scope, part=1)["losses"]
    assert losses[-1] < FALLS_TO * losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed <= trainable
    assert all("lora_E" in name for name in trainable - changed)  # ranks that AdaLoRA took back
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), untouched)


@pytest.mark.parametrize(("method", "base"), REFUSED)
def test_what_the_page_denies_peft_refuses(results, method, base):
    with pytest.raises((ValueError, AttributeError), match="HQQLinear"):
        attach(method, base, results)


@pytest.mark.parametrize("base", BASES)
def test_an_adapter_is_saved_and_loaded(results, base):
    scope = attach("LoRA", base, results)
    run("Train", results, base, scope, part=1)
    run("Save and load", results, base, scope)
    again = run(base, results, base)
    tuned = run("Save and load", results, base, again, part=1)["tuned"]
    assert torch.equal(logits(tuned, scope["batch"]), logits(scope["model"], scope["batch"]))


@pytest.mark.parametrize("base", BASES)
def test_a_base_computes_with_what_was_solved(source, results, base):
    model = run(base, results, base)["base"]
    for module, weight in dequantized(source, Recipe(format=base, **SETTINGS)).items():
        layer = model.get_submodule(module)
        assert torch.equal(layer.dequantize() if base == "hqq" else layer.weight, weight), module
