"""The numbers of an evaluation, by transformers' model and processors and a few lines of PyTorch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MAX_TEXT_LENGTH = 16


class Embedder:
    """The exported model of a folder; its embeddings are float64 and have length 1."""

    def __init__(self, folder: Path):
        from transformers import AutoImageProcessor, AutoTokenizer, VisionTextDualEncoderModel

        self._model = VisionTextDualEncoderModel.from_pretrained(folder).eval()
        self._processor = AutoImageProcessor.from_pretrained(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def images(self, files: Sequence[Path]) -> Any:
        pixels = self._processor([Image.open(file) for file in files], return_tensors="pt")
        return self._unit(self._model.get_image_features(**pixels))

    def texts(self, texts: Sequence[str]) -> Any:
        # Each text once: rounding must not break the ties of those that several images share. Cut texts that
        # begin alike are one text, too.
        cut = [tuple(ids) for ids in self._tokens(texts, padding=False).input_ids]
        first = [cut.index(tokens) for tokens in cut]
        unique = sorted(set(first))
        tokens = self._tokens([texts[i] for i in unique], padding=True, return_tensors="pt")
        embeds = self._unit(self._model.get_text_features(**tokens))
        return embeds[[unique.index(i) for i in first]]

    def classes(self, names: Sequence[str], templates: Sequence[str]) -> Any:
        import torch

        return self._unit(
            torch.stack(
                [
                    self.texts([t.replace("{}", name) for t in templates]).mean(dim=0)
                    for name in names
                ]
            )
        )

    def _tokens(self, texts: Sequence[str], **options: Any) -> Any:
        return self._tokenizer(list(texts), truncation=True, max_length=MAX_TEXT_LENGTH, **options)

    def _unit(self, embeds: Any) -> Any:
        import torch

        embeds = getattr(embeds, "pooler_output", embeds)
        return torch.nn.functional.normalize(embeds.double(), dim=-1)


def zero_shot(images: Any, classes: Any, labels: Sequence[int]) -> dict[str, float]:
    """Return top1, top5 and the mean over classes of the share that is right."""
    import torch

    targets = torch.tensor(labels)
    top5 = (images @ classes.T).topk(5).indices
    right = (top5[:, 0] == targets).double()
    return {
        "top1": float(right.mean()),
        "top5": float((top5 == targets[:, None]).any(dim=1).double().mean()),
        "mean_per_class_recall": float(
            torch.stack([right[targets == c].mean() for c in targets.unique()]).mean()
        ),
    }


def ranks(images: Any, texts: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ranks of images among texts, of which each image has two: at least, at most; and of texts.

    A tie counts as lost. Different texts closer than float32 can tell may be on either side: few are, but
    which and how many is up to the rounding of the two steps that made the model.
    """
    import torch

    # Not a matrix product: its kernels sum some columns in another order, which breaks ties.
    scores, own = (images[:, None] * texts).sum(dim=-1), torch.arange(len(texts)) // 2
    gaps = [scores[i, own != i] - scores[i, own == i].max() for i in range(len(images))]
    fewest = [1 + int(((gap == 0) | (gap > 1e-7)).sum()) for gap in gaps]
    most = [1 + int((gap > -1e-7).sum()) for gap in gaps]
    of_texts = [1 + int((scores[:, m] > scores[own[m], m]).sum()) for m in range(len(texts))]
    return np.array(fewest), np.array(most), np.array(of_texts)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
