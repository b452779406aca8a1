"""What users meet at the command line when something is wrong: one sentence, and nothing left."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from tiny import FOLDER, tiny
from typer.testing import CliRunner

import mimo_jax as mj
from mimo_jax import checkpoint, cli

LONG = "a" * 5000


def run(*args: str, **options: Any):
    return CliRunner().invoke(cli.app, args, prog_name="mimo-jax", **options)


def said(result: Any) -> str:
    """All of stderr as one line; there is one error on it, and no traceback."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture
def never(monkeypatch):
    """No model may be loaded."""

    def load(*args: Any, **options: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(mj, "load", load)
    monkeypatch.setattr(checkpoint, "load", load)


# Options


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("generate --prompt x --draft-width 4", "--draft-width 4 is of speculative decoding; give"),
        ("generate --prompt x --speculative mtp --draft-width wide", "expected a number or adapt"),
        ("generate --prompt x --speculative mtp --draft-width ²", "expected a number or adaptive"),
        ("generate --prompt x --layers 2", "--layers 2 is of models with made-up weights; give"),
        ("bench --draft-width 4", "--draft-width 4 is of speculative decoding; give --speculative"),
        ("bench --layers 2", "--layers 2 is of models with made-up weights; give --random-weights"),
        ("batch IN OUT --draft-width 4", "--draft-width 4 is of speculative decoding; give"),
        ("plan --device h100 --mtp-blocks -1", "--mtp-blocks"),
        ("generate --prompt x --dtype float16", "'float16' is not one of 'bfloat16', 'float32'"),
        ("inspect mimo-tiny --device h100", "--device h100 is of --kernels; give that too"),
        ("inspect mimo-tiny --kernels --qkv plain", "--qkv plain is of a checkpoint's weights"),
    ],
)
def test_options_that_contradict_each_other_load_nothing(args, message):
    result = run(*args.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in said(result)


@pytest.mark.parametrize("command", ["inspect", "convert", "export", "merge"])
def test_arguments_are_called_as_in_the_documents(command):
    usage = run(command, "-h").stdout.split("\n\n")[0]
    name = {"merge": "PARTS", "export": "MODEL"}.get(command, "CHECKPOINT")
    assert f"{{{name}}}" in usage or f" {name}" in usage


# Names


@pytest.mark.parametrize("name", ["", LONG, "~nobody-here/x", f"org/{LONG}"])
@pytest.mark.parametrize("command", ["generate", "inspect", "plan", "convert", "portability"])
def test_names_that_nothing_can_have(command, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    args = {
        "generate": ["--prompt", "x", "--model", name],
        "inspect": [name],
        "plan": ["--device", "h100", "--model", name],
        "convert": [name, "out"],
        "portability": ["--targets", "cpu", "--models", name or '""'],
    }[command]
    result = run(command, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said(result).startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args",
    [
        "plan --device h100 --model MiMo-V9",
        "generate --prompt x --random-weights 0 --model MiMo-V9",
        "bench --random-weights 0 --model MiMo-V9",
        "inspect --kernels MiMo-V9",
    ],
)
def test_a_misspelt_configuration_is_wrong_usage(args):
    result = run(*args.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert "MiMo-V9'; did you mean 'MiMo-V2.5'" in said(result)


@pytest.mark.parametrize("args", ["plan --device h100 --model MiMo-V2-Flash --layers 99"])
def test_more_layers_than_there_are_is_wrong_usage(args):
    result = run(*args.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert "99 layers were asked for; the model has 48" in said(result)


def test_a_folder_beside_does_not_hide_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mimo-tiny").mkdir()
    result = run("inspect", "mimo-tiny")
    assert result.exit_code == 0
    assert str(checkpoint.bundled()["mimo-tiny"]) in result.stdout


# Files


def test_a_config_of_the_wrong_types_is_the_files_fault(tmp_path):
    config = json.loads((FOLDER / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": "many"}))
    for args in (["plan", "--device", "h100", "--model"], ["generate", "--prompt", "x", "--model"]):
        result = run(*args, str(tmp_path))
        assert (result.exit_code, result.stdout) == (1, "")
        assert 'vocab_size is "many"; it must be a whole number' in said(result)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_damaged_tokenizer_is_the_files_fault(name, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "copy")
    (folder / name).write_text("[1")
    result = run("generate", "--prompt", "x", "--model", str(folder))
    assert (result.exit_code, result.stdout) == (1, "")
    assert said(result).startswith("error: ")


def test_a_missing_file_is_named_without_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("batch", "none.jsonl", "out.jsonl")
    assert result.exit_code == 2
    assert said(result) == "error: none.jsonl: No such file or directory"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize("command", ["convert", "export"])
@pytest.mark.parametrize("where", ["file", "file/in/it", "full"])
def test_a_target_that_cannot_be_is_refused_before_anything_is_loaded(tmp_path, command, where):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    result = run(command, "mimo-tiny", str(tmp_path / where))
    assert (result.exit_code, result.stdout) == (1, "")
    assert str(tmp_path / where.split("/")[0]) in said(result)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "full"}


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_a_benchmark_that_could_not_be_written_is_not_run(tmp_path, option):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    result = run("bench", option, str(tmp_path / "folder.png"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert said(result) == f"error: {tmp_path / 'folder.png'}: Is a directory"


@pytest.mark.parametrize("wrong", ["--model=FOLDER", "--mesh=tensor=64", "--rules=fast"])
def test_a_batch_that_cannot_begin_leaves_no_files(tmp_path, wrong):
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "config.json").write_text("{}")
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    before = sorted(tmp_path.iterdir())
    wrong = wrong.replace("FOLDER", str(tmp_path / "FOLDER"))
    result = run("batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), wrong)
    assert result.exit_code in (1, 2)
    assert said(result).startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_batch_that_cannot_go_on_leaves_what_there_was(tmp_path, monkeypatch):
    monkeypatch.setattr(mj, "load", lambda *args, **options: tiny())
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"token_ids": [5], "max_tokens": 1}\n')
    assert run("batch", str(source), str(out)).exit_code == 0
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    source.write_text(source.read_text() + '{"token_ids": [6], "max_tokens": 1}\n')
    monkeypatch.undo()
    assert run("batch", str(source), str(out), "--force", "--mesh=tensor=64").exit_code == 2
    assert out.read_bytes() == before[out]


# Prompts


def test_a_prompt_that_is_no_text():
    result = run("generate", "--prompt", "-", input=b"import \xff")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "byte 8 of the prompt on stdin is 0xff, which is not utf-8" in said(result)


@pytest.mark.parametrize("args", ["generate --prompt -", "batch - out.jsonl"])
def test_no_standard_input(args, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    app = cli.app
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as end:
        app(args.split())
    assert end.value.code == 1
    assert not list(tmp_path.iterdir())


def test_chat_without_a_tokenizer():
    options = "--model tiny-transformers-test --layers 1 --random-weights 3 --chat"
    result = run("generate", "--prompt", "x", *options.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert "tiny-transformers-test has no tokenizer, which --chat needs" in said(result)


# The machine


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    def load(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(mj, "load", load)
    return run("generate", "--prompt", "x")


def test_a_device_that_runs_out_of_memory(monkeypatch):
    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2.0GiB.\nmany\nmore lines"
    result = failing(monkeypatch, RuntimeError(text))
    assert result.exit_code == 1
    assert said(result).startswith(
        "error: a device has too little memory for what runs beside weights and caches "
        "(RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2.0GiB.); run fewer or shorter"
    )
    assert "many" not in result.stderr
    result = failing(monkeypatch, MemoryError())
    assert (result.exit_code, said(result)[:27]) == (1, "error: this host has too li")


@pytest.mark.parametrize(
    ("platforms", "found"),
    [("cuda,nosuch", "Backend 'nosuch' is not in the list"), ("cuda", "no plugin for cuda")],
)
def test_devices_that_are_not_there(platforms, found):
    code = """
import contextlib, sys
from mimo_jax.cli import app
for args in ("generate --prompt x", "inspect mimo-tiny --kernels", "convert mimo-tiny new-folder"):
    with contextlib.suppress(SystemExit):
        app(args.split())
"""
    env = os.environ | {"JAX_PLATFORMS": platforms}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 3, done.stderr
    for line in lines:
        assert line.startswith(f"error: jax finds no device of the platforms {platforms} (")
        assert found in line
        assert line.endswith("set JAX_PLATFORMS to those that are here (cpu is), or to nothing")


def test_a_mistake_in_the_program_keeps_its_traceback(monkeypatch):
    assert isinstance(failing(monkeypatch, RuntimeError("a bug")).exception, RuntimeError)
    assert isinstance(failing(monkeypatch, TypeError("a bug")).exception, TypeError)


# Pipes


@pytest.mark.parametrize("script", [[], ["-u"]])
def test_a_reader_that_has_gone_is_no_error(script):
    """As with `| head`, whether or not Python holds the text until the end."""
    command = [sys.executable, *script, "-m", "mimo_jax", "inspect", "mimo-tiny"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, err) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_an_error():
    command = [sys.executable, "-m", "mimo_jax", "inspect", "mimo-tiny"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert os.strerror(errno.ENOSPC) in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr


# Programs


def test_scripts_end_as_the_commands_do(tmp_path):
    scripts = Path(__file__).parents[1] / "scripts"
    (tmp_path / "other.json").write_text("[1]")
    for args, code, message in (
        (("bench.py", "show", tmp_path / "none.json"), 2, "none.json: No such file or directory"),
        (("bench.py", "show", tmp_path / "other.json"), 2, "has no results of this program's"),
        (("bench_model.py", "MiMo-V9", "--out", tmp_path / "x"), 2, "did you mean 'MiMo-V2.5'"),
    ):
        command = [sys.executable, scripts / args[0], *args[1:]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_ctrl_c_in_a_script():
    code = """
import os, signal
from mimo_jax.cli.console import run_program
signal.signal(signal.SIGINT, signal.default_int_handler)
run_program(lambda: os.kill(os.getpid(), signal.SIGINT))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_ctrl_c_while_the_command_is_imported():
    code = """
import sys
from mimo_jax.__main__ import main

class Interrupting:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
