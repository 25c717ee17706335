"""Tar files of img2dataset and WebDataset: a sample is a run of members that differ in their ending alone."""

from collections.abc import Sequence

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.files import File, read
from lit_jax.data.sources.rows import bad_sample, example_of
from lit_jax.data.sources.tar_index import FIELDS, open_index
from lit_jax.errors import UserError
from lit_jax.files import parse_json


class TarSource:
    """Samples of an image (jpg, png, webp ...), and of txt, json and cls as far as there are any.

    The caption is what `txt` says. Without it, or if `caption_key` is not the default, it is that field of
    `json`. The label is what `cls` says, or a field of `json`.

    Where the samples are is found once and kept, see `tar_index`. In a compressed tar nothing can be found.
    """

    def __init__(self, files: Sequence[File], config: SourceConfig):
        self._files = list(files)
        self._config = config
        self._index = open_index(self._files)
        if not len(self):
            raise UserError(f"{files[0]} has no samples; use tar files that have some.")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        sample = self._index[index]
        file = self._files[sample.shard]
        key = f"{file.name}/{sample.key}"
        if sample.hostile:
            raise BadSampleError(
                f"{key} is a link, or its name leads out of the folder", "hostile_path"
            )
        with bad_sample(key):
            content = read(file, sample.start, sample.stop)  # its members are neighbours
        if len(content) < sample.stop - sample.start:
            raise BadSampleError(f"{file} ends within {key}; get it again")
        with bad_sample(key):
            parts = {
                name: content[start - sample.start : stop - sample.start]
                for name, (start, stop) in zip(FIELDS, sample.spans, strict=True)
                if start >= 0
            }
            row = parse_json(parts["json"].decode()) if "json" in parts else {}
            if not isinstance(row, dict):
                raise TypeError("its json is no object")
            config = self._config
            row |= {config.image_key: parts.get("image")}
            if "txt" in parts and config.caption_key == SourceConfig.caption_key:
                row |= {config.caption_key: parts["txt"].decode()}
            if "cls" in parts:
                row |= {config.label_key: parts["cls"].decode().strip()}
            # "key" of img2dataset's json is the same in every run, but does not name the shard.
            return {**example_of(row, config, file.parent, key=key), "key": key}
