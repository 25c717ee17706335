"""Writes the small files that the demo reads: `python configs/demo/make_text_files.py`.

Class lists for zero-shot classification, and a tiny BERT's config and tokenizer.
"""

import json
import pathlib
import string

from lit_jax.data import demo

FOLDER = pathlib.Path(__file__).parent

CLASS_LISTS = {"all80.json": demo.NUMBERS, "unseen16.json": demo.UNSEEN}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_TEXT_LENGTH = 32  # tokens

BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": MAX_TEXT_LENGTH,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}

TOKENIZER = {
    "tokenizer_class": "BertTokenizer",
    "do_lower_case": True,
    "model_max_length": MAX_TEXT_LENGTH,
}


def vocabulary() -> list[str]:
    """WordPiece tokens: every word of the demo, and single characters to spell any other word with."""
    texts = (*demo.TEMPLATES, *demo.CAPTIONS, *map(demo.number_words, demo.NUMBERS))
    words = {word for text in texts for word in text.replace("{}", " ").split()}
    characters = string.ascii_lowercase + string.digits
    pieces = {*words, *characters, *string.punctuation, *(f"##{c}" for c in characters)}
    return [*SPECIAL, *sorted(pieces)]


def write(folder: pathlib.Path) -> None:
    """Writes all files into `folder`."""
    tokens = vocabulary()
    contents = {
        "bert/config.json": {**BERT, "vocab_size": len(tokens)},
        "bert/tokenizer_config.json": TOKENIZER,
    }
    for name, numbers in CLASS_LISTS.items():
        names = [demo.number_words(number) for number in numbers]
        contents[name] = {"classnames": names, "templates": list(demo.TEMPLATES)}
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "bert/vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(FOLDER)
