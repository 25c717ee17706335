"""Tars with holes, with headers that lie, and with members behind their end."""

import io
import os
import re
import subprocess
import tarfile

import pytest

from lit_jax.errors import UserError
from tests.data.test_samples import describe, open_at, write_tar


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_holes_in_a_tar_are_a_bad_sample(tmp_path, image, form):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.png").write_bytes(image)
    os.truncate(tmp_path / "a.png", 1 << 20)
    (tmp_path / "b.png").write_bytes(image)
    command = ["tar", "cSf", "0.tar", f"--format={form}", "a.png", "a.txt", "b.png"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert describe(open_at(tmp_path / "0.tar")) == {"0": "damaged", "b": ()}


def patched(name: str, image: bytes, change) -> bytes:
    """A tar of three samples in which the header of one member is another."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member_name in ("a.png", "b.png", "c.png"):
            member = tarfile.TarInfo(member_name)
            member.size = len(image)
            start = buffer.tell()
            tar.addfile(member, io.BytesIO(image))
            if member_name == name:
                header = bytearray(buffer.getvalue()[start : start + 512])
                change(header)
                header[148:156] = b" " * 8
                header[148:156] = b"%06o\0 " % sum(header)
                buffer.seek(start)
                buffer.write(header)
                buffer.seek(0, 2)
    return buffer.getvalue()


def set_size(size: int):
    def change(header: bytearray) -> None:
        # As GNU tar writes what has no place in 11 octal digits.
        first = 0x80 if size >= 0 else 0xFF
        header[124:136] = bytes([first]) + size.to_bytes(11, "big", signed=True)

    return change


def pax(size: str):
    def change(header: bytearray) -> None:
        header[156:157] = b"x"
        header[124:136] = size.encode() + b"\0"

    return change


LIES = {
    "negative": set_size(-1024),
    "beyond the file": set_size(1 << 40),
    "beyond any file": set_size(1 << 70),
    "a huge pax header": pax("77777777777"),
    "a link": lambda header: header.__setitem__(slice(156, 157), b"2"),
    "a device": lambda header: header.__setitem__(slice(156, 157), b"3"),
    "an old sparse file": lambda header: header.__setitem__(slice(156, 157), b"S"),
    "no number": lambda header: header.__setitem__(slice(124, 136), b"zzzzzzzzzzz\0"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_cost_no_more_than_their_tar(tmp_path, image, caplog, lie):
    """Samples before stay; what is lost is said, each time the data set is opened."""
    (tmp_path / "0.tar").write_bytes(patched("b.png", image, LIES[lie]))
    for _ in range(2):
        caplog.clear()
        found = describe(open_at(tmp_path))
        good = [key for key, value in found.items() if value == ()]
        assert good in (["a"], ["a", "c"])
        assert set(found.values()) <= {(), "damaged", "hostile_path"}
        assert len(found) == 3 or "0.tar" in caplog.text


def test_a_tar_whose_first_header_is_damaged_is_refused(tmp_path):
    """A map of holes that is none is a ValueError in tarfile."""
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.png")
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        member.size = 600
        tar.addfile(member, io.BytesIO(bytes(600)))
    with pytest.raises(UserError, match=r"0\.tar"):
        open_at(tmp_path)


def test_a_tar_that_goes_on_behind_its_end_is_told(tmp_path, image, caplog):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.part", {f"{name}.png": image})
    parts = [(tmp_path / f"{name}.part").read_bytes() for name in ("a", "b")]
    (tmp_path / "0.tar").write_bytes(b"".join(parts))
    assert len(open_at(tmp_path)) == 1
    assert re.search(r"0\.tar .*\b1 .*byte \d+", caplog.text)
