"""Make the goldens beside this file again, a kind at a time, each in the environment that its maker names.

python -m tests.goldens.make towers [name ...]   PyTorch's outputs and gradients (requirements-oracle.txt)
python -m tests.goldens.make files               the files of transformers 4, with their outputs
python -m tests.goldens.make parameters          parameters.txt of each variant of the recipe
"""

import argparse
import importlib


def main() -> None:
    """Write one kind of goldens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kind", choices=("towers", "files", "parameters"))
    parser.add_argument("names", nargs="*", help="the towers to write; all if none is named")
    args = parser.parse_args()
    maker = importlib.import_module(f"tests.goldens.make_{args.kind}")
    maker.main(*([args.names] if args.kind == "towers" else []))


if __name__ == "__main__":
    main()
