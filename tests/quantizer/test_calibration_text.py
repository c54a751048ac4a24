from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from quantizer.calibration_text import builtin_documents, calibration_tokens, general_documents, pack_tokens
from quantizer.config import QuantizeError
from quantizer.documents import read_documents


def test_builtin_text_is_prose_and_its_held_out_part_is_apart() -> None:
    calibration, held_out = builtin_documents(), builtin_documents(held_out=True)
    assert sum(map(len, calibration)) > 100_000 and sum(map(len, held_out)) > 10_000
    assert not set(calibration) & set(held_out)
    text = "\n".join(calibration)
    assert ">>>" not in text and "\n====" not in text
    assert sum(character.isalpha() or character.isspace() for character in text) > 0.9 * len(text)


def test_general_text_comes_plain_and_in_the_form_of_wikitext() -> None:
    plain, apart = general_documents()
    assert len(plain) == len(apart) > 50
    [at] = [index for index, text in enumerate(plain) if text.startswith("SMS Falkenstein\n\n")]
    assert "She was 127.8 metres long, displaced 10,690 tonnes" in plain[at] and "Three-shaft engines" in plain[at]
    assert apart[at].startswith(" = SMS Falkenstein = \n SMS Falkenstein was the second of three")
    assert "She was 127 @.@ 8 metres long , <unk> 10 @,@ 690 tonnes" in apart[at] and "Three @-@ shaft" in apart[at]
    words = " ".join(apart).split()
    assert 0.03 < words.count("<unk>") / len(words) < 0.07
    assert not [text for text in plain if "<unk>" in text or "@" in text or "  " in text]


def test_files_folders_and_chats_are_read(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b" / "a.jsonl"
    lines.parent.mkdir()
    text.write_text("One document.\n\nStill the same.")
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " Because."}]
    lines.write_text('{"text": "first", "id": 1}\n\n"second\u2028half"\r\n' + json.dumps({"messages": chat}))
    (tmp_path / "b" / "picture.png").write_bytes(b"\xff\xfe")
    one, others = ["One document.\n\nStill the same."], ["first", "second\u2028half", "Why? Because."]
    assert read_documents(str(text), tiny_tokenizer) == one
    assert read_documents(str(lines), tiny_tokenizer) == others
    assert read_documents(str(tmp_path), tiny_tokenizer) == one + others


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": 3}\n', "a.jsonl:1"),
        ('"x"\n{oops\n', "a.jsonl:2.*not JSON"),
        ("\n", "holds no text"),
        ('{"messages": ["hello"]}', "a.jsonl:1: messages: expected a list of objects"),
    ],
)
def test_bad_jsonl_names_the_line(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, content: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(QuantizeError, match=message):
        read_documents(str(path), tiny_tokenizer)


def test_chats_that_the_template_cannot_take_name_the_line(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path, tokenizer = tmp_path / "a.jsonl", copy.deepcopy(tiny_tokenizer)
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(QuantizeError, match=r"a\.jsonl:1: the chat template refuses it: no users here"):
        read_documents(str(path), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(QuantizeError, match=r"a\.jsonl:1: is a chat, but the model has no chat template"):
        read_documents(str(path), tokenizer)


def test_what_holds_no_text_is_named(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(QuantizeError, match="wikitext"):
        read_documents("wikitext", tiny_tokenizer)
    with pytest.raises(QuantizeError, match=r"holds no file of \.txt, \.md, \.jsonl"):
        read_documents(str(tmp_path), tiny_tokenizer)


def test_packing_keeps_every_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    documents = builtin_documents()[:3]
    rows = pack_tokens(tiny_tokenizer, documents, 16)
    expected = []
    for document in documents:
        expected += [*tiny_tokenizer(document, add_special_tokens=False)["input_ids"], tiny_tokenizer.eos_token_id]
    assert rows.reshape(-1).tolist() == expected[: rows.numel()]
    assert len(expected) - rows.numel() < 16


def test_samples_depend_on_the_seed_alone(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, other = (calibration_tokens(tiny_tokenizer, 10**6, "builtin", 4, 32, seed) for seed in (0, 0, 1))
    assert first.shape == (4, 32)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_scattered_tokens_have_embeddings_and_are_not_special(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = calibration_tokens(tiny_tokenizer, 50, "builtin", 21, 32, 0)
    scattered = tokens[12 + 3 : 12 + 3 + 2]  # after four sevenths general text and a seventh code
    assert tokens.shape == (21, 32) and scattered.max() < 50 and scattered.unique().numel() > 20
    assert not set(scattered.reshape(-1).tolist()) & set(tiny_tokenizer.all_special_ids)
    assert tokens.max() >= 50, "text is not cut down to what the model knows"


def test_too_little_text_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Too short.")
    with pytest.raises(QuantizeError, match="sequence_length: 512"):
        calibration_tokens(tiny_tokenizer, 10**6, str(path), 4, 512, 0)
