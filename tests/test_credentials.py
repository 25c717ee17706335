"""Keys in addresses: they open the store, and stand nowhere afterwards."""

import dataclasses
import json

import pytest

from lit_jax.config import parse
from lit_jax.credentials import Keys, hide_keys, split_keys
from lit_jax.data import convert
from lit_jax.data.files import locate
from lit_jax.errors import BAD_INPUT, UserError
from tests.object_store.served import serve


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    monkeypatch.setenv("LIT_JAX_ADDRESS_KEYS", "{}")


@pytest.mark.parametrize(
    ("address", "clean", "keys"),
    [
        ("s3://ID:SECR3T@bucket/a@b?region=x", "s3://bucket/a@b?region=x", ("ID:SECR3T", "")),
        ("s3://ID:SEC/R+T@bucket/x", "s3://bucket/x", ("ID:SEC%2FR%2BT", "")),
        ("s3://ID:SEC%2FRT@bucket", "s3://bucket", ("ID:SEC%2FRT", "")),
        ("https://TOKEN@host/x", "https://host/x", ("TOKEN", "")),
        ("https://me:TOKEN@host:80/x", "https://host:80/x", ("me:TOKEN", "")),
        (
            "s3://b/x?access_key=ID&region=r&secret_key=SECR3T",
            "s3://b/x?region=r",
            ("", "access_key=ID&secret_key=SECR3T"),
        ),
        ("gs://anonymous@bucket/x?design=y", "gs://anonymous@bucket/x?design=y", ("", "")),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c", ("", "")),
        ("/data/a@b?key=c", "/data/a@b", ("", "key=c")),
    ],
)
def test_an_address_is_told_from_its_keys(address, clean, keys):
    assert split_keys(address) == (clean, Keys(*keys))
    shown = hide_keys(f"cannot read {address}, and {address}")
    assert not any(secret in shown for secret in ("SEC", "TOKEN"))
    assert hide_keys(clean) == clean


def test_a_config_has_no_keys_and_opens_the_store_with_them(caplog):
    paths = "s3://ID:SECR3T@bucket/{a,b}.tar?region=r", "s3://other/x?secret_key=SECR3T&region=r"
    with caplog.at_level("WARNING", logger="lit_jax"):
        first, second = (
            parse({"data": {"train": {"path": path}}}) for path in (paths[0], paths[0])
        )
    assert caplog.text.count("are not stored") == 1
    assert first == second == parse({"data": {"train": {"path": "s3://bucket/{a,b}.tar?region=r"}}})
    place = locate(first.data.train.path)
    assert (place.user, place.options) == ("ID:SECR3T", "region=r")
    assert place / "x" == locate("s3://bucket/{a,b}.tar/x", beside=place)
    nested = parse(
        {"data": {"mixture": {"a": {"path": paths[1]}}}, "evals": {"e": {"classes": paths[0]}}}
    )
    assert "SECR3T" not in json.dumps(dataclasses.asdict(nested))
    assert "SECR3T" not in repr(locate(nested.data.mixture["a"].path))
    assert locate(nested.data.mixture["a"].path).options == "region=r&secret_key=SECR3T"


def test_no_file_and_no_message_of_a_command_has_a_key(tmp_path, capfd):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"image": f"{n}.png", "caption": str(n)} for n in range(3)]
    (data / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    with serve(data) as at:
        address = at("s3://MYID:SECR3T@bucket/captions.jsonl")
        flags = [f"--source.path={address}", f"--output={output}", "--text_only", "--workers=2"]
        code = convert.main([*flags, "--shard_size=2"])
    said = capfd.readouterr()
    assert "MYID" not in said.out + said.err
    assert "SECR3T" not in said.out + said.err
    files = [path for path in output.rglob("*") if path.is_file()]
    assert "convert.json" in [path.name for path in files]
    assert not any(b"SECR3T" in path.read_bytes() for path in files)
    assert code in (0, BAD_INPUT)  # none of the images is there


@pytest.mark.parametrize("path", ["https://me:SECR3T@host/x", "s3://ID:SECR3T@b/x?nonsense=1"])
def test_a_message_about_an_address_has_no_key(path):
    with pytest.raises((UserError, ValueError)) as refused:
        locate(path).is_file()
    assert "SECR3T" not in str(refused.value)
