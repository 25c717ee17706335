"""Folders with the tokenizers of the field: their real classes, with files as they are published, of tiny
vocabularies."""

import io
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

TEXTS = [
    "a photo of the number forty two",
    "Hello, World! It's a dog.",
    "ein Hund läuft im Fluß",
    "một con chó chạy",
    "犬が公園を走る",
    "собака бежит",
    "İSTANBUL ΟΔΟΣ ὈΔΥΣΣΕΎΣ ẞ ß",
]
WORDS = sorted({word for text in TEXTS for word in (*text.split(), *text.lower().split())})
CHARACTERS = sorted({*"".join(WORDS), *string.ascii_lowercase})
ROBERTA = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def write_tokenizer(family: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Write a tokenizer into a folder, and return the text tower's model_type and what its config needs."""
    folder.mkdir(parents=True, exist_ok=True)
    model_type, write, settings, config = FAMILIES[family]
    size = write(folder)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": model_type, "vocab_size": size, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return model_type, config


def sentencepiece_model(name: str, **options: Any) -> Callable[[Path], int]:
    def write(folder: Path) -> int:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=model,
            vocab_size=200,
            hard_vocab_limit=False,
            character_coverage=1.0,
            minloglevel=2,
            **options,
        )
        (folder / name).write_bytes(model.getvalue())
        return 260  # with those that a class adds

    return write


def word_pieces(folder: Path) -> int:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = {*CHARACTERS, *string.punctuation, *(f"##{c}" for c in CHARACTERS), "photo", "number"}
    tokens = [*special, *sorted(pieces)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return len(tokens)


def sub_words(folder: Path) -> int:
    """Files of fastBPE, as PhoBERT and BERTweet publish them."""
    merges = grown([(word[:-1], word[-1] + "</w>") for word in WORDS])
    tokens = dict.fromkeys([*WORDS, *CHARACTERS, *(f"{c}@@" for c in CHARACTERS)])
    (folder / "bpe.codes").write_text("".join(f"{a} {b} 7\n" for a, b in merges), "utf-8")
    (folder / "vocab.txt").write_text("".join(f"{token} 7\n" for token in tokens), "utf-8")
    return len(tokens) + 5


def grown(words: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The merges that grow each word symbol by symbol; a word is its letters but the last, and the last."""
    merges = {}
    for letters, last in words:
        done, *rest = [*letters, last]
        for symbol in rest:
            merges[done, symbol] = None
            done += symbol
    return list(merges)


def byte_pairs(end: str, first: list[str], last: list[str]) -> tuple[dict[str, int], list[Any]]:
    in_bytes = ByteLevel(add_prefix_space=False)
    words = [in_bytes.pre_tokenize_str(word)[0][0] for word in ("photo", " photo", "number")]
    merges = grown([(word[:-1], word[-1] + end) for word in words])
    letters = sorted(ByteLevel.alphabet())
    tokens = [*first, *letters, *(letter + end for letter in letters), *map("".join, merges), *last]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def clip(folder: Path) -> int:
    vocab, merges = byte_pairs("</w>", [], ["<|startoftext|>", "<|endoftext|>"])
    CLIPTokenizer(vocab, merges).save_pretrained(folder)
    return len(vocab)


def roberta(folder: Path) -> int:
    vocab, merges = byte_pairs("", ["<s>", "<pad>", "</s>", "<unk>"], ["<mask>"])
    RobertaTokenizer(vocab, merges).save_pretrained(folder)
    return len(vocab)


def modernbert(folder: Path) -> int:
    special = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    vocab, merges = byte_pairs("", [*special.values()], [])
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    ends = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name}_token": token for name, token in special.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return len(vocab)


def gemma(folder: Path) -> int:
    """Without the capitals that SigLIP 2 was never shown, but for letters."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [f"▁{word}" for word in WORDS if word == word.lower()]
    merges = grown([(word[:-1], word[-1]) for word in words])
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁", *CHARACTERS]
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*tokens, *map("".join, merges)]))}
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    end = [("<eos>", vocab["<eos>"])]
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=end)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(vocab)


def of_class(name: str, **settings: Any) -> dict[str, Any]:
    return {"tokenizer_class": f"{name}Tokenizer", **settings}


# By family: model_type of a text tower, writer of its vocabulary, tokenizer_config.json, more of config.json.
BERT_VOCABULARY = {"pad_token_id": 0}
JAPANESE = {"word_tokenizer_type": "basic"}
GEMMA = {
    "add_bos_token": False,
    "add_eos_token": True,
    "model_input_names": ["input_ids"],
    "do_lower_case": True,
    **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
}
FAMILIES: dict[str, tuple[str, Callable[[Path], int], dict[str, Any], dict[str, Any]]] = {
    "bert": ("bert", word_pieces, of_class("Bert"), BERT_VOCABULARY),
    "distilbert": ("distilbert", word_pieces, of_class("DistilBert"), BERT_VOCABULARY),
    "mpnet": (
        "mpnet",
        word_pieces,
        of_class(
            "MPNet", pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]"
        )
        | {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
        {"pad_token_id": 1},
    ),
    "chinese_clip": (
        "chinese_clip_text_model",
        word_pieces,
        of_class("Bert"),
        BERT_VOCABULARY,
    ),
    "align": ("align_text_model", word_pieces, of_class("Bert"), BERT_VOCABULARY),
    "modernbert": ("modernbert", modernbert, {}, {}),
    "clip": ("clip_text_model", clip, {}, {}),
    "roberta": ("roberta", roberta, {}, ROBERTA),
    "xlm_roberta": (
        "xlm-roberta",
        sentencepiece_model("sentencepiece.bpe.model"),
        of_class("XLMRoberta"),
        ROBERTA,
    ),
    "camembert": (
        "camembert",
        sentencepiece_model("sentencepiece.bpe.model", unk_id=0, bos_id=1, eos_id=2),
        of_class("Camembert"),
        {**ROBERTA, "bos_token_id": 5, "eos_token_id": 6},
    ),
    "t5": (
        "bert",
        sentencepiece_model("spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
        of_class("T5", extra_ids=0),
        BERT_VOCABULARY,
    ),
    "siglip": (
        "siglip_text_model",
        sentencepiece_model("spiece.model", pad_id=-1, bos_id=-1, eos_id=1, unk_id=2),
        of_class("Siglip", model_input_names=["input_ids"]),
        {},
    ),
    "siglip2": ("siglip_text_model", gemma, of_class("Gemma", **GEMMA), {}),
    "bert_japanese": ("bert", word_pieces, of_class("BertJapanese", **JAPANESE), BERT_VOCABULARY),
    "bert_japanese_characters": (
        "bert",
        word_pieces,
        of_class("BertJapanese", subword_tokenizer_type="character", **JAPANESE),
        BERT_VOCABULARY,
    ),
    "bert_japanese_sentencepiece": (
        "bert",
        sentencepiece_model(
            "spiece.model",
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        ),
        of_class("BertJapanese", subword_tokenizer_type="sentencepiece", **JAPANESE),
        BERT_VOCABULARY,
    ),
    "phobert": ("roberta", sub_words, of_class("Phobert"), ROBERTA),
    "bertweet": ("roberta", sub_words, of_class("Bertweet"), ROBERTA),
}
