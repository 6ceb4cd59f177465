"""Pictures that strangers made: each is read, or refused in one line before it is unpacked."""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import zlib
from contextlib import suppress
from io import BytesIO

import pytest
from PIL import Image

from gripvlm.grip.train import train
from gripvlm.tasks import TaskError, open_image
from tiny_train import Asked, Sample, asked, tiny_config, tiny_vlm


def png(*chunks: tuple[bytes, bytes], picture: Image.Image | None = None) -> bytes:
    """A PNG with further chunks after its header."""
    kept = BytesIO()
    (picture or Image.new("RGB", (8, 8))).save(kept, "PNG")
    more = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return kept.getvalue()[:33] + more + kept.getvalue()[33:]


def bad_pictures() -> dict[str, bytes]:
    whole = png()
    noise = png(picture=Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(3072)))
    exif, jpeg = Image.Exif(), BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG", exif=exif)
    return {
        "a text that unpacks to gigabytes": png((b"zTXt", b"a\0\0" + zlib.compress(b"b" * 2**26))),
        "EXIF that is none": png((b"eXIf", b"no such thing")),
        "a broken chunk": whole[:33] + b"\0\0\0\5\xffIDATabc" + whole[33:],
        "a broken checksum": png((b"tEXt", b"a\0b")).replace(b"a\0b", b"a\0c"),
        "cut off": noise[:900],
        "a JPEG that is cut off": jpeg.getvalue()[:200],
        "nothing": b"",
        "text": b"no picture",
        "many pixels": png(picture=Image.new("1", (13_000, 13_000))),
    }


BAD_PICTURES = bad_pictures()


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_strangers_picture_ends_in_one_line_and_takes_no_memory(tmp_path, name):
    (tmp_path / "a.png").write_bytes(BAD_PICTURES[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for given in (tmp_path / "a.png", BAD_PICTURES[name]):
        with pytest.raises(TaskError, match=r"is not a picture that Pillow can read|13000 x 13000 pixels, allowed are"):
            open_image(given)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # kB


def test_how_many_pixels_are_allowed_is_pillows_own_setting(monkeypatch):
    small = png(picture=Image.new("RGB", (20, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    with pytest.raises(TaskError, match=r"20 x 10 pixels, allowed are 199 in all: make it smaller, or set"):
        open_image(small)
    for most in (200, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        assert open_image(small).size == (20, 10)


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_training_leaves_bad_pictures_out(tmp_path):
    """Every one of them, a pipe and a folder too; the log says why."""
    samples = []
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, content in BAD_PICTURES.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    for name in (*BAD_PICTURES, "pipe", "folder", "not there", "a\0b", "x" * 300):
        samples.append(Sample(name, (tmp_path / f"{name}.png",), "is there a cat?", "yes"))
    data = Asked([*asked(4).samples, *samples])
    config = tiny_config(
        output_dir=str(tmp_path / "grip"),
        stage="grpo",
        max_steps=4,
        per_device_train_batch_size=6,
        on_bad_sample="skip",
        eval_steps=4,
        eval_questions=2,
    )
    train(config, *tiny_vlm(), data, asked(2, name="held"))
    lines = [json.loads(line) for line in (tmp_path / "grip" / "metrics.jsonl").read_text().splitlines()]
    assert {line["skipped"] for line in lines if "skipped" in line} == {sample.id for sample in samples}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says what it reads over
def test_any_byte_of_a_picture_may_be_wrong():
    chance, kept = random.Random(0), []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        packed, noise = BytesIO(), Image.frombytes("RGB", (16, 16), chance.randbytes(768))
        noise.save(packed, kind)
        kept.append(packed.getvalue())
    for turn in range(1500):
        content = bytearray(kept[turn % len(kept)])
        for _ in range(chance.choice((1, 3))):
            content[chance.randrange(min(len(content), chance.choice((40, 10**6))))] = chance.randrange(256)
        with suppress(TaskError):
            assert open_image(bytes(content)).mode == "RGB"
