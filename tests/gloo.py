"""What Gloo, the library of the collectives between processes on CPUs, prints by itself."""

import re

# "[Gloo] Rank 0 is connected to 7 peer ranks. ...", piece by piece and from one thread for each device: the
# lines of several may be mixed.
_PIECES = re.compile(
    r"(?:\[Gloo\] Rank | is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : |\d+|\n)*"
)


def after_gloo(output: str) -> str:
    """What a process printed, without what Gloo printed first."""
    noise = _PIECES.match(output)
    assert noise is not None
    return output[noise.end() :]
