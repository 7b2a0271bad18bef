"""Text to token ids and back: a byte-level BPE with Qwen's rules and STEP3-VL's image tokens.

Paper-scale runs point at the folder of the released tokenizer. A small one with the same contract (single-token
specials, digits one by one, lossless) is packaged, so that everything runs without a download. It is rebuilt from
`tokenizer/recipe.txt` by `python -m step3vl.data.tokenizer`, and a test checks that the result is the same to the byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

FOLDER = Path(__file__).parent / "tokenizer"
"""The packaged tokenizer, its recipe and the chat templates."""
VOCAB_SIZE = 1024
"""Tokens of the packaged tokenizer, added ones included; the tiny decoder's embedding has as many rows."""

IMAGE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<patch_start>", "<patch_end>", "<patch_newline>")
"""STEP3-VL's visual layout: around a global view, one visual token, around a crop, between rows of crops."""
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *IMAGE_TOKENS,
)
TEXT_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Single tokens that are part of what a model says, hence not special (as in Qwen3)."""

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's and Qwen3's split into words; every digit stands alone, so numbers are read digit by digit."""


class Tokenizer:
    """A fast tokenizer in the two ways we need it: `markup`, where special strings are special ids, and `text`.

    Example: tokenizer.markup("<|im_end|>") is one id; tokenizer.text("<|im_end|>") is the ids of its characters, so
    that nothing a user writes can end a turn or stand for an image. Ids of added tokens that are not special
    (`<think>`) come out the same both ways.
    """

    def __init__(self, backend: Backend, pad_token: str = "<|endoftext|>"):
        self._markup = Backend.from_str(backend.to_str())
        self._text = Backend.from_str(backend.to_str())
        self._text.encode_special_tokens = True
        self.vocab_size: int = max(self._markup.get_vocab(with_added_tokens=True).values()) + 1
        self.special_ids = {i for i, token in self._markup.get_added_tokens_decoder().items() if token.special}
        self.pad_token = pad_token
        self.pad_id = self.token_id(pad_token)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Backend, str]]:
        return Tokenizer, (self._markup, self.pad_token)  # pickling a backend drops the setting

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides which ids a text becomes."""
        return hashlib.sha256(self._markup.to_str().encode()).hexdigest()

    def markup(self, text: str) -> list[int]:
        return self._markup.encode(text, add_special_tokens=False).ids

    def text(self, text: str) -> list[int]:
        return self._text.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._markup.decode(list(ids), skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int:
        """Id of a token that must exist as such. Raises ValueError when it does not."""
        found = self._markup.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token!r}; image tokens needed: {' '.join(IMAGE_TOKENS)}")
        return found

    def save(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Write a folder that `transformers.AutoTokenizer.from_pretrained` reads without a network."""
        from transformers import PreTrainedTokenizerFast

        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=Backend.from_str(self._markup.to_str()),
            eos_token="<|im_end|>",
            pad_token=self.pad_token,
            clean_up_tokenization_spaces=False,
        )
        wrapped.chat_template = chat_template
        wrapped.save_pretrained(str(folder))


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Backend:
    """Learn a byte-level BPE of `vocab_size` tokens, the added ones last. ValueError when texts give too few."""
    backend = Backend(BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    num_learnt = vocab_size - len(SPECIAL_TOKENS) - len(TEXT_TOKENS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if num_learnt < len(alphabet):
        raise ValueError(f"vocab_size must be at least {vocab_size - num_learnt + len(alphabet)}, got {vocab_size}")
    trainer = trainers.BpeTrainer(vocab_size=num_learnt, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in TEXT_TOKENS])
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(f"the texts give {backend.get_vocab_size()} tokens, {vocab_size} were asked for; add text")
    return backend


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The packaged tokenizer (None) or the one in a local Hugging Face folder. ValueError when it is not there."""
    if path is None:
        return Tokenizer(Backend.from_file(str(FOLDER / "tokenizer.json")))
    if not Path(path).is_dir():
        raise ValueError(
            f"tokenizer: no folder {str(path)!r}; give a local folder with tokenizer.json, or null for the packaged one"
        )
    if (Path(path) / "tokenizer.json").is_file():
        return Tokenizer(Backend.from_file(str(Path(path) / "tokenizer.json")), pad_token=_pad_token(Path(path)))
    from transformers import AutoTokenizer

    wrapped = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    if not getattr(wrapped, "is_fast", False):
        raise ValueError(f"tokenizer: {str(path)!r} holds no fast tokenizer; save one with a tokenizer.json")
    return Tokenizer(wrapped.backend_tokenizer, pad_token=wrapped.pad_token or "<|endoftext|>")


def _pad_token(folder: Path) -> str:
    """What tokenizer_config.json calls the padding token; Qwen's where it does not say."""
    file = folder / "tokenizer_config.json"
    given = json.loads(file.read_text(encoding="utf-8")).get("pad_token") if file.is_file() else None
    return (given.get("content") if isinstance(given, dict) else given) or "<|endoftext|>"


def build() -> str:
    """The packaged tokenizer as JSON text, learnt from the recipe: every line is a text, and so is the whole."""
    recipe = (FOLDER / "recipe.txt").read_text(encoding="utf-8")
    backend = train_tokenizer([*recipe.splitlines(), recipe])
    return json.dumps(json.loads(backend.to_str()), ensure_ascii=False, indent=0) + "\n"


if __name__ == "__main__":
    (FOLDER / "tokenizer.json").write_text(build(), encoding="utf-8")
    print(f"wrote {FOLDER / 'tokenizer.json'}: {load_tokenizer().vocab_size} tokens")
