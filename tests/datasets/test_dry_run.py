"""--dry_run says what would be read and writes nothing, and every job opens with the same lines."""

import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_folder_set, make_shards
from tests.forked import run_command


def dry_run(source: str, *flags: str, **options):
    return run_command("pipeline.preprocess", f"--source={source}", "--dry_run", *flags, **options)


def said(done) -> list[str]:
    return [line.removeprefix("preprocess: ") for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "flags, lines",
    [
        (
            [],
            [
                "reads sample: 10,000 records without a split, divided into 80% train, "
                "10% validation, 10% test",
                "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
                "images are 28×28×1",
                "the set is named mnist: its files begin with mnist-",
            ],
        ),
        (
            ["--labels=none", "--image_size=14x20", "--rgb", "--validation_fraction=0.005"],
            [
                "reads sample: 10,000 records without a split, divided into 89.5% train, "
                "0.5% validation, 10% test",
                "no labels: --labels=none",
                "images are 14×20×3 after --rgb, --image_size=14x20",
                "the set is named mnist: its files begin with mnist-",
            ],
        ),
    ],
)
def test_it_says_what_would_be_read(flags, lines):
    done = dry_run("sample", *flags)
    assert said(done) == [*lines, "--dry_run: nothing is written"]


def test_it_tries_images_from_all_over_the_source(tmp_path):
    """Each flag that a set needs is named before a job fails for want of it."""
    make_folder_set(tmp_path / "set")
    for path in sorted((tmp_path / "set").rglob("*.png"))[::2]:
        image = Image.open(path).convert("RGBA")
        image.putalpha(7)
        image.save(path)
    *_, tried, _ = said(dry_run(f"folder:{tmp_path}/set"))
    assert tried.startswith("100 of 100 records that were tried are unreadable: ")
    assert "more: has transparent pixels" in tried and "--background=white" in tried
    assert "×1, expected" in tried and "--rgb makes all images RGB" in tried
    lines = said(dry_run(f"folder:{tmp_path}/set", "--background=white", "--rgb"))
    assert not any("unreadable" in line for line in lines)


def test_a_job_opens_with_the_same_lines_and_a_dry_run_writes_nothing(tmp_path):
    directory = make_folder_set(tmp_path / "set" / "archive")
    (directory / "notes.txt").write_text("not an image")
    source, out = f"folder:{tmp_path}/set", f"--output_dir={tmp_path}/out"
    done = dry_run(source, out)
    *lines, last = said(done)
    assert last == "--dry_run: nothing is written" and not (tmp_path / "out").exists()
    assert any("archive/" in line for line in lines)
    job = run_command("pipeline.preprocess", f"--source={source}", out, "--num_shards=1")
    told = [line.removeprefix("preprocess: ") for line in job.stderr.splitlines()]
    assert told[: len(lines)] == lines


def test_nothing_of_an_append_is_written(idx_dir, tmp_path):
    out = tmp_path / "out"
    make_shards(f"idx:{idx_dir}", out, validation_fraction=0.25)
    before = {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}
    done = dry_run(f"idx:{idx_dir}", f"--output_dir={out}", "--append", "--name=blobs")
    assert "train 300, test 50; 25% of train becomes validation" in done.stdout
    assert "compared with those of the data set when they are appended" in done.stdout
    # What a job would refuse, a dry run refuses.
    done = dry_run("sample", f"--output_dir={out}", check=False)
    assert done.returncode == 1 and "holds finished output of other inputs" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]} == before
    # What an append would refuse, a dry run refuses.
    flags = [f"--output_dir={out}", "--append", "--name=other"]
    done = dry_run(f"idx:{idx_dir}", *flags, check=False)
    assert done.returncode == 1 and "was created with other settings (name" in done.stderr


def test_an_output_directory_is_needed_without_it(tmp_path):
    done = run_command("pipeline.preprocess", "--source=sample", check=False)
    assert done.returncode == 2 and "--output_dir must have a value" in done.stderr
    done = dry_run("sample", "--append", check=False)
    assert done.returncode == 2 and "--output_dir must have a value" in done.stderr


def test_grey_images_become_rgb(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 4, 3)).astype(np.uint8)
    for number, image in enumerate(pixels):
        image = image[..., 0] if number % 2 else image
        path = tmp_path / "set" / "cat" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    from pipeline.datasets import reader

    make_shards(f"folder:{tmp_path}/set", tmp_path / "out", rgb=True, num_shards=1)
    dataset = reader.Dataset(str(tmp_path / "out"))
    assert dataset.image_shape == (6, 4, 3)
    shards = [dataset.read_shard(e) for split in dataset.splits for e in dataset.shards(split)]
    for shard in shards:
        for record_id, image in zip(shard.ids, shard.images, strict=True):
            number = int(record_id.split("/")[1][:2])
            expected = pixels[number]
            if number % 2:
                expected = np.repeat(expected[..., :1], 3, axis=2)
            np.testing.assert_array_equal(image, expected)
    assert sum(len(shard.ids) for shard in shards) == 20


def test_names_do_not_steer_the_terminal(tmp_path):
    folder, out = tmp_path / "set", tmp_path / "out"
    names = ["e\x1b]0;PWNED\x07\x1b[2J", "line\nfeed", "turned\u202e", "größer"]
    for split in ("train", "test"):
        for number, name in enumerate(names):
            if (split, number) == ("test", 1):
                continue  # A warning names this class.
            (folder / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), 60 * number + 10).save(folder / split / name / f"{split}.png")
    flags = (f"--source=folder:{folder}", f"--output_dir={out}")
    for status, more in ((0, []), (1, ["--source=folder:" + str(folder) + "/train/line\nfeed/no"])):
        done = run_command("pipeline.preprocess", *flags, *more, check=False)
        assert done.returncode == status, done.stderr
        shown = done.stdout + done.stderr
        assert all(c.isprintable() or c == "\n" for c in shown), ascii(shown)
        if not status:
            assert "größer" in shown and "has no image of class line\\nfeed" in shown
