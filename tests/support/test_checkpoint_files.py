"""support/files.py and read_json: what may be opened in a stranger's folder, and one sentence for everything else."""
import json
import os

import pytest

from support.errors import UserError, read_json
from support.files import checkpoint_file, checkpoint_json


def sentence(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 900 and text.encode()
    return text


@pytest.fixture
def folder(tmp_path):
    """A checkpoint's folder with a file, beside a private file."""
    (tmp_path / "private").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"a": 1}')
    return tmp_path / "model"


def test_plain_files_and_links_inside_the_folder_are_opened(folder):
    """fails if: links are refused altogether, the folder itself may not be a link, or a missing file is an error."""
    (folder / "again.json").symlink_to("config.json")
    (folder / "absolute.json").symlink_to(folder / "again.json")
    link = folder.with_name("link")
    link.symlink_to(folder)
    for name in ("config.json", "again.json", "absolute.json"):
        assert checkpoint_file(link, name) == link / name and checkpoint_json(folder, name) == {"a": 1}
    assert checkpoint_file(folder, "none.json", optional=True) is None
    assert checkpoint_json(folder, "none.json", optional=True) == {}
    assert "none.json is missing" in sentence(checkpoint_file, folder, "none.json")
    assert "is missing" in sentence(checkpoint_file, folder / "nowhere", "config.json")


def test_links_out_of_the_folder_are_refused(folder):
    """fails if: a link is followed to wherever it leads, by itself or through another link or folder."""
    (folder / "a.txt").symlink_to("../private")
    (folder / "b.txt").symlink_to(folder.parent / "private")
    (folder / "c.txt").symlink_to("a.txt")
    (folder / "out").symlink_to("..")
    (folder / "d.txt").symlink_to("out/private")
    for name in "abcd":
        for optional in (True, False):
            assert "outside the checkpoint's folder" in sentence(checkpoint_file, folder, f"{name}.txt", optional)


def test_links_of_the_hub_cache_are_opened(folder, tmp_path):
    """fails if: the cache's own layout is refused, or links from it lead anywhere else."""
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs/hash").write_text('{"a": 2}')
    (repository / "blobs/bad").symlink_to(tmp_path / "private")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "bad.json").symlink_to("../../blobs/bad")
    (snapshot / "private.json").symlink_to("../../../private")
    assert checkpoint_json(snapshot, "config.json") == {"a": 2}
    (tmp_path / "link").symlink_to(snapshot)
    assert checkpoint_json(tmp_path / "link", "config.json") == {"a": 2}
    for name in ("bad.json", "private.json"):
        assert "outside" in sentence(checkpoint_file, snapshot, name)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(repository / "blobs/hash")
    assert "outside" in sentence(checkpoint_file, folder, "config.json")
    elsewhere = tmp_path / "x/snapshots/0"
    elsewhere.mkdir(parents=True)
    (tmp_path / "x/blobs").symlink_to(tmp_path)         # an archive may bring its own cache
    (elsewhere / "config.json").symlink_to("../../blobs/private")
    assert "outside" in sentence(checkpoint_file, elsewhere, "config.json")


@pytest.mark.parametrize("name", ["", ".", "..", "../private", "/etc/passwd", "a/b", "a\0b", "x" * 300, "\udcff\0"])
def test_only_plain_names_are_looked_for(folder, name):
    """fails if: a name climbs out, or what the system says of it comes through."""
    assert "no plain file name" in (said := sentence(checkpoint_file, folder, name)) or "too long" in said
    if len(name) < 300:
        sentence(checkpoint_file, folder, name, optional=True)


def test_folders_pipes_circles_and_links_to_nothing_are_named(folder):
    """fails if: a pipe is opened (it would wait for ever), or a dangling link counts as missing."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "circle").symlink_to("circle")
    (folder / "dangling").symlink_to("gone")
    (folder / "device").symlink_to("/dev/zero")
    for optional in (True, False):
        for name in ("folder", "pipe"):
            assert f"{name} is a folder, a pipe" in sentence(checkpoint_file, folder, name, optional)
            assert f"{name} is a folder, a pipe" in sentence(read_json, folder / name, optional)
        assert "circle cannot be read" in sentence(checkpoint_file, folder, "circle", optional)
        assert "dangling is a link to gone, which does not" in sentence(checkpoint_file, folder, "dangling", optional)
        assert "outside" in sentence(checkpoint_file, folder, "device", optional)


@pytest.mark.parametrize("text, words", [
    ('{"a": NaN}', "NaN is no number"), ('{"a": -Infinity}', "-Infinity is no"), ('{"a": [1e999]}', "1e999 is no"),
    ('{"a": ' + "9" * 5000 + "}", "is not JSON"), ('{"a": ' + "[" * 150 + "]" * 150 + "}", "100 deep"),
    ('{"a": ' + '{"a":' * 99 + "1" + "}" * 100, None), ('{"a": "\\ud800"}', None), ('{"a": 1e308, "b": -0.0}', None),
    ("\ufeff{}", "is not JSON"), ("", "is not JSON"), (" " * 2**25 + "{}", "more than the 33554432 that are read")],
    ids=range(11))
def test_json_that_others_could_not_read_is_refused(folder, text, words):
    """fails if: read_json takes json's own extensions, or a file without an end."""
    path = folder / "x.json"
    path.write_text(text, encoding="utf-8")
    if words is None:
        assert json.loads(json.dumps(read_json(path), indent=2)) == json.loads(text)
    else:
        assert words in sentence(read_json, path)


def test_names_that_are_no_text_are_shown_escaped(folder):
    """fails if: a sentence holds what cannot be printed, or 5,000 characters of a name."""
    assert "\\udcff" in sentence(read_json, folder / "a\udcff.json")
    assert "\\x1b[2J\\n" in sentence(read_json, folder / "a\x1b[2J\n.json")
    assert "too long" in sentence(read_json, folder / ("a" * 5000))
    assert "cannot be read" in sentence(read_json, folder / "a\0b") or "is not JSON" in sentence(read_json, "a\0b")
