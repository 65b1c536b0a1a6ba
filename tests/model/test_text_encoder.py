"""The text encoder's convention, and the toy encoder that needs no download."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from model import text_encoder
from model.text_encoder import TextEncoder, clean_prompt, toy_text_encoder
from worlds.toy import ToyWorld, ToyWorldConfig

CAPTIONS = ToyWorld(ToyWorldConfig()).captions


def _encoder(seed: int = 0, text_len: int = 8) -> TextEncoder:
    return toy_text_encoder(CAPTIONS, text_len=text_len, text_dim=32, seed=seed)


def test_embeddings_are_zero_exactly_after_the_prompt() -> None:
    out = _encoder().encode([CAPTIONS[0], "digit seven", ""])
    assert out.shape == (3, 8, 32)
    assert out.dtype == torch.float32
    assert not out.requires_grad
    for row, tokens in zip(out, (6, 3, 1), strict=True):  # the words and </s>
        assert (row[:tokens].abs().sum(-1) > 0.1).all()
        assert not row[tokens:].any()


def test_same_seed_same_bits_and_the_global_state_is_untouched() -> None:
    before = torch.get_rng_state()
    a, b, other = _encoder(0), _encoder(0), _encoder(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.encode(CAPTIONS), b.encode(list(reversed(CAPTIONS))).flip(0))
    assert not torch.allclose(a.encode(CAPTIONS[:1]), other.encode(CAPTIONS[:1]), atol=0.1)


def test_captions_are_far_apart() -> None:
    flat = _encoder().encode([*CAPTIONS, ""]).flatten(1)
    distance = torch.cdist(flat, flat) + 1e9 * torch.eye(len(flat))
    assert distance.min() > 0.2 * flat.norm(dim=1).mean()


def test_padding_to_the_longest_prompt_changes_nothing() -> None:
    """One prompt at a time must equal a padded and masked batch, which is how Wan encodes."""
    encoder = _encoder()
    prompts = [CAPTIONS[3], "moving up", ""]
    batch = encoder.tokenizer(prompts, padding="max_length", max_length=8, return_tensors="pt")
    states = encoder.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    expected = states * batch.attention_mask[..., None]
    assert torch.allclose(encoder.encode(prompts), expected, atol=1e-5)


def test_each_distinct_prompt_is_encoded_once() -> None:
    encoder = _encoder()
    encoder.encode(CAPTIONS[:4] * 3)
    first = encoder.encode(CAPTIONS[:1])
    assert encoder.encoder_runs == 4
    first.zero_()  # what a caller does to its tensor must not reach the memo
    assert encoder.encode(CAPTIONS[:1]).any()
    assert encoder.encoder_runs == 4


def test_the_memo_forgets_the_least_recently_used() -> None:
    base = _encoder()
    encoder = TextEncoder(base.encoder, base.tokenizer, text_len=8, memo=2)
    a, b, c = CAPTIONS[:3]
    encoder.encode([a, b, a, c])  # b goes
    encoder.encode([a, c])
    assert encoder.encoder_runs == 3
    encoder.encode([b])
    assert encoder.encoder_runs == 4


def test_long_prompts_are_cut_with_one_warning_and_keep_their_end_token() -> None:
    encoder = _encoder(text_len=4)
    with pytest.warns(UserWarning, match="6 tokens was cut to text_len = 4"):
        out = encoder.encode([CAPTIONS[0]])
    assert torch.equal(out, encoder.encode(["the digit zero"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([CAPTIONS[1]])


def test_case_and_white_space_do_not_matter() -> None:
    encoder = _encoder()
    assert torch.equal(encoder.encode(["  The digit\tzero "]), encoder.encode(["the digit zero"]))


def test_unknown_words_are_named_with_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="unknown word 'cat'; this encoder knows: digit, down, eight"):
        _encoder().encode(["the digit zero", "the cat moving left"])


def test_the_encoder_is_frozen_and_in_evaluation_mode() -> None:
    encoder = _encoder().encoder
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize(
    ("texts", "text_len", "text_dim", "message"),
    [([], 8, 32, "at least one word"), (["a"], 0, 32, "text_len must"), (["a"], 8, 1, "text_dim must")],
)
def test_impossible_encoders_are_refused(texts: list[str], text_len: int, text_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_text_encoder(texts, text_len=text_len, text_dim=text_dim, seed=0)


def test_cleaning_is_wans(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    seen = []
    fixer = SimpleNamespace(fix_text=lambda text: (seen.append(text), text.replace("\u2019", "'"))[1], __version__="9")
    monkeypatch.setitem(sys.modules, "ftfy", fixer)
    assert clean_prompt(" a\n cat\u2019s &amp;lt;hat\u3000 ") == "a cat's <hat"
    assert len(seen) == 1
    with_ftfy = text_encoder.cleaning()
    monkeypatch.setitem(sys.modules, "ftfy", None)
    text_encoder._warn_of_ftfy.cache_clear()
    assert text_encoder.cleaning() != with_ftfy
    assert clean_prompt("a\tcat\u2019s &amp;amp; hat") == "a cat\u2019s & hat"
    assert "ftfy is not installed" in caplog.text
    text_encoder._warn_of_ftfy.cache_clear()
    caplog.clear()
    clean_prompt("plain")
    assert caplog.messages == []


def test_embeddings_are_those_of_diffusers_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    from diffusers.pipelines.wan import pipeline_wan

    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=lambda text: text), raising=False)
    encoder = _encoder(text_len=512)
    pipeline = WanPipeline(encoder.tokenizer, encoder.encoder, None, FlowMatchEulerDiscreteScheduler(), None)
    prompts = [f"  {CAPTIONS[0]}", "digit\nseven", ""]
    expected = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    ours = encoder.encode(prompts)
    assert ours.shape == (3, 512, 32)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.equal(ours == 0, expected == 0)
    assert ours.any(dim=2).sum(dim=1).tolist() == [6, 3, 1]
