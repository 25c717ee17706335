"""The flags of a benchmark, from their defaults."""

import argparse
from typing import Any


def read_flags(description: str | None, **defaults: Any) -> argparse.Namespace:
    """Return the flags of the command line, such as --peak-tflops for the default `peak_tflops`.

    A flag has the type of its default. One whose default is False takes no value.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(default), default=default)
    return parser.parse_args()
