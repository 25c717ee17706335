"""Find the pictures in a folder that fit a text, with the tools of evaluation (docs/picture_search.md).

    python -m examples.search --model=exported --images=~/Pictures --query="a dog in the snow"

Writes a page with the nearest pictures to each query, to be opened in a browser. The pictures are embedded
once; their embeddings are kept in --cache, and made anew when a picture or the model changes.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lit_jax.cli import add_path, command
from lit_jax.data.example import Example
from lit_jax.display import printable
from lit_jax.errors import UserError
from lit_jax.evals.cache import EmbeddingCache
from lit_jax.evaluate import load_folder
from lit_jax.files import atomic_write
from lit_jax.reports.html_parts import page, picture, text

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class Pictures:
    """All images below a folder, as a source."""

    def __init__(self, folder: Path):
        self._files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not self._files:
            raise UserError(f"There is no picture in {folder}; give another folder as --images.")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        file = self._files[index]
        return Example(key=str(file), image=file, captions=(), label=None)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a dual encoder")
    parser.add_argument("--images", required=True, help="folder of pictures")
    parser.add_argument(
        "--query",
        required=True,
        action="append",
        help="text to search for; repeat the flag for several",
    )
    parser.add_argument(
        "--count", type=int, default=16, help="number of pictures for each query (default: 16)"
    )
    add_path(parser, "--output", default=Path("search.html"), help="page to write")
    add_path(parser, "--cache", default=Path("search_cache"))
    args = parser.parse_args(argv)

    pictures = Pictures(Path(args.images).expanduser())
    encoder, params = load_folder(args.model)
    encoder = dataclasses.replace(encoder, cache=EmbeddingCache(args.cache))
    images_NxE, valid_N = encoder.images(params, pictures)
    queries_QxE = encoder.texts(params, args.query)
    scores_QxN = np.where(valid_N, queries_QxE @ images_NxE.T, -np.inf)

    parts = []
    for query, scores_N in zip(args.query, scores_QxN, strict=True):
        parts.append(f'<h2 dir="auto">{text(query)}</h2><div class="strip">')
        for i in np.argsort(-scores_N, kind="stable")[: min(args.count, int(valid_N.sum()))]:
            name = Path(pictures[i]["key"]).name
            parts.append(f"<figure>{picture(pictures[i]['image'], name)}")
            parts.append(f"<figcaption>{text(name)}<br>{scores_N[i]:.3f}</figcaption></figure>")
            key = pictures[i]["key"]
            print(f"{printable(query)}\t{scores_N[i]:.4f}\t{printable(key)}")
        parts.append("</div>")
    subtitle = f"{int(valid_N.sum()):,} pictures in {args.images}, seen by {args.model}"
    atomic_write(args.output, page("Search", subtitle, parts))
    print(f"Open {args.output.absolute()}")


if __name__ == "__main__":
    sys.exit(main())
