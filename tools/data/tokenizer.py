"""The vocabulary: learned from the text, one id a byte, or yours.

Whichever it is, it becomes a folder that Megatron's own ``HuggingFaceTokenizer`` loads without a
network: ``tokenizer.json`` and a ``tokenizer_config.json`` that names the end-of-document token.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_moe.tools.data.encode import texts
from megatron_moe.tools.data.pieces import pieces
from megatron_moe.tools.data.sources import Catalogue, DataError

EOD = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # 256 bytes and the end-of-document token
SAMPLE_BYTES = 10_000_000
_LEAST_SHARE = 64 * 1024
# What a Hugging Face tokenizer folder may consist of; a model's weights beside it stay behind.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
)


def sample(catalogue: Catalogue, json_key: str, limit: int | None) -> Iterator[str]:
    """Yield about ``SAMPLE_BYTES`` of text, every large file giving its share from its start.

    Args:
        catalogue: All files.
        json_key: Key of the text in a JSON line.
        limit: Bytes that will be encoded at most.
    """
    whole = min(SAMPLE_BYTES, limit or SAMPLE_BYTES)
    left = whole
    for source in catalogue.sources:
        share = max(_LEAST_SHARE, whole * source.size // max(catalogue.size, 1))
        for piece, _ in pieces(source):
            for text, _ in texts(piece, json_key):
                yield text
                share -= len(text)
                left -= len(text)
                if share <= 0 or left <= 0:
                    break
            if share <= 0 or left <= 0:
                break
        if left <= 0:
            return


def learn(text: Iterator[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE of at most ``vocab_size`` ids; id 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids 0 to 255 are the bytes themselves; 256 ends a document."""
    # The visible stand-ins of the bytes are GPT-2's: printable ones for themselves, then 256 up.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocab = {chr(b if b in printable else next(others)): b for b in range(256)}
    assert set(vocab) == set(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOD, special=True, normalized=False)])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer`` as a folder that Megatron's ``HuggingFaceTokenizer`` loads."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,  # no warning about long documents
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def find(choice: str) -> Path:
    """Return the folder that ``--tokenizer`` names.

    Raises:
        DataError: It is none, or holds no tokenizer.json.
    """
    path = Path(choice)
    folder = path.parent if path.name == "tokenizer.json" else path
    if not folder.is_dir():
        raise DataError(
            f"--tokenizer ({choice}) is neither bpe, byte nor a folder with a tokenizer.json"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise DataError(
                f"--tokenizer ({choice}) has no {name}; save it with transformers' save_pretrained"
            )
    return folder


def copy(source: Path, folder: Path) -> None:
    """Copy the tokenizer files in ``source``, so that the dataset carries its own."""
    folder.mkdir()
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def end_of_document(folder: Path) -> int:
    """Return the id of the token that ends a document.

    Raises:
        DataError: The configuration names none, or one that the vocabulary lacks.
    """
    name = json.loads((folder / "tokenizer_config.json").read_text()).get("eos_token")
    if isinstance(name, dict):
        name = name.get("content")
    if name is None:
        raise DataError(
            "the tokenizer_config.json names no eos_token, "
            "which Megatron ends documents with; add one"
        )
    eod = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(name)
    if eod is None:
        raise DataError(f"the eos_token ({name}) is not in the vocabulary of tokenizer.json")
    return eod


def size(folder: Path) -> int:
    """Return the number of ids, special ones included."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def check_with_megatron(folder: Path, eod: int, trial: list[str]) -> int:
    """Load the tokenizer as training will, and compare; return Megatron's vocabulary size.

    Args:
        folder: The tokenizer's folder.
        eod: The id that the documents were ended with.
        trial: Some texts.

    Raises:
        DataError: Megatron's class cannot load it, or gives other ids than tokenizer.json does.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    try:
        theirs = build_tokenizer(megatron_arguments(folder))
        ids = [theirs.tokenize(text) for text in trial]
    except Exception as error:  # the Rust library raises no narrower class
        raise DataError(f"Megatron's HuggingFaceTokenizer cannot use it: {error}") from error
    if theirs.eod != eod:
        raise DataError(f"Megatron ends documents with id {theirs.eod}, tokenizer.json with {eod}")
    for text, found in zip(trial, ids, strict=True):
        if found != ours.encode(text, add_special_tokens=False).ids:
            raise DataError(
                f"Megatron's HuggingFaceTokenizer and tokenizer.json disagree about {text[:40]!r}; "
                'in tokenizer_config.json, set "tokenizer_class" to "PreTrainedTokenizerFast" '
                "and remove what changes the text, such as add_prefix_space"
            )
    return theirs.vocab_size


def megatron_arguments(folder: Path) -> SimpleNamespace:
    """Return what Megatron reads its tokenizer options from, for the tokenizer in ``folder``."""
    return SimpleNamespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(folder),
        metadata_path=None,
        chat_template=None,
        vocab_file=None,
        merge_file=None,
        special_tokens=None,
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=True,
        trust_remote_code=False,
        pad_vocab_size=False,
    )
