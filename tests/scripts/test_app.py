"""effnet-quant: verbs, and what is said of those that it does not have."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import effnet_quant
from effnet_quant.cli import app

# as the requirements of the command name them
EXPECTED = ["train", "quantize", "export", "deploy", "compile", "classify", "predict", "verify", "sensitivity"]
EXPECTED += ["latency", "data", "models", "serve", "launch", "demo", "completion"]


@pytest.fixture
def effnet_quant_command(monkeypatch, capsys):
    """Runs the console script: (*words) -> (status, standard output, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/effnet-quant", *words])
        status = 0
        try:
            app.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_help_lists_every_verb_with_an_example(effnet_quant_command):
    status, out, err = effnet_quant_command("-h")
    assert (status, err) == (0, "")
    assert out.startswith("usage: effnet-quant VERB [ARGUMENTS]\n")
    assert re.findall(r"^  (\w+)  +\w", out, re.MULTILINE) == EXPECTED
    assert re.findall(r"^ +effnet-quant (\w+) ", out, re.MULTILINE) == EXPECTED
    assert max(map(len, out.splitlines())) <= 120


def test_every_verb_has_its_module_and_every_example_is_accepted(monkeypatch):
    accepted = []

    class Parsed(Exception):
        pass

    def parse(parser, arguments):
        accepted.append(parser.parse_args(arguments))
        raise Parsed

    monkeypatch.setattr("effnet_quant.cli.arguments.Parser.parse", parse)
    for name, verb in app.VERBS.items():
        monkeypatch.setattr(sys, "argv", [f"effnet-quant {name}"])
        module = importlib.import_module(f"effnet_quant.cli.{verb.module}")
        example = [word.strip("'") for word in verb.example.split()]
        if name == "launch":  # it takes a recipe's flags apart from the script's
            example.append("--dry-run")
        with pytest.raises(Parsed):
            module.job(example)
    assert len(accepted) == len(EXPECTED)


def test_version(effnet_quant_command):
    assert effnet_quant_command("--version") == (0, f"effnet-quant {effnet_quant.__version__}\n", "")


def test_an_unknown_verb_is_one_sentence_with_the_nearest(effnet_quant_command):
    assert effnet_quant_command("verfy") == (2, "", "error: there is no verb 'verfy'; did you mean: verify?\n")
    status, out, err = effnet_quant_command("--xyz")
    assert (status, out) == (2, "")
    assert err == "error: there is no verb '--xyz'; effnet-quant -h lists them.\n"


def test_no_verb_at_all_shows_the_list(effnet_quant_command):
    status, out, err = effnet_quant_command()
    assert (status, out) == (2, "")
    assert err.startswith("usage: effnet-quant VERB")


def test_usage_names_what_was_typed(effnet_quant_command, run_script):
    status, _, err = effnet_quant_command("verify")
    assert status == 2
    assert err == "error: the following arguments are required: --engine; effnet-quant verify -h explains them.\n"
    assert effnet_quant_command("verify", "-h")[1].startswith("usage: effnet-quant verify [-h]")
    assert effnet_quant_command("launch", "-h")[1].startswith("usage: effnet-quant launch [-h]")
    assert run_script("model2trt.py", "-h").out.startswith("usage: model2trt.py [-h]")
    assert run_script("multiproc.py", "-h").out.startswith("usage: multiproc.py [-h]")


def test_mistakes_of_a_verb_are_one_sentence(effnet_quant_command):
    status, out, err = effnet_quant_command("verify", "--engine", "x.onnx")
    assert (status, out) == (2, "")
    assert err == "error: on which images? Give DATA, or --lint tensorrt to check the graph alone.\n"


def test_the_recipes_script_is_named_as_the_user_can_start_it(effnet_quant_command):
    chosen = ["--precision", "FP32", "--platform", "DGX1V", "/data", "--dry-run"]
    status, out, _ = effnet_quant_command("launch", "--model", "efficientnet-b0", "--mode", "evaluate", *chosen)
    assert status == 0
    assert out.startswith("# effnet-quant train ")
    _, out, _ = effnet_quant_command("launch", "--model", "efficientnet-quant-b0", "--mode", "qat", *chosen)
    assert out.startswith("# effnet-quant quantize ")


def test_the_console_script_and_the_package_are_the_same_command(repository, capsys, monkeypatch):
    setup = (repository / "setup.py").read_text(encoding="utf-8")
    assert '"effnet-quant = effnet_quant.cli.app:main"' in setup
    monkeypatch.setattr(sys, "argv", [str(Path(effnet_quant.__file__).parent / "__main__.py"), "--version"])
    runpy.run_module("effnet_quant", run_name="__main__")
    assert capsys.readouterr().out == f"effnet-quant {effnet_quant.__version__}\n"


def test_the_package_runs_as_a_module(repository):
    command = [sys.executable, "-m", "effnet_quant", "data", "digits", "-j0"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("train: 1437 images, 10 classes")
    assert "size of 360 of them: 8 to 8 x 8 to 8" in result.stdout


def test_the_command_lines_of_the_documents_name_verbs(repository):
    named = set()
    for page in (repository / "README.md", repository / "CHANGELOG.md", *(repository / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        named |= {*re.findall(r"`effnet-quant (\w+)", text)}
        for block in re.findall(r"```.*?```", text, re.DOTALL):
            named |= {*re.findall(r"^effnet-quant (\w+)", block, re.MULTILINE)}
    assert {"verify", "latency", "data", "models", "serve"} <= named <= set(app.VERBS)


def test_a_reader_that_leaves_is_no_error(repository):
    command = f"{sys.executable} -m effnet_quant -h | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 141)  # the reader may leave before or after the text is written
    assert result.stderr == ""
