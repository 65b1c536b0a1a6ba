"""Text to conditioning: any transformers encoder behind Wan's convention, and a tiny seeded one for the toy world."""

# B batch  L text tokens  C text channels

from __future__ import annotations

import html
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PAD, _EOS, _UNKNOWN = "<pad>", "</s>", "<unk>"


class TextEncoder:
    """A frozen encoder and its tokenizer: prompts -> [B, text_len, text_dim] in fp32, zero after each prompt's tokens.

    Each distinct prompt runs through the encoder once, by itself and unpadded, so that its embedding depends on nothing
    else in the batch; the `memo` most recently used embeddings are kept. With a `vocabulary`, other words are refused.
    """

    def __init__(
        self,
        encoder: torch.nn.Module,
        tokenizer: Any,  # transformers' PreTrainedTokenizerBase: not imported, transformers is optional here
        text_len: int,
        *,
        vocabulary: frozenset[str] | None = None,
        memo: int = 512,
    ) -> None:
        if text_len < 1:
            raise ValueError(f"text encoder: text_len must be at least 1, got {text_len}")
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_len = text_len
        self.text_dim: int = encoder.config.d_model  # type: ignore[assignment, union-attr]
        self.vocabulary = vocabulary
        self.encoder_runs = 0
        self._memo_size = memo
        self._memo: dict[str, Tensor] = {}
        self._warned = False

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def to(self, device: torch.device | str) -> TextEncoder:
        """Moves the encoder, and with it where embeddings are made and returned."""
        self.encoder.to(device)
        self._memo = {prompt: embedding.to(device) for prompt, embedding in self._memo.items()}
        return self

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, text_len, text_dim], fp32. The empty prompt is its end-of-text token alone.

        Longer prompts are cut to text_len tokens, with one warning per encoder. Raises ValueError on a word outside the
        vocabulary, where there is one.
        """
        out_BLC = torch.zeros(len(prompts), self.text_len, self.text_dim, device=self.device)
        for row, prompt in zip(out_BLC, prompts, strict=True):
            embedding_LC = self._embed(_clean(prompt))
            row[: len(embedding_LC)] = embedding_LC
        return out_BLC

    def _embed(self, prompt: str) -> Tensor:
        embedding = self._memo.pop(prompt, None)
        if embedding is None:
            ids = torch.tensor([self._tokenize(prompt)], device=self.device)
            with torch.no_grad():
                embedding = self.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            self.encoder_runs += 1
        self._memo[prompt] = embedding  # last in the dict = most recently used
        if len(self._memo) > self._memo_size:
            del self._memo[next(iter(self._memo))]
        return embedding

    def _tokenize(self, prompt: str) -> list[int]:
        if self.vocabulary is not None:
            unknown = [word for word in prompt.lower().split() if word not in self.vocabulary]
            if unknown:
                known = ", ".join(sorted(self.vocabulary))
                raise ValueError(f"prompt {prompt!r}: unknown word {unknown[0]!r}; this encoder knows: {known}")
        ids: list[int] = self.tokenizer(prompt).input_ids
        if len(ids) <= self.text_len:
            return ids
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a prompt of {len(ids)} tokens was cut to text_len = {self.text_len}: {prompt[:60]!r} "
                "(further cuts are not reported)",
                stacklevel=4,
            )
        cut: list[int] = self.tokenizer(prompt, truncation=True, max_length=self.text_len).input_ids
        return cut


def load_text_encoder(path: str | Path, text_len: int, *, dtype: torch.dtype = torch.bfloat16) -> TextEncoder:
    """Wan's UMT5 encoder from a folder in Diffusers' layout (`text_encoder/` and `tokenizer/`), or a Hub name.

    Raises ValueError if a local folder lacks either part.
    """
    from transformers import AutoTokenizer, UMT5EncoderModel

    for part in ("text_encoder", "tokenizer"):
        if Path(path).is_dir() and not (Path(path) / part).is_dir():
            raise ValueError(f"text encoder: {path} has no folder {part!r}; give a model in Diffusers' layout")
    encoder = UMT5EncoderModel.from_pretrained(str(path), subfolder="text_encoder", dtype=dtype)
    return TextEncoder(encoder, AutoTokenizer.from_pretrained(str(path), subfolder="tokenizer"), text_len)


def toy_text_encoder(texts: Iterable[str], text_len: int, text_dim: int, seed: int) -> TextEncoder:
    """A two-layer random UMT5 encoder that knows the words of `texts` (captions or single words) and no other.

    Nothing is downloaded and the global random state is untouched. Same words, sizes and seed: same bits.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    words = sorted({word for text in texts for word in text.lower().split()})
    if not words:
        raise ValueError("toy text encoder: needs at least one word, got none")
    if text_dim < 2:
        raise ValueError(f"toy text encoder: text_dim must be at least 2, got {text_dim}")
    heads = 2
    config = UMT5Config(
        vocab_size=len(words) + 3,
        d_model=text_dim,
        d_kv=max(text_dim // heads, 1),
        d_ff=2 * text_dim,
        num_layers=2,
        num_heads=heads,
        dropout_rate=0.0,
    )
    # the CPU generator alone: torch.manual_seed would reseed the accelerators as well
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder = UMT5EncoderModel(config).float()
    return TextEncoder(encoder, _word_tokenizer(words), text_len, vocabulary=frozenset(words))


def _word_tokenizer(words: Sequence[str]) -> Any:
    """A whole-word tokenizer that ends every prompt with </s>, as T5's does. Ids: pad 0, </s> 1, <unk> 2, words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([_PAD, _EOS, _UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_EOS}", special_tokens=[(_EOS, vocabulary[_EOS])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_EOS, unk_token=_UNKNOWN)


def _clean(prompt: str) -> str:
    """Wan's cleaning without ftfy's mojibake repair: HTML entities (twice, as there) and runs of white space."""
    return " ".join(html.unescape(html.unescape(prompt)).split())
