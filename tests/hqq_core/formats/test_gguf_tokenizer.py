"""Tokenizers in GGUF files: told right, and read back by transformers."""

import json

import pytest

from hqq_core import Checkpoint
from hqq_core.errors import CheckpointError, FormatError
from hqq_core.formats.gguf.tokenizer import UNREACHED, Tokenizer
from tests.checkpoints import llama_config, llama_tensors, save_checkpoint
from tests.vocabularies import BOS, BYTE_LEVEL, CHAT, EOS, SENTENCEPIECE, save_tokenizer

N_TOKENS = 400


@pytest.fixture
def folder(tmp_path):
    config = llama_config(1) | {"vocab_size": N_TOKENS}
    return save_checkpoint(tmp_path / "m", llama_tensors(1), config)


def read(folder):
    return Tokenizer.of(Checkpoint.open(folder))


def described(folder):
    return json.loads((folder / "tokenizer.json").read_text())


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level_tokenizers_are_known_by_their_parts(folder, pre):
    tokenizer = read(save_tokenizer(folder, pre, N_TOKENS))
    assert (tokenizer.model, tokenizer.pre) == ("gpt2", pre)
    vocabulary = described(folder)["model"]["vocab"]
    assert [tokenizer.tokens[i] for i in vocabulary.values()] == list(vocabulary)
    assert tokenizer.special == {"bos": 0, "eos": 1, "unk": 2}
    assert set(tokenizer.types[:3]) == {3}
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.templates) == (False, False, {"default": CHAT})
    assert tokenizer.merges[0] == "Ġ Ġ"


@pytest.mark.parametrize("family", SENTENCEPIECE)
def test_tokenizers_with_byte_fallback_get_scores(folder, family):
    tokenizer = read(save_tokenizer(folder, family, N_TOKENS))
    assert (tokenizer.model, tokenizer.pre, tokenizer.merges) == ("llama", "default", ())
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.add_space) == (True, False, family != "gemma")
    assert tokenizer.types[:4] == (2, 3, 3, 6)  # unknown, control, control, byte
    merges = [tuple(merge) for merge in described(folder)["model"]["merges"]]
    scores = [tokenizer.scores[tokenizer.tokens.index("".join(merge))] for merge in merges]
    assert scores == sorted(scores, reverse=True)
    assert tokenizer.scores[0] == UNREACHED


def test_rows_without_a_token_are_padding(folder):
    described = json.loads((save_tokenizer(folder, "gpt-2", 300) / "tokenizer.json").read_text())
    tokenizer = read(folder)
    last = len(described["model"]["vocab"])
    assert len(tokenizer.tokens) == N_TOKENS
    assert tokenizer.tokens[last:] == tuple(f"[PAD{i}]" for i in range(last, N_TOKENS))
    assert set(tokenizer.types[last:]) == {5}


def test_no_row_has_the_name_of_a_token(folder):
    """As a model that was once made of a GGUF file may have it."""
    save_tokenizer(folder, "gpt-2", 300)
    changed = described(folder)
    free = len(changed["model"]["vocab"]) + 1
    changed["model"]["vocab"][f"[PAD{free}]"] = free - 1
    (folder / "tokenizer.json").write_text(json.dumps(changed))
    tokens = read(folder).tokens
    assert tokens[free - 1 : free + 1] == (f"[PAD{free}]", f"[PAD{free}]_")
    assert len(set(tokens)) == N_TOKENS


def test_more_tokens_than_rows(folder):
    save_tokenizer(folder, "gpt-2", N_TOKENS + 1)
    with pytest.raises(CheckpointError, match=f"tokenizer.json: token {N_TOKENS} of {N_TOKENS} rows"):
        read(folder)


def test_added_tokens_are_user_s_own_unless_special(folder):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    named = {390: "<tool>", 391: "<|end|>", N_TOKENS: "<image>"}
    added = [plain | {"id": i, "content": token} for i, token in named.items()]
    save_tokenizer(folder, "gpt-2", 380)
    before = described(folder)["added_tokens"]
    save_tokenizer(folder, "gpt-2", 380, added_tokens=[*before, *added])
    tokenizer = read(folder)
    assert [(tokenizer.tokens[i], tokenizer.types[i]) for i in (390, 391)] == [("<tool>", 4), ("<|end|>", 3)]


def test_special_ids_come_from_the_config_where_no_token_is_named(folder):
    save_tokenizer(folder, "gpt-2", N_TOKENS)
    (folder / "tokenizer_config.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [7, 8], "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert read(folder).special == {"eos": 7}


def test_a_template_of_its_own_file_wins(folder):
    save_tokenizer(folder, "gpt-2", N_TOKENS)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert read(folder).templates == {"default": "{{ messages }}"}


def test_several_templates_keep_their_names(folder):
    save_tokenizer(folder, "gpt-2", N_TOKENS)
    several = [{"name": "default", "template": "a"}, {"name": "tool-use", "template": "b"}, 7]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert read(folder).templates == {"default": "a", "tool_use": "b"}


TEXT, START, END = (
    {"Sequence": {"id": "A", "type_id": 0}},
    *({"SpecialToken": {"id": i, "type_id": 0}} for i in (BOS, EOS)),
)
SPECIAL = {token: {"id": token, "ids": [i], "tokens": [token]} for i, token in enumerate((BOS, EOS))}
TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": SPECIAL}
BYTES = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no such pre-tokenizer.*Whitespace"),
        ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "no such pre-tokenizer"),
        ({"pre_tokenizer": None}, "no such pre-tokenizer"),
        ({"normalizer": {"type": "Lowercase"}}, "no such pre-tokenizer.*Lowercase"),
        ({"post_processor": TEMPLATE | {"single": [END, TEXT]}}, r"adds tokens \[1\].* one bos token"),
    ],
    ids=["words", "space", "none", "lower", "eos before"],
)
def test_what_llama_cpp_does_not_know_is_refused(folder, changes, message):
    save_tokenizer(folder, "gpt-2", N_TOKENS, **changes)
    with pytest.raises(FormatError, match=message) as caught:
        read(folder)
    assert caught.value.field == "format"


def test_other_models_are_refused(folder):
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    save_tokenizer(folder, "gpt-2", N_TOKENS, model=model, added_tokens=[])
    with pytest.raises(FormatError, match="a WordLevel model: format 'gguf' holds BPE alone"):
        read(folder)


def test_another_normalizer_of_byte_fallback_is_refused(folder):
    save_tokenizer(folder, "llama", N_TOKENS, normalizer={"type": "NFKC"})
    with pytest.raises(FormatError, match="no such tokenizer with byte fallback.*NFKC"):
        read(folder)


@pytest.mark.parametrize("raw", ["[]", "{", '{"model": 7}'])
def test_a_damaged_file_is_named(folder, raw):
    save_tokenizer(folder, "gpt-2", N_TOKENS)
    (folder / "tokenizer.json").write_text(raw)
    with pytest.raises(CheckpointError, match="tokenizer.json: "):
        read(folder)


def test_bos_and_eos_as_the_tokenizer_adds_them(folder):
    template = TEMPLATE | {"single": [START, TEXT, END]}
    tokenizer = read(save_tokenizer(folder, "llama-bpe", N_TOKENS, post_processor=template))
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, True)


FIXED = {
    "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": BOS,
}  # fmt: skip
CUT = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    "changes", [{"padding": FIXED}, {"padding": FIXED | {"direction": "Left"}}, {"truncation": CUT}]
)
def test_lengths_that_a_training_left_there_hide_no_bos(folder, changes):
    tokenizer = read(save_tokenizer(folder, "llama", N_TOKENS, **changes))
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, False)
