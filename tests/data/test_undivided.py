"""A folder of class folders without train/ and val/ is divided, always in the same way."""

import shutil
from pathlib import Path

import pytest

from effnet_quant import UserError
from effnet_quant.data.data_argument import open_sources, open_validation


@pytest.fixture
def pictures(image_folder: Path, tmp_path: Path) -> Path:
    """Twelve images of each of three classes, without train/ and val/."""
    for split in ("train", "val"):
        for folder in (image_folder / split).iterdir():
            (tmp_path / folder.name).mkdir(exist_ok=True)
            for file in folder.iterdir():
                shutil.copy(file, tmp_path / folder.name / f"{split}-{file.name}")
    return tmp_path


def names(source) -> list[str]:
    return [
        Path(source.name(index)).relative_to(Path(source.name(index)).parents[1]).as_posix()
        for index in range(len(source))
    ]


def test_a_fifth_of_each_class_is_held_back(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    train, val = open_sources(str(pictures))
    assert train.classes == val.classes == ["apple", "bear", "cat"]
    assert train.labels.bincount().tolist() == [10, 10, 10]
    assert val.labels.bincount().tolist() == [2, 2, 2]
    every = {f"{name}/{file.name}" for name in train.classes for file in (pictures / name).iterdir()}
    assert set(names(train)) | set(names(val)) == every
    assert not set(names(train)) & set(names(val))
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    shutil.copytree(pictures, moved)
    assert names(open_validation(str(moved))) == names(val)
    # the weights may count the classes in another order
    assert open_validation(str(pictures), ["cat", "bear", "apple"]).labels.tolist() == [2, 2, 1, 1, 0, 0]


def test_an_image_more_changes_few_sides(pictures: Path) -> None:
    before = set(names(open_validation(str(pictures))))
    first = next(iter((pictures / "bear").iterdir()))
    shutil.copy(first, pictures / "bear" / f"new{first.suffix}")
    assert len(before - set(names(open_validation(str(pictures))))) <= 1


def test_other_names_of_splits_are_no_classes(pictures: Path) -> None:
    (pictures / "apple").rename(pictures / "Training")
    (pictures / "bear").rename(pictures / "valid")
    shutil.rmtree(pictures / "cat")
    with pytest.raises(UserError, match="holds Training, valid, which are no classes; name its folders train and val"):
        open_sources(str(pictures))
