"""The text encoder's convention, and the toy encoder that needs no download."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import text_encoder
from model.text_encoder import Quantization, TextConfig, TextEncoder, clean_prompt, load_text_encoder, toy_text_encoder
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


def test_an_encoder_on_disk_loads(tmp_path: Path) -> None:
    toy = _encoder()
    toy.encoder.save_pretrained(tmp_path / "text_encoder")  # type: ignore[operator]
    with pytest.raises(ValueError, match="no folder 'tokenizer'"):
        load_text_encoder(tmp_path, text_len=8)
    toy.tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = load_text_encoder(tmp_path, text_len=8, dtype=torch.float32)
    assert torch.equal(loaded.encode([*CAPTIONS[:3], ""]), toy.encode([*CAPTIONS[:3], ""]))
    half = load_text_encoder(tmp_path, text_len=8).encode(CAPTIONS[:1])
    assert half.dtype == torch.float32
    assert torch.allclose(half, toy.encode(CAPTIONS[:1]), atol=0.1)


@pytest.mark.parametrize(
    ("texts", "text_len", "text_dim", "message"),
    [([], 8, 32, "at least one word"), (["a"], 0, 32, "text_len must"), (["a"], 8, 1, "text_dim must")],
)
def test_impossible_encoders_are_refused(texts: list[str], text_len: int, text_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_text_encoder(texts, text_len=text_len, text_dim=text_dim, seed=0)


def test_cleaning_is_wans(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fixer = SimpleNamespace(fix_text=lambda text: (seen.append(text), text.replace("\u2019", "'"))[1], __version__="9")
    monkeypatch.setitem(sys.modules, "ftfy", fixer)
    assert clean_prompt(" a\n cat\u2019s &amp;lt;hat\u3000 ") == "a cat's <hat"
    assert len(seen) == 1
    with_ftfy = text_encoder.cleaning()
    monkeypatch.setitem(sys.modules, "ftfy", None)
    text_encoder._warn_of_ftfy.cache_clear()
    assert text_encoder.cleaning() != with_ftfy
    with pytest.warns(UserWarning, match="ftfy is not installed"):
        assert clean_prompt("a\tcat\u2019s &amp;amp; hat") == "a cat\u2019s & hat"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean_prompt("plain")


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


def test_encoders_load_from_one_folder_too_and_others_are_refused(tmp_path: Path) -> None:
    toy = _encoder()

    def refused(match: str, path: Path, **options: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            load_text_encoder(path, 8, dtype=torch.float32, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    refused("is no folder: give one in Diffusers' layout, or a Hub name", tmp_path / "absent")
    toy.encoder.save_pretrained(tmp_path / "one")  # type: ignore[operator]
    toy.tokenizer.save_pretrained(tmp_path / "one")
    encoder = load_text_encoder(tmp_path / "one", 8, dtype=torch.float32)
    assert torch.equal(encoder.encode(CAPTIONS[:2]), toy.encode(CAPTIONS[:2]))
    whole = TextConfig(str(tmp_path / "one")).identity()
    assert whole == TextConfig(str(tmp_path / "one")).identity()
    assert whole != TextConfig(str(tmp_path / "one"), dtype="fp32").identity()
    config, weights = tmp_path / "one/config.json", tmp_path / "one/model.safetensors"
    state, text = load_file(weights), config.read_text()
    save_file({name: value + 1 for name, value in state.items()}, weights, {"format": "pt"})
    assert whole != TextConfig(str(tmp_path / "one")).identity()
    save_file({k: v for k, v in state.items() if "final_layer_norm" not in k}, weights, {"format": "pt"})
    refused("1 missing weights .encoder.final_layer_norm.weight", tmp_path / "one")
    config.write_text(text.replace("UMT5EncoderModel", "T5EncoderModel"))
    refused("holds T5EncoderModel: give the folder of UMT5EncoderModel", tmp_path / "one")
    with pytest.raises(ValueError, match="quantization 'int4' is unknown: choose int8 or fp8"):
        TextConfig(quantization="int4")


def test_quantization_is_torchaos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in: the real package is optional."""
    toy = _encoder()
    toy.encoder.save_pretrained(tmp_path)  # type: ignore[operator]
    toy.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match="quantization int8 needs torchao: install it"):
        load_text_encoder(tmp_path, 8, quantization=Quantization.int8)
    asked = []
    stand_in = SimpleNamespace(
        quantize_=lambda module, config: asked.append((type(module).__name__, config)),
        Float8WeightOnlyConfig=lambda: "fp8",
    )
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=stand_in))
    load_text_encoder(tmp_path, 8, quantization=Quantization.fp8)
    assert asked == [("UMT5EncoderModel", "fp8")]
