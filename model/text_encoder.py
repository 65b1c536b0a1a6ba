"""Text to conditioning: what a family's encoder is asked, any T5-like encoder of transformers, and a tiny seeded one
for the toy world."""

# B batch  L text tokens  C text channels

from __future__ import annotations

import functools
import html
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from model.folders import fingerprint, pipeline_folder
from model.types import Prompt
from utils.fields import check_modes
from utils.logging import warn
from utils.precision import Dtype

_PAD, _EOS, _UNKNOWN = "<pad>", "</s>", "<unk>"
PARTS = ("text_encoder", "tokenizer")


class Quantization(StrEnum):
    int8 = "int8"
    fp8 = "fp8"

    @property
    def torchao(self) -> str:
        """The name of its config there."""
        return {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}[self.value]


@dataclass
class TextConfig:
    """Where text embeddings come from: a cache, an encoder, or for prompts that the cache lacks the encoder.

    encoder: the text encoder of the networks' family and its tokenizer: a folder with text_encoder and tokenizer (a
    pipeline's), one folder of both, or a Hub name. cache: a folder of `preprocess.py text`; the encoder is loaded only
    where it must be.
    dtype: of the encoder. quantization: of its matrices (torchao), null for none.
    """

    encoder: str | None = None
    cache: str | None = None
    dtype: Dtype = Dtype.bf16
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_modes(self)

    def identity(self) -> list[str | None]:
        """What one encoder's embeddings depend on: weights and tokenizer, precision, cleaning. Raises ValueError."""
        assert self.encoder is not None
        folders = sorted({str(folder) for folder in encoder_folders(self.encoder)})
        return [
            *(fingerprint(folder) for folder in folders),
            self.dtype.value,
            self.quantization and self.quantization.value,
            cleaning(),
        ]


class PromptEncoder(Protocol):
    """What encodes the prompts of a family's real models, as a `TextConfig` names it. It is loaded when first needed.

    what: what it is, in words, as "a UMT5 encoder".
    parts: the folders of a pipeline that have it.
    """

    what: str
    parts: tuple[str, ...]

    def identity(self) -> list[Any]:
        """What the encoded prompts depend on, as plain values by which a cache knows its encoder.

        Files are read for it, but no weights are loaded. Raises ValueError or OSError in one line.
        """
        ...

    def made_with(self) -> Mapping[str, str | int | None]:
        """The same in words, as far as it is known without the files. `encoder` is its folder or Hub name."""
        ...

    def weight_folders(self) -> Sequence[Path]:
        """The local folders of its weights. Raises ValueError or OSError in one line where a config.json does not fit
        the networks."""
        ...

    def load(self) -> None:
        """Loads it, if it is not loaded yet. Raises ValueError or OSError in one line."""
        ...

    def encode(self, prompts: Sequence[str]) -> Prompt:
        """The tensors of `Family.prompt_shapes`, fp32, a row for each prompt; [0, ...] for no prompts.

        A row depends on its prompt alone. Of a tensor with several dimensions the first counts tokens, and what comes
        after a shorter prompt's last token is zero.

        Raises ValueError or OSError in one line.
        """
        ...


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
            embedding_LC = self._embed(clean_prompt(prompt))
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


def encoder_folders(path: str | Path) -> tuple[Path, Path]:
    """The folders of the encoder and of its tokenizer; one and the same where both lie in `path`. Raises ValueError."""
    root = pipeline_folder(path, PARTS)
    if (root / "config.json").is_file() and not (root / "text_encoder").is_dir():
        return root, root
    for part in PARTS:
        if not (root / part).is_dir():
            raise ValueError(f"text encoder: {root} has no folder {part!r}; give a model in Diffusers' layout")
    return root / "text_encoder", root / "tokenizer"


def quantizer(kind: Quantization) -> Callable[[torch.nn.Module], None]:
    """What quantizes an encoder's matrices in place. Raises ValueError, one line, where torchao is not installed."""
    try:
        from torchao import quantization
    except ImportError:
        raise ValueError(
            f"text encoder: quantization {kind} needs torchao: install it (pip install torchao), or set it to null"
        ) from None
    config = getattr(quantization, kind.torchao)()
    return functools.partial(quantization.quantize_, config=config)


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


def clean_prompt(prompt: str) -> str:
    """As Wan cleans (wan/modules/tokenizers.py, 'whitespace'): ftfy's repair of wrongly decoded characters, curly
    quotes and wide letters, HTML entities undone twice, and each run of white space one space.

    Without ftfy that step is left out, with one warning if a prompt has characters that it might have changed.
    """
    fix = _fix_text()
    if fix is not None:
        prompt = fix(prompt)
    elif not prompt.isascii():
        _warn_of_ftfy()
    return " ".join(html.unescape(html.unescape(prompt)).split())


def cleaning() -> str:
    """A name that differs where `clean_prompt` would."""
    if _fix_text() is None:
        return "wan, no ftfy"
    import ftfy

    return f"wan, ftfy {ftfy.__version__}"


def _fix_text() -> Callable[[str], str] | None:
    try:
        from ftfy import fix_text
    except ImportError:
        return None
    found: Callable[[str], str] = fix_text
    return found


@functools.cache
def _warn_of_ftfy() -> None:
    warn("ftfy is not installed, so prompts beyond ASCII are not cleaned quite as Wan does: pip install ftfy")
