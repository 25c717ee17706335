"""All commands in one: `lit-jax train --config=vit_bert --workdir=runs/demo`.

`python -m lit_jax train ...` is the same, and so is `python -m lit_jax.train ...`.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from lit_jax import interrupts
from lit_jax.display import shown_streams
from lit_jax.errors import import_jax_or_exit

COMMANDS = {
    "train": "lit_jax.train",
    "evaluate": "lit_jax.evaluate",
    "export": "lit_jax.export",
    "embed": "lit_jax.embed",
    "plan": "lit_jax.plan",
    "convert": "lit_jax.data.convert",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names with the words behind it; return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help"):
        # The reader of a pipe may close it after the first line.
        with shown_streams(lambda: None):
            print(f"usage: lit-jax {{{','.join(COMMANDS)}}} ...\n\n{__doc__}")
            print("`lit-jax COMMAND --help` lists the flags of a command.")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"write one of {', '.join(COMMANDS)}."
        print(f"error: {name} is not a command; {remedy}", file=sys.stderr)
        return 2
    if argv is None:
        interrupts.end_at_once()
    # Imported only here, so that `lit-jax --help` does not wait for JAX.
    import_jax_or_exit()
    command = importlib.import_module(COMMANDS[name])
    if argv is not None:
        return command.main(rest)
    process = importlib.import_module("lit_jax.distributed.process")
    process.begin_command()
    return process.end_command(command.main(rest))


if __name__ == "__main__":
    sys.exit(main())
