"""The vocabulary: learned, bytes, or given."""

import json

import pytest

from megatron_moe.tools.data import tokenizer
from megatron_moe.tools.data.sources import DataError, find_sources


def test_learning_is_repeatable_and_counts_the_end_of_document():
    text = ["the quick brown fox jumps over the lazy dog " * 3] * 40
    first = tokenizer.learn(iter(text), 280)
    assert first.to_str() == tokenizer.learn(iter(text), 280).to_str()
    assert first.get_vocab_size() == 280
    assert first.token_to_id(tokenizer.EOD) == 0


def test_the_sample_is_bounded_and_every_large_file_gives_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "_LEAST_SHARE", 10)
    for name in "ab":
        lines = (json.dumps({"text": name * 100}) + "\n" for _ in range(10_000))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    catalogue = find_sources([tmp_path], tmp_path / "out")
    taken = list(tokenizer.sample(catalogue, "text", limit=40_000))
    counts = {name: sum(name in text for text in taken) for name in "ab"}
    assert counts == {"a": 200, "b": 200}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tokenizer"
    tokenizer.save(tokenizer.byte_tokenizer(), path)
    return path


def test_a_tokenizer_is_found_by_folder_or_file(folder):
    assert tokenizer.find(str(folder)) == folder
    assert tokenizer.find(str(folder / "tokenizer.json")) == folder


def test_a_folder_must_have_both_files(folder):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError) as error:
        tokenizer.find(str(folder))
    assert str(error.value) == (
        f"--tokenizer ({folder}) has no tokenizer_config.json; "
        "save it with transformers' save_pretrained"
    )


@pytest.mark.parametrize(
    ("eos", "message"),
    [
        (
            None,
            "the tokenizer_config.json names no eos_token, "
            "which Megatron ends documents with; add one",
        ),
        ("</s>", "the eos_token (</s>) is not in the vocabulary of tokenizer.json"),
    ],
)
def test_a_tokenizer_must_end_documents(folder, eos, message):
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    with pytest.raises(DataError) as error:
        tokenizer.end_of_document(folder)
    assert str(error.value) == message


def test_the_end_of_document_may_be_written_as_an_object(folder):
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": tokenizer.EOD}})
    )
    assert tokenizer.end_of_document(folder) == 256


def test_only_tokenizer_files_are_copied(folder, tmp_path):
    (folder / "model.safetensors").write_text("weights")
    tokenizer.copy(folder, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_disagreement_with_megatrons_class_is_refused(folder):
    with pytest.raises(DataError) as error:
        tokenizer.check_with_megatron(folder, eod=7, trial=[])
    assert str(error.value) == "Megatron ends documents with id 256, tokenizer.json with 7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True},
            "Megatron's HuggingFaceTokenizer and tokenizer.json disagree about 'Some Text'; "
            'in tokenizer_config.json, set "tokenizer_class" to "PreTrainedTokenizerFast" '
            "and remove what changes the text, such as add_prefix_space",
        ),
        (
            {"tokenizer_class": "BertTokenizerFast"},
            "Megatron's HuggingFaceTokenizer cannot use it: "
            "WordPiece error: Missing [UNK] token from the vocabulary",
        ),
    ],
)
def test_a_configuration_that_changes_the_ids_is_refused(folder, change, message):
    config = json.loads((folder / "tokenizer_config.json").read_text()) | change
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError) as error:
        tokenizer.check_with_megatron(folder, eod=256, trial=["Some Text"])
    assert str(error.value) == message
