"""Write a run as a folder for transformers: python -m lit_jax.export --workdir=DIR --output=FOLDER.

PyTorch loads the folder with from_pretrained of transformers' VisionTextDualEncoderModel (or of CLIPModel and
so on, if one was trained) and of its processor; lit_jax.evaluate takes it as --model.
Exit codes: 0 done, 2 bad input.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import transformers

from lit_jax.bucket_copies import temporary_copy, written_locally
from lit_jax.buckets import BucketPath, check_access
from lit_jax.cli import Parser, add_path, command
from lit_jax.data.image import ImageTransform
from lit_jax.data.image_processor import load_processor
from lit_jax.data.text import check_saved, finish_saving, without_state
from lit_jax.distributed import process
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import DualEncoderModule
from lit_jax.models.patches import pair
from lit_jax.models.tower import ImageTower
from lit_jax.training.workdir import load_run, model_folder
from lit_jax.training.workdir_errors import quiet_orbax
from lit_jax.weights.save import save_dual_encoder

# model_type -> the class of the processor; all other types have VisionTextDualEncoderProcessor.
PROCESSORS = {
    "clip": transformers.CLIPProcessor,
    "siglip": transformers.SiglipProcessor,
    "align": transformers.AlignProcessor,
    "altclip": transformers.AltCLIPProcessor,
    "chinese_clip": transformers.ChineseCLIPProcessor,
}


@quiet_orbax()
@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    parser = Parser("lit_jax.export", __doc__)
    add_path(parser, "--workdir", required=True, help="folder of a training run")
    add_path(parser, "--output", required=True, help="folder to write")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the latest)")
    args = parser.parse(argv)
    check_access(args.output)
    # Here the files of an earlier export cannot be replaced all at once.
    if isinstance(args.output, BucketPath) and args.output.exists():
        raise UserError(f"--output={args.output} holds something already; give another address.")
    process.open_devices()
    # The run folder keeps locked parameters as they were read, so float32 exports them without rounding.
    run = load_run(args.workdir, step=args.step, dtype="float32")
    model_type = run.model.hf_config["model_type"]
    folder = temporary_copy(model_folder(args.workdir))
    processor = Processor(folder, run.model.processors.tokenizer, model_type)
    params = jax.device_get(run.params)
    transform = run.model.processors.image_transform
    module, hf_config, params = at_image_size(run.module, run.model.hf_config, params, transform)
    with written_locally(args.output) as output:
        save_dual_encoder(output, hf_config, module, params, processor)
    print(f"Exported step {run.step} of {args.workdir} to {args.output}")


def at_image_size(
    module: DualEncoderModule,
    hf_config: dict[str, Any],
    params: dict[str, Any],
    transform: ImageTransform,
) -> tuple[DualEncoderModule, dict[str, Any], dict[str, Any]]:
    """Return module, config and parameters with an image tower for the size of `transform`'s images.

    Images that are not square change nothing, because not every config of transformers can describe them.
    """
    # PyTorch's tower interpolates its position embeddings only if a call asks for it, so the export has
    # interpolated ones.
    height, width, _ = transform.output_shape
    if height != width or pair(module.vision_model.config.image_size) == (height, width):
        return module, hf_config, params
    assert isinstance(module.vision_model, ImageTower)
    tower, vision_params = module.vision_model.interpolated(params["vision_model"], height)
    return (
        module.clone(vision_model=tower),
        hf_config | {"vision_config": hf_config["vision_config"] | {"image_size": height}},
        params | {"vision_model": vision_params},
    )


class Processor:
    """The image processor and the tokenizer of a dual encoder, saved for transformers 4 and 5."""

    def __init__(self, folder: Path, tokenizer: Any, model_type: str):
        self._image_processor, self._tokenizer = load_processor(folder), tokenizer
        self._class = PROCESSORS.get(model_type, transformers.VisionTextDualEncoderProcessor)

    def save_pretrained(self, save_directory: str) -> None:
        """Write the files of both. Raise UserError if transformers does not read the tokenizer back."""
        tokenizer = without_state(self._tokenizer)
        both = self._class(image_processor=self._image_processor, tokenizer=tokenizer)
        both.save_pretrained(save_directory)
        finish_saving(self._tokenizer, Path(save_directory))
        check_saved(self._tokenizer, Path(save_directory))
        # transformers 5 writes a joint processor_config.json; version 4 reads preprocessor_config.json.
        self._image_processor.save_pretrained(save_directory)


if __name__ == "__main__":
    sys.exit(main())
