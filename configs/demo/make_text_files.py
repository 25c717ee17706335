"""Write the small files that the demos read.

    python -m lit_jax.configs.demo.make_text_files

Class files for zero-shot classification, and of each tiny model its configs, tokenizer and image processor:
all but the weights of those that are pretrained (make_vit.py, make_clip.py).
"""

import json
import pathlib
import string
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, RobertaTokenizer, XLMRobertaTokenizer

from lit_jax.configs.demo import make_digits as digits

FOLDER = pathlib.Path(__file__).parent

CLASS_LISTS = {"all80": digits.NUMBERS, "unseen16": digits.UNSEEN}
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MAX_TEXT_LENGTH = 32  # tokens

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    **SIZES,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    **NO_DROPOUT,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": MAX_TEXT_LENGTH,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
ROBERTA = BERT | {
    "layer_norm_eps": 1e-5,
    # The first text token is at position 2.
    "max_position_embeddings": MAX_TEXT_LENGTH + 2,
    "type_vocab_size": 1,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
TRANSFORMER = {**SIZES, "num_hidden_layers": 4, "num_attention_heads": 4}
IMAGE = {"image_size": digits.CANVAS, "patch_size": 8, "num_channels": 3}
BEIT = {
    "architectures": ["BeitModel"],
    "model_type": "beit",
    **TRANSFORMER,
    **IMAGE,
    **NO_DROPOUT,
    "layer_norm_eps": 1e-12,
    "layer_scale_init_value": 0.1,
    "use_absolute_position_embeddings": True,
    "use_relative_position_bias": True,
    "use_mean_pooling": True,
}
EFFICIENTNET = {
    "model_type": "align_vision_model",
    "image_size": digits.CANVAS,
    "num_channels": 3,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "depth_divisor": 8,
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 64],
    "kernel_sizes": [3, 3, 5],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 2, 2],
    "expand_ratios": [1, 4, 4],
    "depthwise_padding": [],
    "hidden_dim": 64,
    "hidden_act": "swish",
    "batch_norm_momentum": 0.1,
    "batch_norm_eps": 1e-3,
    "drop_connect_rate": 0.0,
}


def processor(kind: str, **settings: Any) -> dict[str, Any]:
    size = {"height": digits.CANVAS, "width": digits.CANVAS}
    half = [0.5, 0.5, 0.5]
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "size": size,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
    } | settings


def texts(*languages: str) -> list[str]:
    """Return all that the demos say in these languages."""
    templates = [t for language in languages for t in digits.TEMPLATES[language]]
    return templates + [
        text
        for number in digits.NUMBERS
        for lang in languages
        for text in digits.captions(number, lang)
    ]


def words(*languages: str) -> list[str]:
    """Return the different words of these texts, without punctuation."""
    plain = " ".join(texts(*languages)).translate(str.maketrans(",{}", "   "))
    return sorted(set(plain.split()))


def wordpiece_vocabulary() -> list[str]:
    """Return BERT's tokens: every word, and single characters to spell any other word with."""
    characters = string.ascii_lowercase + string.digits
    pieces = {*words("en"), *characters, *string.punctuation, *(f"##{c}" for c in characters)}
    return [*BERT_SPECIAL, *sorted(pieces)]


def byte_pairs(words: list[str], *, end: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the tokens and merges of a byte-level BPE that knows each word: it grows letter by letter.

    Args:
        end: what the last symbol of a word ends with.
    """
    alphabet = sorted(ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *(symbol + end for symbol in alphabet)])
    merges = {}
    for word in words:
        *symbols, last = word
        grown, *rest = *symbols, last + end
        for symbol in rest:
            merges[grown, symbol] = None
            grown += symbol
            tokens[grown] = None
    return list(tokens), list(merges)


def unigrams() -> list[tuple[str, float]]:
    """Return XLM-RoBERTa's scored pieces: words, the parts of German numbers, single characters."""
    parts = ["und", *digits.TENS["de"]]
    starts = [*words("en", "de"), *digits.UNITS["de"][1:]]
    whole = {f"▁{word}" for word in starts if "und" not in word[2:]} | set(parts)
    characters = {character for text in texts("en", "de") for character in text} | {"▁"}
    characters |= set(string.ascii_letters + string.digits)
    pieces = [(piece, -2.0) for piece in sorted(whole)]
    pieces += [(piece, -10.0) for piece in sorted(characters - {" ", "{", "}"} - whole)]
    *special, mask = ROBERTA_SPECIAL
    return [*((name, 0.0) for name in special), *pieces, (mask, 0.0)]


def write(folder: pathlib.Path) -> None:
    """Write all files into `folder`."""
    for name, numbers in CLASS_LISTS.items():
        english = [digits.number_words(number) for number in numbers]
        classes = {"classnames": english, "templates": digits.TEMPLATES["en"]}
        _write_json(folder / f"{name}.json", classes)
        german = [digits.number_words(number, "de") for number in numbers]
        classes = {"classnames": german, "labels": english, "templates": digits.TEMPLATES["de"]}
        _write_json(folder / f"{name}.de.json", classes)
    _write_bert(folder / "bert", BERT)
    _write_align(folder / "align")
    _write_clip(folder / "clip")
    _write_json(folder / "beit" / "config.json", BEIT)
    _write_json(folder / "beit" / "preprocessor_config.json", processor("BeitImageProcessor"))
    _write_roberta(folder / "roberta")
    _write_xlm_roberta(folder / "xlm_roberta")


def _write_bert(folder: pathlib.Path, config: dict[str, Any]) -> None:
    tokens = wordpiece_vocabulary()
    _write_json(folder / "config.json", {**config, "vocab_size": len(tokens)})
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", tokenizer | {"model_max_length": MAX_TEXT_LENGTH})
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")


def _write_align(folder: pathlib.Path) -> None:
    text = {**BERT, "model_type": "align_text_model", "vocab_size": len(wordpiece_vocabulary())}
    config = {
        "architectures": ["AlignModel"],
        "model_type": "align",
        "projection_dim": EFFICIENTNET["hidden_dim"],
        "temperature_init_value": 1.0,
        "text_config": text,
        "vision_config": EFFICIENTNET,
    }
    _write_bert(folder, config)
    _write_json(folder / "config.json", config)
    larger, crop = digits.CANVAS + 4, {"height": digits.CANVAS, "width": digits.CANVAS}
    settings = {"size": {"height": larger, "width": larger}, "crop_size": crop}
    _write_json(
        folder / "preprocessor_config.json",
        processor(
            "EfficientNetImageProcessor",
            **settings,
            do_center_crop=True,
            rescale_factor=1 / 127.5,
            rescale_offset=True,
            do_normalize=False,
            include_top=False,
        ),
    )


def _write_clip(folder: pathlib.Path) -> None:
    tokens, merges = byte_pairs(words("en"), end="</w>")
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    start, end = len(tokens) - 2, len(tokens) - 1
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    text = {**SIZES, "num_attention_heads": 2, "vocab_size": len(tokens), **ids}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 64,
        "logit_scale_init_value": 2.6592,
        "text_config": {
            "model_type": "clip_text_model",
            **text,
            "max_position_embeddings": MAX_TEXT_LENGTH,
        },
        "vision_config": {"model_type": "clip_vision_model", **TRANSFORMER, **IMAGE},
    }
    _write_json(folder / "config.json", config)
    edge = {"shortest_edge": digits.CANVAS}
    crop = {"height": digits.CANVAS, "width": digits.CANVAS}
    settings = {"size": edge, "do_center_crop": True, "crop_size": crop}
    _write_json(folder / "preprocessor_config.json", processor("CLIPImageProcessor", **settings))
    vocab = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab, merges, model_max_length=MAX_TEXT_LENGTH).save_pretrained(folder)


def _write_roberta(folder: pathlib.Path) -> None:
    english = words("en")
    tokens, merges = byte_pairs([*(f"Ġ{word}" for word in english), *english], end="")
    *special, mask = ROBERTA_SPECIAL
    tokens = [*special, *tokens, mask]
    config = {"architectures": ["RobertaModel"], "model_type": "roberta"}
    _write_json(folder / "config.json", {**ROBERTA, **config, "vocab_size": len(tokens)})
    vocab = {token: i for i, token in enumerate(tokens)}
    RobertaTokenizer(vocab, merges, model_max_length=MAX_TEXT_LENGTH).save_pretrained(folder)


def _write_xlm_roberta(folder: pathlib.Path) -> None:
    pieces = unigrams()
    config = {"architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta"}
    _write_json(folder / "config.json", {**ROBERTA, **config, "vocab_size": len(pieces)})
    XLMRobertaTokenizer(pieces, model_max_length=MAX_TEXT_LENGTH).save_pretrained(folder)


def _write_json(path: pathlib.Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(FOLDER)
