"""index.json of shards: what no shards could have is refused before a shard is opened."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO

import pytest

from effnet_quant.data.folders import FolderSource
from effnet_quant.data.shard_index import MOST_IMAGES, ShardIndex
from effnet_quant.data.shards import ShardSource, pack, write_index
from effnet_quant.errors import UserError

pytest.importorskip("webdataset", reason="needs the extra 'webdataset'")

CLASSES = ["apple", "bear", "cat"]


@pytest.fixture
def shards(image_folder, tmp_path):
    """18 images in two shards."""
    list(pack(FolderSource(image_folder / "val"), tmp_path / "shards", 9))
    return tmp_path / "shards"


def index(**changes):
    first = {"file": "000000.tar", "images": 9, **changes.pop("first", {})}
    return {"classes": CLASSES, "shards": [first, {"file": "000001.tar", "images": 9}], **changes}


HOSTILE = [
    "[" * 100_000,
    [],
    "text",
    7,
    {"classes": CLASSES},
    {"shards": []},
    *(index(classes=classes) for classes in ("abc", [1, 2, 3], {"apple": 1}, None, ["apple", "apple", "cat"])),
    *(
        index(shards=shards)
        for shards in ("abc", [1], None, 3, {"file": "x"}, [{"images": 3}], [{"file": "000000.tar"}])
    ),
    index(shards=[{"file": "000000.tar", "images": 9}] * 2),
    *(
        index(first={"images": count})
        for count in (-1, 1.5, float("nan"), "9", True, None, [9], 10**30, MOST_IMAGES + 1, MOST_IMAGES)
    ),
    *(
        index(first={"file": file})
        for file in (
            *("../../etc/passwd", "/etc/passwd", "..", ".", "", "a/../../b.tar", "..\\..\\b.tar", "a//b.tar"),
            *("http://127.0.0.1:9/x.tar", "x::http://127.0.0.1:9/x", "a\0.tar", "\x1b[2J.tar", 3, None, ["a.tar"]),
        )
    ),
]


@pytest.mark.parametrize("values", HOSTILE, ids=lambda values: repr(values)[:60])
def test_what_no_shards_could_have_is_refused(shards, values):
    text = values if isinstance(values, str) and values[0] == "[" else json.dumps(values)
    (shards / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"shards/index\.json can't be read \(.{5,100}\); check the path"):
        ShardSource(str(shards))


def test_shards_may_lie_in_folders_below(shards):
    (shards / "part").mkdir()
    (shards / "000000.tar").rename(shards / "part/000000.tar")
    (shards / "index.json").write_text(json.dumps(index(first={"file": "part/000000.tar"})))
    source = ShardSource(str(shards))
    assert [source.read(place).shape[0] for place in (0, 9)] == [3, 3]


def test_an_index_survives_the_way_through_json():
    known = ShardIndex(CLASSES, {"000000.tar": 3, "part/1.tar": 0})
    assert ShardIndex.from_text(json.dumps(known.to_json())) == known


@pytest.mark.parametrize("label", [b"-1", b"3", b"99", b"9" * 5000, b"x", b"", b"\xff", "٣".encode(), b"1.0"])
def test_a_label_that_is_none_of_the_classes_is_named(shards, image_folder, label):
    image = (image_folder / "val/cat/00.jpg").read_bytes()
    with tarfile.open(shards / "000000.tar", "w") as tar:
        for name, content in (("a.jpg", image), ("a.cls", label)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    (shards / "index.json").write_text(json.dumps(index(first={"images": 1})))
    with pytest.raises(UserError, match=r"000000\.tar:a\.jpg has the label .*none of its 3 classes"):
        next(ShardSource(str(shards)).samples(str(shards / "000000.tar")))


@pytest.mark.parametrize("length", [0, 700])
def test_a_damaged_shard_is_named_without_addresses(shards, length):
    path = shards / "000000.tar"
    path.write_bytes(path.read_bytes()[:length] if length else b"garbage " * 1000)
    with pytest.raises(UserError, match=r"000000\.tar can't be read") as refusal:
        list(ShardSource(str(shards)).samples(str(path)))
    assert " at 0x" not in str(refusal.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..99999999}",
        "{{0..999}{0..999}{0..999}}",
        "{" + "{a,b}" * 40 + "}",
        "{0..",
        "{0..9}{",
        "{0..%s}" % ("9" * 5000),
    ],
)
def test_patterns_that_stand_for_no_shards_are_refused(shards, pattern):
    with pytest.raises(UserError, match=r"is no pattern of shards|stands for more than 1,000,000 shards"):
        write_index(f"{shards}/{pattern}.tar")
