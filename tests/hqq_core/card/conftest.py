from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import VOCABULARY, llama_config, llama_tensors, save_checkpoint
from tests.vocabularies import save_tokenizer

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path) -> Save:
    """A Llama that every format takes, under a name, with a model card and changes to its config.json."""

    def save(name: str = "source", card: str | bytes | None = None, ternary: bool = False, **config) -> Path:
        tensors = llama_tensors(2, 128)
        if ternary:
            linear = {name: tensor for name, tensor in tensors.items() if "proj" in name}
            tensors |= {name: tensor.sign() * 0.25 for name, tensor in linear.items()}
        folder = save_checkpoint(tmp_path / name, tensors, llama_config(2, 128) | config)
        save_tokenizer(folder, "gpt-2", VOCABULARY)
        if card is not None:
            (folder / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
        return folder

    return save
