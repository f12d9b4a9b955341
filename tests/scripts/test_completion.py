"""effnet-quant completion: what bash and zsh make of its scripts."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import pytest

from effnet_quant import UserError
from effnet_quant.cli import completion
from effnet_quant.cli.app import VERBS

needs_shtab = pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="shtab is not installed")


def script_for(shell, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["effnet-quant completion"])
    assert completion.job([shell]) == 0
    return capsys.readouterr().out


@pytest.fixture
def completed(monkeypatch, capsys, tmp_path):
    """What bash offers for the last of a command line's words, in a folder with a file: (*words) -> set."""
    (tmp_path / "int8.onnx").touch()
    script = script_for("bash", monkeypatch, capsys)

    def complete(*words):
        line = ["effnet-quant", *words]
        ask = f"COMP_WORDS=({' '.join(map(repr, line))}); COMP_CWORD={len(words)}; COMP_LINE={' '.join(line)!r}\n"
        ask += f"COMP_POINT=${{#COMP_LINE}}; _shtab_effnet_quant effnet-quant {words[-1]!r} ''\n"
        result = subprocess.run(
            ["bash", "--norc"],
            check=True,
            input=f"{script}\n{ask}printf '%s\\n' \"${{COMPREPLY[@]}}\"\n",
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=20,
        )
        return set(result.stdout.split())

    return complete


@needs_shtab
def test_bash_completes_verbs_flags_values_and_files(completed):
    assert completed("") >= set(VERBS)
    assert completed("qua") == {"quantize"}
    assert completed("train", "--epo") == {"--epochs"}
    assert completed("train", "--optimizer", "") == {"sgd", "rmsprop", "adamw"}
    assert completed("verify", "DATA", "--engine", "in") == {"int8.onnx"}
    assert completed("serve", "in") == {"int8.onnx"}


@needs_shtab
def test_zsh_reads_its_script(monkeypatch, capsys):
    script = script_for("zsh", monkeypatch, capsys)
    assert script.startswith("#compdef effnet-quant\n")
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    subprocess.run(["zsh", "-n"], check=True, input=script, text=True, timeout=20)


def test_without_shtab_the_sentence_names_the_extra(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["effnet-quant completion"])
    monkeypatch.setitem(sys.modules, "shtab", None)  # as if it were not installed
    with pytest.raises(
        UserError, match=r"^completion needs the package shtab; pip install 'effnet-quant\[completion\]'\.$"
    ):
        completion.job(["bash"])
