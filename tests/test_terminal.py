"""What a file says can't steer the terminal that shows it."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effnet_quant import UserError
from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import write_weights
from effnet_quant.tasks.classification import CLASSIFICATION
from effnet_quant.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe 8 µm, 猫", "Größe 8 µm, 猫"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nerror: forged", r"a\nerror: forged"),
        ("a\r\tb\x00\x7f\x9b", r"a\r\tb\x00\x7f\x9b"),
        ("safe\u202egnp.exe", r"safe\u202egnp.exe"),
        ("\u2028\ud800", r"\u2028\ud800"),
        ("👩\u200d🔬", "👩\u200d🔬"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_what_is_shown_is_one_line_without_controls(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cs", "Zl", "Zp"}
    shown.encode()


def test_a_user_error_is_one_line_whatever_names_it_quotes():
    assert str(UserError("there is no file a\nerror: forged\x1b[2J.")) == r"there is no file a\nerror: forged\x1b[2J."


CLASSES = ("\x1b[2J\x1b[Hall well", "b\n  100.00 %  forged", "c")


def test_classify_shows_hostile_names_of_classes_on_one_line_each(run_script, tmp_path, image_folder):
    card = ModelCard(arch="cifar-resnet20", num_classes=3, classes=CLASSES, input=InputSpec(32, 32))
    path, image = tmp_path / "w.safetensors", image_folder / "val/cat/00.jpg"
    write_weights(path, get_entry("cifar-resnet20").create(3).state_dict(), card)
    result = run_script("classify.py", "--arch", "cifar-resnet20", "--pretrained-from-file", path, "--image", image)
    assert result.code == 0, result.err
    assert len(result.out.splitlines()) == 1 + len(CLASSES)
    assert "\x1b" not in result.out
    assert r"b\n  100.00 %  forged" in result.out


def test_task_text_is_escaped_for_every_answer():
    answer = {"top": [{"class": name, "index": 0, "probability": 0.5} for name in CLASSES]}
    assert len(CLASSIFICATION.answer_text(answer).splitlines()) == len(CLASSES)
