"""Secret keys in addresses: used by this process, but neither stored nor shown.

`s3://KEY:SECRET@bucket/data` and `s3://bucket/data?secret_key=...` become `s3://bucket/data`. The keys go
into this process's environment, where its worker processes find them.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

log = logging.getLogger(__name__)

# The environment variable with the keys, as JSON: address or bucket -> [user, options].
_VARIABLE = "LIT_JAX_ADDRESS_KEYS"
_HIDDEN = "***"
# The user name for public files that need no key.
_NOBODY = "anonymous"
_SCHEME = r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"
# A key with its secret, or a token alone. The secret may contain slashes, which should have been %2F.
_USER = r"(?P<user>[^\s/?#@:'\"]*:[^\s?#'\"]*?(?=@)|[^\s/?#'\"]+(?=@))@"
_ADDRESS = re.compile(_SCHEME + _USER)
# Options whose name suggests a secret, such as secret_key, access_token, or the signature of a presigned URL.
_OPTION = re.compile(
    r"(?P<name>[?&](?:sig|[\w.-]*(?:key|secret|token|passw|credential|signature)[\w.-]*)=)"
    r"(?P<value>[^\s&#'\"]+)",
    re.IGNORECASE,
)


class Keys(NamedTuple):
    """The secret parts of an address: the user part, and options."""

    user: str = ""
    options: str = ""


def hide_keys(text: str) -> str:
    """Return a text, such as a message, with *** in the place of all keys in its addresses."""
    text = _ADDRESS.sub(_hidden_user, text)
    return _OPTION.sub(lambda match: f"{match['name']}{_HIDDEN}", text)


def _hidden_user(match: re.Match[str]) -> str:
    return match[0] if match["user"] == _NOBODY else f"{match['scheme']}://{_HIDDEN}@"


def split_keys(address: str) -> tuple[str, Keys]:
    """Return an address without its keys, and the keys."""
    user = ""
    if (match := _ADDRESS.match(address)) and match["user"] != _NOBODY:
        # Arrow parses the address as a URI, in which a slash in the secret has to be escaped.
        user = ":".join(quote(part, safe="%") for part in match["user"].split(":", 1))
        address = f"{match['scheme']}://{address[match.end() :]}"
    place, mark, options = address.partition("?")
    parts = options.split("&") if mark else []
    secret = [part for part in parts if _OPTION.match(f"?{part}")]
    rest = "&".join(part for part in parts if part not in secret)
    return place + ("?" + rest if rest else ""), Keys(user, "&".join(secret))


def take_keys(value: Any) -> Any:
    """Return a value without the keys in its texts, and remember the keys for `get_keys`.

    The value is a text, or a nested dict, list or tuple of texts. The first keys are reported in a warning.
    """
    if isinstance(value, Mapping):
        return {key: take_keys(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(take_keys(item) for item in value)
    if not isinstance(value, str) or "://" not in value:
        return value
    address, keys = split_keys(value)
    if keys == Keys():
        return value
    known = _known()
    if not known:
        log.warning(
            "The keys in the address %s are used in this process only and are not stored; set them in the "
            "environment instead (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "GOOGLE_APPLICATION_CREDENTIALS).",
            address,
        )
    # The bucket's entry serves the files that a list in the same bucket names.
    known |= {_bucket(address): list(keys), address: list(keys)}
    os.environ[_VARIABLE] = json.dumps(known)
    return address


def get_keys(address: str) -> Keys:
    """Return the keys that were given with this address, else the last keys for its bucket, else none."""
    known = _known()
    return Keys(*known.get(address, known.get(_bucket(address), ())))


def had_keys(address: str) -> bool:
    """Return whether `take_keys` has removed keys from this address."""
    return address in _known()


def _known() -> dict[str, list[str]]:
    return json.loads(os.environ.get(_VARIABLE, "{}"))


def _bucket(address: str) -> str:
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{re.split('[/?]', rest, maxsplit=1)[0]}"
