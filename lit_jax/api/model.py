"""The common base of the dual encoder and the towers: calls, saving, and uploads to the Hub."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from lit_jax.api.inputs import is_deterministic
from lit_jax.api.outputs import ModelOutput, Output, model_output
from lit_jax.config_schema import nearest
from lit_jax.errors import UserError
from lit_jax.models.tower import TowerOutput
from lit_jax.weights import hub, load, save

# "float32", "bfloat16" or "float16", or JAX's dtypes such as jnp.bfloat16.
Dtype = str | type | np.dtype
Params = Mapping[str, Any]
# A config, or a folder or Hub id with a config.json.
Config = PreTrainedConfig | str | Path

_OPTIONS = [field.name for field in dataclasses.fields(hub.HubOptions)]
# The options of transformers' push_to_hub.
_PUSH_OPTIONS = (
    "token",
    "private",
    "revision",
    "commit_message",
    "commit_description",
    "create_pr",
)


class Call(NamedTuple):
    """The arguments that the calls of all models share, in the order of the signatures."""

    params: Params | None = None
    dropout_rng: Any = None
    train: bool | None = None
    output_hidden_states: bool | None = None
    output_attentions: bool | None = None
    return_dict: bool | None = None

    @property
    def records(self) -> bool:
        """True if the blocks of the towers record their outputs."""
        return bool(self.output_hidden_states or self.output_attentions)

    def model_output(self, output: TowerOutput, recorded: Mapping[str, Any]) -> ModelOutput:
        """Return the output of a tower with the requested hidden states and attentions."""
        return model_output(
            output,
            recorded,
            hidden_states=bool(self.output_hidden_states),
            attentions=bool(self.output_attentions),
        )

    def returned(self, output: Output) -> Any:
        """Return the output, or a tuple of it if `return_dict` is False."""
        return output.to_tuple() if self.return_dict is False else output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model with its parameters. `config` is transformers' own; a call may use other `params`."""

    config: PreTrainedConfig
    module: Any
    # Not in the repr, because a notebook would print millions of numbers.
    params: Params = dataclasses.field(repr=False)

    def _run(
        self, call: Call, method: Callable[..., Any] | None, *inputs: Any
    ) -> tuple[Any, Mapping[str, Any]]:
        """Return the result of a method of the module (None: its __call__), and the blocks' records."""
        if call.params is not None:
            _check_params(call.params, self.params)
        # Blocks record with `sow`, which does nothing unless the collection is mutable.
        output, state = self.module.apply(
            {"params": self.params if call.params is None else call.params},
            *inputs,
            deterministic=is_deterministic(call.train, call.dropout_rng),
            method=method,
            rngs=None if call.dropout_rng is None else {"dropout": call.dropout_rng},
            mutable=["intermediates"] if call.records else [],
        )
        return output, state.get("intermediates", {})

    def save_pretrained(
        self,
        folder: str | Path,
        processor: Any = None,
        *,
        params: Params | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """Write a folder that transformers loads, with the files of the processor if one is given.

        Other files in the folder stay, such as those of a processor that was saved before. A model in the
        folder is replaced if it is of the same class, or was written by lit_jax. `params` replace the model's
        own parameters.

        With `push_to_hub` the folder is uploaded, too. The default of `repo_id` is the folder's name;
        `options` are those of `push_to_hub`. Raises UserError for bad arguments, and if the folder cannot be
        written.
        """
        if processor is not None and not isinstance(processor, save.Saveable):
            raise UserError(
                f"processor is a {type(processor).__name__}, which has no save_pretrained; give parameters "
                "by name, as params=..."
            )
        for name in options:
            if name not in _PUSH_OPTIONS:
                known = ("processor", "params", "push_to_hub", "repo_id", *_PUSH_OPTIONS)
                raise UserError(
                    f"{name} is not an argument of save_pretrained; {nearest(name, known)}."
                )
            if not push_to_hub:
                raise UserError(
                    f"{name} of save_pretrained has no effect without an upload; add push_to_hub=True, or "
                    "leave it out."
                )
        if params is not None:
            _check_params(params, self.params)
        self._write(str(folder), self.params if params is None else params, processor)
        # Uploaded from the written folder, with the files that were there before.
        if push_to_hub:
            written = Path(folder).expanduser().resolve()
            hub.upload(written, repo_id or written.name, **options)

    def push_to_hub(
        self, repo_id: str, processor: Any = None, *, params: Params | None = None, **options: Any
    ) -> str:
        """Upload the files of `save_pretrained` to a Hub repository, and return the commit's URL.

        `options` are those of transformers: token, private, revision, commit_message, create_pr ...
        Raises UserError if the Hub refuses or cannot be reached.
        """
        # The upload holds only these files, unlike an upload from a folder of the user.
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, processor, params=params)
            return hub.upload(folder, repo_id, **options)

    def _write(self, folder: str, params: Params, processor: Any) -> None:
        raise NotImplementedError


def _check_params(given: Params, own: Params) -> None:
    """Raise UserError unless a tree of parameters has the names and shapes of the model's own tree."""
    # Compared by path, so that the error names the first parameter that differs.
    shapes, expected = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (given, own)
    )
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            found = f"{[*shapes[name]]}" if name in shapes else "missing"
            wanted = f"{[*expected[name]]}" if name in expected else "no such parameter"
            raise UserError(
                f"params does not fit this model ({name} is {found}, the model has {wanted}); give a tree "
                "like model.params, without {'params': ...} around it."
            )


def split_options(given: Mapping[str, Any]) -> tuple[hub.HubOptions, dict[str, Any]]:
    """Return the options of from_pretrained that choose a copy of the model, and all other options."""
    # Code for transformers may pass subfolder=None.
    options = {name: value for name, value in given.items() if name in _OPTIONS}
    if options.get("subfolder") is None:
        options.pop("subfolder", None)
    rest = {name: value for name, value in given.items() if name not in _OPTIONS}
    return hub.HubOptions(**options), rest


def refuse_unknown(rest: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise UserError for a keyword argument that from_pretrained does not have."""
    for name in rest:
        raise UserError(
            f"{name} is not an argument of this call; {nearest(name, [*known, *_OPTIONS])}."
        )


def read_given(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config that a caller passes instead of the model's config.json."""
    if isinstance(config, str | Path):
        return hub.read_config(hub.local_folder(str(config), config_key="config"))
    return hub.complete(config if isinstance(config, Mapping) else config.to_dict())


def as_config(hf: Mapping[str, Any]) -> PreTrainedConfig:
    """Return transformers' config object for the content of a config.json."""
    content = dict(hf)
    model_type = content.pop("model_type")
    # transformers has no class for our own type; this class has all the fields that our type needs.
    if model_type == hub.OWN_TYPE:
        model_type = "vision-text-dual-encoder"
    return AutoConfig.for_model(model_type, **content)


def init_params(
    module: Any, example: Any, seed: int, given: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the parameters of a module: those in `given`, by their topmost name, and random ones."""

    def draw(key: jax.Array) -> dict[str, Any]:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
        params = module.init(key, zeros)["params"]
        # The compiler does not compute the parameters that are not returned.
        return {name: part for name, part in params.items() if name not in given}

    key = jax.random.key(seed)
    # Only tracing is inside the context: an error of the device, such as out of memory, is not the config's.
    with load.config_errors():
        lowered = jax.jit(draw).lower(key)
    return {**lowered.compile()(key), **given}
