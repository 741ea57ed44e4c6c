"""The tokenizer of a GGUF file, from tokenizer.json and tokenizer_config.json, which are read as data: no code of a model runs.

llama.cpp knows two kinds that matter here: `gpt2` (byte-level BPE, words cut by a pre-tokenizer that a name stands for) and
`llama` (BPE with byte fallback, as SentencePiece makes it, whose merges follow the scores of their results).
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hqq_core.checkpoint import Checkpoint
from hqq_core.errors import CheckpointError, FormatError
from hqq_core.formats.gguf.pretokenizers import prefixes_space, pretokenizer_of

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from tokenizers import Tokenizer as Library

FILE, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
UNREACHED = -1e6  # score of a token that no merge makes
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's
# What tokens are, in tokenizer_config.json and in the names of GGUFWriter's methods.
_ROLES = ("bos", "eos", "unk", "pad", "sep", "mask")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What llama.cpp wants to know of a tokenizer.

    Parameters
    ----------
    model : {"gpt2", "llama"}
    pre : str
        Name of the pre-tokenizer.
    tokens : tuple of str
        One for each row of the embedding.
    types : tuple of int
        Of each token, as `gguf.TokenType` numbers them.
    merges : tuple of str
        Of "gpt2", first to last.
    scores : tuple of float
        Of "llama": the higher, the earlier a token is merged.
    special : dict of str to int
        Ids by role: bos, eos, unk, pad, sep, mask.
    add_bos, add_eos : bool
        Whether a text gets them.
    add_space : bool
        Whether a text gets a space before it.
    templates : dict of str to str
        Chat templates by name; the one that is used unless named is "default".
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space: bool
    templates: dict[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Tokenizer:
        """Read the tokenizer of a checkpoint.

        Raises
        ------
        CheckpointError
            A file is missing or damaged.
        FormatError
            llama.cpp has no such tokenizer.
        """
        raw = _read(checkpoint, FILE)
        if raw is None:
            raise CheckpointError(f"no {FILE} in the folder: wanted one; transformers' save_pretrained writes it")
        described, library = _parsed(raw), _loaded(raw)
        settings = _parsed(_read(checkpoint, SETTINGS) or b"{}", SETTINGS)
        fields = _model(described)
        kind = "llama" if fields.get("byte_fallback") else "gpt2"
        tokens, types = _tokens(described, library, kind, _n_rows(checkpoint))
        merges = tuple(_merges(fields))
        special = dict(_special(checkpoint.config, settings, library))
        add_bos, add_eos = _added(library, special)
        return cls(
            model=kind,
            pre=pretokenizer_of(described) if kind == "gpt2" else "default",
            tokens=tokens,
            types=types,
            merges=tuple(" ".join(merge) for merge in merges) if kind == "gpt2" else (),
            scores=_scores(tokens, merges) if kind == "llama" else (),
            special=special,
            add_bos=add_bos,
            add_eos=add_eos,
            add_space=kind == "llama" and prefixes_space(described),
            templates=_templates(checkpoint, settings),
        )

    def add_to(self, writer: GGUFWriter) -> None:
        """Keys of the tokenizer."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
        else:
            writer.add_token_merges(self.merges)
        for role, number in self.special.items():
            getattr(writer, f"add_{role}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.model == "llama":
            writer.add_add_space_prefix(self.add_space)
        self._add_templates(writer)

    def _add_templates(self, writer: GGUFWriter) -> None:
        """As the gguf library writes several, but in an order that is always the same."""
        from gguf import Keys

        names = sorted(self.templates.keys() - {"default"})
        for name in names:
            writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), self.templates[name])
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, names)
        if "default" in self.templates:
            writer.add_chat_template(self.templates["default"])


def _read(checkpoint: Checkpoint, name: str) -> bytes | None:
    if not (checkpoint.folder / name).is_file():
        return None
    return checkpoint.file_bytes(name)


def _parsed(raw: bytes, name: str = FILE) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: no JSON text: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: a JSON {type(value).__name__}: wanted an object")
    return value


def _loaded(raw: bytes) -> Library:
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_buffer(raw)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{FILE}: the tokenizers library cannot read it: {error}") from error
    library.no_padding()  # to a length that a training left there: it hides what is added, and may be any
    library.no_truncation()
    return library


def _model(described: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = described["model"]
    if fields.get("type", "BPE") != "BPE" or "merges" not in fields:
        raise FormatError("format", f"{FILE}: a {fields.get('type', 'nameless')} model: format 'gguf' holds BPE alone")
    if fields.get("dropout") or fields.get("continuing_subword_prefix") or fields.get("end_of_word_suffix"):
        raise FormatError("format", f"{FILE}: dropout, prefixes and suffixes of words are unknown to llama.cpp")
    return fields


def _n_rows(checkpoint: Checkpoint) -> int:
    size = checkpoint.config.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"config.json: vocab_size {size!r}: wanted a whole number above 0")
    return size


def _tokens(
    described: dict[str, Any], library: Library, kind: str, n_rows: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Token and type of each row of the embedding; rows without a token are padding."""
    from gguf import TokenType

    taken = {*described["model"]["vocab"], *(added["content"] for added in described.get("added_tokens") or ())}
    tokens = [_unused(i, taken) for i in range(n_rows)]
    types = [int(TokenType.UNUSED)] * n_rows
    for token, i in described["model"]["vocab"].items():
        if i >= n_rows:
            raise CheckpointError(f"{FILE}: token {i} of {n_rows} rows of the embedding")
        is_byte = kind == "llama" and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[i], types[i] = token, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    unknown = described["model"].get("unk_token")
    for added in described.get("added_tokens") or ():
        i, token = added["id"], added["content"]
        if i >= n_rows:
            continue  # such as the image token of a Gemma 3 that sees nothing
        control = added["special"] or _looks_special(token)
        tokens[i] = token if control else token.replace(_SPACE, " ")
        types[i] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    if unknown is not None and kind == "llama" and (i := library.token_to_id(unknown)) is not None:
        types[i] = int(TokenType.UNKNOWN)
    return tuple(tokens), tuple(types)


def _unused(number: int, taken: Container[str]) -> str:
    """A name for a row without a token; llama.cpp wants no name twice."""
    name = f"[PAD{number}]"
    while name in taken:
        name += "_"
    return name


def _looks_special(token: str) -> bool:
    """Added tokens that some models do not mark as the control tokens they are; llama.cpp's list."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def _merges(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in fields.get("merges") or ():
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _scores(tokens: tuple[str, ...], merges: tuple[tuple[str, str], ...]) -> tuple[float, ...]:
    """By the first merge that makes a token: SentencePiece merges by the score of the result, tokenizer.json by rank."""
    ranks: dict[str, int] = {}
    for rank, (first, second) in enumerate(merges):
        ranks.setdefault(first + second, rank)
    return tuple(-float(ranks[token]) if token in ranks else UNREACHED for token in tokens)


def _special(config: dict[str, Any], settings: dict[str, Any], library: Library) -> Iterator[tuple[str, int]]:
    """(role, id): by the token in tokenizer_config.json, else by the id in config.json."""
    for role in _ROLES:
        token = settings.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = library.token_to_id(text) if isinstance(text, str) else config.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < int(config["vocab_size"]):
            yield role, number


def _added(library: Library, special: dict[str, int]) -> tuple[bool, bool]:
    """Whether a text gets a bos before it and an eos behind it; anything else is a FormatError."""
    plain, whole = (library.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    start = next((i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain), 0)
    before, behind = whole[:start], whole[start + len(plain) :]
    for found, role in ((before, "bos"), (behind, "eos")):
        if found not in ([], [special.get(role)]):
            raise FormatError("format", f"{FILE}: adds tokens {found} to a text: format 'gguf' holds one {role} token")
    return bool(before), bool(behind)


def _templates(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, str]:
    """The one of a file of its own, or those of tokenizer_config.json; names with letters and digits alone, as keys have them."""
    raw = _read(checkpoint, TEMPLATE)
    if raw is not None:
        return {"default": raw.decode(errors="replace")}
    found = settings.get("chat_template")
    named = [{"name": "default", "template": found}] if isinstance(found, str) else found
    templates = {}
    for choice in named if isinstance(named, list) else ():
        name, text = (choice.get(key) for key in ("name", "template")) if isinstance(choice, dict) else (None, None)
        if isinstance(name, str) and isinstance(text, str) and name:
            templates[re.sub("[^A-Za-z0-9]", "_", name)] = text.encode(errors="replace").decode()
    return templates
