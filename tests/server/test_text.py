"""Detokenization and stop strings: however text is cut into tokens and pieces, the output is that of the whole."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from server.text import Detokenizer, StopStrings, Tokenizer
from tests.server.fakes import END, END_ID, byte_level_tokenizer


def _byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: pieces with `▁` for spaces, a token per byte for what the pieces lack, a leading space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    pieces += ["▁", *"abcdehlorw", "▁hello", "▁world", "é", "\ufffd"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(tokenizer)


BYTE_FALLBACK = _byte_fallback_tokenizer()
TOKENIZERS = {"byte-level": byte_level_tokenizer(), "byte-fallback": BYTE_FALLBACK}


def pieces_of(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    pieces = [detokenizer.feed([token_id]) for token_id in output]
    return [*pieces, detokenizer.finish()], detokenizer


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data(), text=st.text(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_text_and_never_split_a_character(
    name: str, data: st.DataObject, text: str, skip: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(token_ids)))
    prompt, output = token_ids[:cut], token_ids[cut:]
    pieces, detokenizer = pieces_of(tokenizer, prompt, output, skip)
    assert "".join(pieces) == detokenizer.whole()
    if cut == 0:
        assert "".join(pieces) == tokenizer.decode(output, skip)
    if cut == 0 and "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_tokens_stream_to_what_they_decode_to(name: str, data: st.DataObject) -> None:
    """Broken characters anywhere, special tokens, text that looks like a broken character."""
    tokenizer = TOKENIZERS[name]
    ids = st.integers(0, tokenizer.vocab_size - 1)
    if name == "byte-fallback":
        ids |= st.sampled_from(sorted(tokenizer.byte_token_ids))
    output = data.draw(st.lists(ids, max_size=40))
    skip = data.draw(st.booleans())
    pieces, _ = pieces_of(tokenizer, [], output, skip)
    assert "".join(pieces) == tokenizer.decode(output, skip)


def test_bytes_on_both_sides_of_a_skipped_token_are_one_run() -> None:
    null, broken = (BYTE_FALLBACK._tokenizer.token_to_id(f"<0x{value:02X}>") for value in (0x00, 0x80))
    special = min(BYTE_FALLBACK.special_token_ids)
    for prompt, output in ([], [null, special, broken]), ([null, special], [broken]), ([null], [special, broken]):
        pieces, detokenizer = pieces_of(BYTE_FALLBACK, prompt, output, True)
        assert "".join(pieces) == detokenizer.whole() == "\ufffd\ufffd"[len(prompt) > 0 :]
    pieces, _ = pieces_of(BYTE_FALLBACK, [], [null, special, broken], False)
    assert "".join(pieces) == BYTE_FALLBACK.decode([null, special, broken], False)


def test_the_space_after_the_prompt_is_output() -> None:
    prompt = BYTE_FALLBACK.encode("hello")
    space, *_ = BYTE_FALLBACK.encode("world")
    pieces, _ = pieces_of(BYTE_FALLBACK, prompt, [space], True)
    assert "".join(pieces) == " "
    assert BYTE_FALLBACK.decode([space]) == "", "the decoder alone strips it"


def test_an_unfinished_character_shows_at_the_end_as_the_decoder_shows_it() -> None:
    tokenizer = byte_level_tokenizer()
    token_ids = tokenizer.encode("a🤖")  # not in the corpus: several tokens for the second character
    assert len(token_ids) > 3
    detokenizer = Detokenizer(tokenizer, [])
    assert [detokenizer.feed([token_id]) for token_id in token_ids[:-1]] == ["a"] + [""] * (len(token_ids) - 2)
    assert detokenizer.finish() == tokenizer.decode(token_ids[:-1])[1:] != ""
    assert detokenizer.finish() == ""


def test_special_tokens_show_when_asked() -> None:
    tokenizer = byte_level_tokenizer()
    output = [*tokenizer.encode("dog"), END_ID]
    assert "".join(pieces_of(tokenizer, [], output, skip=True)[0]) == "dog"
    assert "".join(pieces_of(tokenizer, [], output, skip=False)[0]) == "dog" + END


def test_stored_truncation_does_not_cut_prompts() -> None:
    raw = tokenizers.Tokenizer.from_str(byte_level_tokenizer()._tokenizer.to_str())
    raw.enable_truncation(2)
    assert len(Tokenizer(raw).encode("The quick brown fox jumps")) > 2


# -- stop strings ------------------------------------------------------------------------------------------------------


def reference_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """One character after the other: the first end of a stop string ends the text, the longest such string counts."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


ALPHABET = "abé\n"
CUT_TEXT = st.lists(st.text(ALPHABET, max_size=6), max_size=12)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4)


@given(pieces=CUT_TEXT, stops=STOPS, include=st.booleans())
@settings(max_examples=500, deadline=None)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopStrings(stops, include)
    output = ""
    for piece in pieces:
        output += matcher.feed(piece)
        if matcher.matched is not None:
            break
    output += matcher.finish()
    assert (output, matcher.matched) == reference_stop("".join(pieces), stops, include)


@given(pieces=CUT_TEXT, stops=STOPS)
@settings(max_examples=300, deadline=None)
def test_nothing_given_out_has_to_be_taken_back(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    whole = "".join(pieces)
    final, _ = reference_stop(whole, stops, include=False)
    output = ""
    for piece in pieces:
        output += matcher.feed(piece)
        assert final.startswith(output)


def test_text_that_cannot_be_a_stop_string_is_not_held_back() -> None:
    matcher = StopStrings(["STOP"])
    assert matcher.feed("go S") == "go "
    assert matcher.feed("T") == ""
    assert matcher.feed("AR") == "STAR"
    assert matcher.feed("ST") == ""
    assert matcher.finish() == "ST"
